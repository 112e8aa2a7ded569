"""Sends spans of the calls to an OpenTelemetry collector. Without tracing, none of OpenTelemetry's code is imported.

OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT and others) configure it. It never keeps the server from
serving: a wrong configuration is logged in one line. A span is written after its call has ended, from the call's
recorded times, so that a call that is not sampled costs nothing.
"""

import asyncio
import importlib.metadata
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import grpc

from ganserve_server.observe.metrics import OTHER
from ganserve_server.transport.interface import Call, Work

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_FLUSH_S = 5.0  # how long an unreachable collector may delay the server's shutdown
# The statuses that are server errors by OpenTelemetry's conventions for gRPC.
_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


def start_tracing(*, warn: bool = True) -> "Tracing | None":
    """Start tracing if the environment asks for it. If that fails, return None, and log a warning if `warn` is set."""
    variables = {name: value.strip() for name, value in os.environ.items() if name.startswith("OTEL_")}
    exporter = variables.get("OTEL_TRACES_EXPORTER") or (
        "otlp" if any(variables.get(name) for name in _ENDPOINTS) else "none"
    )
    if exporter == "none" or variables.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = next((variables[name] for name in _PROTOCOLS if variables.get(name)), "grpc")
    try:
        if exporter != "otlp":
            raise ValueError(f"OTEL_TRACES_EXPORTER is {exporter}; it must be otlp or none")
        if protocol != "grpc":
            raise ValueError(f"the OTLP protocol (OTEL_EXPORTER_OTLP_PROTOCOL) is {protocol}; it must be grpc")
        return Tracing()
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed; install ganserve with its extra: 'ganserve[tracing]'"
    except Exception as error:  # the variables may hold anything
        reason = str(error)
    if warn:
        _log.warning("calls are not traced", extra={"reason": reason})
    return None


class Tracing:
    """Writes a span for each call, with child spans for queueing, computing and encoding."""

    def __init__(self) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        for reader in ("baggage", "trace"):  # the headers of a call could cause any number of warnings
            logging.getLogger(f"opentelemetry.{reader}").setLevel(logging.ERROR)
        self._api = trace
        self._propagator = propagate.get_global_textmap()
        version = importlib.metadata.version("ganserve")
        resource = Resource.create(
            {
                "service.name": "ganserve-server",
                "service.version": version,
                "process.pid": os.getpid(),
                **OTELResourceDetector().detect().attributes,  # the variables take precedence
            }
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ganserve", version)

    def record(self, call: Call, code: grpc.StatusCode, text: str) -> str | None:
        """Write the spans of a call that has ended; return the id of its trace, or None if it is not sampled."""
        # Read both clocks together: otherwise child spans may not lie within their parent.
        since_start_s, now, now_ns = time.perf_counter() - call.started, time.monotonic(), time.time_ns()
        service, _, method = call.path.removeprefix("/").rpartition("/")
        if call.method is None:
            service = method = OTHER  # callers could invent any number of names
        span = self._tracer.start_span(
            OTHER if call.method is None else f"{service}/{method}",
            self._context(call),
            self._api.SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
            start_time=now_ns - round(since_start_s * 1e9),
        )
        if not span.is_recording():
            return None
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        span.set_attribute("ganserve.request_id", call.request_id)
        if call.model:
            span.set_attribute("ganserve.model", call.model)
        if call.version is not None:
            span.set_attribute("ganserve.version", call.version)
        if code in _ERRORS:
            span.set_status(self._api.StatusCode.ERROR, text)
        if call.work is not None and call.work.count:
            accepted_ns = now_ns - round((now - call.work.accepted) * 1e9)
            self._record_work(call, call.work, span, accepted_ns, now_ns)
        span.end(now_ns)
        return self._api.format_trace_id(span.get_span_context().trace_id)

    async def close(self) -> None:
        """Send the remaining spans, if the collector accepts them."""
        # Not in the event loop's thread pool, whose shutdown would wait for a collector that does not answer.
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, _FLUSH_S)

    def _context(self, call: Call) -> "Context":
        """Read the caller's span from the headers (W3C's, unless OTEL_PROPAGATORS names others)."""
        fields = self._propagator.fields
        carrier = {
            name: value.decode("latin-1") for name in fields if (value := call.metadata.get(name.encode())) is not None
        }
        return self._propagator.extract(carrier)

    def _record_work(self, call: Call, work: Work, span: "Span", accepted_ns: int, end_ns: int) -> None:
        context = self._api.set_span_in_context(span)

        def child(name: str, start_ns: int, stop_ns: int) -> None:
            self._tracer.start_span(name, context, start_time=start_ns).end(stop_ns)

        span.set_attribute("ganserve.count", work.count)
        if not work.taken:
            child("queue", accepted_ns, end_ns)
            return
        span.set_attribute("ganserve.queue_s", work.queue_s)
        span.set_attribute("ganserve.compute_s", work.compute_s)
        taken_ns = accepted_ns + round(work.queue_s * 1e9)
        child("queue", accepted_ns, taken_ns)
        if not call.partly_sent:  # the spans of many answers would overlap
            encoding_ns = end_ns - round(call.encode_s * 1e9)
            child("compute", taken_ns, encoding_ns)
            if call.encode_s:
                child("encode", encoding_ns, end_ns)

"""Spans as a collector gets them, and what the server does where there is none."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from tests.conftest import START_TIMEOUT_S, RunningServer
from tests.programs import ended

from ganserve import Client, GanserveError
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

Start = Callable[..., RunningServer]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVICE = "ganserve.v1.GenerationService"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes OTLP, and keeps what it gets."""

    def __init__(self) -> None:
        self.address = ""
        self.resources: list[dict[str, Any]] = []
        self.spans: list[trace_pb2.Span] = []

    def Export(self, request: Any, context: object) -> Any:  # noqa: N802
        for of_resource in request.resource_spans:
            self.resources.append(attributes(of_resource.resource))
            for of_scope in of_resource.scope_spans:
                self.spans += of_scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[trace_pb2.Span]:
        return [span for span in self.spans if span.name == name]


def attributes(told: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in told.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Run a collector, and tell servers of it as an operator would."""
    collecting = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collecting, server)
    collecting.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collecting.address}")
    yield collecting
    server.stop(None).wait()


def generate(address: str, flags: str, **request: Any) -> None:
    headers = [("traceparent", f"00-{TRACE}-{PARENT}-{flags}"), ("x-request-id", "of-the-caller")]
    with grpc.insecure_channel(address) as channel:
        pb_grpc.GenerationServiceStub(channel).GenerateImages(pb.GenerateImagesRequest(**request), metadata=headers)


def test_a_call_is_a_span_in_its_callers_trace(start_server: Start, collector: Collector) -> None:
    running = start_server("--access-log", "all")
    generate(running.address, "01", model="cdcgan-mnist", count=300, seed=1, encoding=pb.ENCODING_PNG)
    assert running.wait_for("call")["trace_id"] == TRACE
    assert running.stop() == 0  # and sends what it has
    [span] = collector.named(f"{SERVICE}/GenerateImages")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == trace_pb2.Span.SPAN_KIND_SERVER
    told = attributes(span)
    took_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert 0 < told.pop("ganserve.queue_s") < took_s < 30
    assert told.pop("ganserve.compute_s") > 0
    assert told == {
        "rpc.system": "grpc",
        "rpc.service": SERVICE,
        "rpc.method": "GenerateImages",
        "rpc.grpc.status_code": 0,
        "ganserve.request_id": "of-the-caller",
        "ganserve.model": "cdcgan-mnist",
        "ganserve.version": 1,
        "ganserve.count": 300,
    }
    assert span.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert collector.resources[0]["service.name"] == "ganserve-server"
    parts = [one for name in ("queue", "compute", "encode") for one in collector.named(name)]
    assert [one.name for one in parts] == ["queue", "compute", "encode"]
    assert {(one.trace_id, one.parent_span_id) for one in parts} == {(span.trace_id, span.span_id)}
    times = [span.start_time_unix_nano]
    for part in parts:  # one after the other, within the call
        times += [part.start_time_unix_nano, part.end_time_unix_nano]
    times.append(span.end_time_unix_nano)
    assert times == sorted(times)
    assert all(part.start_time_unix_nano < part.end_time_unix_nano for part in parts)


def test_failed_calls_streams_and_calls_of_no_trace_are_spans_too(start_server: Start, collector: Collector) -> None:
    running = start_server()
    with Client(running.address) as client:
        assert sum(len(batch) for batch in client.stream_batches("mlp-mnist", count=200)) == 200
        with pytest.raises(GanserveError):
            client.generate("nothing")
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/made.up/Method")(b"")
    assert running.stop() == 0
    [stream] = collector.named(f"{SERVICE}/StreamImages")
    assert attributes(stream)["ganserve.count"] == 200
    assert attributes(stream)["ganserve.compute_s"] > 0
    [failed] = collector.named(f"{SERVICE}/GenerateImages")
    assert attributes(failed)["ganserve.model"] == "other"
    assert attributes(failed)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert failed.status.code == trace_pb2.Status.STATUS_CODE_UNSET  # the caller's mistake
    [unknown] = collector.named("other")
    assert unknown.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert {span.parent_span_id for span in (stream, failed, unknown)} == {b""}
    assert attributes(unknown)["rpc.service"] == attributes(unknown)["rpc.method"] == "other"


def test_a_caller_that_samples_nothing_gets_no_span(start_server: Start, collector: Collector) -> None:
    running = start_server()
    generate(running.address, "00", model="mlp-mnist", seed=1)
    generate(running.address, "01", model="mlp-mnist", seed=2)
    assert running.stop() == 0
    assert len(collector.named(f"{SERVICE}/GenerateImages")) == 1


def test_workers_trace_too(start_server: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "faces")
    running = start_server("--workers", "2")
    generate(running.address, "01", model="mlp-mnist", seed=1)
    assert running.stop() == 0
    assert len(collector.named(f"{SERVICE}/GenerateImages")) == 1
    assert collector.resources[0]["service.name"] == "faces"


def test_a_collector_that_does_not_answer_holds_up_neither_calls_nor_the_end(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
        running = start_server()
        with Client(running.address) as client:
            client.generate("mlp-mnist", seed=1, timeout_s=10)
        running.process.terminate()
        assert running.process.wait(timeout=20) == 0


WITHOUT = """
import sys
sys.modules[{missing!r}] = None
sys.argv[1:] = ["--address", "127.0.0.1:0", "--metrics-address", "off", "--log-format", "json", "--workers", "1"]
import logging
class Tell(logging.Handler):
    def emit(self, record):
        if record.msg == "serving":
            print(*sorted(name for name in sys.modules if name.partition(".")[0] == "opentelemetry"), flush=True)
from ganserve_server.cli import main as cli
configure = cli._configure_logs
def configure_and_tell(settings):
    log = configure(settings)
    logging.getLogger().addHandler(Tell())
    return log
cli._configure_logs = configure_and_tell
cli.main()
"""


def served(environment: dict[str, str], missing: str = "nothing") -> tuple[list[str], list[str]]:
    """Start a server and end it; return the modules of OpenTelemetry that it had, and its log."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", WITHOUT.format(missing=missing)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ended(subprocess.Popen(command, env=inherited | environment, **pipes)) as process:  # type: ignore[call-overload]
        loaded = process.stdout.readline().split()
        process.terminate()
        _, errors = process.communicate(timeout=START_TIMEOUT_S)
        assert process.returncode == 0, errors
    return loaded, [line for line in errors.splitlines() if "calls are not traced" in line]


COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        COLLECTOR | {"OTEL_SDK_DISABLED": "true"},
        pytest.param(COLLECTOR | {"OTEL_TRACES_EXPORTER": "none"}, marks=pytest.mark.slow),
    ],
)
def test_where_nobody_asks_for_traces_nothing_of_opentelemetry_is_loaded(environment: dict[str, str]) -> None:
    assert served(environment) == ([], [])


def test_the_check_sees_what_is_loaded() -> None:
    loaded, warnings = served(COLLECTOR)
    assert "opentelemetry.sdk.trace" in loaded
    assert warnings == []


def test_without_the_extra_the_server_says_what_to_install_and_serves() -> None:
    loaded, [warning] = served(COLLECTOR, missing="opentelemetry.sdk")
    assert "opentelemetry.sdk.trace" not in loaded
    assert "ganserve[tracing]" in warning


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        (COLLECTOR | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://[", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "Invalid IPv6"),
    ],
)
def test_what_cannot_be_done_is_told_and_the_server_serves(environment: dict[str, str], text: str) -> None:
    _, [warning] = served(environment)
    assert text in warning


@pytest.mark.parametrize(
    "headers",
    [
        (("baggage", "a,b;=," * 50),),
        (("baggage", "a" * 9000),),
        (("traceparent", f"00-{TRACE}-{PARENT}-00"), ("tracestate", "a,=b,!=!")),
    ],
)
def test_headers_that_break_their_rules_write_nothing_in_the_log(
    headers: tuple[tuple[str, str], ...], start_server: Start, collector: Collector
) -> None:
    running = start_server("--access-log", "off")
    with grpc.insecure_channel(running.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        stub.GenerateImages(pb.GenerateImagesRequest(model="mlp-mnist"), metadata=headers)
    assert running.stop() == 0
    assert running.events.get()["event"] == "draining"

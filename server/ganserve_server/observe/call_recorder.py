"""Records each call: in metrics, in the log, and in a trace."""

import asyncio
import collections
import functools
import logging
import time
from typing import Any

import grpc
from prometheus_client import Counter, Histogram

from ganserve_server.errors import ServingError
from ganserve_server.observe.metrics import OTHER, Metrics
from ganserve_server.observe.tls_failures import CLOSED, tls_failure
from ganserve_server.observe.tracing import Tracing
from ganserve_server.settings import AccessLog
from ganserve_server.transport.interface import Call

_log = logging.getLogger(__name__)

# Lines of one kind per second. Under overload thousands of calls are refused per second, and logging all of them took
# more time than refusing them.
_MOST_LINES = 100
_MOST_STACKS = 5


class CallRecorder:
    """Counts, times, logs and traces the calls of all services except health and reflection."""

    def __init__(self, metrics: Metrics, access_log: AccessLog, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self._tracing = tracing
        self._failed = _Lines("calls not logged", "code")
        self._tls_failed = _Lines("TLS failures not logged", "reason")
        self._ended = _Lines("connection ends not logged", "reason")
        self._internal = _Lines("internal errors not logged", "method", most=_MOST_STACKS)
        # Finding a metric by its labels costs more than counting, so it is cached; the labels are bounded.
        self._of = functools.cache(self._find)

    def refused(self, call: Call, error: ServingError) -> None:
        """Count an error that the caller got."""
        self._metrics.rejections.labels(error.reason).inc()

    def internal_error(self, call: Call, error: BaseException) -> None:
        """Log an unexpected exception, which the caller does not get."""
        if self._internal.have_room(_method(None if call.method is None else call.path)):
            log_internal_error(call, error)

    def finished(self, call: Call, code: grpc.StatusCode, text: str) -> None:
        """Count the call, trace it, and log it if the settings say so."""
        if call.method is not None and not call.method.awaited:
            return
        took = time.perf_counter() - call.started
        path = None if call.method is None else call.path
        requests, seconds = self._of(path, call.model, call.version, code.name)
        requests.inc()
        seconds.observe(took)
        if call.caller is not None and call.work is not None and code is grpc.StatusCode.OK:
            self._metrics.caller_images.labels(call.caller.name).inc(call.work.count)
        if code is grpc.StatusCode.CANCELLED:
            self._metrics.cancellations.labels(call.model or OTHER, _stage(call)).inc()
        trace_id = None if self._tracing is None else self._tracing.record(call, code, text)
        if self._access_log == "off":
            return
        # A caller that leaves is not an error.
        failed = code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)
        if self._access_log == "all" or (failed and self._failed.have_room(code.name)):
            self._log(call, code, text, took, trace_id)

    def tls_failed(self, error: OSError, peer: str) -> None:
        """Count a connection that ended in the TLS handshake, and log it."""
        reason = tls_failure(error)
        self._metrics.tls_failures.labels(reason).inc()
        if reason == CLOSED or self._access_log == "off":
            return
        if self._access_log == "all" or self._tls_failed.have_room(reason):
            log_tls_failure(error, peer)

    def connection_ended(self, reason: str, peer: str, text: str) -> None:
        """Count a connection that the server has ended, and log it if its peer did what no ordinary client does."""
        self._metrics.connections_ended.labels(reason).inc()
        if reason in ("idle", "crowded") or self._access_log == "off":
            return
        if self._access_log == "all" or self._ended.have_room(reason):
            _log.info("connection ended", extra={"reason": reason, "peer": peer, "error": text})

    def close(self) -> None:
        """Log the counts of suppressed lines."""
        self._failed.report()
        self._ended.report()
        self._tls_failed.report()
        self._internal.report()

    def _find(self, path: str | None, model: str, version: int | None, code: str) -> tuple[Counter, Histogram]:
        method, model = _method(path), model or OTHER
        return (
            self._metrics.requests.labels(method, model, "" if version is None else version, code),
            self._metrics.request_seconds.labels(method, model),
        )

    def _log(self, call: Call, code: grpc.StatusCode, text: str, took: float, trace_id: str | None) -> None:
        method = _method(None if call.method is None else call.path)
        fields: dict[str, Any] = {"method": method, "model": call.model or OTHER, "code": code.name}
        if call.version is not None:
            fields["version"] = call.version
        fields["seconds"] = round(took, 6)
        if (work := call.work) is not None:
            fields |= {
                "images": work.count,
                "queue_s": round(work.queue_s, 6),
                "compute_s": round(work.compute_s, 6),
            }
        if call.throttled_s:
            to_come = max(0.0, call.throttled_until - time.monotonic())  # if the call ended during the wait
            fields["throttled_s"] = round(call.throttled_s - to_come, 6)
        if call.caller is not None:
            fields["caller"] = call.caller.name
        fields["peer"] = call.peer
        fields["request_id"] = call.request_id
        if trace_id is not None:
            fields["trace_id"] = trace_id
        if text:
            fields["reason"] = text
        _log.info("call", extra=fields)


class _Lines:
    """Limits the lines of each kind per second, and logs how many were suppressed."""

    def __init__(self, event: str, label: str, most: int = _MOST_LINES) -> None:
        self._event, self._label, self._most = event, label, most
        self._asked: collections.Counter[str] = collections.Counter()

    def have_room(self, kind: str) -> bool:
        """Count a line; return whether to log it."""
        if not self._asked:
            asyncio.get_running_loop().call_later(1.0, self.report)
        self._asked[kind] += 1
        return self._asked[kind] <= self._most

    def report(self) -> None:
        """Log how many lines were suppressed, and start counting again."""
        for kind, asked in self._asked.items():
            if asked > self._most:
                _log.warning(self._event, extra={self._label: kind, "count": asked - self._most})
        self._asked.clear()


def log_internal_error(call: Call, error: BaseException) -> None:
    """Log an unexpected exception with its stack."""
    _log.error("internal error", exc_info=error, extra={"request_id": call.request_id, "method": call.path})


def log_tls_failure(error: OSError, peer: str) -> None:
    """Log a connection that failed in the TLS handshake, unless the peer only closed it, as port scanners do."""
    if (reason := tls_failure(error)) != CLOSED:
        _log.info("TLS failed", extra={"reason": reason, "peer": peer, "error": str(error)})


def _method(path: str | None) -> str:
    return OTHER if path is None else path.rpartition("/")[2]


def _stage(call: Call) -> str:
    """Name the stage that a cancelled call was in."""
    if call.partly_sent:
        return "sending"
    if call.work is None or not call.work.count:
        return "receiving"
    return "computing" if call.work.taken else "queued"

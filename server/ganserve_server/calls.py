"""What is told of each call: metrics, and a line in the log."""

import functools
import logging
import time

import grpc

from ganserve_server.errors import ServingError
from ganserve_server.grpc_server import Call
from ganserve_server.metrics import OTHER, Metrics
from ganserve_server.settings import AccessLog

_log = logging.getLogger(__name__)


class CallRecorder:
    """Counts, times and logs the calls of our services; those of health and reflection pass in silence."""

    def __init__(self, metrics: Metrics, access_log: AccessLog) -> None:
        self._metrics = metrics
        self._access_log = access_log
        # Looking up a metric by its labels costs more than counting; the labels are bounded.
        self._requests = functools.cache(metrics.requests.labels)
        self._seconds = functools.cache(metrics.request_seconds.labels)

    def refused(self, call: Call, error: ServingError) -> None:
        """Count an error that the caller was told."""
        self._metrics.rejections.labels(error.reason).inc()

    def finished(self, call: Call, code: grpc.StatusCode, text: str) -> None:
        """Count the call, and log it if it is of those that are logged."""
        if call.method is not None and not call.method.awaited:
            return
        took = time.perf_counter() - call.started
        method = OTHER if call.method is None else call.head.path.rpartition("/")[2]
        model = call.model or OTHER
        self._requests(method, model, code.name).inc()
        self._seconds(method, model).observe(took)
        if self._access_log == "off":
            return
        # A caller that leaves is no error.
        failed = code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)
        if failed or self._access_log == "all":
            told = {"method": method, "model": model, "code": code.name, "seconds": round(took, 6)}
            _log.info("call", extra=told | {"request_id": call.request_id} | ({"reason": text} if text else {}))

"""Answers plain HTTP: metrics, liveness and readiness."""

import contextlib
import http.server
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler, choose_encoder

from ganserve_server.machine import free_descriptors
from ganserve_server.transport.addresses import name, places, refused

_log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0  # for a peer that sends no request, or reads no answer
_MAX_TIMEOUT_S = 30.0  # for a peer that sends or reads byte by byte
_MAX_CONNECTIONS = 64  # each has a thread
_PAUSE_S = 0.1  # after a connection could not be accepted


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._accepted: dict[socket.socket, float] = {}  # oldest first, with the time of acceptance by time.monotonic
        self._fitting = max(1, free_descriptors() // 8)
        super().__init__(*args)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; wait after a failure, such as without free file descriptors, which repeats at once."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; if there are too many, cut off the oldest connection, which is the slowest."""
        if len(accepted := list(self._accepted)) >= min(_MAX_CONNECTIONS, self._fitting):
            _cut_off(accepted[0])
            self._accepted.pop(accepted[0], None)
        self._accepted[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self._accepted.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off connections that take too long; called twice a second and for each new connection."""
        for request, since in list(self._accepted.items()):
            if time.monotonic() - since > _MAX_TIMEOUT_S:
                _cut_off(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Log failures like the rest of the server; a peer that disconnects is not an error."""
        if not isinstance(sys.exception(), OSError):
            _log.exception("a scrape failed")


def _cut_off(connected: socket.socket) -> None:
    """Wake the thread that reads or writes, which then closes the connection."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


class HttpEndpoint:
    """Answers /metrics, /livez and /readyz in threads, so that it answers even if the event loop stands still.

    Args:
        address: HOST:PORT, or "off".
        registry: the registry of the metrics.

    Raises:
        StartError: the address is taken or not valid.
    """

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        self.why_not_ready: Callable[[], str] = lambda: "starting"  # an empty text: the server is ready
        self.why_stuck: Callable[[], str] = lambda: ""  # an empty text: the server lives
        self.address: str | None = None
        self._server: _Server | None = None
        if address == "off":
            return
        endpoint = self

        class Handler(MetricsHandler):
            timeout = _TIMEOUT_S

            def do_GET(self) -> None:  # noqa: N802
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    try:
                        choose_encoder(self.headers.get("Accept", ""))
                    except (TypeError, ValueError):  # the requested version is not a number
                        del self.headers["Accept"]
                    super().do_GET()
                elif path in ("/livez", "/readyz"):
                    reason = endpoint.why_stuck() or ("" if path == "/livez" else endpoint.why_not_ready())
                    self._answer(503 if reason else 200, reason or "ok")
                else:
                    self._answer(404, "not found; the paths are /metrics, /livez and /readyz")

            def _answer(self, status: int, text: str) -> None:
                content = f"{text}\n".encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        Handler.registry = registry
        try:
            family, place = places(address, "--metrics-address")[0]
            kind = type("_OfFamily", (_Server,), {"address_family": family})
            self._server = kind(place[:2], Handler)
        except OSError as error:
            raise refused(address, "--metrics-address, 'off' for none", error) from error
        self.address = name(self._server.socket, address)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

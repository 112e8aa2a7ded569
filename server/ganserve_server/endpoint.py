"""What the server tells over plain HTTP: its metrics, whether it lives, and whether it is ready."""

import http.server
import logging
import sys
import threading
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler

from ganserve_server.addresses import name, places, refused

_log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0  # of a peer that sends no request, or reads no answer


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what fails, as the rest of the server does; a peer that leaves is no error."""
        if not isinstance(sys.exception(), OSError):
            _log.exception("a scrape failed")


class Endpoint:
    """Answers /metrics, /livez and /readyz, in threads: while models load, too.

    Args:
        address: HOST:PORT, or "off".
        registry: of the metrics.

    Raises:
        StartError: the address is taken, or none.
    """

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        self.why_not_ready: Callable[[], str] = lambda: "starting"  # an empty text: it is
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
                    super().do_GET()
                elif path == "/livez":
                    self._tell(200, "ok")
                elif path == "/readyz":
                    reason = endpoint.why_not_ready()
                    self._tell(503 if reason else 200, reason or "ok")
                else:
                    self._tell(404, "there are /metrics, /livez and /readyz")

            def _tell(self, status: int, text: str) -> None:
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
        """Answer nothing more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

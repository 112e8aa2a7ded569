"""The server as one process."""

import asyncio
import contextlib
from socket import socket
from typing import Any

from ganserve_server.auth.security import Security
from ganserve_server.observe.http_endpoint import HttpEndpoint
from ganserve_server.observe.metrics import Load, Metrics
from ganserve_server.processes.admin_listener import AdminListener
from ganserve_server.processes.reports import ReportServing, report_draining
from ganserve_server.processes.serving import Host, serve_models
from ganserve_server.repository.lifecycle import Lifecycle
from ganserve_server.settings import ServerSettings
from ganserve_server.transport.interface import Server


async def serve_alone(
    settings: ServerSettings,
    stop: asyncio.Event,
    reload: asyncio.Event,
    sockets: list[socket],
    metrics: Metrics,
    security: Security,
    report_serving: ReportServing,
) -> None:
    """Serve as the only process until `stop` is set, then drain.

    Raises:
        StartError: no model can be served, or an address is taken.
    """
    with contextlib.closing(HttpEndpoint(settings.metrics_address, metrics.registry)) as endpoint:
        admin = AdminListener(settings, security)
        host = _OnlyProcessHost(settings, sockets, metrics, security, endpoint, admin, report_serving)
        await serve_models(host, settings, stop, reload)
        await admin.stop()


class _OnlyProcessHost(Host):
    def __init__(
        self,
        settings: ServerSettings,
        sockets: list[socket],
        metrics: Metrics,
        security: Security,
        endpoint: HttpEndpoint,
        admin: AdminListener,
        report_serving: ReportServing,
    ) -> None:
        self._settings, self._endpoint, self._admin = settings, endpoint, admin
        self.sockets, self.metrics, self.security = sockets, metrics, security
        self.board, self.unloaded, self.may_be_empty, self.logs = None, (), False, True
        self._report_serving = report_serving

    def server_made(self, server: Server) -> None:
        """Add the server's connections and calls to the metrics."""
        self.metrics.registry.register(Load(lambda: server.load, server.kept_bytes))

    def serving(self, facts: dict[str, Any], lifecycle: Lifecycle) -> None:
        """Listen for operators, and report that the server is ready."""
        self._report_serving(facts, self._endpoint, lifecycle, self._admin.start(lifecycle))

    def draining(self) -> None:
        """Report the drain to systemd and the log."""
        report_draining(self._settings)

    async def wait_for_drain(self) -> None:
        """Keep serving for the configured delay."""
        await asyncio.sleep(self._settings.drain_delay_s)

    async def drained(self) -> None:
        """Do nothing: `serve_alone` stops answering operators at the end."""

"""The server as one process."""

import asyncio
import contextlib
from socket import socket
from typing import Any

from ganserve_server.auth.security import Security
from ganserve_server.observe.http_endpoint import HttpEndpoint
from ganserve_server.observe.metrics import Load, Metrics, Standstills
from ganserve_server.processes.heartbeat import Heart
from ganserve_server.processes.log_writer import LogWriter
from ganserve_server.processes.management import Management
from ganserve_server.processes.reports import NO_MODEL, ReportServing, report_draining
from ganserve_server.processes.serving import LOST_THREAD_STATUS, Host, serve_models
from ganserve_server.repository.served import ServedVersions
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates
from ganserve_server.transport.interface import Server


async def serve_alone(
    settings: ServerSettings,
    stop: asyncio.Event,
    management: Management,
    sockets: list[socket],
    heart: Heart,
    log: LogWriter,
    report_serving: ReportServing,
) -> None:
    """Serve as the only process until `stop` is set, then drain.

    Raises:
        StartError: no model can be served, or an address is taken.
    """
    metrics = Metrics()
    log.count_dropped(metrics.log_lines_dropped.inc)
    security = Security(settings, metrics, SharedRates())
    security.warn_if_open(sockets, "--address")
    with contextlib.closing(HttpEndpoint(settings.metrics_address, metrics.registry)) as endpoint:
        endpoint.why_stuck = heart.why_stuck
        metrics.registry.register(Standstills(lambda: heart.standstill.longest_s))
        management.bind(security)
        host = _OnlyProcessHost(settings, stop, sockets, metrics, security, endpoint, management, report_serving)
        await serve_models(host, settings, stop)
    if host.status:
        raise SystemExit(host.status)


class _OnlyProcessHost(Host):
    def __init__(
        self,
        settings: ServerSettings,
        stop: asyncio.Event,
        sockets: list[socket],
        metrics: Metrics,
        security: Security,
        endpoint: HttpEndpoint,
        management: Management,
        report_serving: ReportServing,
    ) -> None:
        self._settings, self._stop, self._endpoint = settings, stop, endpoint
        self.status = 0  # with which the process ends
        self.sockets, self.metrics, self.security = sockets, metrics, security
        self.board, self.state, self.logs = None, management.state, True
        self._management, self._report_serving = management, report_serving
        self._versions: ServedVersions
        self._withdrawing: set[asyncio.Task[None]] = set()

    async def load(self, versions: ServedVersions) -> None:
        """Load the models as the lifecycle decides."""
        self._versions = versions
        self._management.lifecycle.serve_by(versions)
        await self._management.starting

    def withdrawn(self, name: str, version: int, digest: str, reason: str) -> None:
        """Have the lifecycle withdraw the version."""
        task = asyncio.create_task(self._management.lifecycle.withdraw(name, version, digest, reason))
        self._withdrawing.add(task)
        task.add_done_callback(self._withdrawing.discard)

    def server_made(self, server: Server) -> None:
        """Add the server's connections and calls to the metrics."""
        self.metrics.registry.register(Load(lambda: server.load, server.kept_bytes))

    def serving(self, facts: dict[str, Any]) -> None:
        """Report that the server is ready."""
        admin_address = self._management.begin(self.security)
        self._report_serving(facts, self._endpoint, self._why_not_serving, self.security, admin_address)

    def _why_not_serving(self) -> str:
        return "" if self._versions.serves else NO_MODEL

    def thread_lost(self, on_cpu: bool) -> None:
        """Serve on, or drain and end if the thread is the one that uses the GPU."""
        if not on_cpu:
            self.status = LOST_THREAD_STATUS
            self._stop.set()

    def draining(self) -> None:
        """Report the drain to systemd and the log."""
        report_draining(self._settings)

    async def wait_for_drain(self) -> None:
        """Keep serving for the configured delay."""
        await asyncio.sleep(self._settings.drain_delay_s)

    async def drained(self) -> None:
        """Load no models any more."""
        await self._management.close()

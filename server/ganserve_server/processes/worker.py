"""One of several worker processes: handles its supervisor's requests, and drains when the supervisor is gone."""

import asyncio
import contextlib
import functools
import logging
from typing import Any

from ganserve_server.auth.security import Security
from ganserve_server.observe import shared_metrics
from ganserve_server.observe.metrics import Metrics
from ganserve_server.processes.channel import SupervisorChannel
from ganserve_server.processes.log_writer import LogWriter
from ganserve_server.processes.serving import LOST_THREAD_STATUS, Host, serve_models
from ganserve_server.repository.served import ServedVersions
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.repository.states import ProbedVersion, Served
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates
from ganserve_server.start_errors import StartError
from ganserve_server.transport.interface import Server

_POLL_S = 0.2  # until another worker serves; processes share no Event


async def work(channel: SupervisorChannel, settings: ServerSettings, stop: asyncio.Event, log: LogWriter) -> None:
    """Serve as one of several workers.

    Raises:
        StartError: the server cannot listen; only in the worker that logs it for all.
        SystemExit: the server cannot listen; in the other workers.
    """
    shared_metrics.count_in(channel.metrics)
    metrics = Metrics()
    log.count_dropped(metrics.log_lines_dropped.inc)
    # Lines that are identical in all workers are logged once: about certificates and tokens by the supervisor.
    logging.getLogger("ganserve_server.auth.security").setLevel(logging.CRITICAL)
    try:
        security = Security(settings, metrics, SharedRates(channel.rates))
        host = _WorkerHost(channel, settings, metrics, security, stop)
        await serve_models(host, settings, stop)
    except StartError as error:
        if channel.number == 0:
            raise
        raise SystemExit(1) from error
    if host.status:
        raise SystemExit(host.status)


class _WorkerHost(Host):
    def __init__(
        self,
        channel: SupervisorChannel,
        settings: ServerSettings,
        metrics: Metrics,
        security: Security,
        stop: asyncio.Event,
    ) -> None:
        self._channel, self._settings, self._stop = channel, settings, stop
        self.sockets, self.metrics, self.security = channel.sockets, metrics, security
        self.board, self.state, self.logs = channel.board, StateFolder(settings), channel.number == 0
        self._following: asyncio.Task[None]
        self._replacing: asyncio.Task[None] | None = None
        self.status = 0  # with which the process ends
        self._told = asyncio.Event()  # what to serve
        self._order = asyncio.Lock()

    async def load(self, versions: ServedVersions) -> None:
        """Wait until the supervisor has said what to serve."""
        self._following = asyncio.create_task(
            self._channel.follow(self._stop, functools.partial(self._answer, versions))
        )
        await self._told.wait()

    def withdrawn(self, name: str, version: int, digest: str, reason: str) -> None:
        """Report it to the supervisor."""
        what = {"model": name, "version": version, "digest": digest, "reason": reason}
        self._channel.send({"event": "withdrawn", **what})

    def server_made(self, server: Server) -> None:
        """Do nothing: the supervisor reads connections and calls from the scoreboard."""

    def serving(self, facts: dict[str, Any]) -> None:
        """Report to the supervisor."""
        self._channel.send({"event": "serving", "facts": facts})

    def thread_lost(self, on_cpu: bool) -> None:
        """Drain and end as soon as another worker serves: the supervisor then replaces this one."""
        if self._replacing is None:
            self._replacing = asyncio.create_task(self._end_while_others_serve())

    async def _end_while_others_serve(self) -> None:
        while not self._channel.board.others_serving():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        self._channel.board.set_models(0)  # the others do not rely on this one
        self.status = LOST_THREAD_STATUS
        self._stop.set()

    def draining(self) -> None:
        """Do nothing: the supervisor logs it."""

    async def wait_for_drain(self) -> None:
        """Keep serving for the configured delay.

        Not if the supervisor is gone: the next server needs the address. And not if only this worker ends.
        """
        if self.status:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._channel.gone.wait(), self._settings.drain_delay_s)

    async def drained(self) -> None:
        """Stop answering the supervisor."""
        tasks = [self._following] if self._replacing is None else [self._following, self._replacing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, versions: ServedVersions, request: dict[str, Any]) -> dict[str, Any]:
        """Handle a request of the supervisor; return the answer."""
        if request["do"] == "refresh":  # as on SIGHUP
            self.security.refresh()
            return {}
        async with self._order:  # a version is served after it was opened
            if request["do"] == "open":
                try:
                    return {"reason": await versions.open(ProbedVersion.from_json(request["version"]))}
                except StartError as error:
                    return {"cannot_start": str(error)}
            await versions.serve([], Served.from_json(request["served"]))
            self._told.set()
            return {}

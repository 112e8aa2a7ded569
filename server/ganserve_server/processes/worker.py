"""One of several worker processes: handles its supervisor's requests, and drains when the supervisor is gone."""

import asyncio
import contextlib
import functools
import logging
from typing import Any

from ganserve_server.auth.security import Security
from ganserve_server.observe.metrics import Metrics
from ganserve_server.processes import administration
from ganserve_server.processes.channel import SupervisorChannel
from ganserve_server.processes.serving import Host, serve_models
from ganserve_server.repository.lifecycle import Lifecycle
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates
from ganserve_server.start_errors import StartError
from ganserve_server.transport.interface import Server

_IDENTICAL = ("model loaded", "model unloaded", "model rejected")  # log messages


async def work(
    channel: SupervisorChannel, settings: ServerSettings, stop: asyncio.Event, reload: asyncio.Event
) -> None:
    """Serve as one of several workers.

    Raises:
        StartError: no model can be served; only in the worker that logs it for all.
        SystemExit: no model can be served; in the other workers.
    """
    metrics = Metrics()
    # Lines that are identical in all workers are logged once: about certificates and tokens by the supervisor, about
    # models by one worker.
    logging.getLogger("ganserve_server.auth.security").setLevel(logging.CRITICAL)
    models_log = logging.getLogger("ganserve_server.repository.lifecycle")
    models_log.addFilter(lambda line: line.msg not in _IDENTICAL or channel.logs_for_all)
    security = Security(settings, metrics, SharedRates(channel.rates))
    with contextlib.closing(channel):
        try:
            await serve_models(_WorkerHost(channel, settings, metrics, security, stop), settings, stop, reload)
        except StartError as error:
            if channel.logs_for_all:
                raise
            raise SystemExit(1) from error


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
        self.board, self.unloaded = channel.board, channel.unloaded
        # A replacement continues like the other workers, which may have no model by now.
        self.may_be_empty = channel.replaces
        self.logs = channel.number == 0
        self._following: asyncio.Task[None]

    def server_made(self, server: Server) -> None:
        """Do nothing: the supervisor reads connections and calls from the scoreboard."""

    def serving(self, facts: dict[str, Any], lifecycle: Lifecycle) -> None:
        """Report to the supervisor, and answer its requests."""
        self._channel.send(facts)
        answer = functools.partial(_answer, lifecycle, self.security)
        self._following = asyncio.create_task(self._channel.follow(self._stop, answer))

    def draining(self) -> None:
        """Do nothing: the supervisor logs it."""

    async def wait_for_drain(self) -> None:
        """Keep serving for the configured delay, unless the supervisor is gone: the next server needs the address."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._channel.gone.wait(), self._settings.drain_delay_s)

    async def drained(self) -> None:
        """Stop answering the supervisor."""
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)


async def _answer(lifecycle: Lifecycle, security: Security, request: dict[str, Any]) -> dict[str, Any]:
    """Handle the supervisor's request; return the answer."""
    if request["do"] == "refresh":  # as on SIGHUP
        security.refresh()
    return await administration.answer(lifecycle, request)

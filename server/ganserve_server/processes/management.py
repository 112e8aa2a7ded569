"""Runs the lifecycle of the models in the process that decides what is served: the only one, or the supervisor."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ganserve_server.auth.security import Security
from ganserve_server.processes.admin_listener import AdminListener
from ganserve_server.processes.systemd import reloading
from ganserve_server.repository.lifecycle import Lifecycle
from ganserve_server.repository.prober import Prober
from ganserve_server.repository.scan import require_models
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.settings import ServerSettings

_log = logging.getLogger(__name__)


class Management:
    """Starts loading models at once; later also on SIGHUP, when the repository changes, and for operators.

    Args:
        settings: the server's settings.
        stop: set when the server drains.
        reload: set on SIGHUP.
        state: what is known of model files.
        prober: checks new model files.

    Attributes:
        state: what is known of model files.
        lifecycle: decides which models to serve.
        starting: the start of the lifecycle.
    """

    def __init__(
        self,
        settings: ServerSettings,
        stop: asyncio.Event,
        reload: asyncio.Event,
        state: StateFolder,
        prober: Prober,
    ) -> None:
        self._settings, self._stop, self._reload, self.state = settings, stop, reload, state
        self.lifecycle = Lifecycle(settings, state, prober)
        self.starting = asyncio.create_task(self.lifecycle.start())
        self._admin: AdminListener | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def bind(self, security: Security) -> None:
        """Bind the address for operators, before the models are loaded, so that a taken one is reported at once.

        Raises:
            StartError: the address is taken, or there is no model file at all.
        """
        self._admin = AdminListener(self._settings, security)
        require_models(self._settings.models)

    def begin(self, security: Security, refresh_workers: Callable[[], Awaitable[None]] | None = None) -> str | None:
        """Answer operators, and follow changes; return the address for operators, if there is one.

        Raises:
            StartError: the address is taken.
        """
        assert self._admin is not None
        self._tasks.append(asyncio.create_task(self._follow_reloads(security, refresh_workers)))
        if self._settings.reload == "watch":
            self._tasks.append(asyncio.create_task(self.lifecycle.watch(self._stop)))
        return self._admin.start(self.lifecycle)

    async def close(self) -> None:
        """Load nothing more, and finish operators' calls."""
        for task in (*self._tasks, self.starting):
            task.cancel()
        await asyncio.gather(*self._tasks, self.starting, return_exceptions=True)
        await self.lifecycle.close()
        admin, self._admin = self._admin, None
        if admin is not None:
            await admin.stop()

    async def _follow_reloads(self, security: Security, refresh_workers: Callable[[], Awaitable[None]] | None) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            with reloading():
                security.refresh()
                await asyncio.gather(self.lifecycle.refresh(), *([refresh_workers()] if refresh_workers else ()))
            _log.info("reloaded")

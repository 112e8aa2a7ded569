"""Reports the server's state to the log, to systemd and to probes, for one process or several."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ganserve_server.auth.security import Security
from ganserve_server.observe.http_endpoint import HttpEndpoint
from ganserve_server.processes.systemd import notify
from ganserve_server.settings import ServerSettings

_log = logging.getLogger(__name__)


class ModelServer(Protocol):
    """The served versions of the only process, or the supervisor of several."""

    @property
    def serves(self) -> bool:
        """Whether there is a model that can be called."""


# Called with facts for the log, the endpoint of probes, the source of their answers, the certificates and tokens, and
# the admin address, if any.
ReportServing = Callable[[Mapping[str, Any], HttpEndpoint, ModelServer, Security, str | None], None]


def why_not_ready(stop: asyncio.Event, server: ModelServer) -> str:
    """Return the answer to readiness probes; an empty text: the server is ready."""
    return "draining" if stop.is_set() else "" if server.serves else "no model is served"


def report_draining(settings: ServerSettings) -> None:
    """Report that the server begins to drain."""
    notify("STOPPING=1")
    _log.info("draining", extra={"drain_delay_s": settings.drain_delay_s})

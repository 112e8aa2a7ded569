"""Reports the server's state to the log, to systemd and to probes, for one process or several."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ganserve_server.auth.security import Security
from ganserve_server.observe.http_endpoint import HttpEndpoint
from ganserve_server.processes.systemd import notify
from ganserve_server.settings import ServerSettings

_log = logging.getLogger(__name__)


NO_MODEL = "no model is served"
# Called with facts for the log, the endpoint of probes, what says why no calls are answered (an empty text: they are),
# the certificates and tokens, and the admin address, if any.
ReportServing = Callable[[Mapping[str, Any], HttpEndpoint, Callable[[], str], Security, str | None], None]


def report_draining(settings: ServerSettings) -> None:
    """Report that the server begins to drain."""
    notify("STOPPING=1")
    _log.info("draining", extra={"drain_delay_s": settings.drain_delay_s})

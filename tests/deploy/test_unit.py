"""The systemd unit fits the server. `.ci/systemd` runs it."""

import re
from pathlib import Path

from ganserve_server.processes.heartbeat import INTERVAL_S
from ganserve_server.settings import ServerSettings

UNIT = (Path(__file__).parents[2] / "deploy" / "ganserve-server.service").read_text()


def value_of(key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def test_systemd_waits_longer_than_a_drain_takes_by_default() -> None:
    settings = ServerSettings()
    assert float(value_of("TimeoutStopSec")) > settings.drain_delay_s + settings.drain_timeout_s


def test_every_connection_that_the_server_takes_by_default_may_be_open() -> None:
    assert int(value_of("LimitNOFILE")) > ServerSettings().max_connections


def test_a_change_of_files_is_read_by_the_signal_that_the_server_knows() -> None:
    assert "-HUP $MAINPID" in value_of("ExecReload")
    assert value_of("Type") == "notify"


def test_systemd_gives_up_later_than_the_server_ends_itself() -> None:
    assert float(value_of("WatchdogSec")) > ServerSettings().stuck_timeout_s + 2 * INTERVAL_S
    assert value_of("WatchdogSignal") == "SIGKILL"  # a stopped process takes no other

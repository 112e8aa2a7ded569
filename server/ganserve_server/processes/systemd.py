"""Notifies systemd if it started the server with Type=notify: sd_notify(3), sd_watchdog_enabled(3)."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator

SOCKET_VARIABLE = "NOTIFY_SOCKET"
_TIMEOUT_S = 1.0  # to wait for room in systemd's queue; all calls wait meanwhile


def notify(*states: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Send states, such as READY=1; do nothing without systemd."""
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return
    # A failed notification is no reason to stop serving.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(timeout_s)
        sender.connect("\0" + path[1:] if path.startswith("@") else path)
        sender.send("\n".join(states).encode())


def beat() -> None:
    """Report that the event loop runs, if systemd watches for it (WatchdogSec)."""
    if "WATCHDOG_USEC" in os.environ:
        notify("WATCHDOG=1", timeout_s=0)  # does not wait for room: the next one follows soon


@contextlib.contextmanager
def reloading() -> Iterator[None]:
    """Report the start and the end of a reload."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    yield
    notify("READY=1")

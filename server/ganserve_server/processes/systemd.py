"""What systemd is told, where it started the server and asks for it (Type=notify): sd_notify(3)."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator

SOCKET_VARIABLE = "NOTIFY_SOCKET"
_TIMEOUT_S = 1.0  # for room in systemd's queue; all calls wait meanwhile


def notify(*states: str) -> None:
    """Send states, such as READY=1; nobody hears them without systemd."""
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return
    # That systemd cannot be told is no reason to stop serving.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_TIMEOUT_S)
        sender.connect("\0" + path[1:] if path.startswith("@") else path)
        sender.send("\n".join(states).encode())


@contextlib.contextmanager
def reloading() -> Iterator[None]:
    """Say that a reload begins, and at its end that it is done."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    yield
    notify("READY=1")

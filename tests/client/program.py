"""Runs the real `ganserve` program."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.programs import installed, run

TIMEOUT_S = 60


def ganserve(*arguments: str | Path, address: str | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; its output is text."""
    return run("ganserve", *_options(arguments, address), **{"env": environment(), **options})


def command(*arguments: str | Path, address: str | None = None) -> list[str]:
    return [installed("ganserve"), *_options(arguments, address)]


def _options(arguments: Iterable[str | Path], address: str | None) -> list[str]:
    return [*map(str, arguments), *(["--address", address] if address else [])]


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment, without what changes how the program works, and with these."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GANSERVE_") and name != "PYTHONUNBUFFERED"
    }
    return {**kept, **variables}


def read_terminal(controller: int) -> bytes:
    """Return what a program shows on a terminal until it ends; the controlling side is closed then."""
    shown = b""
    while True:
        try:
            shown += os.read(controller, 1 << 16)
        except OSError:  # the terminal's other side is closed
            os.close(controller)
            return shown

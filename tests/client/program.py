"""Runs the real `ganserve` program."""

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, AnyStr

from tests.programs import installed, run

PROGRAM = installed("ganserve")
TIMEOUT_S = 60


def ganserve(*arguments: str | Path, address: str | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; its output is text."""
    return run("ganserve", *_options(arguments, address), **{"env": environment(), **options})


def command(*arguments: str | Path, address: str | None = None) -> list[str]:
    return [PROGRAM, *_options(arguments, address)]


def _options(arguments: Iterable[str | Path], address: str | None) -> list[str]:
    return [*map(str, arguments), *(["--address", address] if address else [])]


@contextmanager
def ended(process: "subprocess.Popen[AnyStr]") -> "Iterator[subprocess.Popen[AnyStr]]":
    """Wait for the end of a program, but not if the test fails: it may wait for what the test does not do any more."""
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


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

"""Runs the real `ganserve` program."""

import io
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from tests.programs import installed, run

from ganserve._cli import main

TIMEOUT_S = 60


def ganserve(*arguments: str | Path, address: str | None = None, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; its output is text."""
    return run("ganserve", *_options(arguments, address), **{"env": environment(), **options})


def ganserve_here(
    *arguments: str | Path, address: str | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command as `ganserve` does, but in this process, which costs a tenth."""
    line, out, error = command(*arguments, address=address), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", line)
        patch.setattr(os, "environ", environment(**variables))
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(line, int(ended.value.code or 0), out.getvalue(), error.getvalue())


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

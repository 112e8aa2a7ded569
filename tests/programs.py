"""Starts the real programs as processes of their own, forked from a process that has already imported their libraries.

Imports are most of a program's start: 0.5 s of CPU time of `ganserve`, 1 s of `ganserve-server` and 6 s of
`ganserve-trainer`, in hundreds of tests. A program gets the arguments, environment, folder and files of a fresh
process, and runs what its console script runs. Tests of the start itself (imports, variables that libraries read when
they are imported, signals meanwhile) use subprocess.
"""

import array
import atexit
import ctypes
import faulthandler
import fcntl
import functools
import gc
import importlib
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, AnyStr

# Of each program: its entry point, and modules that import all that it uses.
PROGRAMS = {
    "ganserve": ("ganserve._cli", ("ganserve._client", "ganserve._async_client")),
    "ganserve-server": (
        "ganserve_server.__main__",
        ("ganserve_server.cli.main", "ganserve_server.processes.app", "ganserve_server.processes.worker"),
    ),
    "ganserve-trainer": ("ganserve_trainer.__main__", ("ganserve_trainer.cli", "ganserve_trainer.train.loop")),
}
TIMEOUT_S = 300
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_ADOPTING = threading.Lock()  # one program at a time becomes a child of this process


class Program(subprocess.Popen[Any]):
    """A program of this project; takes what subprocess.Popen takes, except for shells, users and preexec_fn."""

    def _execute_child(self, *arguments: Any) -> None:
        parameters = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
        given = parameters.bind(self, *arguments).arguments
        request = {
            "arguments": [os.fsdecode(part) for part in given["args"]],
            "folder": os.path.abspath(os.fsdecode(given["cwd"] or "")),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "session": given["start_new_session"],
        }
        ends = (given["p2cread"], given["c2pwrite"], given["errwrite"])
        files = [number if end == -1 else end for number, end in enumerate(ends)]
        self.pid = _helper(Path(given["args"][0]).name).start(request, files)
        self._child_created = True
        self._close_pipe_fds(
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def run(program: str, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[Any]":
    """Run a program to its end; its output is text, if the options of subprocess.Popen do not say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    command = [installed(program), *map(str, arguments)]
    with ended(Program(command, **options)) as process:
        out, error = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@contextmanager
def ended(process: "subprocess.Popen[AnyStr]") -> "Iterator[subprocess.Popen[AnyStr]]":
    """Wait for the end of a program, but not if the test fails: it may wait for what the test does not do any more."""
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@contextmanager
def unread_pipe() -> Iterator[tuple[int, int]]:
    """Make a pipe that is full, with one line of 4096 bytes; give the descriptors to read and to write it."""
    reading, writing = os.pipe()
    try:
        size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writing, b"-" * (size - 1) + b"\n")
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def installed(program: str) -> str:
    """Return the path of a program."""
    return str(Path(sys.executable).with_name(program))


class _Helper:
    """The tests' side of the process that a program is forked from."""

    def __init__(self, program: str) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen([sys.executable, __file__, program], stdin=theirs)
        atexit.register(self.close)

    def start(self, request: dict[str, Any], files: list[int]) -> int:
        """Start the program; return its process id."""
        content = pickle.dumps(request)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
        with _ADOPTING:
            # The helper's child ends at once, and the program becomes a child of this process, which can wait for it.
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                self._socket.sendmsg([len(content).to_bytes(4, "big")], [rights])
                self._socket.sendall(content)
                answer = self._socket.recv(4, socket.MSG_WAITALL)
            finally:
                ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if len(answer) < 4:
            raise RuntimeError("the process that forks programs has ended")
        return int.from_bytes(answer, "big")

    def close(self) -> None:
        """End the helper."""
        self._socket.close()
        self._process.wait()


@functools.cache
def _helper(program: str) -> _Helper:
    return _Helper(program)


def _serve(link: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; return the request in the child, and None in the helper at the end of the tests."""
    while True:
        head, files, _, _ = socket.recv_fds(link, 4, 3)
        if len(head) < 4:
            return None
        content = link.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        reading, writing = os.pipe()
        if child := os.fork():
            os.close(writing)
            os.waitpid(child, 0)
            link.sendall(os.read(reading, 4))
            for file in (reading, *files):
                os.close(file)
            continue
        if program := os.fork():
            os.write(writing, program.to_bytes(4, "big"))
            os._exit(0)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, max(link.fileno(), writing, *files) + 1)
        request: dict[str, Any] = pickle.loads(content)
        return request


def _become(request: dict[str, Any]) -> None:
    """Make this process what a fresh one is."""
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # though nohup started the tests
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = request["arguments"]
    sys.stdin = sys.__stdin__ = _stream(0, "r", line_buffered=False, errors="strict")
    sys.stdout = sys.__stdout__ = _stream(1, "w", line_buffered=os.isatty(1), errors="strict")
    sys.stderr = sys.__stderr__ = _stream(2, "w", line_buffered=True, errors="backslashreplace")


def _stream(number: int, mode: str, *, line_buffered: bool, errors: str) -> Any:
    return open(number, mode, 1 if line_buffered else -1, encoding="utf-8", errors=errors, closefd=False)


def _main(program: str) -> None:
    # What modules ask for when they are imported.
    sys.argv = [program]
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    entry, modules = PROGRAMS[program]
    main = importlib.import_module(entry)
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    link = socket.socket(fileno=os.dup(0))
    if request := _serve(link):
        link.detach()
        _become(request)
        sys.exit(main.main())


if __name__ == "__main__":
    _main(sys.argv[1])

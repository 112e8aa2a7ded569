"""Starts the process that checks model files (`probe`), gives it one file after the other, and survives its end."""

import asyncio
import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ganserve_server.compute.cuda import nvidia_driver
from ganserve_server.machine import cores, memory_left, processes_killed_for_memory
from ganserve_server.repository.probed import Outcome, Probed, one_line
from ganserve_server.repository.state_folder import how_it_ended
from ganserve_server.settings import ServerSettings

_STEP_S = 1.0  # of a time limit
_MAX_LINE_BYTES = 64 << 20  # of an answer; a card has up to 1 MiB
_FOLDERS = "ganserve-probe-"
_MOST_OUTPUT = 4096  # bytes; the last line has the exception
_START_TIMEOUT_S = 60.0  # for the imports of a probe, on a busy machine
# Variables that a probe must not have: it reports nothing to systemd, and a crash is one line in the log.
_NOT_PASSED_ON = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "PYTHONFAULTHANDLER", "PROMETHEUS_MULTIPROC_DIR")

_Result = TypeVar("_Result")


class Prober:
    """Probes one file at a time. The process starts with the first file, or earlier by `start`, and ends by `close`.

    Args:
        settings: the server's settings.
        provider: where to run the models: cpu, because a server's own process tries the GPU.
    """

    def __init__(self, settings: ServerSettings, provider: str = "cpu") -> None:
        self._settings, self._provider = settings, provider
        self._on_cpu = provider == "cpu" or not nvidia_driver()  # a GPU's driver reserves addresses without limits
        self._threads = settings.threads or cores().usable
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: asyncio.StreamReader | None = None  # once it has imported its libraries
        self._output = -1  # a file in memory with what the process writes to standard error
        self._reading: asyncio.ReadTransport | None = None
        self._folder: _TemporaryFolder | None = None
        self._one_at_a_time = asyncio.Lock()

    def start(self) -> None:
        """Start the process, unless it runs. It imports its libraries, which takes longer than to check a small file.

        This needs no event loop, so that a server can do it before its own imports.

        Raises:
            OSError: it cannot be started.
        """
        if self._process is not None:
            return
        self._output = os.memfd_create("ganserve-probe")
        try:
            self._process = subprocess.Popen(
                (sys.executable, "-m", "ganserve_server.repository.probe", str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._output,
                env={name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON},
                bufsize=0,
                start_new_session=True,  # a terminal's Ctrl-C reaches only the server
            )
        except OSError:
            os.close(self._output)
            raise

    async def probe(self, path: Path, *, gently: bool = False) -> Probed:
        """Check a file.

        Args:
            path: the file.
            gently: with a low priority, because calls are being answered.

        Raises:
            OSError: the process cannot be started.
        """
        async with self._one_at_a_time:
            try:
                return await self._probe(path, gently=gently)
            except BaseException:  # such as CancelledError: the answer would be taken for that of the next file
                await self.close()
                raise

    async def close(self) -> None:
        """End the process, and give its memory back."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        await asyncio.to_thread(process.wait)
        os.close(self._output)
        assert process.stdin is not None
        process.stdin.close()
        if self._reading is not None:
            self._reading.close()
        self._answers = self._reading = None
        if self._folder is not None:
            self._folder.remove()
        self._folder = None

    async def _probe(self, path: Path, *, gently: bool) -> Probed:
        self.start()
        with contextlib.suppress(OSError):
            self._folder = self._folder or _TemporaryFolder()
        memory_bytes, limit_s = memory_left(), self._settings.load_timeout_s
        request = {
            "folder": str(self._folder.path) if self._folder else None,
            "path": str(path),
            "settings": self._settings.model_dump(mode="json"),
            "provider": self._provider,
            "threads": self._threads,
            "memory_bytes": memory_bytes if self._on_cpu else None,
            "gently": gently,
        }
        killed = processes_killed_for_memory()
        try:
            if self._answers is None:
                self._answers = await _within(_START_TIMEOUT_S, self._connect())
            answer = await _within(limit_s, self._ask(request, self._answers)) if self._answers else None
        except TimeoutError:
            stopped = self._is_stopped()
            await self.close()
            if stopped:
                return _interrupted("stopped (SIGSTOP)")
            return _failed(
                "timeout",
                f"checking it takes longer than {limit_s:g} s, the limit set by --load-timeout-s: export a faster "
                "model, or raise the limit",
            )
        if answer is None:
            return await self._ended(memory_bytes, killed)
        probed = Probed(**answer)
        return _short_of_memory(memory_bytes, probed.digest) if probed.outcome == "memory" else probed

    async def _connect(self) -> asyncio.StreamReader | None:
        """Wait until the process has imported its libraries; return its answers, or None if it has ended."""
        assert self._process is not None
        answers = asyncio.StreamReader(_MAX_LINE_BYTES)
        self._reading, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(answers), self._process.stdout
        )
        return answers if await _line(answers) is not None else None

    async def _ask(self, request: dict[str, Any], answers: asyncio.StreamReader) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and the answer is None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")  # which the pipe has room for
        return await _line(answers)

    def _is_stopped(self) -> bool:
        """Return whether somebody stopped the process, so that the time says nothing about its file."""
        assert self._process is not None
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self._process.pid}/stat").read_text()
            return status.rpartition(")")[2].split()[0] in ("T", "t")
        return False

    async def _ended(self, memory_bytes: int, killed_before: int | None) -> Probed:
        """Return what the end of the process says about the file that it checked."""
        assert self._process is not None
        status = await asyncio.to_thread(self._process.wait)
        last = os.pread(self._output, _MOST_OUTPUT, max(0, os.fstat(self._output).st_size - _MOST_OUTPUT))
        await self.close()
        if status == -signal.SIGKILL:
            killed = processes_killed_for_memory()
            if killed is None or killed != killed_before:
                return _short_of_memory(memory_bytes, "")
            return _interrupted("killed (SIGKILL), not by the kernel for want of memory")
        if status >= 0:
            lines = last.decode(errors="replace").strip().splitlines() or [""]
            return _failed("died", f"the process that checked it ended with status {status}: {one_line(lines[-1])}")
        return _failed(
            "died",
            f"the process that checked it {how_it_ended(status)}: onnx or onnxruntime cannot "
            "handle the file; export the model again, with another opset",
        )


async def _within(limit_s: float, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait for some work; do not count the time in which this process itself stood still, as in a paused container.

    Raises:
        TimeoutError: it takes longer than the limit.
    """
    task = asyncio.create_task(work)
    try:
        for _ in range(math.ceil(limit_s / _STEP_S)):
            if (await asyncio.wait((task,), timeout=min(_STEP_S, limit_s)))[0]:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


def _interrupted(how: str) -> Probed:
    return _failed("unreadable", f"the process that checks model files was {how}; the next look tries again")


class _TemporaryFolder:
    """A folder for the temporary files of a process that may be killed. Removes those of servers that were killed.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self) -> None:
        for old in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
            with contextlib.suppress(OSError):  # it is in use, or another user's
                _remove(old, _locked(old))
        self.path = Path(tempfile.mkdtemp(prefix=_FOLDERS))
        self._lock = _locked(self.path)  # as long as this process lives

    def remove(self) -> None:
        """Remove the folder with its content."""
        _remove(self.path, self._lock)


def _locked(folder: Path) -> int:
    """Return a descriptor that locks a folder.

    Raises:
        OSError: it is locked already, is no folder, or cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


async def _line(answers: asyncio.StreamReader) -> dict[str, Any] | None:
    """Return the next line of the process, or None if it has ended."""
    line = await answers.readline()
    return dict(json.loads(line)) if line.endswith(b"\n") else None


def _failed(outcome: Outcome, problem: str, digest: str = "") -> Probed:
    return Probed(outcome, [problem], [problem], digest)


def _short_of_memory(memory_bytes: int, digest: str) -> Probed:
    return _failed(
        "memory",
        f"checking it takes more than {memory_bytes >> 20} MiB of memory, and no more are left of the machine's and of "
        "the cgroup's limit: export a smaller model, or raise the limit",
        digest,
    )

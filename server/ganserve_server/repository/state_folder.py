"""The folder in which a server records what it knows of model files, by their digests, across restarts.

- `passed` has the results of probes, so that a restart does not repeat them.
- `quarantine` has the files that must not be loaded again, and the files with which a process ended once.
- `at-risk` has a file for each process: the digests that it opens, or whose first batches it computes, at this moment.
  The process holds a lock on its file. If the lock is free, the process has ended, and what its file names is the
  probable reason.

A file is quarantined at once if the signal that ended the process is one of the program's own faults, such as SIGFPE,
and no other file was at risk. Otherwise, for example after SIGKILL, or if nobody saw how the process ended, it is
quarantined when this happens twice without a success in between: a machine may lose its power once.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import signal
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ganserve_server.repository.probed import Probed
from ganserve_server.settings import ServerSettings

_DEATHS = 2  # before a file is quarantined, if the reason of a death is not certain
_OWN_FAULTS = {
    *(signal.SIGFPE, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGSYS),
}
_MOST_PASSED = 200  # results; the oldest are removed
_PROVEN_BATCHES = 8  # batches after which a version is no longer at risk
_PACKAGES = ("ganserve", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "protobuf", "pillow")
# The settings on which the result of a probe depends.
_SETTINGS = ("max_model_mib", "threads", "max_batch_size", "batch_memory_mib", "batch_timeout_s")


class StateFolder:
    """The records. All of them are in memory only if there is no folder that can be written.

    Attributes:
        problem: why there is no folder; empty if there is one.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.problem = ""
        self._folder: Path | None = None
        self._marks: dict[str, dict[str, Any]] = {}  # by digest, if they cannot be written
        self._setting = {name: getattr(settings, name) for name in _SETTINGS}
        self._versions: list[str] = []
        for folder in _candidates(settings):
            try:
                _make(folder)
            except OSError as error:
                self.problem = self.problem or f"{folder}: {error.strerror or error}"
            else:
                self._folder, self.problem = folder, ""
                break

    # Results of probes.

    @property
    def has_passed(self) -> bool:
        """Whether any result is kept."""
        return bool(self._folder) and any(self._listed("passed"))

    def passed(self, digest: str) -> Probed | None:
        """Return the result of a probe of a file with this digest, by the same versions of the libraries."""
        if self._folder is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                return Probed(**json.loads((self._folder / "passed" / self._key(digest)).read_bytes()))
        return None

    def keep(self, probed: Probed) -> None:
        """Keep the result of a probe."""
        if self._folder is not None:
            self._write(self._folder / "passed" / self._key(probed.digest), probed.to_json())
            files = sorted(self._listed("passed"), key=_modified, reverse=True)
            for old in files[_MOST_PASSED:]:
                old.unlink(missing_ok=True)

    # Quarantine.

    def marked_sizes(self) -> set[int]:
        """Return the sizes of the quarantined files, so that files of other sizes need not be read."""
        return {mark["size_bytes"] for mark in self._all_marks() if mark["quarantined"]}

    def quarantined(self, digest: str) -> dict[str, Any] | None:
        """Return why a file is quarantined, with the time, or None."""
        mark = self._mark(digest)
        return mark if mark and mark["quarantined"] else None

    def quarantine(self, digest: str, size_bytes: int, path: str, reason: str, **facts: Any) -> None:
        """Do not load a file again until `release`."""
        self._put(digest, {"path": path, "size_bytes": size_bytes, "reason": reason, "quarantined": True, **facts})

    def release(self, digest: str) -> None:
        """Forget what is recorded against a file."""
        self._marks.pop(digest, None)
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._of_mark(digest).unlink(missing_ok=True)
                (self._folder / "passed" / self._key(digest)).unlink(missing_ok=True)

    def proven(self, digest: str) -> None:
        """Forget the deaths of a file that was loaded and run successfully."""
        mark = self._mark(digest)
        if mark and not mark["quarantined"]:
            self._marks.pop(digest, None)
            with contextlib.suppress(OSError):
                self._of_mark(digest).unlink(missing_ok=True)

    # Processes that ended.

    def collect_deaths(self, pid: int | None = None, status: int | None = None) -> list[str]:
        """Record the files that were at risk in processes that have ended; return those that are quarantined now.

        Args:
            pid: only this process; None: all that have ended.
            status: its exit status, negative for a signal; None: unknown.
        """
        found: list[str] = []
        for file in self._listed("at-risk"):
            if pid is not None and not file.name.startswith(f"{pid}-"):
                continue
            if (content := _left_behind(file)) is None:
                continue
            own_fault = status is not None and -status in _OWN_FAULTS and len(content) == 1
            for digest, facts in content.items():
                deaths = (self._mark(digest) or {"deaths": 0}).get("deaths", 0) + 1
                how = "ended" if status is None else how_it_ended(status)
                times = "" if deaths == 1 else f" {deaths} times, the last time"
                self._put(
                    digest,
                    {
                        "path": facts["path"],
                        "size_bytes": facts["size_bytes"],
                        "reason": f"a process{times} {how} while it {facts['doing']}",
                        "deaths": deaths,
                        "quarantined": own_fault or deaths >= _DEATHS,
                    },
                )
                if self.quarantined(digest):
                    found.append(digest)
        return found

    def risk(self) -> "AtRisk":
        """Return the record of this process's files at risk."""
        self._make_again()
        return AtRisk(self, self._folder)

    def _listed(self, kind: str) -> list[Path]:
        if self._folder is None:
            return []
        with contextlib.suppress(OSError):
            return [file for file in (self._folder / kind).iterdir() if not file.name.endswith(".tmp")]
        return []

    def _all_marks(self) -> Iterator[dict[str, Any]]:
        yield from self._marks.values()
        for file in self._listed("quarantine"):
            if mark := _read(file):
                yield mark

    def _mark(self, digest: str) -> dict[str, Any] | None:
        if (mark := self._marks.get(digest)) is not None or self._folder is None:
            return mark
        return _read(self._of_mark(digest))

    def _put(self, digest: str, mark: dict[str, Any]) -> None:
        mark = {"digest": digest, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **mark}
        if self._folder is not None and self._write(self._of_mark(digest), mark):
            self._marks.pop(digest, None)
        else:  # for example because the disk is full
            self._marks[digest] = mark

    def _write(self, file: Path, content: dict[str, Any]) -> bool:
        """Write a file whole or not at all; return whether that worked."""
        self._make_again()
        beside = file.with_name(f"{os.urandom(6).hex()}.tmp")
        try:
            beside.write_text(json.dumps(content))
            beside.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            return False
        return True

    def _make_again(self) -> None:
        """Create the folder again if somebody has removed it."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                _make(self._folder)

    def _of_mark(self, digest: str) -> Path:
        assert self._folder is not None
        return self._folder / "quarantine" / digest.rpartition(":")[2]

    def _key(self, digest: str) -> str:
        self._versions = self._versions or [*_versions(), _processor()]
        text = json.dumps([digest, self._setting, self._versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class AtRisk:
    """The files that this process opens, or whose first batches it computes. May be used from several threads."""

    def __init__(self, state: StateFolder, folder: Path | None) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._facts: dict[str, dict[str, Any]] = {}
        self._file: Path | None = None
        self._descriptor = -1
        if folder is not None:
            with contextlib.suppress(OSError):
                file = folder / "at-risk" / f"{os.getpid()}-{os.urandom(6).hex()}"
                self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                self._file = file

    @contextlib.contextmanager
    def of(self, digest: str, size_bytes: int, path: str, doing: str) -> Iterator[None]:
        """Record a file for the time of this context."""
        facts = {"size_bytes": size_bytes, "path": path, "doing": doing}
        self._change(digest, 1, facts)
        try:
            yield
        finally:
            self._change(digest, -1, facts)

    def trial(
        self, probed: Probed, path: str, on_proven: Callable[[], None]
    ) -> Callable[[], AbstractContextManager[None]]:
        """Return the context of each of the first batches of a version that was opened.

        Args:
            probed: the file.
            path: its path, for the log.
            on_proven: called when the first batches went well: the context is not needed any more.
        """
        batches = itertools.count(1)

        @contextlib.contextmanager
        def batch() -> Iterator[None]:
            with self.of(probed.digest, probed.size_bytes, path, "computed one of its first batches"):
                yield
            if next(batches) == _PROVEN_BATCHES:
                on_proven()
                self._state.proven(probed.digest)

        return batch

    def close(self) -> None:
        """Remove the record: this process ends in good order."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _change(self, digest: str, change: int, facts: dict[str, Any]) -> None:
        with self._lock:
            self._counts[digest] += change
            self._facts[digest] = facts
            if not self._counts[digest]:
                del self._counts[digest], self._facts[digest]
            if self._file is not None:
                content = json.dumps(self._facts).encode()
                with contextlib.suppress(OSError):
                    os.pwrite(self._descriptor, content, 0)
                    os.ftruncate(self._descriptor, len(content))


def _candidates(settings: ServerSettings) -> Iterator[Path]:
    """Yield the folders to try, the best first."""
    if settings.state_dir:
        yield Path(settings.state_dir)
        return
    if of_systemd := os.environ.get("STATE_DIRECTORY"):
        yield Path(of_systemd.partition(":")[0])
    if of_user := os.environ.get("XDG_STATE_HOME"):
        yield Path(of_user) / "ganserve"
    elif home := os.environ.get("HOME"):
        yield Path(home) / ".local" / "state" / "ganserve"
    # In a container there may be no home, or none that can be written.
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir()) / f"ganserve-{os.geteuid()}"


def _make(folder: Path) -> None:
    """Create a folder for this user alone.

    Raises:
        OSError: it cannot be created or written, or belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for kind in ("passed", "quarantine", "at-risk"):
        (folder / kind).mkdir(mode=0o700, exist_ok=True)
        status = (folder / kind).lstat()
        if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
            raise PermissionError(0, "it belongs to another user")
        if not os.access(folder / kind, os.W_OK | os.X_OK):
            raise PermissionError(0, "it cannot be written")


def _read(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        content: dict[str, Any] = json.loads(file.read_bytes())
        return content
    return None


def _left_behind(file: Path) -> dict[str, Any] | None:
    """Return what a process left behind in its file, and remove the file; None: the process is alive."""
    with contextlib.suppress(OSError, ValueError), file.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
        content: dict[str, Any] = json.JSONDecoder().raw_decode(opened.read().decode())[0]
        return content
    return None


def how_it_ended(status: int) -> str:
    """Return how a process ended: was killed by SIGFPE, or ended with status 1."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


def _modified(file: Path) -> float:
    with contextlib.suppress(OSError):
        return file.stat().st_mtime
    return 0.0


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{package} {importlib.metadata.version(package)}"


def _processor() -> str:
    """Return what distinguishes the processors on which a model makes other bytes, or is faster."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))})
        )
    return ""

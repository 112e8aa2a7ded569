"""Checks untrusted model files in a process of its own: `python -m ganserve_server.repository.probe PARENT`.

The process reads requests, each a line of JSON, and answers each with a line: the fields of `Probed`. It has limits on
memory and files, no descriptor but its pipes, and ends with its parent. A file that kills it, or that never ends, costs
the server a line in the log. `prober` has the other side.
"""

import base64
import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import re
import resource
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ganserve_server.repository.verify import Examination
    from ganserve_server.settings import ServerSettings

_PR_SET_PDEATHSIG = 1  # prctl(2)
_MOST_FILES = 256  # descriptors
_LARGEST_FILE = 256 << 20  # bytes of a file that it writes: a profile of a run, which has an entry for each node
_STACK = 8 << 20  # of each thread of onnxruntime; it counts as memory, though little of it is used
_NICENESS = 10  # a tenth of the share of a call's thread where they compete; 19 is a seventieth, and no load would end
_NO_MEMORY = re.compile(r"bad_alloc|bad allocation|[Ff]ailed to allocate|Cannot allocate memory|MemoryError")


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        return  # it ended before
    _limit()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what the libraries print is no answer
        from ganserve_server.repository import verify  # noqa: F401  takes long; meanwhile the server starts, too

        _send(answers, {})
        for line in sys.stdin:
            _send(answers, _probe(json.loads(line)))


def _limit() -> None:
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, _MOST_FILES)):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too large fails
    with contextlib.suppress(OSError):  # if memory is short, the kernel ends this process rather than the server
        Path("/proc/self/oom_score_adj").write_text("1000")


def _send(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _probe(request: dict[str, Any]) -> dict[str, Any]:
    from ganserve_server.compute.batching import batch_limits
    from ganserve_server.compute.engine import ProviderUnavailable
    from ganserve_server.compute.gpu import gpu_options
    from ganserve_server.machine import give_back_memory
    from ganserve_server.repository.verify import Examination, examine

    # Without pydantic, whose import takes 0.15 s of CPU time; the server has checked the values.
    settings = cast("ServerSettings", SimpleNamespace(**request["settings"]))
    path, tempfile.tempdir = Path(request["path"]), request["folder"]
    if request["gently"]:
        with contextlib.suppress(OSError):  # a filter of system calls may forbid it
            os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    warnings = _Warnings()
    logging.getLogger().addHandler(warnings)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if request["memory_bytes"] is not None:
        most = before["VmData"] + request["memory_bytes"] + 2 * _STACK * request["threads"]
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        found = examine(
            path,
            max_model_mib=settings.max_model_mib,
            provider=request["provider"],
            threads=request["threads"],
            limits=batch_limits(settings),
            gpu=gpu_options(settings),
        )
    except ProviderUnavailable as error:
        found = Examination([str(error)])
    except MemoryError:
        found = Examination(["MemoryError"])
    except Exception as error:  # a file from outside can cause any exception in the libraries
        found = Examination([f"the file could not be read ({type(error).__name__}: {error})"])
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    peak_bytes = _memory()["VmHWM"] - before["VmRSS"]
    give_back_memory()
    answer = _answer(found, request["threads"])
    answer["peak_bytes"], answer["kept_bytes"] = peak_bytes, max(0, _memory()["VmRSS"] - before["VmRSS"])
    answer["warnings"] = warnings.found
    if any(_NO_MEMORY.search(problem) for problem in found.problems):
        answer["outcome"] = "memory"
    logging.getLogger().removeHandler(warnings)
    del found
    give_back_memory()
    return answer


def _answer(found: "Examination", threads: int) -> dict[str, Any]:
    from ganserve_server.repository.report import report_of

    answer: dict[str, Any] = {
        "outcome": "unreadable" if found.unreadable else "rejected" if found.problems else "passed",
        "problems": found.problems,
        "reasons": found.reasons,
        "digest": found.digest,
        "size_bytes": found.size_bytes,
        "report": report_of(found, threads),
    }
    if found.problems or found.card is None or found.engine is None or found.batches is None:
        return answer
    engine, figures = found.engine, dataclasses.asdict(found.engine.figures)
    return answer | {
        "card": base64.b64encode(found.card.SerializeToString()).decode(),
        "figures": figures | {"batching": engine.batching.name},
        "truncation": engine.inputs.truncation,
        "one_thread": bool(found.batches.one_thread_operator),
        "largest_batch": engine.largest_batch,
    }


class _Warnings(logging.Handler):
    """Keeps what would be logged about a file, for the server's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.getMessage(), str(getattr(record, "reason", ""))))


def _memory() -> dict[str, int]:
    """Return the sizes in /proc/self/status, in bytes."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows}


if __name__ == "__main__":
    main()

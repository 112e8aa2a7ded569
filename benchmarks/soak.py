"""Harms two replicas behind Envoy in all ways of isolation.py, one after the other, and watches what is left behind.

Each round has all harms in a random order. Two loads call all the time (open_loop.py): one by the SDK with its retries,
the other one without retries. Each minute, a line has the replicas' resident memory and open files, and the files that
are in their temporary and state folders; the last one is of the time after the replicas have ended.

Bounds: with the SDK's retries, no call fails. Without retries, none fails but in `kill`, where 1 of 1,000 may, and in
`stop`, which has no bound.

    python -m benchmarks.soak [--minutes 30] [--workers 2] [--only restart,kill,…] [--behind envoy] [--check]
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.balancing import (
    BALANCERS,
    MODEL,
    NO_RETRIES,
    Host,
    Load,
    Site,
    balanced,
    chosen,
    load,
    name_server,
    until,
)
from benchmarks.isolation import AFTER_S, BEFORE_S, HARMS, MAY_FAIL, Victim

EVERY_S = 60.0
RESTARTS = 3  # on a machine that is so busy that a start takes too long


@dataclass
class Period:
    """One harm, with the time before and after it."""

    harm: str
    began: float
    ended: float = 0.0
    note: str = ""
    failures: dict[str, Counter[str]] = field(default_factory=dict)  # by load

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Watcher:
    """Prints each minute what the replicas hold."""

    def __init__(self, running: list[Victim], temporary: Path, states: Path) -> None:
        self._running, self._temporary, self._states = running, temporary, states
        self._began, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self.print()

    def print(self) -> None:
        minute = (time.monotonic() - self._began) / 60
        held = "; ".join(f"replica {number}: {_held(one)}" for number, one in enumerate(self._running))
        left = f"{_files(self._temporary)} files in the temporary folder, {_files(self._states)} in the state folders"
        print(f"minute {minute:.1f}: {held}; {left}", flush=True)

    def _run(self) -> None:
        self.print()
        while not self._over.wait(EVERY_S):
            self.print()


def _held(one: Victim) -> str:
    pids = _tree(one.process.pid) if one.process is not None and one.process.poll() is None else []
    kib, files = 0, 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            kib += int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
            files += len(os.listdir(f"/proc/{pid}/fd"))
    return f"{len(pids)} processes, {kib / 1024:.0f} MiB, {files} open files"


def _tree(pid: int) -> list[int]:
    """Return a process, its children, and theirs."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _tree(int(child))
    return found


def _files(folder: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def tidy(one: Victim) -> None:
    """Remove what a harm leaves in a repository."""
    for left in (one.models / "large", one.models / MODEL / "2"):
        shutil.rmtree(left, ignore_errors=True)


def repair(one: Victim) -> None:
    """Make a repository as it was before a harm."""
    tidy(one)
    until(lambda: one.serves(1), "version 1", 60)


def restore(one: Victim) -> None:
    """Start a replica again in which a harm did not end as it should."""
    with contextlib.suppress(SystemExit, subprocess.TimeoutExpired):
        one.stop()
    one.kill()
    one.reads, one.environment = True, {}
    tidy(one)
    for _ in range(RESTARTS):
        with contextlib.suppress(SystemExit):
            one.start()
            return
        one.kill()
    one.start()


def soak(
    names: list[str], running: list[Victim], minutes: float, order: random.Random, log: Path | None
) -> list[Period]:
    """Harm the replicas for some minutes."""
    periods: list[Period] = []
    end, left = time.monotonic() + 60 * minutes, list[str]()
    while time.monotonic() < end:
        left = left or order.sample(names, len(names))
        for one in running:  # harms count lines; the last one stays, for the thread that reads them
            one.log.append({"event": ""})
            del one.log[:-1]
        periods.append(period := Period(left.pop(), time.monotonic()))
        try:
            time.sleep(BEFORE_S)
            period.note = HARMS[period.harm](running)
            for one in running:
                repair(one)
        except (SystemExit, OSError) as error:
            period.note = f"BROKEN: {error}"
            for one in running:
                restore(one)
        time.sleep(AFTER_S)
        period.ended = time.monotonic()
        print(f"{period.harm}: {period.seconds:.0f} s" + (f"; {period.note}" if period.note else ""), flush=True)
        if log is not None:
            with log.open("a") as file:
                for number, one in enumerate(running):
                    lines = [line for line in list(one.log) if line["event"] not in ("", "call")]
                    file.writelines(f"{period.harm} {number} {line}\n" for line in lines)
    return periods


def table(periods: list[Period], loads: dict[str, Load], rate: float) -> str:
    """Return a line for each kind of harm, as a Markdown table."""
    for who, done in loads.items():
        for at, reason in done.failed_at:
            during = next((each for each in periods if each.began <= at < each.ended), periods[-1])
            during.failures.setdefault(who, Counter())[reason] += 1
    lines = [f"| harm | times | calls of each load | {' | '.join(loads)} |", "|---" * (3 + len(loads)) + "|"]
    for harm in dict.fromkeys(sorted(each.harm for each in periods)):
        some = [each for each in periods if each.harm == harm]
        calls = round(rate * sum(each.seconds for each in some))
        cells = [_failed(sum((each.failures.get(who, Counter()) for each in some), Counter())) for who in loads]
        lines.append(f"| {harm} | {len(some)} | {calls:,} | {' | '.join(cells)} |")
    cells = [
        f"{sum(done.failures.values())} of {done.calls:,}, the slowest {done.worst_s:.1f} s" for done in loads.values()
    ]
    return "\n".join([*lines, f"| all | {len(periods)} | | {' | '.join(cells)} |"])


def _failed(reasons: Counter[str]) -> str:
    return f"{reasons.total()} failed" + "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))


def broken(periods: list[Period], loads: dict[str, Load], rate: float) -> list[str]:
    """Return the bounds that do not hold, each with the harm."""
    found = [f"{each.harm}: {each.note}" for each in periods if each.note.startswith("BROKEN")]
    for who, done in loads.items():
        for harm in dict.fromkeys(each.harm for each in periods):
            some = [each for each in periods if each.harm == harm]
            count = sum(each.failures.get(who, Counter()).total() for each in some)
            may = MAY_FAIL.get(HARMS[harm], 0) if done is not loads["the SDK retries"] else 0
            if count > may * (1 + rate * sum(each.seconds for each in some) / 1000):
                found.append(f"{harm}, {who}: {count} failed")
    return found


def main() -> None:
    """Print a line for each harm and each minute, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=2, help="of each replica")
    parser.add_argument("--only", default=",".join(HARMS))
    parser.add_argument("--behind", default="envoy", help=f"one of {', '.join(BALANCERS)}")
    parser.add_argument("--rate", type=float, default=50, help="calls a second of each load")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--log", type=Path, help="a file for the replicas' log, without the lines of calls")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is broken")
    parser.add_argument("--port", type=int, default=25700, help="the first of five, on 127.0.0.1 and its neighbours")
    options = parser.parse_args()
    names, (balancer,) = chosen(options.only, tuple(HARMS)), chosen(options.behind, BALANCERS)
    with tempfile.TemporaryDirectory() as scratch:
        temporary, states = Path(scratch, "temporary"), Path(scratch, "states")
        temporary.mkdir()
        hosts = [Host(f"127.0.0.{2 + number}") for number in range(2)]
        site = Site(Host("127.0.0.1"), hosts, options.port, Path(scratch), options.check)
        running = [Victim(site, number, options.workers) for number in range(2)]
        try:
            for number, one in enumerate(running):
                os.environ["TMPDIR"] = str(temporary)  # of the replicas; this program has its own already
                one.flags = ["--load-timeout-s=20", f"--state-dir={states / str(number)}"]
                one.start()
            site.known = [one.host.ip for one in running]
            with name_server(site), balanced(balancer, site, NO_RETRIES) as address, ExitStack() as stack:
                flag = f"--rate={options.rate:g}"
                loads = {
                    "the SDK retries": stack.enter_context(load(site, address, flag, retries=True)),
                    "nobody retries": stack.enter_context(load(site, address, flag)),
                }
                watcher = Watcher(running, temporary, states)
                try:
                    periods = soak(names, running, options.minutes, random.Random(options.seed), options.log)
                    stack.close()
                    for one in running:
                        one.stop()
                finally:
                    watcher.stop()
        finally:
            for one in running:
                one.kill()
    print(f"\n{table(periods, loads, options.rate)}")
    if problems := broken(periods, loads, options.rate):
        print("\n".join(f"BROKEN: {each}" for each in problems))
        if options.check:
            sys.exit(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # also ends the started processes
        main()

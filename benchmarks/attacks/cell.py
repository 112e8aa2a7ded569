"""Measures one attack on one server: its effect on a good caller before, during and after, and its cost."""

import math
import multiprocessing
import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.attacks import attacker, caller
from benchmarks.attacks.patterns import ATTACKS
from benchmarks.attacks.servers import SERVERS, certificate
from benchmarks.running import Running
from benchmarks.serving import cpu_s

MOST_P99_MS = {1: 50.0, 50: 250.0}  # by the least number of connections
MOST_LEFT_MIB = 32.0
SETTLED_MIB = 8.0  # with at most this growth, the memory counts as released
QUIET_P99_MS = 10.0  # before the attack, on an otherwise idle machine
RECOVERY_S = 30.0
_LEAST_RECOVERY_S = 0.5  # in which the good caller continues
_OPENED_A_SECOND = 800  # connections: opening thousands takes longer than an attack of some seconds
_SAMPLE_S = 0.05
_GRACE_S = 15.0  # for processes to end
_MOST_GROWTH_MIB = 6144.0  # the attack ends at this growth: the machine has no more memory
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([attacker.__name__, caller.__name__])


@dataclass(frozen=True)
class Latency:
    """The latency of the good caller, in ms."""

    p50: float
    p99: float
    longest: float
    calls: int

    @classmethod
    def of(cls, samples: list[caller.Sample]) -> "Latency":
        """Summarise samples; without any answer, the latency is infinite."""
        ms = sorted(1000 * sample.seconds for sample in samples) or [math.inf]
        return cls(ms[(len(ms) - 1) // 2], ms[math.ceil(0.99 * len(ms)) - 1], ms[-1], len(samples))


@dataclass
class Cell:
    """The measurement of one attack on one server."""

    attack: str
    connections: int
    server: str
    load: float  # of the machine, at the beginning
    before: Latency
    meanwhile: Latency
    errors: dict[str, int]  # of the good caller, from the attack's beginning to the end
    cpu: float  # cores that the server used during the attack
    peak_mib: float  # growth of the server's memory
    left_mib: float
    left_s: float  # the time of that measurement after the attack
    outcome: attacker.Outcome = field(default_factory=attacker.Outcome)
    fault: str = ""  # of the server

    def faults(self) -> list[str]:
        """Return the faults of the server that no load excuses."""
        return [*([self.fault] if self.fault else []), *self.outcome.rules_broken]

    def broken(self) -> list[str]:
        """Return the limits that are exceeded. On a busy machine, the limits on latency are higher in proportion."""
        most = MOST_P99_MS[max(count for count in MOST_P99_MS if count <= self.connections)]
        most *= max(1.0, self.before.p99 / QUIET_P99_MS)
        found = self.faults()
        if self.meanwhile.p99 > most:
            found.append(f"p99 {self.meanwhile.p99:.0f} ms, over {most:.0f} ms")
        if self.errors:
            found.append(f"{sum(self.errors.values())} errors of the good caller: {', '.join(self.errors)}")
        if self.left_mib > MOST_LEFT_MIB:
            found.append(f"{self.left_mib:.0f} MiB more after {self.left_s:.0f} s, over {MOST_LEFT_MIB:.0f} MiB")
        return found


def measure(
    name: str,
    connections: int,
    server: str,
    folder: Path,
    *,
    seconds: float,
    baseline_s: float,
    settled_mib: float,
) -> Cell:
    """Start the server and a good caller, attack, and wait until the memory is released."""
    seconds = max(seconds, connections / _OPENED_A_SECOND)
    load, tls = os.getloadavg()[0], certificate(folder) if ATTACKS[name].tls else None
    cell = None
    try:
        with SERVERS[server](tls) as running:
            stop, (ours, theirs) = _CONTEXT.Event(), _CONTEXT.Pipe()
            authority = str(tls.authority) if tls else ""
            good = _CONTEXT.Process(target=caller.run, args=(running.address, authority, stop, theirs), daemon=True)
            good.start()
            ours.recv()
            began = time.monotonic()
            time.sleep(baseline_s)
            attacked = time.monotonic()
            seen = _attack(running, name, connections, seconds, settled_mib)
            stop.set()
            samples = ours.recv() if ours.poll(_GRACE_S) else []
            good.join()
            # Including calls in flight at its beginning: one that waits during the whole attack may be the only one.
            inside = [one for one in samples if attacked < one.began + one.seconds and one.began < attacked + seconds]
            cell = Cell(
                name,
                connections,
                server,
                load,
                Latency.of([one for one in samples if began <= one.began and one.began + one.seconds <= attacked]),
                Latency.of(inside),
                dict(Counter(one.error for one in samples if one.began + one.seconds > attacked and one.error)),
                *seen,
            )
    except (SystemExit, subprocess.TimeoutExpired) as error:  # the server's end
        if cell is None:
            raise
        cell.fault = cell.fault or str(error)
    return cell


def _attack(
    running: Running, name: str, connections: int, seconds: float, settled_mib: float
) -> tuple[float, float, float, float, attacker.Outcome, str]:
    """Attack; return the CPU, the memory growth at its peak and at the end, the time of the end, and the outcome."""
    ours, theirs = _CONTEXT.Pipe()
    arguments = (name, running.address, connections, seconds, theirs)
    attacking = _CONTEXT.Process(target=attacker.run, args=arguments, daemon=True)
    cpu, before, peak, left, after, fault = 0.0, running.resident_mib(), 0.0, 0.0, 0.0, ""
    used, began = cpu_s(running.pids()), time.monotonic()
    attacking.start()
    try:
        while (elapsed := time.monotonic() - began) < seconds + _GRACE_S and not ours.poll(_SAMPLE_S):
            peak = max(peak, running.resident_mib() - before)
            if elapsed < seconds:
                cpu = (cpu_s(running.pids()) - used) / elapsed
            if peak > _MOST_GROWTH_MIB:
                fault = "memory without a bound"
                break
        outcome = ours.recv() if ours.poll() else attacker.Outcome()
        attacking.kill()
        attacking.join()
        ended = time.monotonic()
        while True:
            after, left = time.monotonic() - ended, running.resident_mib() - before
            if after >= RECOVERY_S or (after >= _LEAST_RECOVERY_S and left <= settled_mib):
                break
            time.sleep(0.1)
    except (OSError, IndexError):  # from /proc: the server is gone
        attacking.kill()
        return cpu, peak, left, after, attacker.Outcome(), "the server has ended"
    return cpu, peak, left, after, outcome, fault

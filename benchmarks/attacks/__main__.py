"""Prints as a table how named attacks on HTTP/2 and gRPC affect a good caller, with ganserve's transport and grpc.aio.

Each attack, with one connection and with fifty, hits a server of its own. Meanwhile, one good caller makes calls from
another process: one call at a time with pauses of 5 ms, ten calls on each connection; one call in four has 32 images,
the other calls have one. The attacker is a third process with lower priority; when the server cuts a connection, the
attacker reconnects after 0.1 s. The good caller's calls just before the attack are the baseline ("before"), because the
machine's other load slows them, too.

    python -m benchmarks.attacks [--only NAME] [--servers NAME] [--seconds 4] [--json FILE] [--check] [--quick]

--quick takes at most three minutes: only ganserve's transport, with the most connections of each attack, a second each,
in random order. A slow machine skips some attacks, and lists them.

The limits, for ganserve's transport: the good caller's p99 is at most 50 ms with one connection and 250 ms with fifty
or more, it sees no error, and 30 s after the attack the server's memory is at most 32 MiB above its memory before. If
the baseline's p99 is above 10 ms, because the machine is busy, the limits on latency are higher in proportion.
"""

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.attacks.attacker import Outcome
from benchmarks.attacks.cell import MOST_LEFT_MIB, SETTLED_MIB, Cell, measure
from benchmarks.attacks.patterns import ATTACKS
from benchmarks.attacks.servers import OWN, SERVERS

TRIES = 2  # the machine may have been busy with something else
QUICK_CONNECTIONS = 1000
QUICK_S = 140.0  # no cell begins after this time: the slowest take half a minute
COLUMNS = (
    "attack",
    "connections",
    "server",
    "p50 before → meanwhile, ms",
    "p99 before → meanwhile, ms",
    "longest, ms",
    "errors of calls",
    "server's CPU, cores",
    "memory at the peak, MiB",
    "memory after",
    "attacker cut; faults of the server",
    "load",
)


def cut(outcome: Outcome) -> str:
    """Describe how often connections were cut, at what age (median), and why."""
    if not outcome.cuts:
        return "no"
    ages, why = zip(*outcome.cuts, strict=True)
    age, reason = statistics.median(ages), Counter(why).most_common(1)[0][0]
    return f"{len(ages)} of {outcome.connections}, after {age:.2g} s: {reason}"


def row(cell: Cell) -> str:
    before, meanwhile = cell.before, cell.meanwhile
    fields = (
        cell.attack,
        f"{cell.connections:,}",
        cell.server,
        f"{before.p50:.1f} → {meanwhile.p50:.1f}",
        f"{before.p99:.0f} → {meanwhile.p99:.0f}",
        f"{meanwhile.longest:.0f}",
        f"{sum(cell.errors.values())} of {meanwhile.calls}",
        f"{cell.cpu:.2f}",
        f"{cell.peak_mib:+.0f}",
        f"{cell.left_mib:+.0f} MiB, {cell.left_s:.0f} s",
        "; ".join([cut(cell.outcome), *cell.faults()]),
        f"{cell.load:.1f}",
    )
    return f"| {' | '.join(fields)} |"


def plan(only: list[str], servers: list[str], connections: list[int] | None, quick: bool) -> list[tuple[str, int, str]]:
    """List what to measure: attack, connections and server."""
    wanted = []
    for name, attack in ATTACKS.items():
        if not only or any(part in name for part in only):
            counts = connections or attack.connections
            counts = [min(counts[-1], QUICK_CONNECTIONS)] if quick else counts
            wanted += [(name, count, server) for count in counts for server in servers]
    if quick:
        random.shuffle(wanted)  # a slow machine has no time for all attacks
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="attacks whose names have this in them")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, help="all by default, if quick our transport alone")
    parser.add_argument("--connections", type=int, nargs="+", help="in place of each attack's own numbers")
    parser.add_argument("--seconds", type=float, help="of each attack; 4, if quick 1")
    parser.add_argument("--json", type=Path, help="where to write all that was measured")
    parser.add_argument("--check", action="store_true", help="exit with 1 if our transport breaks a bar, twice")
    parser.add_argument("--quick", action="store_true", help="for CI: at most three minutes")
    options = parser.parse_args()
    quick, end = options.quick, time.monotonic() + QUICK_S
    servers = options.servers or ([OWN] if quick else list(SERVERS))
    wanted = plan(options.only, servers, options.connections, quick)
    if not wanted:
        parser.error(f"no such attack; there are: {', '.join(ATTACKS)}")
    seconds, baseline_s = (1.0, 0.5) if quick else (4.0, 1.5)
    seconds = options.seconds or seconds
    cells, broken, left_out = [], [], []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, connections, server in wanted:
            if quick and time.monotonic() > end:
                left_out.append(name)
                continue
            for _ in range(TRIES if options.check and server == OWN else 1):
                cell = measure(
                    name,
                    connections,
                    server,
                    Path(folder),
                    seconds=seconds,
                    baseline_s=baseline_s,
                    settled_mib=MOST_LEFT_MIB if quick or server != OWN else SETTLED_MIB,
                )
                cells.append(cell)
                print(row(cell), flush=True)
                if not cell.broken():
                    break
            else:
                broken += [cell] if server == OWN else []
            if options.json:
                options.json.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells], indent=1))
    if left_out:
        print(f"left out, as {QUICK_S:.0f} s are over: {', '.join(left_out)}", file=sys.stderr)
    for cell in broken:
        print(f"{cell.attack}, connections: {cell.connections}: {'; '.join(cell.broken())}", file=sys.stderr)
    sys.exit(bool(options.check and broken))


if __name__ == "__main__":
    main()

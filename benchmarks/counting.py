"""Measures what counting costs in a worker: prometheus-client's counters and histograms on each kind of values.

`own` are those of a process that serves alone, `files` are prometheus-client's for several processes, and `shared` are
those of the server's workers. A program for each, because prometheus-client chooses when it is imported.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import timeit

KINDS = ("own", "files", "shared")
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
CALLS, REPEATS = 50_000, 15


def measure(kind: str) -> None:
    """Print the least time of a count, and of an observation, in this process."""
    from prometheus_client import CollectorRegistry, Counter, Histogram

    if kind == "shared":
        from ganserve_server.observe.shared_metrics import WorkersMetrics, count_in

        with WorkersMetrics().memory_of(0) as descriptor:
            count_in(os.dup(descriptor))
    registry = CollectorRegistry()
    counter = Counter("calls", "Calls.", ["model"], registry=registry).labels("mlp")
    histogram = Histogram("seconds", "Seconds.", ["model"], buckets=BUCKETS, registry=registry).labels("mlp")
    times = [
        min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e9
        for call in (counter.inc, lambda: histogram.observe(0.004))
    ]
    print(f"{kind:7}{times[0]:8.0f} ns a count{times[1]:8.0f} ns an observation", flush=True)


def main() -> None:
    """Measure one kind, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS)
    kind = parser.parse_args().kind
    if kind:
        measure(kind)
        return
    for each in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            files = {"PROMETHEUS_MULTIPROC_DIR": folder} if each == "files" else {}
            subprocess.run([sys.executable, __file__, f"--kind={each}"], env={**os.environ, **files}, check=True)


if __name__ == "__main__":
    main()

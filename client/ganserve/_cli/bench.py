"""`ganserve bench`: measures how fast a server makes a model's images, as a caller sees it.

A closed loop keeps a given number of calls in flight: each call waits for the one before it, so a slow server gets
fewer calls. An open loop sends at a given rate, whatever the server does, and counts latency from the time at which a
call should have been sent. So the latency includes the wait of a call that the server or this program delayed.
Otherwise the measurement would omit that wait ("coordinated omission", G. Tene, 2013).
"""

import asyncio
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ganserve import AsyncClient
from ganserve._cli.connection import Connection, with_connection
from ganserve._cli.generating import Labels, ModelName, Version, labels_in_turn
from ganserve._cli.outcome import ExitStatus, one_line
from ganserve._cli.output import print_json
from ganserve.errors import GanserveError

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_BUSY = 0.7  # fraction of the time; if this program is busier, calls wait for it longer than it works on them
_LATE = 0.1  # fraction of the median latency that this program, and not the server, may cause
_PROBE_EVERY_S = 0.01
_BARS = 16
_BAR_WIDTH = 40
_ARROW = "←"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SEED_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class _Load:
    """The calls to make: `count` images each, for `duration_s` seconds."""

    model: str
    version: int
    count: int
    label: int | list[int] | None
    duration_s: float


@dataclass(slots=True)
class _Record:
    """The measured times of the calls, in seconds, and their errors."""

    latencies_s: list[float] = field(default_factory=list)
    # How late this program was: with the calls of an open loop, or with the probes of a closed loop.
    lags_s: list[float] = field(default_factory=list)
    queue_s: float = 0.0
    compute_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)  # by reason
    first_errors: dict[str, str] = field(default_factory=dict)  # the text of the first error of each reason
    wall_s: float = 0.0
    process_cpu_s: float = 0.0
    busy_s: float = 0.0  # the time in which the event loop's thread had work


@with_connection
def bench(
    model: ModelName,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Closed loop: number of calls in flight.", show_default="8")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=100_000, help="Open loop: calls per second, sent even if earlier calls are unfinished."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=256, help="Images per call.")] = 1,
    duration_s: Annotated[float, typer.Option("--duration", min=0.1, help="Seconds to send calls for.")] = 10.0,
    label: Labels = None,
    version: Version = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    *,
    connection: Connection,
) -> None:
    """Measure how fast the server makes images, all replicas of the address together.

    With --rate, a latency counts from the time at which the call was due. The exit status is 1 if a call failed.

    Example: ganserve bench cdcgan-mnist --rate 200
    """
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("--rate is an open loop and --concurrency a closed one; give one of them")
    concurrency = concurrency or 8
    with connection.client() as client:
        described = client.model(model, version)
        labels = labels_in_turn(label, count, described)
        # Not measured: a warm-up, which also reports a request that the server refuses.
        client.generate(model, count=count, seed=0, label=labels, version=described.version)
    load = _Load(model, described.version, count, labels, duration_s)
    record = _Record()
    try:
        asyncio.run(_measure(connection, load, concurrency, rate, record))
    finally:
        # After Ctrl-C, too, report the figures so far.
        if record.wall_s:
            figures = _figures(record, load, concurrency, rate)
            if as_json:
                print_json(figures)
            else:
                print(_report(figures, np.array(record.latencies_s)))
    if failed := record.errors.total():
        calls = failed + len(record.latencies_s)
        print(f"ganserve: {failed:,} of {calls:,} calls failed ({', '.join(record.errors)})", file=sys.stderr)
    if failed or not record.latencies_s:
        raise typer.Exit(ExitStatus.NO)


async def _measure(connection: Connection, load: _Load, concurrency: int, rate: float | None, record: _Record) -> None:
    # Without retries: a refused call counts as failed.
    async with connection.async_client(retries=False) as client:
        await client.models()  # connects
        begin, busy_s, process_cpu_s = time.perf_counter(), _thread_busy_s(), time.process_time()
        try:
            if rate is None:
                await _closed_loop(client, load, concurrency, record)
            else:
                await _open_loop(client, load, rate, record)
        finally:
            record.wall_s = time.perf_counter() - begin
            record.busy_s = _thread_busy_s() - busy_s
            record.process_cpu_s = time.process_time() - process_cpu_s


def _thread_busy_s() -> float:
    """Return how long this thread ran or, if the system reports it, waited for a core; in seconds."""
    try:
        ran_ns, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return time.thread_time()
    return (int(ran_ns) + int(waited_ns)) / 1e9


async def _closed_loop(client: AsyncClient, load: _Load, concurrency: int, record: _Record) -> None:
    loop = asyncio.get_running_loop()
    until, stopped = time.perf_counter() + load.duration_s, threading.Event()
    numbers = iter(range(_SEED_LIMIT))

    async def caller() -> None:
        while time.perf_counter() < until:
            await _call(client, load, next(numbers), time.perf_counter(), record)

    def probe() -> None:
        # This thread measures how long an answer waits until the event loop handles it.
        while (now := time.perf_counter()) < until:
            loop.call_soon_threadsafe(lambda: record.lags_s.append(time.perf_counter() - now))
            if stopped.wait(_PROBE_EVERY_S):
                return

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(caller())
        try:
            await asyncio.to_thread(probe)
        finally:
            stopped.set()  # otherwise the thread would keep the program alive


async def _open_loop(client: AsyncClient, load: _Load, rate: float, record: _Record) -> None:
    loop = asyncio.get_running_loop()
    begin, stopped = time.perf_counter(), threading.Event()

    async with asyncio.TaskGroup() as calls:

        def send(number: int, intended: float) -> None:
            if stopped.is_set():
                return
            record.lags_s.append(time.perf_counter() - intended)
            calls.create_task(_call(client, load, number, intended, record))

        def keep_time() -> None:
            # A thread's wait is accurate to about 0.1 ms; the event loop rounds waits up to whole milliseconds.
            for number in range(max(1, round(rate * load.duration_s))):
                intended = begin + number / rate
                if stopped.wait(max(0.0, intended - time.perf_counter())):
                    return
                loop.call_soon_threadsafe(send, number, intended)

        try:
            await asyncio.to_thread(keep_time)
        finally:
            stopped.set()


async def _call(client: AsyncClient, load: _Load, number: int, intended: float, record: _Record) -> None:
    try:
        batch = await client.generate(
            load.model,
            count=load.count,
            seed=number * load.count % _SEED_LIMIT,
            label=load.label,
            version=load.version,
        )
    except GanserveError as error:
        record.errors[error.reason] += 1
        record.first_errors.setdefault(error.reason, one_line(error))
        return
    record.latencies_s.append(time.perf_counter() - intended)
    record.queue_s += batch.queue_s
    record.compute_s += batch.compute_s


def _figures(record: _Record, load: _Load, concurrency: int, rate: float | None) -> dict[str, Any]:
    done = len(record.latencies_s)
    figures: dict[str, Any] = {
        "model": load.model,
        "version": load.version,
        "loop": "closed" if rate is None else "open",
        **({"concurrency": concurrency} if rate is None else {"rate": rate}),
        "images_per_call": load.count,
        "seconds": record.wall_s,
        "calls": done,
        "errors": dict(record.errors.most_common()),
        "first_errors": record.first_errors,
        "calls_per_second": done / record.wall_s,
        "images_per_second": done * load.count / record.wall_s,
        "latency_ms": _in_ms(record.latencies_s),
        "server_ms": {
            "queue": 1e3 * record.queue_s / done if done else None,
            "compute": 1e3 * record.compute_s / done if done else None,
        },
        "client_cpu_cores": record.process_cpu_s / record.wall_s,
        "client_busy": record.busy_s / record.wall_s,
    }
    figures["client_lag_ms"] = _in_ms(record.lags_s)
    figures["warnings"] = _warnings(figures)
    return figures


def _in_ms(seconds: list[float]) -> dict[str, float] | None:
    """Return the mean, percentiles (measured values, without interpolation), and the maximum."""
    if not seconds:
        return None
    values = np.array(seconds) * 1e3
    percentiles = np.percentile(values, PERCENTILES, method="higher")
    named = {f"p{name:g}": float(value) for name, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(values.mean()), **named, "max": float(values.max())}


def _warnings(figures: dict[str, Any]) -> list[str]:
    warnings = []
    # If most calls fail, this program is busy with errors, however fast it is.
    if figures["client_busy"] > _BUSY and sum(figures["errors"].values()) <= figures["calls"]:
        warnings.append(
            f"this program was busy for {figures['client_busy']:.0%} of the time, on "
            f"{figures['client_cpu_cores']:.2f} cores: it is the bottleneck, not the server; give it cores of its "
            "own, request more images per call (--count), or run several at once and add their results"
        )
    lag, latency = figures["client_lag_ms"], figures["latency_ms"]
    for name in ("p50", "p99"):
        if lag and latency and lag[name] > _LATE * latency[name]:
            warnings.append(
                f"this program was itself {lag[name]:.2f} ms late ({name}), and the latencies ({name}: "
                f"{latency[name]:.2f} ms) include that; reduce the load, or run it where it has cores of its own"
            )
            break
    if 0 < figures["calls"] < 1000:
        warnings.append(
            f"p99.9 of {figures['calls']} calls is the slowest of them; a longer --duration makes more calls"
        )
    if figures["errors"]:
        warnings.append("the latencies include only the calls that succeeded")
    return warnings


def _report(figures: dict[str, Any], latencies_s: NDArray[np.float64]) -> str:
    """Return the figures as text, with a histogram of latencies [n] in seconds."""
    how = (
        f"{figures['concurrency']} calls in flight"
        if figures["loop"] == "closed"
        else f"{figures['rate']:g} calls/s, open loop"
    )
    lines = [
        f"{figures['model']} version {figures['version']}: {how}, {figures['images_per_call']} image(s) each, "
        f"{figures['seconds']:.1f} s",
        f"{figures['calls_per_second']:,.1f} calls/s, {figures['images_per_second']:,.1f} images/s; "
        f"this program used {figures['client_cpu_cores']:.2f} cores",
    ]
    if figures["errors"]:
        failed = sum(figures["errors"].values())
        lines.append(f"{failed:,} call{'s' * (failed > 1)} failed; by reason, with the text of the first error:")
        lines += [
            f"{number:>9,} {reason}: {figures['first_errors'][reason]}" for reason, number in figures["errors"].items()
        ]
    if figures["latency_ms"]:
        lines += ["", _row("", figures["latency_ms"]), _row("latency, ms", figures["latency_ms"], values=True)]
        lines.append(_row("client lag, ms", figures["client_lag_ms"], values=True))
        server = figures["server_ms"]
        lines.append(f"in the server, on average: {server['queue']:.2f} ms queue, {server['compute']:.2f} ms compute")
        lines += ["", *histogram(latencies_s * 1e3)]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in figures["warnings"])])


def _row(title: str, figures: dict[str, float], *, values: bool = False) -> str:
    return f"{title:<15}" + "".join(f"{f'{value:.2f}' if values else name:>10}" for name, value in figures.items())


def histogram(values_ms: NDArray[np.float64]) -> list[str]:
    """Return the lines of a histogram of values [n]. The bin edges grow by a constant factor, to suit latencies."""
    low, high = max(values_ms.min(), 1e-3), max(values_ms.max(), 2e-3)
    edges = np.geomspace(low, max(high, low * 1.01), _BARS + 1)
    edges[0], edges[-1] = min(values_ms.min(), edges[0]), max(values_ms.max() + 1e-9, edges[-1])
    counts, _ = np.histogram(values_ms, edges)
    marks = np.percentile(values_ms, PERCENTILES, method="higher")
    lines = []
    for index, number in enumerate(counts):
        first, last = edges[index], edges[index + 1]
        eighths = round(8 * _BAR_WIDTH * number / counts.max())
        if number and not eighths:
            eighths = 1
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        here = ", ".join(f"p{name:g}" for name, mark in zip(PERCENTILES, marks, strict=True) if first <= mark < last)
        lines.append(f"{first:>9.2f} ms {number:>8} {bar}{here and f'  {_ARROW} {here}'}".rstrip())
    return lines

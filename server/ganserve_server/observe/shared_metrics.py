"""The metrics of several workers, added up by their supervisor, without a file.

Each worker counts in memory that the supervisor has made for it (memfd). When the worker has ended, the supervisor
keeps its counters and histograms, and frees the memory with its gauges. So totals never go backwards, and nothing
grows with the number of workers that have ended.

prometheus-client's own way is files in a folder: two for each ended process that stay for ever, and a process that ends
by SIGBUS when the file system is full. Its documentation does not promise what is used of it here: the class of its
values. `tests/server/test_shared_metrics.py` fails, and names the version, if that has changed.
"""

import functools
import json
import logging
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from prometheus_client import values
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

_log = logging.getLogger(__name__)

_CELL_BYTES = 8
_MEMORY_BYTES = 64 << 20  # addresses for 280,000 series; a worker with four models has 500
_RESERVED_BYTES = 256 << 10  # that the system gives at a time, so that no write finds it without memory (SIGBUS)
_LIVE: dict[str, Callable[[Iterable[float]], float]] = {
    "livesum": sum,
    "livemax": max,
    "livemin": min,
}  # modes of gauges

_Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Series:
    """A sample of a metric, as prometheus-client names it; a histogram has one for each bucket, and one for its sum."""

    metric: str
    kind: str  # counter, gauge or histogram
    help: str
    mode: str  # of a gauge
    name: str
    labels: _Labels  # without that of the bound
    bound: float | None  # of a bucket, which counts the values between the next smaller bound and this one


class WorkerMemory:
    """The series and values of one worker, in memory that it shares with the supervisor.

    The first cell has the number of cells in use. Each series has one cell for the length of its description, the
    description as JSON, and one cell for the value. A series is in use once it is complete, so a worker may be killed
    at any time, and the supervisor may read at any time.

    Args:
        descriptor: the shared memory.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = mmap.mmap(descriptor, _MEMORY_BYTES)
        self._counts = memoryview(self._bytes).cast("q")
        self._values = memoryview(self._bytes).cast("d")
        self._reserved = _RESERVED_BYTES
        self._added: dict[bytes, int] = {}  # in the worker: descriptions, each with the cell of its value
        self._series: dict[_Series, int] = {}  # in the supervisor: the same of those that were read
        self._read = 1  # the first cell that was not read yet
        self._full = False
        self._lock = Lock()

    def add(self, description: list[Any]) -> "tuple[memoryview[float], int]":
        """Find a series, or add it with the value 0; return the cells and the index of its cell.

        If there is no memory for it, the cell is this process's own, and the supervisor does not see it.
        """
        text = json.dumps(description).encode()
        with self._lock:
            if text in self._added:
                return self._values, self._added[text]
            start = self._counts[0] or 1
            place = start + 1 + -(-len(text) // _CELL_BYTES)
            try:
                self._reserve((place + 1) * _CELL_BYTES)
            except OSError as error:
                if not self._full:
                    _log.error(
                        "there is no memory for more metrics; new ones are missing", extra={"reason": str(error)}
                    )
                self._full = True
                return memoryview(bytearray(_CELL_BYTES)).cast("d"), 0
            first = (start + 1) * _CELL_BYTES
            self._bytes[first : first + len(text)] = text
            self._counts[start] = len(text)
            self._values[place] = 0.0
            self._counts[0] = place + 1  # from here on, the supervisor sees it
            self._added[text] = place
        return self._values, place

    def read(self) -> Iterator[tuple[_Series, float]]:
        """Return all series with their values."""
        used = self._counts[0]
        while self._read < used:
            size, first = self._counts[self._read], (self._read + 1) * _CELL_BYTES
            metric, kind, help_, mode, name, labels = json.loads(self._bytes[first : first + size])
            bound = float(labels.pop()[1]) if name.endswith("_bucket") else None
            place = self._read + 1 + -(-size // _CELL_BYTES)
            self._series[_Series(metric, kind, help_, mode, name, tuple(map(tuple, labels)), bound)] = place
            self._read = place + 1
        for series, place in self._series.items():
            yield series, self._values[place]

    def _reserve(self, size: int) -> None:
        while size > self._reserved:
            _reserve(self._descriptor, self._reserved + _RESERVED_BYTES)
            self._reserved += _RESERVED_BYTES


def _reserve(descriptor: int, size: int) -> None:
    """Have the system give the first bytes of the memory.

    Raises:
        OSError: there is not so much.
    """
    if size > _MEMORY_BYTES:
        raise OSError(f"the metrics of a worker may take {_MEMORY_BYTES >> 20} MiB")
    os.posix_fallocate(descriptor, 0, size)


class _SharedValue:
    """A value of prometheus-client, in a worker's memory; it has the methods of prometheus_client.values.MutexValue."""

    def __init__(
        self,
        memory: WorkerMemory,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Iterable[str],
        labelvalues: Iterable[str],
        help_text: str,
        multiprocess_mode: str = "",
        **_: object,
    ) -> None:
        labels = list(zip(labelnames, labelvalues, strict=True))
        self._cells, self._place = memory.add([metric_name, typ, help_text, multiprocess_mode, name, labels])
        self._lock = Lock()

    def inc(self, amount: float) -> None:
        with self._lock:  # threads also count
            self._cells[self._place] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        with self._lock:
            self._cells[self._place] = value

    def get(self) -> float:
        return float(self._cells[self._place])

    def set_exemplar(self, exemplar: object) -> None:
        """Do nothing: the server has no exemplars."""

    def get_exemplar(self) -> None:
        """Return None: the server has no exemplars."""


def count_in(descriptor: int) -> None:
    """Have all metrics that this process makes from now on keep their values in the supervisor's memory."""
    values.ValueClass = functools.partial(_SharedValue, WorkerMemory(descriptor))


class WorkersMetrics:
    """The sums over all workers, including those that have ended, as a collector of prometheus-client."""

    def __init__(self) -> None:
        self._memories: dict[int, WorkerMemory] = {}
        self._ended: dict[_Series, float] = defaultdict(float)
        self._lock = Lock()  # a scrape has a thread

    @contextmanager
    def memory_of(self, worker: int) -> Iterator[int]:
        """Make memory for a worker that is to be started in this block; yield the descriptor to pass to it.

        Raises:
            OSError: there are too few file descriptors, or too little memory.
        """
        self.ended(worker)
        descriptor = os.memfd_create("ganserve-metrics")
        try:
            os.ftruncate(descriptor, _MEMORY_BYTES)
            _reserve(descriptor, _RESERVED_BYTES)
            with self._lock:
                self._memories[worker] = WorkerMemory(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def ended(self, worker: int) -> None:
        """Keep what a worker has counted, and free its memory: the worker has ended."""
        with self._lock:
            if (memory := self._memories.pop(worker, None)) is not None:
                for series, value in memory.read():
                    if series.kind != "gauge":
                        self._ended[series] += value

    def collect(self) -> Iterator[Metric]:
        """Return all metrics."""
        with self._lock:
            found = {series: [value] for series, value in self._ended.items()}
            for memory in self._memories.values():
                for series, value in memory.read():
                    found.setdefault(series, []).append(value)
        children: dict[tuple[str, _Labels], list[tuple[_Series, float]]] = defaultdict(list)
        for series, each in found.items():
            children[series.metric, series.labels].append((series, _LIVE.get(series.mode, sum)(each)))
        metrics: dict[str, Metric] = {}
        for (name, labels), samples in children.items():
            first = samples[0][0]
            metric = metrics.setdefault(name, Metric(name, first.help, first.kind))
            count = 0.0
            for series, value in sorted(samples, key=lambda sample: sample[0].bound or 0.0):
                if series.bound is None:
                    metric.add_sample(series.name, dict(labels), value)
                else:
                    count += value
                    le = {"le": floatToGoString(series.bound)}
                    metric.add_sample(series.name, {**dict(labels), **le}, count)
            if first.kind == "histogram":
                metric.add_sample(f"{name}_count", dict(labels), count)
        yield from metrics.values()

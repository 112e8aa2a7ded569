"""Starts several worker processes on one port, watches them, replaces any that dies, and ends them together.

The workers share the listening sockets, and each accepts only while it has no more connections than the others. This
spreads connections evenly. The kernel's hash (SO_REUSEPORT) does not, for the few connections of a load balancer.
Counters are sums over all workers, including dead ones: prometheus-client keeps them in files.
"""

import asyncio
import functools
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector

from ganserve_server.observe.metrics import Load
from ganserve_server.processes.channel import MAX_LINE_BYTES, WORKER_VARIABLE
from ganserve_server.processes.systemd import SOCKET_VARIABLE
from ganserve_server.shared.rates import RATES_BYTES
from ganserve_server.shared.scoreboard import Scoreboard, scoreboard_bytes
from ganserve_server.start_errors import StartError

_log = logging.getLogger(__name__)

_RESTART_DELAYS_S = (0.1, 1.0, 5.0, 15.0)
_LONG_LIFE_S = 30.0


class _Worker:
    """One process, as the supervisor sees it."""

    def __init__(self, number: int, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self.number, self.process, self._channel = number, process, channel
        self.started = time.monotonic()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._asking = asyncio.Lock()

    async def ready(self) -> dict[str, Any] | None:
        """Wait until the worker serves; return its first message, or None if it ended before."""
        async with self._asking:  # requests wait until then
            self._reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=MAX_LINE_BYTES)
            return await self._read()

    async def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Send a request; return the answer, or None if the worker ended meanwhile."""
        # Shielded: if the caller disconnects, the answer must still be read, or it would answer the next request.
        return await asyncio.shield(self._exchange(request))

    async def _exchange(self, request: dict[str, Any]) -> dict[str, Any] | None:
        async with self._asking:
            self._writer.write(json.dumps(request).encode() + b"\n")
            return await self._read()

    def signal(self, number: signal.Signals) -> None:
        """Send the worker a signal."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def _read(self) -> dict[str, Any] | None:
        with suppress(OSError):
            if (line := await self._reader.readline()).endswith(b"\n"):  # otherwise the worker has ended
                message: dict[str, Any] = json.loads(line)
                return message
        return None


class Supervisor:
    """Keeps `count` workers running."""

    def __init__(self, count: int, sockets: list[socket.socket]) -> None:
        self._count, self._sockets = count, sockets
        self._memory = os.memfd_create("ganserve-scoreboard")
        os.ftruncate(self._memory, scoreboard_bytes(count))
        self._rates = os.memfd_create("ganserve-rates")
        os.ftruncate(self._rates, RATES_BYTES)
        self._board = Scoreboard(self._memory, count, mine=0)
        for number in range(count):
            self._board.absent(number)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="ganserve-metrics-"))
        except OSError as error:
            raise StartError(
                f"workers share their metrics in temporary files, but there is no folder for them ({error.strerror}): "
                "set the variable TMPDIR to a folder, such as /dev/shm, or use --workers 1"
            ) from error
        self._workers: dict[int, _Worker] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False
        self.unloaded: set[str] = set()  # models that an operator has unloaded
        self.registry = CollectorRegistry()
        MultiProcessCollector(self.registry, str(self._folder))
        self.registry.register(_Processes(self))
        self.registry.register(Load(self._board.load))

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers.values()]

    @property
    def serves(self) -> bool:
        """Whether any worker has a model."""
        return self._board.serving() > 0

    async def start(self) -> dict[str, Any] | None:
        """Start all workers; return the first message of one, or None if none starts and the first has logged why.

        Raises:
            StartError: no worker starts, and the first has not logged why, for example because it was killed.
        """
        # At the same time: otherwise the first to serve would take all connections until the others serve.
        ready = await asyncio.gather(*(self._start(number) for number in range(self._count)))
        facts = next((one for one in ready if one is not None), None)
        if facts is None:
            status = await self._workers[0].process.wait()
            if status == 1:
                return None
            raise StartError(f"a worker ended with status {status} before it served")
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(self._count)]
        return facts

    def signal(self, number: signal.Signals) -> None:
        """Send all workers a signal."""
        for worker in self._workers.values():
            worker.signal(number)

    async def ask_all(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Send all workers a request; return the answers of the live ones."""
        answers = await asyncio.gather(*(worker.ask(request) for worker in self._workers.values()))
        return [answer for answer in answers if answer is not None]

    async def stop(self, timeout_s: float) -> None:
        """End all workers; kill those that take longer than the timeout."""
        self._stopping = True
        self.signal(signal.SIGTERM)
        # Otherwise the kernel would complete connections that no worker accepts.
        for listening in self._sockets:
            listening.close()
        ends = asyncio.gather(*(worker.process.wait() for worker in self._workers.values()))
        try:
            await asyncio.wait_for(asyncio.shield(ends), timeout_s)
        except TimeoutError:
            _log.error("workers do not end; they are killed", extra={"timeout_s": timeout_s})
            self.signal(signal.SIGKILL)
            await ends
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def close(self) -> None:
        """Kill remaining processes, if the start failed, and remove the metrics' files."""
        self.signal(signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self, number: int, *, replaces: bool = False) -> dict[str, Any] | None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        descriptors, unloaded = [bound.fileno() for bound in self._sockets], sorted(self.unloaded)
        variable = {
            "number": number,
            "workers": self._count,
            "sockets": descriptors,
            "board": self._memory,
            "rates": self._rates,
            "channel": theirs.fileno(),
            "unloaded": unloaded,
            "replaces": replaces,
            "folder": str(self._folder),
        }
        environment = {
            **os.environ,
            WORKER_VARIABLE: json.dumps(variable),
            "PROMETHEUS_MULTIPROC_DIR": str(self._folder),
        }
        environment.pop(SOCKET_VARIABLE, None)  # only the supervisor reports to systemd
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ganserve_server",
            *sys.argv[1:],
            env=environment,
            pass_fds=(*descriptors, self._memory, self._rates, theirs.fileno()),
            process_group=0,  # a terminal's Ctrl-C reaches only the supervisor, which ends the workers
        )
        theirs.close()
        worker = self._workers[number] = _Worker(number, process, ours)
        ready = await worker.ready()
        for model in self.unloaded.symmetric_difference(unloaded):  # since the worker was started
            await worker.ask({"do": "unload" if model in self.unloaded else "load", "model": model})
        if self._stopping:
            worker.signal(signal.SIGTERM)
        return ready

    async def _keep(self, number: int) -> None:
        """Replace a worker whenever it ends."""
        quick_ends = 0
        while True:
            worker = self._workers[number]
            status = await worker.process.wait()
            self._board.absent(number)
            mark_process_dead(worker.process.pid, str(self._folder))
            if self._stopping:
                return
            quick_ends = quick_ends + 1 if time.monotonic() - worker.started < _LONG_LIFE_S else 0
            delay_s = _RESTART_DELAYS_S[min(quick_ends, len(_RESTART_DELAYS_S) - 1)]
            _log.error("a worker ended; it is replaced", extra={"worker": number, "status": status, "in_s": delay_s})
            await asyncio.sleep(delay_s)
            try:
                ready = await self._start(number, replaces=True)
            except OSError as error:  # too little memory, or too few descriptors or processes; retry later
                _log.error("a worker cannot be started", extra={"worker": number, "reason": str(error)})
                worker.started = time.monotonic()
                continue
            if ready is not None:
                _log.info("worker started", extra={"worker": number, "pid": self._workers[number].process.pid})


class _Processes:
    """CPU, memory and open files of all workers together, under prometheus-client's names for one process."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        """Add up the values of all workers; the CPU seconds of a dead worker are lost."""
        totals: dict[str, float] = {}
        starts: list[float] = []
        for pid in self._supervisor.pids:
            for metric in ProcessCollector(pid=functools.partial(int, pid), registry=None).collect():
                for sample in metric.samples:
                    if sample.name == "process_start_time_seconds":
                        starts.append(sample.value)
                    else:
                        totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        for name, value in totals.items():
            if name.endswith("_total"):
                yield CounterMetricFamily(name.removesuffix("_total"), "Total of all running workers.", value)
            else:
                yield GaugeMetricFamily(name, "Total of all running workers.", value)
        if starts:
            yield GaugeMetricFamily(
                "process_start_time_seconds", "Start time of the worker that started last.", max(starts)
            )
        yield GaugeMetricFamily("ganserve_workers", "Running worker processes.", len(starts))

"""Starts several worker processes on one port, watches them, and ends them together.

A worker that ends is replaced, and one whose event loop stands still is killed and replaced.

The workers share the listening sockets, and each accepts only while it has no more connections than the others. This
spreads connections evenly. The kernel's hash (SO_REUSEPORT) does not, for the few connections of a load balancer.
Counters are sums over all workers, including dead ones (`observe.shared_metrics`).
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from ganserve_server.observe.metrics import Load
from ganserve_server.observe.shared_metrics import WorkersMetrics
from ganserve_server.processes.channel import MAX_LINE_BYTES, WORKER_VARIABLE
from ganserve_server.processes.heartbeat import INTERVAL_S, Standstill
from ganserve_server.processes.log_writer import LogWriter
from ganserve_server.processes.reports import NO_MODEL
from ganserve_server.processes.systemd import SOCKET_VARIABLE
from ganserve_server.repository.states import ProbedVersion, Served
from ganserve_server.shared.rates import RATES_BYTES
from ganserve_server.shared.scoreboard import Scoreboard, scoreboard_bytes
from ganserve_server.start_errors import StartError

_log = logging.getLogger(__name__)

_RESTART_DELAYS_S = (0.1, 1.0, 5.0, 15.0)
_LONG_LIFE_S = 30.0
# Without a beat, of a worker that starts or ends. Importing libraries takes 1 s.
_LONGEST_START_S = 60.0


class _Worker:
    """One process, as the supervisor sees it.

    Args:
        number: its place among the workers.
        process: the process.
        channel: the supervisor's end of the channel.
        on_event: called with what it reports without being asked.
        on_opened: called with the answer about a version that is served already.
    """

    def __init__(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        channel: socket.socket,
        on_event: Callable[[dict[str, Any]], None],
        on_opened: Callable[[ProbedVersion, "asyncio.Future[dict[str, Any] | None]"], None],
    ) -> None:
        self.number, self.process, self._channel = number, process, channel
        self._on_event, self._on_opened = on_event, on_opened
        self.started = time.monotonic()
        self.serves = False  # from its first message until it ends or is killed
        self.stuck = False  # and was killed
        self.facts: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self.sent: set[tuple[str, int, str]] = set()  # the versions that it was asked to open
        self._answers: dict[int, asyncio.Future[dict[str, Any] | None]] = {}
        self._ids = itertools.count()
        self._writer: asyncio.StreamWriter
        self._reading: asyncio.Task[None]

    async def connect(self) -> None:
        """Open the channel."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=MAX_LINE_BYTES)
        self._reading = asyncio.create_task(self._read(reader))

    def ask(self, request: dict[str, Any]) -> "asyncio.Future[dict[str, Any] | None]":
        """Send a request; return the future answer, which is None if the worker ends before."""
        answer: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        if self._reading.done():
            answer.set_result(None)
        else:
            number = next(self._ids)
            self._answers[number] = answer
            self._writer.write(json.dumps({"id": number, **request}).encode() + b"\n")
        return answer

    def open(self, version: ProbedVersion) -> "asyncio.Future[dict[str, Any] | None]":
        """Ask the worker to open a version."""
        self.sent.add((*version.key, version.probed.digest))
        return self.ask({"do": "open", "version": version.to_json()})

    def serve(self, versions: list[ProbedVersion], served: Served) -> "asyncio.Future[dict[str, Any] | None]":
        """Ask the worker to serve these versions, and to open before what it was not asked to open."""
        for version in versions:
            if (*version.key, version.probed.digest) not in self.sent:
                self.open(version).add_done_callback(functools.partial(self._on_opened, version))
        return self.ask({"do": "serve", "served": served.to_json()})

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while (line := await reader.readline()).endswith(b"\n"):  # otherwise the worker has ended
                message: dict[str, Any] = json.loads(line)
                if "id" in message:
                    if not (answer := self._answers.pop(message["id"])).done():
                        answer.set_result(message)
                elif message["event"] == "serving":
                    self.facts.set_result(message["facts"])
                else:
                    self._on_event(message)
        for future in (self.facts, *self._answers.values()):
            if not future.done():
                future.set_result(None)


class Supervisor:
    """Keeps `count` workers running, which serve what the lifecycle decides.

    Args:
        count: the number of workers.
        sockets: the bound sockets for calls.
        log: the log of this process.
        on_worker_ended: called with the process id and the exit status of a worker that ended by itself.
        on_withdrawn: called with a version that a worker withdrew, its digest, and the reason.
        on_unopened: called with a served version that a worker which started later cannot open, and the reason.
        open_timeout_s: how long to wait for a worker that opens a version; then it is not served by that worker yet.
        stuck_timeout_s: how long the event loop of a worker may stand still before the worker is replaced.
    """

    def __init__(
        self,
        count: int,
        sockets: list[socket.socket],
        log: LogWriter,
        *,
        on_worker_ended: Callable[[int, int], Coroutine[Any, Any, None]],
        on_withdrawn: Callable[[str, int, str, str], Coroutine[Any, Any, None]],
        on_unopened: Callable[[ProbedVersion, str], Coroutine[Any, Any, None]],
        open_timeout_s: float,
        stuck_timeout_s: float,
    ) -> None:
        self._count, self.sockets = count, sockets
        self._on_worker_ended, self._on_withdrawn, self._on_unopened = on_worker_ended, on_withdrawn, on_unopened
        self._open_timeout_s, self._stuck_timeout_s = open_timeout_s, stuck_timeout_s
        self._standstills = [Standstill() for _ in range(count)]  # by worker
        self.replaced = {"stuck": 0, "ended": 0}
        self._memory = os.memfd_create("ganserve-scoreboard")
        os.ftruncate(self._memory, scoreboard_bytes(count))
        self._rates = os.memfd_create("ganserve-rates")
        os.ftruncate(self._rates, RATES_BYTES)
        self._board = Scoreboard(self._memory, count, mine=0)
        for number in range(count):
            self._board.absent(number)
        self._metrics = WorkersMetrics()
        self._processes: dict[int, asyncio.subprocess.Process] = {}  # of the workers, also before they are connected
        self._workers: dict[int, _Worker] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False
        self._served: tuple[list[ProbedVersion], Served] | None = None
        self._handling: set[asyncio.Task[None]] = set()
        self._ended: dict[int, asyncio.Task[None]] = {}  # by process id: the search for the reason
        self.registry = CollectorRegistry()
        self.registry.register(_Workers(self._metrics, log))
        self.registry.register(_Processes(self))
        self.registry.register(Load(self._board.load))

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers.values()]

    @property
    def longest_standstill_s(self) -> float:
        """For how long an event loop of a worker stood still at most, in the last one to two minutes."""
        return max(standstill.longest_s for standstill in self._standstills)

    @property
    def missing(self) -> int:
        """How many workers answer no calls: they start, have ended, or stand still."""
        live = sum(worker.serves and not self._stands_still(worker) for worker in [*self._workers.values()])
        return self._count - live

    def why_stuck(self) -> str:
        """Return the answer to liveness probes; an empty text: not all workers stand still."""
        workers = [*self._workers.values()]  # a copy, because probes are answered in threads
        return self._describe() if workers and all(map(self._stands_still, workers)) else ""

    def why_not_serving(self) -> str:
        """Return the answer to readiness probes; an empty text: a worker serves a model."""
        if self.missing == self._count:
            return self._describe()
        return "" if self._board.serving() else NO_MODEL

    def _stands_still(self, worker: _Worker) -> bool:
        return worker.serves and self._standstills[worker.number].seconds >= self._stuck_timeout_s / 2

    def _describe(self) -> str:
        """Say of each worker why it answers no calls."""
        states = (
            f"{number} has stood still for {self._standstills[number].seconds:.1f} s"
            if self._stands_still(worker)
            else f"{number} is starting"
            for number, worker in sorted(self._workers.items())
        )
        return f"no worker answers calls: worker {', '.join(states)}"

    async def start(self) -> dict[str, Any] | None:
        """Start all workers; return the first message of one, or None if none starts and the first has logged why.

        Raises:
            StartError: no worker starts, and the first has not logged why, for example because it was killed.
        """
        watching = asyncio.create_task(self._watch())
        # At the same time: otherwise the first to serve would take all connections until the others serve.
        ready = await asyncio.gather(*(self._start(number) for number in range(self._count)))
        facts = next((one for one in ready if one is not None), None)
        if facts is None:
            status = await self._workers[0].process.wait()
            if status == 1:
                return None
            raise StartError(f"a worker ended with status {status} before it served")
        self._keepers = [watching, *(asyncio.create_task(self._keep(number)) for number in range(self._count))]
        return facts

    def signal(self, number: signal.Signals) -> None:
        """Send all workers a signal."""
        for process in self._processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    @property
    def processes(self) -> int:
        """How many workers there are."""
        return self._count

    async def open(self, version: ProbedVersion) -> str:
        """Open a version in all workers, without serving it; return why one cannot, or an empty text.

        Raises:
            StartError: the required provider is missing.
        """
        asked = {worker.open(version): worker for worker in self._workers.values()}
        if not asked:
            return ""  # the workers open it when they start
        done, waiting = await asyncio.wait(asked, timeout=self._open_timeout_s)
        for answer in waiting:  # of a worker that stands still
            answer.add_done_callback(functools.partial(self._opened_late, version))
        for answer in done:
            if (found := answer.result()) is None:
                await self._look_for_the_reason(asked[answer])
            elif "cannot_start" in found:
                raise StartError(found["cannot_start"])
            elif found["reason"]:
                return str(found["reason"])
        return ""

    async def serve(self, versions: list[ProbedVersion], served: Served) -> None:
        """Have all workers serve these versions, and no others; also those that start later."""
        self._served = versions, served
        if asked := [self._give(worker) for worker in self._workers.values()]:
            await asyncio.wait(asked, timeout=self._open_timeout_s)

    def _give(self, worker: _Worker) -> "asyncio.Future[dict[str, Any] | None]":
        """Have a worker serve what is decided."""
        assert self._served is not None
        versions, served = self._served
        self._served = versions, dataclasses.replace(served, newly_rejected=0)  # one worker counts them
        return worker.serve(versions, served)

    async def refresh(self) -> None:
        """Have all workers read changed certificates and tokens again."""
        if asked := [worker.ask({"do": "refresh"}) for worker in self._workers.values()]:
            await asyncio.wait(asked, timeout=self._open_timeout_s)

    async def stop(self, timeout_s: float) -> None:
        """End all workers; kill those that take longer than the timeout."""
        self._stopping = True
        self.signal(signal.SIGTERM)
        # Otherwise the kernel would complete connections that no worker accepts.
        for listening in self.sockets:
            listening.close()
        ends = asyncio.gather(*(process.wait() for process in self._processes.values()))
        try:
            await asyncio.wait_for(asyncio.shield(ends), timeout_s)
        except TimeoutError:
            left = [number for number, worker in self._workers.items() if worker.process.returncode is None]
            _log.error("workers do not end; they are killed", extra={"timeout_s": timeout_s, "workers": left})
            await self.kill()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def kill(self) -> None:
        """Kill all workers, and wait for their ends, after which none of them logs anything."""
        self._stopping = True
        self.signal(signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in self._processes.values()))

    def close(self) -> None:
        """Kill remaining processes, if the start failed."""
        self.signal(signal.SIGKILL)

    async def _start(self, number: int) -> dict[str, Any] | None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        descriptors = [bound.fileno() for bound in self.sockets]
        with self._metrics.memory_of(number) as metrics, _blocked(signal.SIGHUP):
            variable = {
                "number": number,
                "workers": self._count,
                "sockets": descriptors,
                "board": self._memory,
                "rates": self._rates,
                "metrics": metrics,
                "channel": theirs.fileno(),
            }
            environment = {**os.environ, WORKER_VARIABLE: json.dumps(variable)}
            environment.pop(SOCKET_VARIABLE, None)  # only the supervisor reports to systemd
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "ganserve_server",
                *sys.argv[1:],
                env=environment,
                pass_fds=(*descriptors, self._memory, self._rates, metrics, theirs.fileno()),
                process_group=0,  # a terminal's Ctrl-C reaches only the supervisor, which ends the workers
            )
        theirs.close()
        self._processes[number] = process
        self._standstills[number].seconds = 0.0  # the time without a process does not count
        worker = _Worker(number, process, ours, self._handle, self._opened_late)
        await worker.connect()
        self._workers[number] = worker
        if self._served is not None:
            self._give(worker)
        facts = await worker.facts
        worker.serves = facts is not None
        if self._stopping:
            self.signal(signal.SIGTERM)
        return facts

    def _handle(self, event: dict[str, Any]) -> None:
        """Take what a worker reports: that it withdrew a version."""
        self._begin(self._on_withdrawn(event["model"], event["version"], event["digest"], event["reason"]))

    def _opened_late(self, version: ProbedVersion, answer: "asyncio.Future[dict[str, Any] | None]") -> None:
        """Take the answer of a worker that started later than the version was served by others."""
        found = answer.result() or {}
        if reason := found.get("reason") or found.get("cannot_start"):
            self._begin(self._on_unopened(version, reason))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._handling.add(task := asyncio.create_task(work))
        task.add_done_callback(self._handling.discard)

    async def _look_for_the_reason(self, worker: _Worker) -> None:
        """Have the files quarantined that probably ended a worker."""
        status, pid = await worker.process.wait(), worker.process.pid
        if self._stopping:
            return
        if pid not in self._ended:
            self._ended[pid] = asyncio.create_task(self._on_worker_ended(pid, status))
        await self._ended[pid]

    async def _watch(self) -> None:
        """Kill each worker whose event loop stands still for too long; `_keep` replaces it."""
        killed, killed_at = 0, -math.inf
        while True:
            await asyncio.sleep(INTERVAL_S)
            for number, worker in self._workers.items():
                beat = self._board.beat_of(number)
                seconds = self._standstills[number].look(beat)
                limit_s = self._stuck_timeout_s
                if not (worker.serves and beat):  # it starts or ends
                    limit_s = max(limit_s, _LONGEST_START_S)
                if seconds < limit_s or worker.stuck or worker.process.returncode is not None:
                    continue
                # The last one must be replaced first, or have had the time for it: if all workers stand still because
                # the machine has too little memory, new processes at the same time make it worse.
                if time.monotonic() - killed_at < self._stuck_timeout_s and not self._workers[killed].serves:
                    continue
                killed, killed_at, worker.stuck, worker.serves = number, time.monotonic(), True, False
                event = "a worker is stuck; it is killed" if self._stopping else "a worker is stuck; it is replaced"
                extra = {"worker": number, "pid": worker.process.pid, "seconds": round(seconds, 1)}
                _log.error(event, extra=extra)
                worker.process.kill()

    async def _keep(self, number: int) -> None:
        """Replace a worker whenever it ends."""
        quick_ends = 0
        while True:
            worker = self._workers[number]
            status = await worker.process.wait()
            self._board.absent(number)
            self._metrics.ended(number)
            worker.serves = False
            if self._stopping:
                return
            await self._look_for_the_reason(worker)
            del self._ended[worker.process.pid]
            self.replaced["stuck" if worker.stuck else "ended"] += 1
            quick_ends = quick_ends + 1 if time.monotonic() - worker.started < _LONG_LIFE_S else 0
            delay_s = _RESTART_DELAYS_S[0 if worker.stuck else min(quick_ends, len(_RESTART_DELAYS_S) - 1)]
            if not worker.stuck:
                extra = {"worker": number, "status": status, "in_s": delay_s}
                _log.error("a worker ended; it is replaced", extra=extra)
            await asyncio.sleep(delay_s)
            try:
                ready = await self._start(number)
            except OSError as error:  # too little memory, or too few descriptors or processes; retry later
                _log.error("a worker cannot be started", extra={"worker": number, "reason": str(error)})
                worker.started = time.monotonic()
                continue
            if ready is not None:
                _log.info("worker started", extra={"worker": number, "pid": self._workers[number].process.pid})


class _Workers:
    """The metrics of all workers together, with the supervisor's dropped log lines."""

    def __init__(self, metrics: WorkersMetrics, log: LogWriter) -> None:
        self._metrics, self._log = metrics, log

    def collect(self) -> Iterator[Metric]:
        """Add up the values of all workers."""
        for metric in self._metrics.collect():
            if metric.name == "ganserve_log_lines_dropped":
                metric.samples = [one._replace(value=one.value + self._log.dropped) for one in metric.samples]
            yield metric


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Start processes with a blocked signal, which would end a process before its first step, which ignores it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


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
        missing = (
            "Workers that answer no calls: they start, have ended, or have stood still for half of --stuck-timeout-s."
        )
        yield GaugeMetricFamily("ganserve_workers_missing", missing, self._supervisor.missing)
        replaced = CounterMetricFamily(
            "ganserve_workers_replaced",
            "Workers that were replaced, by reason: stuck (they stood still for --stuck-timeout-s) or ended.",
            labels=["reason"],
        )
        for reason, count in self._supervisor.replaced.items():
            replaced.add_metric([reason], count)
        yield replaced

"""Runs the batches of all queues on the cores or on a GPU: as soon as there is room, never on a timer."""

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ganserve_server.compute.inputs import Feeds, images_in
from ganserve_server.compute.watchdog import LATE_PART, WATCHDOG, Run, Slot
from ganserve_server.errors import BatchTimedOut
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import Part
from ganserve_server.shared.scoreboard import Scoreboard

_log = logging.getLogger(__name__)

_DRAW_HERE_AT_MOST = 1 << 16  # random numbers in the event loop, which take 2 ms
# A batch on all cores delays the next call. So it runs only for a caller that seems to be alone: this many batches in a
# row ran without another call.
_LONE_BATCHES = 8
_LATE_TIMES = 4  # as long as the measured time: a batch that is late, and not only slow
_CLOSE_S = 2.0  # for the threads to end; those that do not are left behind


class _Threads:
    """Threads that compute, and the number of their batches: each thread runs one, and may have another one ready."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0
        self.work: queue.SimpleQueue[_RunningBatch | None] = queue.SimpleQueue()


@dataclass(slots=True, eq=False)
class _RunningBatch(Run):
    """A batch that waits for a thread or runs in one."""

    batcher: Batcher
    parts: list[Part]
    feeds: Feeds | None  # None: the thread draws the latents
    wide: bool
    threads: _Threads
    answered: bool = False
    replaced: bool = False  # its thread ends with it, because another one has its place


class Scheduler:
    """Runs the batches of all queues on a number of cores, or on one device.

    The cores are used in two ways: one batch on each core gives the highest throughput, and one batch on all cores
    gives a lone caller the lowest latency. A second batch may be ready behind each running one, so that no core waits
    for the event loop. Latents are drawn in the event loop, because the computing threads would wait for Python's GIL
    each time; but not the millions of random numbers of some models' noise.

    Args:
        cores: the number of cores.
        board: the scoreboard of the workers that share the cores; None: there is one process. Each worker has its own
            part of the cores, and borrows the cores of the other workers while these compute nothing.
        limit_s: how long a batch may take.
        on_overdue: called with the queue of a version and with the reason when a batch took longer.
        on_lost: called when a thread does not come back from such a batch and has been replaced.
    """

    def __init__(
        self,
        cores: int,
        board: Scoreboard | None = None,
        *,
        limit_s: float = math.inf,
        on_overdue: Callable[[Batcher, str], None] = lambda *_: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.cores = cores
        self._limit_s, self._on_overdue, self._on_lost = limit_s, on_overdue, on_lost
        own = cores if board is None else max(1, cores // board.workers)
        self._own, self._others = _Threads(own), _Threads(cores - own)
        self._board = board
        self._loop = asyncio.get_running_loop()
        self._ready: OrderedDict[Batcher, None] = OrderedDict()
        self._woken = False
        self._alone_in_a_row = 0  # batches during which no other call came
        self._numbers = itertools.count()
        self._threads: dict[Slot, threading.Thread] = {}
        for kind in (self._own, self._others):
            for _ in range(kind.count):
                self._start_thread(kind)

    def wake(self, batcher: Batcher) -> None:
        """Look at a queue in this iteration of the event loop, after all calls that arrived together are queued."""
        self._ready[batcher] = None
        if not self._idle:
            self._alone_in_a_row = 0
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self._dispatch)

    def close(self) -> None:
        """End the threads, and the batches that still run. No job may be waiting."""
        for kind in (self._own, self._others):
            kind.work.put(None)
        until = time.monotonic() + _CLOSE_S
        for slot, thread in list(self._threads.items()):  # a copy, because the event loop may replace a thread
            if (run := slot.run) is not None:
                assert isinstance(run, _RunningBatch)
                run.answered = True  # nobody waits for it, and its end is no failure
                run.end()
                if run.stuck:
                    continue
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive() and (run := slot.run) is not None:
                run.stuck = True

    def _start_thread(self, kind: _Threads) -> None:
        def tell(event: Callable[[Slot, Run], None], run: Run) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(event, slot, run)

        overdue, stuck, late = (functools.partial(tell, event) for event in (self._overdue, self._stuck, self._late))
        slot = Slot(overdue, stuck, late)
        name = f"engine-{next(self._numbers)}"
        self._threads[slot] = thread = threading.Thread(target=self._run, args=(kind, slot), name=name, daemon=True)
        thread.start()

    @property
    def _idle(self) -> bool:
        return not (self._own.taken or self._others.taken)

    @property
    def _lent(self) -> int:
        """How many cores of the other workers are idle."""
        if self._board is None or not self._others.count:
            return 0
        return max(0, self._others.count - self._board.others_running())

    @property
    def _free(self) -> int:
        """How many more batches would run at once."""
        own, others = self._own, self._others
        free = own.count - own.taken if own.taken < own.count else 0
        return free + max(0, self._lent - others.taken) if others.count else free

    @property
    def _places(self) -> int:
        """How many more batches would run at once, or be ready behind a running one."""
        own, others = self._own, self._others
        places = 2 * own.count - own.taken if own.taken < 2 * own.count else 0
        return places + max(0, 2 * self._lent - others.taken) if others.count else places

    def _next_place(self) -> _Threads:
        own, others = self._own, self._others
        if own.taken >= own.count and (others.taken < self._lent or own.taken >= 2 * own.count):
            return others
        return own

    def _dispatch(self) -> None:
        self._woken = False
        left: list[Batcher] = []  # slow, or with too few images for a batch that would have to wait
        # Read again for each batch: the other workers lend and take back their cores at any moment.
        while self._ready and (places := self._places):
            batcher, _ = self._ready.popitem(last=False)
            waiting, engine, free = batcher.waiting, batcher.model.engine, self._free
            if not waiting or batcher.late:
                continue
            unsuited = batcher.slow or waiting < batcher.least_batch_while_busy()
            if not free and unsuited and not batcher.overtaken:
                left.append(batcher)
                continue
            alone = self._idle and not self._ready
            spread = max(batcher.least_batch, math.ceil(waiting / (free or 1)))
            lone = alone and waiting <= spread and self._alone_in_a_row >= _LONE_BATCHES
            wide = lone and engine.wide_is_faster and (self._board is None or not self._board.others_running())
            # Small enough that each core can have another batch ready; otherwise cores would wait for the next calls.
            behind = max(batcher.round_trip_images(), math.ceil(waiting / places))
            batch = batcher.next_batch(min(spread, behind, batcher.batch_size()))
            if batcher.waiting:
                self._ready[batcher] = None  # behind the others
            if not batch:
                continue
            draws, feeds = [part.draw for part in batch], None
            try:
                if engine.inputs.random_values * sum(draw.count for draw in draws) <= _DRAW_HERE_AT_MOST:
                    feeds = engine.feeds(draws)
            except Exception as error:
                batcher.returned(batch)
                batcher.failed(batch, error)
                continue
            work = _RunningBatch(self._limit_s, batcher, batch, feeds, wide, self._next_place())
            self._count(work, 1)
            batcher.overtaken = False
            for other in left:
                other.overtaken = True  # only once: its images are next
            if alone and not batcher.waiting and feeds is not None and waiting <= engine.inline_images:
                self._done(work, *self._compute(work))
            else:
                work.threads.work.put(work)
        for batcher in reversed(left):
            self._ready[batcher] = None
            self._ready.move_to_end(batcher, last=False)
        if self._ready:
            busy = not self._free
            for batcher in self._ready:
                batcher.publish_waiting()
                if busy:
                    batcher.saturated()

    def _count(self, work: _RunningBatch, change: int) -> None:
        """Count a batch that starts (1) or is done (-1)."""
        if work.wide:
            for kind in (self._own, self._others):
                kind.taken += change * 2 * kind.count
        else:
            work.threads.taken += change
        if self._board is not None:
            self._board.set_running(sum(min(kind.taken, kind.count) for kind in (self._own, self._others)))

    def _run(self, kind: _Threads, slot: Slot) -> None:
        WATCHDOG.add(slot)
        while (work := kind.work.get()) is not None:
            # A new one for each batch: a batch that is asked to end just when it is done leaves the next one alone.
            work.options = onnxruntime.RunOptions()
            if work.batcher.model.engine.on_cpu:  # on a GPU, it may first wait for another model's warm-up
                work.started = time.monotonic()
            slot.run = work
            result = self._compute(work)
            slot.run = None
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits for the result
                self._loop.call_soon_threadsafe(self._done, work, *result)
            if work.replaced:
                break
            del work, result  # their model may be retired while this thread waits for the next batch
        else:
            kind.work.put(None)  # for the next thread
        WATCHDOG.remove(slot)

    @staticmethod
    def _compute(work: _RunningBatch) -> tuple[NDArray[np.uint8] | Exception | None, list[Part], float, float]:
        """Return the images of the parts that are still wanted, or the error; these parts; the start; the duration."""
        started, engine, parts, feeds = time.monotonic(), work.batcher.model.engine, work.parts, work.feeds
        if work.batcher.withdrawn:  # while the batch stood ready
            return BatchTimedOut(work.batcher.withdrawn), parts, started, 0.0
        try:
            if not all(part.job.wanted(started) for part in parts):
                parts = [part for part in parts if part.job.wanted(started)]
                if not parts:
                    return None, parts, started, 0.0
                feeds = None
            if feeds is None:
                feeds = engine.feeds([part.draw for part in parts])
            pixels = engine.compute(feeds, wide=work.wide, run=work)
            if len(pixels) != (wanted := images_in(feeds)):
                raise ValueError(f"the model made {len(pixels)} images, not {wanted}")
        except Exception as error:
            return error, parts, started, time.monotonic() - started
        return pixels, parts, started, time.monotonic() - started

    def _done(
        self,
        work: _RunningBatch,
        result: NDArray[np.uint8] | Exception | None,
        parts: list[Part],
        started: float,
        seconds: float,
    ) -> None:
        if not work.replaced:
            self._count(work, -1)
        else:
            work.batcher.late -= 1
            self.wake(work.batcher)
        self._alone_in_a_row += 1
        if self._ready and not self._woken:
            self._woken = True
            self._loop.call_soon(self._dispatch)
        if work.answered:  # it took too long
            return
        work.answered = True
        batcher = work.batcher
        batcher.returned(work.parts)
        if len(parts) < len(work.parts):
            for part in work.parts:
                if part not in parts:
                    part.job.expire()  # unless it was cancelled
        if isinstance(result, Exception):
            batcher.failed(parts, result)
        elif result is None:
            batcher.rest()
        else:
            cores = self.cores if work.wide else 1
            batcher.deliver(parts, result, started, seconds, cores, busy=not self._free)

    def _overdue(self, _: Slot, work: Run) -> None:
        """Fail the callers of a batch that takes too long, which was asked to end, and of its version."""
        assert isinstance(work, _RunningBatch)
        if work.answered:  # it has come back meanwhile
            return
        work.answered = True
        batcher, model = work.batcher, work.batcher.model
        seconds = round(time.monotonic() - work.started, 1)
        reason = (
            f"version {model.version} of model {model.name} is out of service: a batch took longer than "
            f"{work.limit_s:g} s, the limit set by --batch-timeout-s"
        )
        _log.error(
            "a batch did not end; its version is taken out of service",
            extra={
                "model": model.name,
                "version": model.version,
                "digest": model.digest,
                "images": sum(part.draw.count for part in work.parts),
                "seconds": seconds,
                "limit_s": work.limit_s,
            },
        )
        batcher.returned(work.parts)
        batcher.time_out(work.parts, reason)
        self._on_overdue(batcher, reason)

    def _stuck(self, slot: Slot, work: Run) -> None:
        """Replace a thread that does not come back from a batch that was asked to end."""
        assert isinstance(work, _RunningBatch)
        if slot.run is not work:  # it has come back meanwhile
            return
        if not work.replaced:
            self._replace_thread(work)
        model = work.batcher.model
        _log.error(
            "a thread does not come back from a batch; another one takes its place",
            extra={"model": model.name, "version": model.version, "seconds": round(time.monotonic() - work.started, 1)},
        )
        self._on_lost()

    def _late(self, slot: Slot, work: Run) -> None:
        """Let the other models compute while a batch takes much longer than expected: it may never end."""
        assert isinstance(work, _RunningBatch)
        images = sum(part.draw.count for part in work.parts)
        expected_s = work.batcher.model.engine.seconds_for(images)
        if slot.run is work and expected_s * _LATE_TIMES < work.limit_s * LATE_PART:
            self._replace_thread(work)

    def _replace_thread(self, work: _RunningBatch) -> None:
        work.replaced = True
        work.batcher.late += 1
        self._count(work, -1)
        self._threads = {slot: thread for slot, thread in self._threads.items() if thread.is_alive()}
        self._start_thread(work.threads)
        if self._ready and not self._woken:
            self._woken = True
            self._loop.call_soon(self._dispatch)

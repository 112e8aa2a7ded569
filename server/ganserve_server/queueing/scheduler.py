"""Runs the batches of all queues on the cores, or on a GPU: at once when there is room for one, never on a timer."""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ganserve_server.compute.gpu import Feeds
from ganserve_server.queueing.batcher import LEAST_BATCH, Batcher
from ganserve_server.queueing.jobs import Part
from ganserve_server.shared.scoreboard import Scoreboard

# A batch shorter than this is made where the calls are read: the way to a thread and back costs 50 to 100 µs.
_INLINE_S = 0.0003
# Of two calls that come at random, the second would wait for a batch that takes all cores: so many in a row must have
# been alone for the next to be taken for a lone caller's.
_LONE_BATCHES = 8


class _Threads:
    """Threads that compute, and how many batches they have: each runs one, and another may stand ready behind it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0
        self.work: queue.SimpleQueue[_RunningBatch | None] = queue.SimpleQueue()


@dataclass(slots=True)
class _RunningBatch:
    """A batch on its way through a thread."""

    batcher: Batcher
    parts: list[Part]
    feeds: Feeds
    wide: bool
    threads: _Threads


class Scheduler:
    """Runs the batches of all queues on so many cores, or on one device.

    Two ways to use the cores: one batch on each, which makes the most images, and one batch on all of them, which makes
    a lone caller's soonest. Behind each batch that runs another may stand ready, so that no core waits for the calls'
    own work; latents are drawn here, for the threads that compute would wait for Python's lock at each.

    Args:
        cores: how many there are.
        board: of the workers that share them, if there are several; each has its part of the cores, and those of the
            others while they compute nothing.
    """

    def __init__(self, cores: int, board: Scoreboard | None = None) -> None:
        self.cores = cores
        own = cores if board is None else max(1, cores // board.workers)
        self._own, self._others = _Threads(own), _Threads(cores - own)
        self._board = board
        self._loop = asyncio.get_running_loop()
        self._ready: OrderedDict[Batcher, None] = OrderedDict()
        self._woken = False
        self._alone_in_a_row = 0  # batches while which no other call came
        self._threads = [
            threading.Thread(target=self._run, args=(kind.work,), name=f"engine-{number}", daemon=True)
            for kind in (self._own, self._others)
            for number in range(kind.count)
        ]
        for thread in self._threads:
            thread.start()

    def wake(self, batcher: Batcher) -> None:
        """Look at a queue in this turn of the loop, once all calls that came with this one are in it."""
        self._ready[batcher] = None
        if not self._idle:
            self._alone_in_a_row = 0
        if not self._woken and self._places:
            self._woken = True
            self._loop.call_soon(self._dispatch)

    def close(self) -> None:
        """End the threads; nothing waits."""
        for kind in (self._own, self._others):
            for _ in range(kind.count):
                kind.work.put(None)
        for thread in self._threads:
            thread.join()

    @property
    def _idle(self) -> bool:
        return not (self._own.taken or self._others.taken)

    @property
    def _lent(self) -> int:
        """How many of the others' cores have nothing to compute for them."""
        if self._board is None or not self._others.count:
            return 0
        return max(0, self._others.count - self._board.others_running())

    @property
    def _free(self) -> int:
        """How many more batches would run at once."""
        own, others = self._own, self._others
        return max(0, own.count - own.taken) + max(0, self._lent - others.taken)

    @property
    def _places(self) -> int:
        """How many more batches would run at once, or stand ready."""
        own, others = self._own, self._others
        return max(0, 2 * own.count - own.taken) + max(0, 2 * self._lent - others.taken)

    def _next_place(self) -> _Threads:
        own, others = self._own, self._others
        if own.taken >= own.count and (others.taken < self._lent or own.taken >= 2 * own.count):
            return others
        return own

    def _dispatch(self) -> None:
        self._woken = False
        too_few: list[Batcher] = []  # for a batch that would not run at once
        # Asked once for each batch: the other workers lend and take back their cores at any moment.
        while self._ready and (places := self._places):
            batcher, _ = self._ready.popitem(last=False)
            waiting, engine, free = batcher.waiting, batcher.model.engine, self._free
            if not waiting:
                continue
            if not free and waiting < batcher.least_batch_while_busy() and not batcher.overtaken:
                too_few.append(batcher)
                continue
            alone = self._idle and not self._ready
            spread = max(LEAST_BATCH, math.ceil(waiting / (free or 1)))
            lone = alone and waiting <= spread and self._alone_in_a_row >= _LONE_BATCHES
            wide = lone and engine.wide_is_faster and (self._board is None or not self._board.others_running())
            # So small that each core may have another ready behind it: it would wait for the next calls' way else.
            behind = max(batcher.round_trip_images(), math.ceil(waiting / places))
            batch = batcher.next_batch(min(spread, behind, batcher.batch_size()))
            if batcher.waiting:
                self._ready[batcher] = None  # behind the others
            if not batch:
                continue
            try:
                feeds = engine.feeds([part.draw for part in batch])
            except Exception as error:
                batcher.returned(batch)
                batcher.failed(batch, error)
                continue
            work = _RunningBatch(batcher, batch, feeds, wide, self._next_place())
            self._count(work, 1)
            batcher.overtaken = False
            for other in too_few:
                other.overtaken = True  # once is enough: its few images are next
            # On a GPU it may be behind a batch that warms up another model.
            if alone and not batcher.waiting and engine.seconds_for(waiting) < _INLINE_S and engine.on_cpu:
                self._done(work, *self._compute(work))
            else:
                work.threads.work.put(work)
        for batcher in reversed(too_few):
            self._ready[batcher] = None
            self._ready.move_to_end(batcher, last=False)
        if not self._free:
            for batcher in self._ready:
                batcher.saturated()

    def _count(self, work: _RunningBatch, change: int) -> None:
        """Take note that a batch is begun, or is done."""
        if work.wide:
            for kind in (self._own, self._others):
                kind.taken += change * 2 * kind.count
        else:
            work.threads.taken += change
        if self._board is not None:
            self._board.set_running(sum(min(kind.taken, kind.count) for kind in (self._own, self._others)))

    def _run(self, queued: "queue.SimpleQueue[_RunningBatch | None]") -> None:
        while (work := queued.get()) is not None:
            result = self._compute(work)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._done, work, *result)
            del work, result  # while it waits for the next, their model may be retired

    @staticmethod
    def _compute(work: _RunningBatch) -> tuple[NDArray[np.uint8] | Exception | None, list[Part], float, float]:
        """Return the images of those parts that are still wanted, or the error; the parts; when it began; how long."""
        started, engine, parts, feeds = time.monotonic(), work.batcher.model.engine, work.parts, work.feeds
        try:
            if not all(part.job.wanted(started) for part in parts):
                parts = [part for part in parts if part.job.wanted(started)]
                if not parts:
                    return None, parts, started, 0.0
                feeds = engine.feeds([part.draw for part in parts])
            pixels = engine.compute(feeds, wide=work.wide)
            if len(pixels) != (wanted := len(feeds["latent"])):
                raise ValueError(f"the model made {len(pixels)} images of {wanted} latents")
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
        self._count(work, -1)
        self._alone_in_a_row += 1
        batcher = work.batcher
        batcher.returned(work.parts)
        if self._ready and not self._woken:
            self._woken = True
            self._loop.call_soon(self._dispatch)
        if len(parts) < len(work.parts):
            for part in work.parts:
                if part not in parts:
                    part.job.expire()  # if it was not cancelled
        if isinstance(result, Exception):
            batcher.failed(parts, result)
        elif result is None:
            batcher.rest()
        else:
            cores = self.cores if work.wide else 1
            batcher.deliver(parts, result, started, seconds, cores, busy=not self._free)

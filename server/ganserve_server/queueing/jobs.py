"""Jobs, and the lanes in which they wait."""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ganserve_server.compute.inputs import Draw
from ganserve_server.errors import DeadlineExceeded, EngineFailed, ServingError

_log = logging.getLogger(__name__)


@dataclass(slots=True)  # not frozen, which would double the time to create one
class Made:
    """The images of a draw, how long they waited, and how long their batches took."""

    pixels: NDArray[np.uint8]  # [count, height, width, channels]
    queue_s: float
    compute_s: float


class JobQueue(Protocol):
    """The queue that a job is in."""

    def drop(self, job: "Job") -> None:
        """Stop counting the images of a job that are not in a batch yet."""

    def release(self) -> None:
        """Record that a job has ended."""


class Job:
    """A draw in the queue: `taken` of its images are or were in batches, and `arrived` of these have come back."""

    __slots__ = (
        "_batch",
        "_done",
        "_queue",
        "accepted",
        "arrived",
        "compute_s",
        "count",
        "counted",
        "deadline",
        "draw",
        "fairness_key",
        "lane",
        "over",
        "pixels",
        "queue_s",
        "taken",
        "work",
    )

    def __init__(
        self,
        queue: JobQueue,
        lane: "Lane",
        draw: Draw,
        fairness_key: Hashable,
        deadline: float | None,
        *,
        counted: bool,
        done: Callable[[Made | ServingError], None],
        work: "CallWork | None",
    ) -> None:
        self._queue, self.lane, self.work = queue, lane, work
        self._batch = -1  # the last batch that images came back from
        self._done: Callable[[Made | ServingError], None] | None = done  # None once the job is over
        self.draw, self.count, self.deadline, self.counted = draw, draw.count, deadline, counted
        self.fairness_key = fairness_key
        self.accepted = time.monotonic()
        self.taken = self.arrived = 0
        self.queue_s = self.compute_s = 0.0
        self.pixels: NDArray[np.uint8] | None = None  # filled as batches come back, in any order
        self.over = False

    def cancel(self) -> None:
        """Remove the images that are not in a batch yet from the queue, because nobody waits for them."""
        if not self.over:
            self._end()

    def fail(self, error: ServingError) -> None:
        """Answer with an error."""
        if not self.over:
            self._answer(error)

    def wanted(self, now: float) -> bool:
        """Return whether a caller still waits for the job."""
        return not self.over and (self.deadline is None or now < self.deadline)

    def expire(self) -> None:
        """Answer that the deadline has passed."""
        self.fail(DeadlineExceeded("the deadline passed before the images were made"))

    def arrive(self, start: int, pixels: NDArray[np.uint8], batch: int, compute_s: float) -> None:
        """Store the images from `start` on, which batch number `batch` made; answer if the job is then complete."""
        if batch != self._batch:  # else an earlier part of this job was in the same batch
            self._batch = batch
            self.compute_s += compute_s
            if self.work is not None:
                self.work.computed(batch, compute_s)
        self.arrived += len(pixels)
        if self.over:
            return
        if len(pixels) == self.count:
            self.pixels = pixels
        else:
            if self.pixels is None:
                self.pixels = np.empty((self.count, *pixels.shape[1:]), np.uint8)
            self.pixels[start : start + len(pixels)] = pixels
        if self.arrived == self.count:
            self._answer(Made(self.pixels, self.queue_s, self.compute_s))

    def _answer(self, outcome: Made | ServingError) -> None:
        done = self._done
        assert done is not None
        self._end()
        try:
            done(outcome)
        except Exception:
            # The failure concerns one caller: the other callers in the batch must get their answers.
            _log.exception("an answer could not be written")
            try:
                done(EngineFailed("internal error"))
            except Exception:
                _log.exception("an error could not be delivered")

    def _end(self) -> None:
        self.over = True
        if self.taken < self.count:
            self._queue.drop(self)
        # The caller may refer to the job: such a cycle would keep the answer in memory until garbage collection.
        self.pixels = self._done = None
        self._queue.release()


class CallWork:
    """The times of all jobs of one call: the transport's `Work` for calls with several jobs."""

    __slots__ = ("_batch", "_first", "compute_s", "count")

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.compute_s = 0.0
        self._first: Job | None = None
        self._batch = -1

    def queued(self, job: Job) -> None:
        """Record a job."""
        if self._first is None:
            self._first = job

    def computed(self, batch: int, compute_s: float) -> None:
        """Record a batch once, although each job in it reports it."""
        if batch != self._batch:
            self._batch = batch
            self.compute_s += compute_s

    @property
    def accepted(self) -> float:
        """When the first job was queued, by time.monotonic; now if there is none."""
        return time.monotonic() if self._first is None else self._first.accepted

    @property
    def taken(self) -> int:
        """How many images of the first job are in batches."""
        return 0 if self._first is None else self._first.taken

    @property
    def queue_s(self) -> float:
        """How long the first job waited, in seconds."""
        return 0.0 if self._first is None else self._first.queue_s


@dataclass(slots=True, eq=False)
class Part:
    """The images of a job that are in one batch."""

    job: Job
    start: int
    draw: Draw


class Lane:
    """Jobs of one kind, taken round robin by fairness key, and in order for each key.

    A key's turn is one job, or `quantum` images of a larger one.
    """

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self.queues: OrderedDict[Hashable, deque[Job]] = OrderedDict()  # by fairness key; may hold jobs that are over
        self.images = 0
        self.images_of: dict[Hashable, int] = {}  # by fairness key
        self.jobs = 0

    def put(self, job: Job) -> None:
        """Add a job behind the other jobs of its key."""
        jobs = self.queues.get(job.fairness_key)
        if jobs is None:
            jobs = self.queues[job.fairness_key] = deque()
        jobs.append(job)
        self._count(job.fairness_key, job.count)
        self.jobs += 1

    def drop(self, job: Job) -> None:
        """Stop counting a job; `take` skips it."""
        self._count(job.fairness_key, job.taken - job.count)
        self.jobs -= 1
        jobs = self.queues.get(job.fairness_key)
        if jobs is not None and jobs and jobs[0] is job:
            jobs.popleft()
            if not jobs:
                del self.queues[job.fairness_key]

    def _count(self, fairness_key: Hashable, more: int) -> None:
        """Add `more`, which may be negative, to the waiting images of the lane and of a key."""
        self.images += more
        if images := self.images_of.get(fairness_key, 0) + more:
            self.images_of[fairness_key] = images
        else:
            del self.images_of[fairness_key]

    def newest(self, fairness_key: Hashable) -> Job | None:
        """Return the last job of a key, if none of it is in a batch and max_queue_images counts it."""
        jobs = self.queues.get(fairness_key)
        while jobs and jobs[-1].over:
            jobs.pop()
        return jobs[-1] if jobs and jobs[-1].counted and not jobs[-1].taken else None

    def images_before(self, fairness_key: Hashable) -> float:
        """Return the most images that precede a new job of a key, if other keys keep sending jobs as they do now."""
        if not self.jobs:
            return 0
        own = len(self.queues.get(fairness_key, ()))
        others = len(self.queues) - (own > 0)
        return (own + (own + 1) * others) * min(self.quantum, self.images / self.jobs)

    def take(self, room: int, now: float, batch: list[Part]) -> int:
        """Move up to `room` images into a batch, from the first job of each key in turn; return how many."""
        left = room
        while left and self.queues:
            key, jobs = self.queues.popitem(last=False)
            while jobs and jobs[0].over:
                jobs.popleft()
            if jobs:
                job = jobs[0]
                if not job.wanted(now):
                    self.queues[key] = jobs
                    job.expire()
                    continue
                start = job.taken
                stop = min(job.count, start + left, start - start % self.quantum + self.quantum)
                whole = stop - start == job.count
                batch.append(Part(job, start, job.draw if whole else job.draw.part(start, stop)))
                job.taken = stop
                self._count(key, start - stop)
                left -= stop - start
                if stop == job.count:
                    self.jobs -= 1
                    jobs.popleft()
                elif stop % self.quantum:
                    # Finish the quantum first: if all jobs advanced a little at a time, all would finish late.
                    self.queues[key] = jobs
                    self.queues.move_to_end(key, last=False)
                    continue
                else:
                    jobs.rotate(-1)  # this key's other jobs have their turn
            if jobs:
                self.queues[key] = jobs
        return room - left

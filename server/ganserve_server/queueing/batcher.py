"""The queue of a model version: what waits, who is next, what is refused.

What waits is taken fairly: calls for a few images go into the next batch, callers in turn, so that a request of a
thousand images, which is cut up, starves none; bulk work gets what is left, and an eighth where others wait. A request
that was cancelled or whose deadline has passed never reaches the engine, one that cannot make its deadline is refused
at once, and a batch that fails answers its own callers and nobody else's.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ganserve_server.compute.engine import Draw
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import DeadlineExceeded, DeadlineTooShort, EngineFailed, QueueFull, ServingError
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.jobs import CallWork, Job, Lane, Made, Part

_log = logging.getLogger(__name__)

LEAST_BATCH = 8  # images that are not worth being spread over more cores
_SMALL_PART = 8  # of a batch: a request up to this part of it is never cut
_BULK_PART = 8
# On two cores, batches of 16 to 24 of a model that takes 1 ms an image make as many images as larger ones.
_BATCH_S = 0.02
_ROUND_TRIP_S = 0.003  # of some calls, on busy cores
_DEADLINE_MARGIN = 1.2
_CHUNK_BATCHES, _CHUNK_S, _CHUNK_BYTES = 4, 0.005, 1 << 20
_batch_numbers = itertools.count()  # of all models: a call may be of several


class Dispatcher(Protocol):
    """Runs the batches: the scheduler, as a queue sees it."""

    cores: int

    def wake(self, batcher: "Batcher") -> None:
        """Look at a queue soon: it has a new job."""


class Batcher:
    """The queue of one model version."""

    def __init__(
        self, model: ModelVersion, max_batch_size: int, max_queue_images: int, metrics: Metrics, scheduler: Dispatcher
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.small = max(1, max_batch_size // _SMALL_PART)  # images of a request that is never cut
        self._max_queue_images = max_queue_images
        self._scheduler = scheduler
        self._small, self._large, self._bulk = (Lane(max_batch_size) for _ in range(3))
        self._counted_images = 0  # those that the queue's bound counts
        # Of a core for an image; and from image to image while some wait. The second is what counts for deadlines: the
        # calls' own work is in it, and the other models'.
        self._core_s = model.engine.seconds_for(max_batch_size) / max_batch_size
        self._pace_s = self._core_s / scheduler.cores
        self._running_images = 0
        self._bulk_credit = 0  # of an image, in eighths
        self.overtaken = False  # by another model's batch, when too few images waited for one of this model
        self._saturated_since: float | None = None  # the last batch came back, or began, with images still waiting
        self._told_waiting = 0
        self._users = 0
        self._unused = asyncio.Event()
        self._queue_seconds = metrics.queue_seconds.labels(model.name)
        self._compute_seconds = metrics.compute_seconds.labels(model.name)
        self._batch_size = metrics.batch_size.labels(model.name)
        self._queue_images = metrics.queue_images.labels(model.name)
        self._images = metrics.images.labels(model.name, str(model.version))
        self._padding_images = metrics.padding_images.labels(model.name)

    @property
    def waiting(self) -> int:
        """How many images wait."""
        return self._small.images + self._large.images + self._bulk.images

    def submit(
        self,
        draw: Draw,
        done: Callable[[Made | ServingError], None],
        *,
        fairness_key: Hashable,
        deadline: float | None,
        bulk: bool = False,
        accepted: bool = False,
        work: CallWork | None = None,
    ) -> Job:
        """Queue a draw; `done` is called with the images, or the error, once.

        Args:
            draw: what to make.
            done: called from the event loop; if it raises, once more with an error.
            fairness_key: jobs of different keys are taken in turn.
            deadline: by time.monotonic; None if there is none.
            bulk: to be made of what others leave.
            accepted: neither held to the queue's bound nor counted in it: the later chunks of a stream that was let in.
            work: of the call, where it may have several draws.

        Raises:
            QueueFull: too many images wait already.
            DeadlineTooShort: by what images took so far, it would be done only after the deadline, for what waits.
            DeadlineExceeded: it would be so even if nothing waited.
        """
        count, waiting = draw.count, self.waiting
        lane = self._small if count <= self.small else self._large
        if bulk:
            lane = self._bulk
        # An empty queue takes any request: one that is larger than the bound would else be refused for ever.
        if not accepted and self._counted_images and self._counted_images + count > self._max_queue_images:
            raise QueueFull(
                f"the queue of model {self.model.name} holds {self._max_queue_images} images and has no room for "
                f"{count} more; try again later",
                retry_after_s=waiting * self._pace_s,
            )
        if deadline is not None and not accepted and (waiting or self._running_images):
            # In turn, no job that waits goes before this one with more images than this one has.
            jobs = self._small.jobs + self._large.jobs + (self._bulk.jobs if bulk else 0)
            # And of those that are still to come, each other caller's next, as often as it is not this caller's turn.
            before = max(min(waiting, jobs * count), lane.images_before(fairness_key))
            # An image that comes too late was made in vain, so rather one too few.
            needed_s = _DEADLINE_MARGIN * (self._running_images + before + count) * self._pace_s + self._batch_s()
            left_s = deadline - time.monotonic()
            if _DEADLINE_MARGIN * count * self._pace_s > left_s:
                # Not for what waits: trying again would not help.
                raise DeadlineExceeded(
                    f"{count} images take about {count * self._pace_s:.2g} s here and the deadline is in "
                    f"{max(0.0, left_s):.2g} s; ask for fewer, or give them longer"
                )
            if needed_s > left_s:
                raise DeadlineTooShort(
                    f"with what waits, {count} images of model {self.model.name} would take about {needed_s:.2g} s, "
                    f"and the deadline is in {max(0.0, left_s):.2g} s; try again later",
                    retry_after_s=needed_s - left_s,
                )
        job = Job(self, lane, draw, fairness_key, deadline, counted=not accepted, done=done, work=work)
        if work is not None:
            work.queued(job)
        job.lane.put(job)
        self.hold()
        if job.counted:
            self._counted_images += count
        self._tell_waiting()
        self._scheduler.wake(self)
        return job

    async def make(
        self,
        draw: Draw,
        *,
        fairness_key: Hashable,
        deadline: float | None,
        bulk: bool = False,
        accepted: bool = False,
        work: CallWork | None = None,
    ) -> Made:
        """Make the images of a draw, and count it in the work of its call.

        Raises:
            ServingError: as `submit`, or the deadline passed, or the engine failed.
        """
        result: asyncio.Future[Made] = asyncio.get_running_loop().create_future()

        def done(made: Made | ServingError) -> None:
            if result.done():
                return
            if isinstance(made, Made):
                result.set_result(made)
            else:
                result.set_exception(made)

        job = self.submit(
            draw, done, fairness_key=fairness_key, deadline=deadline, bulk=bulk, accepted=accepted, work=work
        )
        try:
            return await result
        finally:
            job.cancel()

    def drop(self, job: Job) -> None:
        """Forget what of a job is not yet in a batch."""
        job.lane.drop(job)
        if job.counted:
            self._counted_images -= job.count - job.taken
        if not self.waiting:
            self._saturated_since = None
        self._tell_waiting()

    def next_batch(self, room: int) -> list[Part]:
        """Take up to `room` images from what waits."""
        now = time.monotonic()
        batch: list[Part] = []
        small, large, bulk = self._small, self._large, self._bulk
        others = small.images + large.images
        for_bulk = 0
        if bulk.images and others:
            self._bulk_credit += room
            for_bulk, self._bulk_credit = divmod(self._bulk_credit, _BULK_PART)
        # As many as if each job got an equal share; one large job at a time gets those of all of them.
        for_large = math.ceil((room - for_bulk) * large.jobs / (large.jobs + small.jobs)) if large.images else 0
        left = room - small.take(room - for_bulk - for_large, now, batch)
        left -= large.take(left - for_bulk, now, batch)
        left -= bulk.take(left, now, batch)
        if left:
            left -= small.take(left, now, batch)
            large.take(left, now, batch)
        for part in batch:
            if part.job.counted:
                self._counted_images -= part.draw.count
        self._running_images += sum(part.draw.count for part in batch)
        self._tell_waiting()
        return batch

    def batch_size(self) -> int:
        """Return how many images a batch has at most: so few that others wait little, where more would gain nothing."""
        return min(self.max_batch_size, max(LEAST_BATCH, int(_BATCH_S / max(self._core_s, 1e-9))))

    def chunk_size(self) -> int:
        """Return how many images of a stream go into a message: a batch, or several that are made in 5 ms of a core.

        A message costs its reader some 100 µs, as much as 6 images of a small model take to make.
        """
        batches = min(
            _CHUNK_S / max(self._core_s, 1e-9) // self.max_batch_size,
            _CHUNK_BYTES // (self.model.pixel_bytes * self.max_batch_size),
            _CHUNK_BATCHES,
        )
        return self.max_batch_size * max(1, int(batches))

    def least_batch_while_busy(self) -> int:
        """Return how many images are worth a batch while all cores are busy, when more may come to join it."""
        return min(self.batch_size(), max(LEAST_BATCH, self.model.engine.least_batch))

    def round_trip_images(self) -> int:
        """Return how many images keep a core busy for as long as answers and the next calls are on their way."""
        return max(LEAST_BATCH, math.ceil(_ROUND_TRIP_S / max(self._core_s, 1e-9)))

    def saturated(self) -> None:
        """Take note that images wait and no core is free."""
        if self._saturated_since is None:
            self._saturated_since = time.monotonic()

    def returned(self, batch: list[Part]) -> None:
        """Take note that a batch is done, well or not."""
        self._running_images -= sum(part.draw.count for part in batch)

    def deliver(
        self, batch: list[Part], pixels: NDArray[np.uint8], started: float, seconds: float, cores: int, *, busy: bool
    ) -> None:
        """Give a batch's images to its jobs.

        Args:
            batch: what was to be made.
            pixels: of all its images, in order.
            started: when, by time.monotonic.
            seconds: how long it took.
            cores: that it ran on.
            busy: all cores have something to do.
        """
        count = len(pixels)
        self._compute_seconds.observe(seconds)
        self._batch_size.observe(count)
        self._images.inc(count)
        if padding := self.model.engine.padding(count):
            self._padding_images.inc(padding)
        # Small batches, with their fixed cost, say little of what many images take.
        weight = 0.1 * min(1.0, count / self.batch_size())
        self._core_s += weight * (seconds * cores / count - self._core_s)
        now = time.monotonic()
        if self._saturated_since is not None:
            self._pace_s += weight * ((now - self._saturated_since) / count - self._pace_s)
        self._saturated_since = now if self.waiting or (busy and self._running_images) else None
        first, number = 0, next(_batch_numbers)
        for part in batch:
            stop = first + part.draw.count
            if not part.start:
                part.job.queue_s = started - part.job.accepted
                self._queue_seconds.observe(part.job.queue_s)
            part.job.arrive(part.start, pixels[first:stop], number, seconds)
            first = stop

    def failed(self, batch: list[Part], error: Exception) -> None:
        """Tell a batch's jobs, and the log."""
        _log.error("the engine failed", exc_info=error, extra={"model": self.model.name, "version": self.model.version})
        for part in batch:
            part.job.fail(EngineFailed("internal error"))
        self.rest()

    def rest(self) -> None:
        """Take note that no images came back: what is idle from here on is no pace."""
        if not self.waiting and not self._running_images:
            self._saturated_since = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the version, should it be retired, for a call that will queue more draws."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def hold(self) -> None:
        """Keep the version until `release`."""
        self._users += 1

    def release(self) -> None:
        """Let the version go."""
        self._users -= 1
        if not self._users:
            self._unused.set()

    async def retire(self) -> None:
        """Wait for the draws and the calls that hold the version; the caller lets no new ones come."""
        while self._users:
            self._unused.clear()
            await self._unused.wait()

    def _tell_waiting(self) -> None:
        waiting = self.waiting
        self._queue_images.inc(waiting - self._told_waiting)  # of all versions of the model
        self._told_waiting = waiting

    def _batch_s(self) -> float:
        return self.batch_size() * self._core_s

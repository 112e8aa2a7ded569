"""The queue of a model version: keeps waiting jobs, chooses the next ones, and refuses jobs.

Waiting jobs are taken fairly. Small requests go into the next batch, round robin by caller. Large requests are cut into
parts, so that a request for a thousand images starves no other. Bulk work gets the remaining room, or an eighth of each
batch while other jobs wait. A request that was cancelled or whose deadline has passed never reaches the engine. A
request that cannot meet its deadline is refused at once. A batch that fails answers only its own callers.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ganserve_server.compute.inputs import Draw
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import (
    BatchTimedOut,
    DeadlineExceeded,
    DeadlineTooShort,
    EngineFailed,
    QueueFull,
    ServingError,
)
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.jobs import CallWork, Job, Lane, Made, Part

_log = logging.getLogger(__name__)

_LEAST_BATCH = 8  # up to this many images are not worth spreading over more cores, unless they take long
_SMALL_PART = 8  # of a batch: a request up to an eighth of a batch is never cut
_BULK_PART = 8
# On two cores, with a model that takes 1 ms an image, batches of 16 to 24 images reach the throughput of larger ones.
_BATCH_S = 0.02
_LEAST_BATCH_S = 0.06  # the longest time of these images
# An image that takes this long is not worth a batch that stands ready: the next call would wait for it.
_SLOW_S = 0.008
_TURN_S = 0.5  # of a large request, before another caller's
_ROUND_TRIP_S = 0.003  # from answers to the next calls, on busy cores
_DEADLINE_MARGIN = 1.2
_CHUNK_BATCHES, _CHUNK_S, _CHUNK_BYTES = 4, 0.005, 1 << 20
_FIRST_CHUNK_S = 0.25
# gRPC's clients accept messages of 4 MiB unless they are set up otherwise. The rest is for the fields that all images
# share, and for pixels that no encoder makes smaller.
_MESSAGE_BYTES = 3984 << 10
_FIELDS_BYTES = 1 << 10  # of an image: seed, label, metadata, and a file's own headers
_batch_numbers = itertools.count()  # across all models, because one call may use several


class Dispatcher(Protocol):
    """Runs the batches: the scheduler, as a queue sees it."""

    cores: int

    def wake(self, batcher: "Batcher") -> None:
        """Look at a queue soon, because it has a new job."""


class Batcher:
    """The queue of one model version."""

    def __init__(
        self, model: ModelVersion, max_batch_size: int, max_queue_images: int, metrics: Metrics, scheduler: Dispatcher
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        # A PNG has a byte more for each row.
        self._most_a_message = max(1, _MESSAGE_BYTES // (model.pixel_bytes + model.card.height + _FIELDS_BYTES))
        self._max_queue_images = max_queue_images
        self._scheduler = scheduler
        self._lanes = [Lane(max_batch_size) for _ in range(3)]
        self._small, self._large, self._bulk = self._lanes
        self._counted_images = 0  # waiting images that count towards max_queue_images
        # `_core_s` is one core's time for an image. `_pace_s` is the time from one image to the next while images wait.
        # Deadlines are checked by the pace, because it includes the work of the calls and of the other models.
        self._core_s = model.engine.seconds_for(max_batch_size) / max_batch_size
        self._pace_s = self._core_s / scheduler.cores
        # A request for this many images is never cut. With images that take 0.1 s, a lone caller would wait for the 4
        # images of another caller's message.
        in_time = int(_BATCH_S / max(self._core_s, 1e-9))
        self.small = max(1, min(max_batch_size // _SMALL_PART, in_time))
        # Batches of a slow model wait here until a core is free, instead of behind a running one. By the engine's
        # timing: while all cores are busy, `_core_s` of a fast model is larger.
        self.slow = model.engine.seconds_for(1) > _SLOW_S
        # A batch of such a model gains nothing on the CPU: its layers no longer fit the core's cache. With images of
        # 256x256 pixels that take 9 ms, batches of 4 took up to 14.
        self._one_by_one = self.slow and model.engine.gains_nothing_from_batches
        self._running_images = 0
        self._bulk_credit = 0  # in eighths of an image
        self._large_credit = 0.0  # images
        self._take_turns()
        self.late = 0  # running batches that take much longer than expected; meanwhile no other one starts
        self.withdrawn = ""  # why the version is out of service
        self.overtaken = False  # another model's batch ran first, because too few images waited here
        self._saturated_since: float | None = None  # the start of the pace measurement; None: no images wait
        self._published_waiting = 0
        self._users = 0
        self._unused = asyncio.Event()
        self._queue_seconds = metrics.queue_seconds.labels(model.name)
        self._compute_seconds = metrics.compute_seconds.labels(model.name)
        self._batch_size = metrics.batch_size.labels(model.name)
        self._queue_images = metrics.queue_images.labels(model.name)
        self._images = metrics.images.labels(model.name, str(model.version))
        self._padding_images = metrics.padding_images.labels(model.name)
        self._timed_out = metrics.batches_timed_out.labels(model.name)

    @property
    def waiting(self) -> int:
        """The number of waiting images."""
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
            draw: the images to make.
            done: called from the event loop; if it raises, it is called once more with an error.
            fairness_key: jobs of different keys are taken in turn.
            deadline: by time.monotonic; None if there is none.
            bulk: gets the room that other jobs leave, or an eighth of each batch.
            accepted: a later chunk of an accepted stream: max_queue_images neither applies to it nor counts it.
            work: the work of the call, if the call may have several draws.

        Raises:
            QueueFull: too many images wait already, and no other key has more of them.
            DeadlineTooShort: because of the waiting images, the draw would probably miss its deadline.
            DeadlineExceeded: the draw would probably miss its deadline even if nothing waited.
            BatchTimedOut: the version is out of service.
        """
        if self.withdrawn:
            raise BatchTimedOut(self.withdrawn)
        count, waiting = draw.count, self.waiting
        lane = self._small if count <= self.small else self._large
        if bulk:
            lane = self._bulk
        # An empty queue accepts any request; otherwise a request larger than the bound would never be accepted.
        if (
            not accepted
            and self._counted_images
            and self._counted_images + count > self._max_queue_images
            and not self._make_room(fairness_key, count, bulk=bulk)
        ):
            raise self._full(count)
        if deadline is not None and not accepted and (waiting or self._running_images):
            # Round robin: no waiting job precedes this one with more images than this one has.
            jobs = self._small.jobs + self._large.jobs + (self._bulk.jobs if bulk else 0)
            # In each round that this job waits, one job of each other key precedes it, even if that job comes later.
            before = max(min(waiting, jobs * count), lane.images_before(fairness_key))
            # An image that is late is wasted, so rather refuse too many: hence the margin.
            needed_s = _DEADLINE_MARGIN * (self._running_images + before + count) * self._pace_s + self._batch_s()
            left_s = deadline - time.monotonic()
            if _DEADLINE_MARGIN * count * self._pace_s > left_s:
                # The reason is not the waiting images, so a retry would not help.
                raise DeadlineExceeded(
                    f"{count} images take about {count * self._pace_s:.2g} s here, but the deadline is in "
                    f"{max(0.0, left_s):.2g} s; request fewer images, or set a longer deadline"
                )
            if needed_s > left_s:
                raise DeadlineTooShort(
                    f"with the waiting images, {count} images of model {self.model.name} would take about "
                    f"{needed_s:.2g} s, but the deadline is in {max(0.0, left_s):.2g} s; try again later",
                    retry_after_s=needed_s - left_s,
                )
        job = Job(self, lane, draw, fairness_key, deadline, counted=not accepted, done=done, work=work)
        if work is not None:
            work.queued(job)
        job.lane.put(job)
        self.hold()
        if job.counted:
            self._counted_images += count
        self._scheduler.wake(self)
        return job

    def _full(self, count: int) -> QueueFull:
        return QueueFull(
            f"the queue of model {self.model.name} holds {self._max_queue_images} images and has no room for "
            f"{count} more; try again later",
            retry_after_s=self.waiting * self._pace_s,
        )

    def _make_room(self, fairness_key: Hashable, count: int, *, bulk: bool) -> bool:
        """Make room for a key with less than its share: refuse the newest jobs of the keys with the most images."""
        lanes = (self._bulk,) if bulk else (self._bulk, self._large, self._small)
        own = sum(lane.images_of.get(fairness_key, 0) for lane in lanes) + count
        # Under overload thousands of requests per second are refused, nearly all of them here, after two sums.
        keys = max(len(lane.images_of) for lane in lanes) + (own == count)
        if own > self._max_queue_images // keys:
            return False
        images: Counter[Hashable] = Counter()
        for lane in lanes:
            images.update(lane.images_of)
        while self._counted_images + count > self._max_queue_images:
            largest, most = images.most_common(1)[0] if images else (fairness_key, 0)
            if most <= own:
                return False
            job = next(filter(None, (lane.newest(largest) for lane in lanes)), None)
            if job is None:
                del images[largest]
                continue
            images[largest] -= job.count
            job.fail(self._full(job.count))
        return True

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
            ServingError: as in `submit`, or the deadline passed, or the engine failed.
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
        """Stop counting the images of a job that are not in a batch yet."""
        job.lane.drop(job)
        if job.counted:
            self._counted_images -= job.count - job.taken
        if not self.waiting:
            self._saturated_since = None
        self.publish_waiting()

    def next_batch(self, room: int) -> list[Part]:
        """Take up to `room` of the waiting images."""
        now = time.monotonic()
        batch: list[Part] = []
        if self._large.queues or self._bulk.queues:
            self._share(room, now, batch)
        else:
            self._small.take(room, now, batch)
        for part in batch:
            if part.job.counted:
                self._counted_images -= part.draw.count
        self._running_images += sum(part.draw.count for part in batch)
        self.publish_waiting()
        return batch

    def _share(self, room: int, now: float, batch: list[Part]) -> None:
        """Move up to `room` images of all lanes into a batch."""
        small, large, bulk = self._small, self._large, self._bulk
        for_bulk = 0
        if bulk.images and (small.images or large.images):
            self._bulk_credit += room
            for_bulk, self._bulk_credit = divmod(self._bulk_credit, _BULK_PART)
        # Each job has an equal share. The shares of all large jobs go to one large job at a time.
        share = (room - for_bulk) * large.jobs / (large.jobs + small.jobs) if large.images else 0.0
        for_large = math.ceil(share)
        if room < _LEAST_BATCH and small.images:  # slow images: rounded up, small jobs would get none
            self._large_credit = self._large_credit % 1 + share
            for_large = int(self._large_credit)
        left = room - small.take(room - for_bulk - for_large, now, batch)
        left -= large.take(left - for_bulk, now, batch)
        left -= bulk.take(left, now, batch)
        if left:
            left -= small.take(left, now, batch)
            large.take(left, now, batch)

    def batch_size(self) -> int:
        """Return the size of a full batch: small enough to keep waits short, large enough for full throughput."""
        if self._one_by_one:
            return 1
        return min(self.max_batch_size, max(self.least_batch, int(_BATCH_S / max(self._core_s, 1e-9))))

    @property
    def least_batch(self) -> int:
        """How many images are not worth spreading over more cores."""
        if self._one_by_one:
            return 1
        longest_s = _BATCH_S if self.slow else _LEAST_BATCH_S
        return max(1, min(_LEAST_BATCH, int(longest_s / max(self._core_s, 1e-9))))

    def chunk_size(self) -> int:
        """Return how many images of a stream go into one message: one batch, or more if one core makes them in 5 ms.

        A message has at most 4 batches and 1 MiB of pixels, unless one batch has more, and at most 4 MiB, unless one
        image has more. A message costs its reader about 100 µs, the time to make 6 images of a small model.
        """
        batches = min(
            _CHUNK_S / max(self._core_s, 1e-9) // self.max_batch_size,
            _CHUNK_BYTES // (self.model.pixel_bytes * self.max_batch_size),
            _CHUNK_BATCHES,
        )
        return min(self._most_a_message, self.first_chunk_size() * max(1, int(batches)))

    def first_chunk_size(self) -> int:
        """Return how many images of a stream go into its first message: what the cores make in 0.25 s, or one batch.

        They have at most 4 MiB, unless one image has more.
        """
        in_time = self._scheduler.cores * max(1, int(_FIRST_CHUNK_S / max(self._core_s, 1e-9)))
        return min(self.max_batch_size, in_time, self._most_a_message)

    def least_batch_while_busy(self) -> int:
        """Return how many images justify a batch while all cores are busy and more images may still join."""
        return min(self.batch_size(), max(self.least_batch, self.model.engine.least_batch))

    def round_trip_images(self) -> int:
        """Return how many images keep a core busy while answers and the next calls are in flight."""
        return max(self.least_batch, math.ceil(_ROUND_TRIP_S / max(self._core_s, 1e-9)))

    def saturated(self) -> None:
        """Record that images wait and no core is free."""
        if self._saturated_since is None:
            self._saturated_since = time.monotonic()

    def returned(self, batch: list[Part]) -> None:
        """Record that a batch is done, successfully or not."""
        self._running_images -= sum(part.draw.count for part in batch)

    def deliver(
        self, batch: list[Part], pixels: NDArray[np.uint8], started: float, seconds: float, cores: int, *, busy: bool
    ) -> None:
        """Give the images of a batch to its jobs.

        Args:
            batch: the parts of the jobs.
            pixels: all images of the batch, in order.
            started: when it started, by time.monotonic.
            seconds: how long it took.
            cores: how many cores it ran on.
            busy: whether all cores are busy.
        """
        count = len(pixels)
        self._compute_seconds.observe(seconds)
        self._batch_size.observe(count)
        self._images.inc(count)
        if padding := self.model.engine.padding(count):
            self._padding_images.inc(padding)
        # Small batches are mostly fixed cost, and say little about the time of many images.
        weight = 0.1 * min(1.0, count / self.batch_size())
        self._core_s += weight * (seconds * cores / count - self._core_s)
        self._take_turns()
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
        """Fail the jobs of a batch, and log the error."""
        if self.withdrawn:
            self._fail(batch)
        else:
            facts = {"model": self.model.name, "version": self.model.version}
            _log.error("the engine failed", exc_info=error, extra=facts)
            for part in batch:
                part.job.fail(EngineFailed("internal error"))
        self.rest()

    def time_out(self, batch: list[Part], reason: str) -> None:
        """Fail the jobs of a batch that does not end, and all that wait; refuse new ones.

        Args:
            batch: the parts of the jobs.
            reason: the text of their error.
        """
        self._timed_out.inc()
        self.withdrawn = reason
        self._fail(batch)
        for lane in self._lanes:
            for job in [job for jobs in lane.queues.values() for job in jobs]:
                job.fail(BatchTimedOut(reason))
        self.rest()

    def _fail(self, batch: list[Part]) -> None:
        for part in batch:
            part.job.fail(BatchTimedOut(self.withdrawn))

    def rest(self) -> None:
        """Record that no images came back: the idle time that follows does not count as pace."""
        if not self.waiting and not self._running_images:
            self._saturated_since = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the version from being retired while a call still queues draws."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def hold(self) -> None:
        """Keep the version from being retired until `release`."""
        self._users += 1

    def release(self) -> None:
        """Undo one `hold`."""
        self._users -= 1
        if not self._users:
            self._unused.set()

    async def retire(self) -> None:
        """Wait for the draws and calls that hold the version; the caller ensures that no new ones come."""
        while self._users:
            self._unused.clear()
            await self._unused.wait()

    def publish_waiting(self) -> None:
        """Add the change in the number of waiting images to the metric."""
        waiting = self.waiting
        if waiting != self._published_waiting:
            self._queue_images.inc(waiting - self._published_waiting)  # the gauge adds up all versions of the model
            self._published_waiting = waiting

    def _take_turns(self) -> None:
        turn = max(1, min(self.max_batch_size, int(_TURN_S / max(self._core_s, 1e-9))))
        for lane in self._lanes:
            lane.quantum = turn

    def _batch_s(self) -> float:
        return self.batch_size() * self._core_s

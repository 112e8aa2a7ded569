"""Groups concurrent requests into batches. A batch closes when the engine is free, never on a timer.

The queue is per image and shared fairly: every waiting request gets its part of the next batch, so that one of a
thousand images interleaves with the others and starves none. A request that was cancelled or whose deadline has passed
never reaches the engine. A batch that fails answers its own callers and nobody else's.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ganserve_server.engine import Draw
from ganserve_server.errors import DeadlineExceeded, EngineFailed, QueueFull
from ganserve_server.metrics import Metrics
from ganserve_server.repository import ModelVersion

_log = logging.getLogger(__name__)

_FIRST_BATCH_SECONDS_GUESS = 0.05


@dataclass(frozen=True, slots=True)
class Made:
    """The images of a draw, and what they waited and took."""

    pixels: NDArray[np.uint8]  # [count, height, width, channels]
    queue_s: float
    compute_s: float


@dataclass(slots=True, eq=False)
class _Job:
    """A draw on its way through the queue: images up to `taken` are in batches, `arrived` of them have come back."""

    draw: Draw
    unbounded: bool
    result: "asyncio.Future[Made]"
    deadline: float | None  # by time.monotonic
    accepted: float
    taken: int = 0
    arrived: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    parts: list[NDArray[np.uint8]] = field(default_factory=list)


class Batcher:
    """The queue of one model version, and the task that empties it into the engine."""

    def __init__(self, model: ModelVersion, max_batch_size: int, max_queue_images: int, metrics: Metrics) -> None:
        self.model = model
        self._max_batch_size = max_batch_size
        self._max_queue_images = max_queue_images
        self._jobs: deque[_Job] = deque()
        self._waiting_images = 0
        self._bounded_images = 0  # those of them that the queue's bound counts
        self._seconds_per_image = _FIRST_BATCH_SECONDS_GUESS / max_batch_size
        self._wake = asyncio.Event()
        self._users = 0
        self._unused = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{model.name}-{model.version}")
        self._queue_seconds = metrics.queue_seconds.labels(model.name)
        self._compute_seconds = metrics.compute_seconds.labels(model.name)
        self._batch_size = metrics.batch_size.labels(model.name)
        self._queue_images = metrics.queue_images.labels(model.name)
        self._images = metrics.images.labels(model.name, str(model.version))
        self._task = asyncio.create_task(self._run(), name=f"batcher {model.name} {model.version}")

    async def make(self, draw: Draw, time_remaining_s: float | None, *, accepted: bool = False) -> Made:
        """Make the images of a draw.

        Args:
            draw: what to make.
            time_remaining_s: until the caller's deadline; None if it has none.
            accepted: neither held to the queue's bound nor counted in it: the later chunks of a stream that was let in.

        Raises:
            QueueFull: too many images wait already.
            DeadlineExceeded: the deadline passed before the first image was made.
            EngineFailed: the engine raised.
        """
        # An empty queue takes any request: one that is larger than the bound would else be refused for ever.
        if not accepted and self._bounded_images and self._bounded_images + draw.count > self._max_queue_images:
            raise QueueFull(
                f"{self._bounded_images} images of model {self.model.name} are waiting and the queue holds "
                f"{self._max_queue_images}: there is no room for {draw.count} more; try again later",
                retry_after_s=self._waiting_images * self._seconds_per_image,
            )
        now = time.monotonic()
        deadline = None if time_remaining_s is None else now + time_remaining_s
        job = _Job(draw, accepted, asyncio.get_running_loop().create_future(), deadline, now)
        self._jobs.append(job)
        self._change_waiting(job, draw.count)
        self._wake.set()
        try:
            return await job.result
        finally:
            # Cancelled here, or failed: what was not yet taken is dropped, and leaves the count at once.
            if job.taken < draw.count and job in self._jobs:
                self._jobs.remove(job)
                self._change_waiting(job, job.taken - draw.count)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the version, should it be retired, for a call that will make images of it."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def retire(self) -> None:
        """Wait for the calls that hold the version, then end; the caller lets no new ones come."""
        while self._users:
            self._unused.clear()
            await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        """End the task; the caller has seen to it that nothing waits."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._executor.shutdown()

    def _change_waiting(self, job: _Job, images: int) -> None:
        self._waiting_images += images
        if not job.unbounded:
            self._bounded_images += images
        self._queue_images.inc(images)  # of all versions of the model

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._jobs:
                self._wake.clear()
                await self._wake.wait()
            batch = self._next_batch()
            if not batch:
                continue
            try:
                pixels, seconds = await loop.run_in_executor(self._executor, self._compute, [part for _, part in batch])
                self._hand_out(batch, pixels, seconds)
            except Exception:
                _log.exception("the engine failed", extra={"model": self.model.name, "version": self.model.version})
                for job, _ in batch:
                    if not job.result.done():
                        job.result.set_exception(EngineFailed("internal error"))

    def _compute(self, parts: list[Draw]) -> tuple[NDArray[np.uint8], float]:
        started = time.perf_counter()
        pixels = self.model.engine.run(parts)
        if len(pixels) != sum(part.count for part in parts):
            raise ValueError(f"the model made {len(pixels)} images of {sum(part.count for part in parts)} latents")
        return pixels, time.perf_counter() - started

    def _next_batch(self) -> list[tuple[_Job, Draw]]:
        """Take a fair share from every waiting job, oldest first, up to the batch size."""
        now = time.monotonic()
        batch: list[tuple[_Job, Draw]] = []
        room = self._max_batch_size
        unfinished: list[_Job] = []
        share = max(1, room // max(1, len(self._jobs)))
        while room and self._jobs:
            job = self._jobs.popleft()
            if job.result.done() or (job.deadline is not None and job.deadline <= now):
                self._change_waiting(job, job.taken - job.draw.count)
                job.taken = job.draw.count
                if not job.result.done():
                    job.result.set_exception(DeadlineExceeded("the deadline passed before the images were made"))
                continue
            if job.taken == 0:
                job.queue_s = now - job.accepted
                self._queue_seconds.observe(job.queue_s)
            stop = min(job.draw.count, job.taken + min(share, room))
            batch.append((job, job.draw.part(job.taken, stop)))
            room -= stop - job.taken
            self._change_waiting(job, job.taken - stop)
            job.taken = stop
            if stop < job.draw.count:
                unfinished.append(job)
            if not self._jobs and unfinished and room:
                # All have had their share and there is room left: go round once more.
                self._jobs.extend(unfinished)
                unfinished.clear()
                share = room
        self._jobs.extend(unfinished)
        return batch

    def _hand_out(self, batch: list[tuple[_Job, Draw]], pixels: NDArray[np.uint8], seconds: float) -> None:
        self._compute_seconds.observe(seconds)
        self._batch_size.observe(len(pixels))
        self._images.inc(len(pixels))
        self._seconds_per_image += 0.1 * (seconds / len(pixels) - self._seconds_per_image)
        for job in {job for job, _ in batch}:
            job.compute_s += seconds
        start = 0
        for job, part in batch:
            mine = pixels[start : start + part.count]
            start += part.count
            job.parts.append(mine)
            job.arrived += part.count
            if job.arrived == job.draw.count and not job.result.done():
                whole = job.parts[0] if len(job.parts) == 1 else np.concatenate(job.parts)
                job.result.set_result(Made(whole, job.queue_s, job.compute_s))

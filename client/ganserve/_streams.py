"""Reads StreamImages: the images of one request in order, by one or more calls.

If a call breaks, or if one call cannot ask for all images, the next call asks for the images that are missing.
`StreamProgress` knows which they are; `stream` and `stream_async` call and wait, with threads and with asyncio.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from typing import Any

import grpc

from ganserve._arguments import UINT32_LIMIT
from ganserve._calls import AsyncCalls, Calls, readable
from ganserve._forks import answers_of, cancelled_on_exit, check_fork, lost_in_fork
from ganserve._messages import first_seed, image_count, images_per_stream, stream_request, to_chunk
from ganserve._retries import Attempts
from ganserve.errors import ServerError
from ganserve.images import GeneratedImage, ImageBatch


class StreamProgress:
    """Which images of a request have arrived, and the request for the missing ones.

    A request with more labels or latents than one call may carry becomes several calls, one after the other.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self._count = image_count(request)
        self._done = 0
        self._asked = 0  # how many images are done once the current call has ended
        self._first: ImageBatch | None = None

    @property
    def complete(self) -> bool:
        """Whether all images have arrived."""
        return self._done == self._count

    def take(self, response: Any) -> ImageBatch:
        """Return the next images.

        Raises:
            ServerError: they do not follow the images before, or come from another model file.
        """
        batch = to_chunk(response, self._done, self._asked)
        first = self._first = self._first or batch
        if (batch.version, batch.digest) != (first.version, first.digest):
            raise ServerError(
                f"the images after the first {self._done} were made by version {batch.version} ({batch.digest}), the "
                f"images before by version {first.version} ({first.digest}); request all images again"
            )
        seed = self._next_seed()
        if seed is not None and (batch.seeds is None or batch.seeds[0] != seed):
            raise ServerError(f"the server's images after the first {self._done} do not start at seed {seed}")
        self._done += len(batch)
        return batch

    def check_end(self) -> None:
        """Check that the call has brought all requested images.

        Raises:
            ServerError: images are missing, although the server reports success.
        """
        if self._done < self._asked:
            raise ServerError(f"the server ended the stream after {self._done} of {self._asked} images")

    def next_request(self) -> Any:
        """Return the request for the missing images, or for as many of them as one call may ask for."""
        self._asked = min(self._count, self._done + images_per_stream(self.request))
        version = None if self._first is None else self._first.version
        return stream_request(self.request, self._done, self._asked, version, self._next_seed())

    def _next_seed(self) -> int | None:
        seed = first_seed(self.request)
        if seed is None and self._first is not None and self._first.seeds is not None:
            seed = self._first.seeds[0]
        return None if seed is None else (seed + self._done) % UINT32_LIMIT


def stream(calls: Calls, request: Any, timeout_s: float) -> Generator[ImageBatch, None, None]:
    """Yield the images of a request in batches, as the server makes them."""
    given_s, deadline = timeout_s, time.monotonic() + timeout_s
    progress, attempts = StreamProgress(request), Attempts(calls.policy)
    while not progress.complete:
        stubs, request_id = calls.connected(), uuid.uuid4().hex
        try:
            with cancelled_on_exit(
                stubs.stream_images(
                    progress.next_request(), timeout=timeout_s, metadata=calls.metadata_with(request_id)
                )
            ) as call:
                for response in call:
                    attempts.answered()
                    yield progress.take(response)
                    if lost_in_fork:
                        check_fork()
            progress.check_end()
            attempts.succeeded()
        except (grpc.RpcError, ValueError) as error:
            failure = calls.failure(error, given_s, request_id)
            if not progress.complete:  # otherwise the end of the call no longer matters
                corrected = calls.prepare_retry(failure, progress.request, attempts, deadline)
                progress.request = corrected or progress.request
        timeout_s = deadline - time.monotonic()


async def stream_async(calls: AsyncCalls, request: Any, timeout_s: float) -> AsyncGenerator[ImageBatch, None]:
    """Yield the images of a request in batches, as `stream` does."""
    given_s, deadline = timeout_s, time.monotonic() + timeout_s
    progress, attempts = StreamProgress(request), Attempts(calls.policy)
    while not progress.complete:
        stubs, request_id = calls.connected(), uuid.uuid4().hex
        try:
            async with answers_of(
                stubs.stream_images(
                    progress.next_request(), timeout=timeout_s, metadata=calls.metadata_with(request_id)
                )
            ) as answers:
                async for response in answers:
                    attempts.answered()
                    yield progress.take(readable(response))
                    if lost_in_fork:
                        check_fork()
            progress.check_end()
            attempts.succeeded()
        except (grpc.RpcError, asyncio.CancelledError, grpc.aio.UsageError) as error:
            failure = calls.failure(error, given_s, request_id)
            if not progress.complete:
                corrected = await calls.prepare_retry(failure, progress.request, attempts, deadline)
                progress.request = corrected or progress.request
        timeout_s = deadline - time.monotonic()


def one_by_one(batches: Generator[ImageBatch, None, None]) -> Generator[GeneratedImage, None, None]:
    """Yield the images of batches."""
    with contextlib.closing(batches):
        for batch in batches:
            yield from batch


async def one_by_one_async(batches: AsyncGenerator[ImageBatch, None]) -> AsyncGenerator[GeneratedImage, None]:
    """Yield the images of batches, as `one_by_one` does."""
    async with contextlib.aclosing(batches):
        async for batch in batches:
            for image in batch:
                yield image

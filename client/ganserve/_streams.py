"""Reads the calls that have many answers, over and over until all images are there: StreamImages and GenerateEach.

A call that breaks is made again for the images that have not come. What those are, and what is to be sent, `_messages`
keeps (`StreamProgress`, `EachProgress`), the same for threads and asyncio; here is only the reading and the waiting.
In a forked child its parent's calls cannot be read: each image is followed by a look at that.
"""

import asyncio
import contextlib
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any

import grpc

from ganserve._calls import AsyncCalls, Calls, readable
from ganserve._forks import check_fork, enter_call, leave_call, leave_to_parent, lost_in_fork
from ganserve._messages import EachProgress, StreamProgress
from ganserve._retries import Attempts
from ganserve.errors import GanserveError
from ganserve.images import GeneratedImage, ImageBatch
from ganserve.v1 import generation_pb2 as pb


def stream(calls: Calls, request: pb.GenerateImagesRequest, timeout_s: float) -> Generator[ImageBatch, None, None]:
    """Yield the images of a request in batches, as the server makes them."""
    given_s, deadline = timeout_s, time.monotonic() + timeout_s
    progress, attempts = StreamProgress(request), Attempts(calls.policy)
    while not progress.complete:
        stubs, request_id = calls.connected(), uuid.uuid4().hex
        try:
            with _held(
                stubs.stream_images(progress.rest(), timeout=timeout_s, metadata=calls.named(request_id))
            ) as call:
                for response in call:
                    attempts.answered()
                    yield progress.take(response.chunk)
                    check_fork()
            progress.end()
            calls.policy.succeeded()
        except (grpc.RpcError, ValueError) as error:
            failure = calls.failure(error, given_s, request_id)
            if not progress.complete:  # else how the call ends no longer matters
                progress.request = calls.again(failure, progress.request, attempts, deadline) or progress.request
        timeout_s = deadline - time.monotonic()


async def stream_async(
    calls: AsyncCalls, request: pb.GenerateImagesRequest, timeout_s: float
) -> AsyncGenerator[ImageBatch, None]:
    """Do as `stream` does."""
    given_s, deadline = timeout_s, time.monotonic() + timeout_s
    progress, attempts = StreamProgress(request), Attempts(calls.policy)
    while not progress.complete:
        stubs, request_id = calls.connected(), uuid.uuid4().hex
        try:
            with _held_in_loop(
                stubs.stream_images(progress.rest(), timeout=timeout_s, metadata=calls.named(request_id))
            ) as call:
                async for response in call:
                    attempts.answered()
                    yield progress.take(readable(response).chunk)
                    check_fork()
            progress.end()
            calls.policy.succeeded()
        except (grpc.RpcError, asyncio.CancelledError, grpc.aio.UsageError) as error:
            failure = calls.failure(error, given_s, request_id)
            if not progress.complete:
                progress.request = await calls.again(failure, progress.request, attempts, deadline) or progress.request
        timeout_s = deadline - time.monotonic()


def one_by_one(batches: Generator[ImageBatch, None, None]) -> Generator[GeneratedImage, None, None]:
    """Yield the images of batches."""
    with contextlib.closing(batches):
        for batch in batches:
            yield from batch


async def one_by_one_async(batches: AsyncGenerator[ImageBatch, None]) -> AsyncGenerator[GeneratedImage, None]:
    """Do as `one_by_one` does."""
    async with contextlib.aclosing(batches):
        async for batch in batches:
            for image in batch:
                yield image


def each(calls: Calls, progress: EachProgress, seeds: Iterator[int]) -> Generator[GeneratedImage, None, None]:
    """Yield the image of each seed, by calls that are sent the requests as there is room for them."""
    call: Any = None
    attempts = Attempts(calls.policy)
    progress.read(seeds)
    with _watched(progress, lambda: call is not None and call.cancel()):
        while not progress.complete:
            stubs, requests, request_id = calls.connected(), SimpleQueue[bytes | None](), uuid.uuid4().hex
            failure: GanserveError | None
            progress.wait()
            try:
                with _held(stubs.generate_each(iter(requests.get, None), metadata=calls.named(request_id))) as call:
                    progress.begin(requests.put, request_id)
                    for answer in call:
                        if progress.take(answer):
                            calls.policy.succeeded()
                            attempts.answered()
                            while (image := progress.next_image()) is not None:
                                yield image
                                check_fork()
                        progress.read(seeds)
                        progress.wait()
                        if progress.over:
                            break
                    else:
                        progress.check_end()
                failure = progress.failure
            except (grpc.RpcError, ValueError) as error:
                failure = calls.failure(error, progress.timeout_s, request_id, late=progress.late)
            finally:
                requests.put(None)
            if failure is not None and not progress.complete:
                corrected = calls.again(failure, progress.request, attempts, progress.deadline)
                if corrected is not None:
                    progress.correct(corrected)
    if progress.error is not None:
        raise progress.error


async def each_async(
    calls: AsyncCalls, progress: EachProgress, seeds: Iterator[int] | AsyncIterator[int]
) -> AsyncGenerator[GeneratedImage, None]:
    """Do as `each` does."""
    call: Any = None
    attempts, source = Attempts(calls.policy), _Source(progress, seeds)
    try:
        await source.read()
        with _watched_in_loop(progress, lambda: call is not None and call.cancel()):
            while not progress.complete:
                stubs, requests, request_id = calls.connected(), asyncio.Queue[bytes | None](), uuid.uuid4().hex
                failure: GanserveError | None
                progress.wait()
                try:
                    with _held_in_loop(
                        stubs.generate_each(_until_none(requests), metadata=calls.named(request_id))
                    ) as call:
                        progress.begin(requests.put_nowait, request_id)
                        async for answer in call:
                            if progress.take(readable(answer)):
                                calls.policy.succeeded()
                                attempts.answered()
                                while (image := progress.next_image()) is not None:
                                    yield image
                                    check_fork()
                            await source.read()
                            progress.wait()
                            if progress.over:
                                break
                        else:
                            progress.check_end()
                    failure = progress.failure
                except (grpc.RpcError, asyncio.CancelledError, grpc.aio.UsageError) as error:
                    failure = calls.failure(error, progress.timeout_s, request_id, late=progress.late)
                finally:
                    requests.put_nowait(None)
                if failure is not None and not progress.complete:
                    corrected = await calls.again(failure, progress.request, attempts, progress.deadline)
                    if corrected is not None:
                        progress.correct(corrected)
    finally:
        await source.close()
    if progress.error is not None:
        raise progress.error


async def _until_none(requests: "asyncio.Queue[bytes | None]") -> AsyncGenerator[bytes, None]:
    while (request := await requests.get()) is not None:
        yield request


@contextlib.contextmanager
def _held(call: Any) -> Iterator[Any]:
    """Give a call whose answers are read; what is left of it then is cancelled."""
    enter_call(call)
    try:
        with _held_in_loop(call):
            yield call
    finally:
        leave_call(call)


@contextlib.contextmanager
def _held_in_loop(call: Any) -> Iterator[Any]:
    """Do as `_held` does."""
    try:
        yield call
    finally:
        if lost_in_fork():
            leave_to_parent(call)
        elif not sys.is_finalizing():  # else a thread of gRPC's that is no more may have the call's lock
            call.cancel()


# gRPC's own deadlines are for a whole call, those of GenerateEach for its next answer.


@contextlib.contextmanager
def _watched(progress: EachProgress, end_call: Callable[[], object]) -> Iterator[None]:
    """End a call whose next answer takes too long."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(progress.patience_s()):
            if progress.late:
                end_call()

    threading.Thread(target=watch, name="ganserve-watch", daemon=True).start()
    try:
        yield
    finally:
        # Nobody waits for the thread: where the program ends before the iterator, it is no more. In a forked child
        # there is none, and a lock that it held at the fork is never given back.
        if not lost_in_fork() and not sys.is_finalizing():
            over.set()


@contextlib.contextmanager
def _watched_in_loop(progress: EachProgress, end_call: Callable[[], object]) -> Iterator[None]:
    """Do as `_watched` does."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def watch() -> None:
        nonlocal timer
        if progress.late:
            end_call()
        timer = loop.call_later(progress.patience_s(), watch)

    watch()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


class _Source:
    """Seeds for an EachProgress, which asyncio may make: those are read in a task of their own.

    So no answer waits for a seed, and no call's end reaches who makes them.
    """

    def __init__(self, progress: EachProgress, seeds: Iterator[int] | AsyncIterator[int]) -> None:
        self._progress = progress
        self._fed, self._room = asyncio.Event(), asyncio.Event()
        self._seeds: Iterator[int] = iter(())
        self._feeding: asyncio.Task[None] | None = None
        if isinstance(seeds, AsyncIterator):
            self._feeding = asyncio.create_task(self._feed(seeds))
        else:
            self._seeds = seeds

    async def read(self) -> None:
        """Read on while there is room, and until there is something to wait for."""
        if self._feeding is None:
            self._progress.read(self._seeds)
            return
        if self._progress.hungry:
            self._room.set()
        while self._progress.idle:
            self._fed.clear()
            await self._fed.wait()

    async def _feed(self, seeds: AsyncIterator[int]) -> None:
        progress = self._progress
        try:
            async for seed in seeds:
                if not progress.add(seed):
                    return
                progress.ask()
                self._fed.set()
                while progress.full:
                    self._room.clear()
                    await self._room.wait()
            progress.end()
        except (Exception, asyncio.CancelledError) as error:
            progress.end(error)
            raise
        finally:
            progress.ask()
            self._fed.set()

    async def close(self) -> None:
        """Leave what is not read."""
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)

"""Reads GenerateEach: the images of many seeds in order, by one call with a request for each seed.

`EachProgress` decides which requests to send and when, and matches answers to them. If the call breaks, the next call
asks for the missing images. `each` and `each_async` call and wait, with threads and with asyncio.
"""

import asyncio
import contextlib
import math
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from itertools import repeat
from queue import SimpleQueue
from typing import Any, SupportsIndex

import grpc

from ganserve._arguments import check_label_container, invalid, label_value, uint32
from ganserve._calls import AsyncCalls, Calls, readable
from ganserve._forks import answers_of, cancelled_on_exit, check_fork, lost_in_fork
from ganserve._messages import EachError, EachRequests, to_each
from ganserve._retries import Attempts
from ganserve._statuses import FirstStatus, translate_answer
from ganserve.errors import (
    GanserveError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from ganserve.images import GeneratedImage, ImageBatch

_MOST_IN_FLIGHT = 256  # keeps a server busy; a server runs at most this many requests of one stream at a time
_REFILL_BELOW = 0.75  # of the requests that may be in flight: requests sent together are batched together
_READING_S = 0.005  # the time for reading seeds while an answer may be waiting
_END: Any = object()


class _Asked:
    """One image that the caller asked for, and its outcome: the image, or the error of the last try; None: none yet."""

    __slots__ = ("label", "outcome", "seed")

    def __init__(self, seed: int, label: int | str | None) -> None:
        self.seed, self.label = seed, label
        self.outcome: ImageBatch | GanserveError | None = None


class EachProgress:
    """The images that the caller asked for and has not received: a bounded number, in the order of the seeds.

    Args:
        requests: the requests of the images.
        label: the label of all images, or an iterable with one for each; None lets the server choose.
        timeout_s: for the next image, from the time when the caller starts to wait for it.
        address: the server's address, for the texts of errors.
    """

    def __init__(self, requests: EachRequests, label: Any, timeout_s: float, address: str) -> None:
        self.error: BaseException | None = None  # why reading the seeds ended early
        self.timeout_s = timeout_s
        self._requests, self._address = requests, address
        self._labelled = label is not None
        check_label_container(label)
        self._alone = isinstance(label, str) or not isinstance(label, Iterable) or getattr(label, "ndim", 1) == 0
        self._labels: Iterator[Any] = repeat(self._label(label)) if self._alone else iter(label)
        self._first: ImageBatch | None = None
        self._ended = False
        self._asked: deque[_Asked] = deque()  # all images that the caller has not received; of these:
        self._unsent: deque[_Asked] = deque()
        self._sent: deque[_Asked] = deque()  # the server answers these in this order
        self._got = 0
        self._room = 1.0  # requests in flight; the first image is requested alone, because it fixes the version
        self._refused = False
        self._send: Callable[[bytes | None], object] | None = None  # None: there is no call that takes requests
        self._request_id = ""
        self._deadline = math.inf
        self._waiting_since = self._last_wait_s = 0.0

    @property
    def complete(self) -> bool:
        """Whether the caller has got all images that it can get."""
        return self._ended and not self._asked

    @property
    def idle(self) -> bool:
        """Whether there is nothing to wait for until another seed is read."""
        return not self._asked and not self._ended

    @property
    def full(self) -> bool:
        """Whether the number of seeds without an image is at its limit."""
        return len(self._sent) + len(self._unsent) >= self._room or len(self._asked) >= _MOST_IN_FLIGHT

    @property
    def hungry(self) -> bool:
        """Whether to read more seeds now."""
        few = len(self._sent) + len(self._unsent) <= _REFILL_BELOW * self._room
        return few and not (self._ended or self._refused)

    @property
    def late(self) -> bool:
        """Whether the next image has missed its deadline."""
        return time.monotonic() >= self._deadline

    @property
    def deadline(self) -> float:
        """The deadline of the next image by time.monotonic, if the caller waits for it from now on."""
        return min(self._deadline, time.monotonic() + self.timeout_s)

    @property
    def request(self) -> Any:
        """The request for the next image."""
        return self._requests.with_label(self._asked[0].label) if self._asked else self._requests.common

    @property
    def failure(self) -> GanserveError | None:
        """The error that keeps this call from bringing the next image; None if it may still bring it."""
        outcome = self._asked[0].outcome if self._refused and self._asked else None
        if not isinstance(outcome, GanserveError):
            return None
        # A temporary refusal does not discard the answers that are still in flight.
        return None if self._sent and isinstance(outcome, OverloadedError | UnavailableError) else outcome

    @property
    def over(self) -> bool:
        """Whether this call brings nothing more: it does not bring the next image, or no image follows."""
        return self.failure is not None or (self.complete and self.error is not None)

    def read(self, seeds: Iterator[SupportsIndex]) -> None:
        """Read seeds while there is room, and ask for their images.

        Reading takes no longer than the last answer took, so that slow seeds do not delay the images of earlier seeds.
        """
        if self.hungry:
            until = time.monotonic() + max(_READING_S, self._last_wait_s)
            while not self.full:
                try:
                    seed = next(seeds)
                except StopIteration:
                    self.end()
                    break
                except Exception as error:
                    self.end(error)
                    break
                if not self.add(seed) or time.monotonic() > until:
                    break
        self.ask()

    def add(self, seed: Any) -> bool:
        """Take the next seed; return whether another may follow."""
        try:
            if (label := next(self._labels, _END)) is _END:
                raise invalid("label", f"label is shorter than seeds: it has {self._count()}; give one for each seed")
            asked = _Asked(uint32("seed", seed), label if self._alone else self._label(label))
        except Exception as error:
            self.end(error)
            return False
        self._asked.append(asked)
        self._unsent.append(asked)
        return True

    def end(self, error: BaseException | None = None) -> None:
        """Record the end of the seeds. The caller gets `error`, if there is one, after the images of earlier seeds."""
        try:
            if error is None and not self._alone and next(self._labels, _END) is not _END:
                text = f"seeds is shorter than label: it has {self._count()}; give one for each label"
                error = invalid("seeds", text)
        except Exception as of_labels:
            error = of_labels
        self._ended, self.error = True, error

    def begin(self, send: Callable[[bytes | None], object], request_id: str) -> None:
        """Begin a call: send the requests of all missing images.

        Args:
            send: takes the requests, and None after the last one.
            request_id: identifies the call in the server's log.
        """
        if self._refused and isinstance(self._asked[0].outcome, OverloadedError):
            self._room = max(1.0, self._room / 2)
        self._send, self._request_id, self._refused = send, request_id, False
        self._sent.clear()
        self._unsent = deque(asked for asked in self._asked if not isinstance(asked.outcome, ImageBatch))
        for asked in self._unsent:
            asked.outcome = None
        self.ask()

    def ask(self) -> None:
        """Send requests while there is room in flight."""
        if self._refused or self._send is None:
            return
        while self._unsent and len(self._sent) < self._room:
            self._sent.append(asked := self._unsent.popleft())
            self._send(self._requests.serialized(asked.seed, asked.label))
        if self._ended and not self._unsent:
            self._send(None)
            self._send = None

    def wait(self) -> None:
        """Record that the caller waits for the next image: start its timeout."""
        self._waiting_since = time.monotonic()
        if self._deadline == math.inf:
            self._deadline = self._waiting_since + self.timeout_s

    def patience_s(self) -> float:
        """Return a time during which nothing can become late."""
        left_s = self._deadline - time.monotonic()
        return left_s if 0 < left_s < math.inf else self.timeout_s

    def take(self, answer: Any) -> bool:
        """Read the next answer; return whether it has an image.

        Raises:
            ServerError: it does not match the request, or comes from another model file than the images before.
        """
        self._last_wait_s = time.monotonic() - self._waiting_since
        if not self._sent:
            raise ServerError(f"the server sent more answers than the {self._count()} requested ones")
        asked = self._sent.popleft()
        outcome = to_each(answer)
        if isinstance(outcome, EachError):
            asked.outcome, self._refused = self._translated(outcome, asked), True
            return False
        first = self._first
        if first is None:
            first = self._first = outcome
            self._requests.fix_version(outcome.version)
            self._room = _MOST_IN_FLIGHT
        if outcome.version != first.version or outcome.digest != first.digest:
            raise ServerError(
                f"the image of seed {asked.seed} was made by version {outcome.version} ({outcome.digest}), the images "
                f"before it by version {first.version} ({first.digest}); request all images again"
            )
        if outcome.seeds != (asked.seed,):
            raise ServerError(f"the server's answer is for seed {outcome.seeds}, not {asked.seed}")
        self._room = min(_MOST_IN_FLIGHT, self._room + 1 / self._room)
        asked.outcome = outcome
        return True

    def next_image(self) -> GeneratedImage | None:
        """Return the next image if it has arrived, and end its timeout."""
        outcome = self._asked[0].outcome if self._asked else None
        if not isinstance(outcome, ImageBatch):
            return None
        self._asked.popleft()
        self._got += 1
        self._deadline = math.inf
        return GeneratedImage(outcome, 0)

    def check_end(self) -> None:
        """Check that all images have arrived.

        Raises:
            ServerError: images are missing, although the server reports success.
        """
        if not self.complete:
            raise ServerError(f"the server ended the stream after {self._got} of {self._count()} images")

    def correct(self, request: Any) -> None:
        """Spell the label of the next image as `request` does, now and in later requests."""
        self._requests.correct(self._asked[0].label, request)

    def _count(self) -> int:
        return self._got + len(self._asked)

    def _label(self, label: Any) -> int | str | None:
        return None if label is None and not self._labelled else label_value(label)

    def _translated(self, error: EachError, asked: _Asked) -> GanserveError:
        failure = translate_answer(error.code, error.reason, error.text, self._address, self._request_id)
        if isinstance(failure, InvalidRequestError) and isinstance(asked.label, str):
            # The answer does not say which field is wrong.
            failure.field = "label" if repr(asked.label) in error.text else None
        return failure


def each(calls: Calls, progress: EachProgress, seeds: Iterator[SupportsIndex]) -> Generator[GeneratedImage, None, None]:
    """Yield the image of each seed."""
    call: Any = None
    attempts = Attempts(calls.policy)
    progress.read(seeds)
    with _watched(progress, lambda: call is not None and call.cancel()):
        while not progress.complete:
            stubs, requests, request_id = calls.connected(), SimpleQueue[bytes | None](), uuid.uuid4().hex
            failure: GanserveError | None
            progress.wait()
            try:
                with cancelled_on_exit(
                    stubs.generate_each(iter(requests.get, None), metadata=calls.metadata_with(request_id))
                ) as call:
                    progress.begin(requests.put, request_id)
                    for answer in call:
                        if progress.take(answer):
                            attempts.succeeded()
                            while (image := progress.next_image()) is not None:
                                yield image
                                if lost_in_fork:
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
                corrected = calls.prepare_retry(failure, progress.request, attempts, progress.deadline)
                if corrected is not None:
                    progress.correct(corrected)
    if progress.error is not None:
        raise progress.error


async def each_async(
    calls: AsyncCalls, progress: EachProgress, seeds: Iterator[SupportsIndex] | AsyncIterator[SupportsIndex]
) -> AsyncGenerator[GeneratedImage, None]:
    """Yield the image of each seed, as `each` does."""
    call: Any = None
    attempts, source = Attempts(calls.policy), _SeedReader(progress, seeds)
    try:
        await source.read()
        with _WatchedAsync(progress, lambda: call is not None and call.cancel()):
            while not progress.complete:
                stubs, requests, request_id = calls.connected(), asyncio.Queue[bytes | None](), uuid.uuid4().hex
                status = FirstStatus()
                failure: GanserveError | None
                progress.wait()
                try:
                    call = stubs.generate_each(_until_none(requests), metadata=calls.metadata_with(request_id))
                    call.add_done_callback(status)
                    async with answers_of(call) as answers:
                        progress.begin(requests.put_nowait, request_id)
                        async for answer in answers:
                            if progress.take(readable(answer)):
                                attempts.succeeded()
                                while (image := progress.next_image()) is not None:
                                    yield image
                                    if lost_in_fork:
                                        check_fork()
                            await source.read()
                            progress.wait()
                            if progress.over:
                                break
                        else:
                            progress.check_end()
                    failure = progress.failure
                except grpc.RpcError as error:
                    failure = calls.failure(status.of(error), progress.timeout_s, request_id, late=progress.late)
                except (asyncio.CancelledError, grpc.aio.UsageError) as error:
                    failure = calls.failure(error, progress.timeout_s, request_id, late=progress.late)
                finally:
                    requests.put_nowait(None)
                if failure is not None and not progress.complete:
                    corrected = await calls.prepare_retry(failure, progress.request, attempts, progress.deadline)
                    if corrected is not None:
                        progress.correct(corrected)
    finally:
        await source.close()
    if progress.error is not None:
        raise progress.error


async def _until_none(requests: "asyncio.Queue[bytes | None]") -> AsyncGenerator[bytes, None]:
    while (request := await requests.get()) is not None:
        yield request


# gRPC's deadline is for a whole call, but GenerateEach has a deadline for each next image. The next two watch it.


@contextlib.contextmanager
def _watched(progress: EachProgress, end_call: Callable[[], object]) -> Iterator[None]:
    """End a call whose next image is late."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(progress.patience_s()):
            if progress.late:
                end_call()

    threading.Thread(target=watch, name="ganserve-watch", daemon=True).start()
    try:
        yield
    finally:
        # Do not join the thread: it is gone if the program ends before the iterator. A forked child does not have the
        # thread, and a lock that the thread held at the fork stays locked.
        if not lost_in_fork and not sys.is_finalizing():
            over.set()


class _WatchedAsync:
    """Ends a call whose next image is late, as `_watched` does.

    A class, because a function that schedules itself would be a reference cycle, which would keep the call alive.
    """

    def __init__(self, progress: EachProgress, end_call: Callable[[], object]) -> None:
        self._progress, self._end_call = progress, end_call
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        self._watch()

    def _watch(self) -> None:
        if self._progress.late:
            self._end_call()
        self._timer = self._loop.call_later(self._progress.patience_s(), self._watch)

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()


class _SeedReader:
    """Reads seeds for an EachProgress. A separate task reads the seeds of an async iterable.

    So no answer waits for a seed, and the end of a call does not interrupt the code that yields the seeds.
    """

    def __init__(self, progress: EachProgress, seeds: Iterator[SupportsIndex] | AsyncIterator[SupportsIndex]) -> None:
        self._progress = progress
        self._fed, self._room = asyncio.Event(), asyncio.Event()
        self._seeds: Iterator[SupportsIndex] = iter(())
        self._feeding: asyncio.Task[None] | None = None
        if isinstance(seeds, AsyncIterator):
            self._feeding = asyncio.create_task(self._feed(seeds))
        else:
            self._seeds = seeds

    async def read(self) -> None:
        """Read seeds while there is room, and until there is an image to wait for."""
        if self._feeding is None:
            self._progress.read(self._seeds)
            return
        if self._progress.hungry:
            self._room.set()
        while self._progress.idle:
            self._fed.clear()
            await self._fed.wait()

    async def _feed(self, seeds: AsyncIterator[SupportsIndex]) -> None:
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
        """Stop reading."""
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)

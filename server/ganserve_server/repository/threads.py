"""Runs functions that may never return, because of a file or a file system, in daemon threads."""

import asyncio
import contextlib
import errno
import functools
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

LOOK_TIMEOUT_S = 30.0  # for a look at the repository, whose file system may hang
_Result = TypeVar("_Result")


async def in_thread_of_its_own(function: Callable[[], _Result]) -> _Result:
    """Run a function in a daemon thread: the process can end while it runs, unlike with asyncio's threads."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_Result] = loop.create_future()

    def settle(finished: Callable[[], None]) -> None:
        if not result.done():  # otherwise nobody waits any more
            finished()

    def run() -> None:
        try:
            value = function()
            finished = functools.partial(result.set_result, value)
        except Exception as error:
            finished = functools.partial(result.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, finished)

    threading.Thread(target=run, name="opening", daemon=True).start()
    return await result


class Limited(Generic[_Result]):
    """A function that waits for a file system, such as NFS, which may hang. At most one thread runs it.

    Args:
        function: the function.
        limit_s: how long to wait for it.
    """

    def __init__(self, function: Callable[[], _Result], limit_s: float) -> None:
        self._function, self._limit_s = function, limit_s
        self._late: asyncio.Task[_Result] | None = None  # did not return in time

    async def __call__(self) -> _Result:
        """Call the function; after a call that hung, only once that has returned.

        Raises:
            TimeoutError: it does not return in time.
        """
        if self._late is not None:
            await self._wait(self._late)
        running = asyncio.create_task(in_thread_of_its_own(self._function))
        await self._wait(running)
        return running.result()

    async def _wait(self, running: "asyncio.Task[_Result]") -> None:
        self._late = running
        await asyncio.wait((running,), timeout=self._limit_s)
        if not running.done():
            raise TimeoutError(errno.ETIMEDOUT, f"it does not answer within {self._limit_s:g} s")
        running.exception()  # a late one is of no interest
        self._late = None

"""Detects forks during a call: gRPC does not survive them, and the child process may hang or crash (grpcio 1.85)."""

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ganserve.errors import UnavailableError

# What was running inside gRPC when this process was forked; empty if gRPC is usable. Streams check it after each image.
lost_in_fork: list[str] = []

_inside: dict[object, None] = {}  # what runs inside gRPC now: thread ids, and streams
# Objects of the parent process. The child keeps them alive: ending them would end connections that it does not own.
_of_parents: list[object] = []


def enter_call(call: object) -> None:
    """Record that a call is inside gRPC; `call` is a thread id, or a stream."""
    _inside[call] = None


def leave_call(call: object) -> None:
    """Record that the call has left gRPC."""
    _inside.pop(call, None)


@contextlib.contextmanager
def cancelled_on_exit(call: Any) -> Iterator[Any]:
    """Yield a call whose answers are read; cancel the rest of the call on exit."""
    enter_call(call)
    try:
        yield call
    finally:
        try:
            _cancel(call)
        finally:
            leave_call(call)


@contextlib.asynccontextmanager
async def answers_of(call: Any) -> AsyncIterator[AsyncIterator[Any]]:
    """Yield the answers of an asyncio call; cancel the rest of the call on exit."""
    answers = aiter(call)
    try:
        yield answers
    finally:
        _cancel(call)
        if not lost_in_fork:
            # A suspended iterator and its call refer to each other, and a call that exists keeps its connection open.
            await answers.aclose()


def _cancel(call: Any) -> None:
    if lost_in_fork:
        leave_to_parent(call)
    elif not sys.is_finalizing():  # a dead gRPC thread may then hold the lock of the call
        call.cancel()


def lose_in_fork(what: str) -> None:
    """Record, in a child process, that gRPC is unusable there."""
    lost_in_fork.append(what)


def leave_to_parent(owned: object) -> None:
    """Keep alive, in a child process, a channel or a call that only the parent may end."""
    _of_parents.append(owned)


def check_fork() -> None:
    """Raise UnavailableError if this process was forked while calls were running."""
    if lost_in_fork:
        raise UnavailableError(
            f"this process was forked while its parent had {lost_in_fork[0]}, which gRPC does not survive; "
            "fork before, or use multiprocessing's 'spawn' or 'forkserver'",
            reason="forked",
        )


def _after_fork_in_child() -> None:
    if _inside:
        lose_in_fork("calls or streams running")
        _inside.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)

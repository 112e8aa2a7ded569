"""Shares the event loop's time among connections: a burst of one keeps the others waiting for milliseconds."""

import asyncio
import time
from collections import deque
from typing import Protocol

_SLICE_S = 0.002  # of one member at a time
_ITERATION_S = 0.004  # of all members that wait, in one iteration of the loop
# A member that took less than this of the last window is served at once, whoever waits.
_LIGHT_S, _WINDOW_S = 0.002, 0.1


class Member(Protocol):
    """Has work that comes in pieces."""

    window_began: float  # for LoopTurns
    used_s: float  # for LoopTurns, in this window

    def turn(self, until: float) -> bool:
        """Work until a time by time.perf_counter; return whether there is more to do."""

    def waits(self) -> None:
        """Take no more work until the turn comes."""


class LoopTurns:
    """Gives turns: at once while there is time, else in a queue, a slice for each member.

    A slice ends after the piece of work that passes its end. The longest pieces take about 10 ms: a message inflated to
    4 MiB, or a header block of 64 KiB.
    """

    __slots__ = ("_loop", "_scheduled", "_spent_s", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Member] = deque()
        self._spent_s = 0.0  # since the queue's last turn
        self._scheduled = False

    def begin(self, member: Member) -> None:
        """Work for a member that is not in the queue: now, or once its turn comes."""
        start = time.perf_counter()
        if start - member.window_began > _WINDOW_S:
            member.window_began, member.used_s = start, 0.0
        if (self._waiting or self._spent_s > _ITERATION_S) and member.used_s > _LIGHT_S:
            self.wait(member)
            return
        more = member.turn(start + _SLICE_S)
        took = time.perf_counter() - start
        member.used_s += took
        self._spent_s += took
        if more:
            self.wait(member)
        elif self._spent_s > _ITERATION_S:
            self._schedule()

    def wait(self, member: Member) -> None:
        """Put a member that is not in the queue at its end."""
        member.waits()
        self._waiting.append(member)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._scheduled = False
        start = now = time.perf_counter()
        for _ in range(len(self._waiting)):
            member, began = self._waiting.popleft(), now
            more = member.turn(now + _SLICE_S)
            now = time.perf_counter()
            member.used_s += now - began
            if more:
                self._waiting.append(member)
            if now - start > _ITERATION_S:
                break
        self._spent_s = now - start
        if self._waiting:
            self._schedule()

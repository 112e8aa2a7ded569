"""Shares the event loop's time among connections: a burst on one delays the others only by milliseconds."""

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

_SLICE_S = 0.002  # of one member at a time
_ITERATION_S = 0.008  # of all waiting members together, in one iteration of the loop
# A light member does not wait for the queue: it takes at most 2% of the time, and 2 ms at once. The exception: light
# members together have taken more than `_MOST_S` of an iteration.
_LIGHT, _LIGHT_S = 0.02, 0.002
_MOST_S = 0.012
_MOST_CHARGED_S = 0.004  # for a turn outside the queue


class Member(Protocol):
    """Has work that arrives in pieces. `LoopTurns` owns the attributes."""

    seen_s: float  # when its last turn began
    used_s: float  # time taken beyond its light share
    finish_s: float  # virtual time at the end of its last turn

    def turn(self, until: float) -> bool:
        """Work until a time by time.perf_counter; return whether there is more to do."""

    def waits(self) -> None:
        """Accept no more work until the turn comes."""


class LoopTurns:
    """Gives turns: at once while there is time, otherwise through a queue with a slice for each member.

    The queue uses start-time fair queueing (Goyal, Vin and Cheng, 1996): virtual time advances with the work done, and
    the member whose last turn ended first in virtual time is next. So a member that takes little time is served before
    members that take much, and a member with an expensive piece waits until the other members had as much time.

    A slice ends after the piece of work that exceeds it. The longest pieces take about 10 ms: a message decompressed to
    4 MiB, or a header block of 64 KiB.
    """

    __slots__ = (
        "_loop",
        "_number",
        "_pieces",
        "_scheduled",
        "_spent_s",
        "_thread_read_s",
        "_thread_s",
        "_virtual_s",
        "_waiting",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[tuple[float, int, Member]] = []  # a heap, by virtual start and arrival
        self._number = 0
        self._virtual_s = 0.0  # the start of the last turn
        self._spent_s = 0.0  # since the queue's last turn
        self._scheduled = False
        self._thread_s = self._thread_read_s = 0.0  # this thread's CPU time, and when it was read
        self._pieces: deque[Callable[[], object]] = deque()

    @property
    def idle(self) -> bool:
        """Whether no pieces wait."""
        return not self._pieces

    def spread(self, pieces: Iterable[Callable[[], object]]) -> None:
        """Do pieces of work that belong to no turn, for one slice in each iteration of the loop."""
        if not self._pieces:
            self._loop.call_soon(self._do_pieces)
        self._pieces.extend(pieces)

    def _do_pieces(self) -> None:
        until = time.perf_counter() + _SLICE_S
        try:
            while self._pieces and time.perf_counter() < until:
                self._pieces.popleft()()
        finally:
            if self._pieces:
                self._loop.call_soon(self._do_pieces)

    def begin(self, member: Member) -> None:
        """Give a member that is not in the queue a turn: now, or once its turn in the queue comes."""
        start = time.perf_counter()
        used_s = member.used_s - _LIGHT * (start - member.seen_s)
        member.used_s = used_s = used_s if used_s > 0 else 0.0
        member.seen_s = start
        busy = self._waiting or self._spent_s > _ITERATION_S
        if busy and (used_s > _LIGHT_S or self._spent_s > _MOST_S):
            self.wait(member)
            return
        tag = self._tag(member)
        if not self._waiting:
            self._virtual_s = tag
        more = member.turn(start + _SLICE_S)
        took = time.perf_counter() - start
        # Charge a bounded time: another thread or program may have used the core meanwhile.
        charged = took if took < _MOST_CHARGED_S else _MOST_CHARGED_S
        member.used_s = used_s + charged
        member.finish_s = tag + charged
        self._spent_s += took
        if more:
            self.wait(member)
        elif self._spent_s > _ITERATION_S:
            self._schedule()

    def wait(self, member: Member) -> None:
        """Put a member that is not in the queue into it."""
        member.waits()
        self._put(member)
        self._schedule()

    def _tag(self, member: Member) -> float:
        """Return the virtual time at which a member's next turn starts."""
        return member.finish_s if member.finish_s > self._virtual_s else self._virtual_s

    def _put(self, member: Member) -> None:
        self._number += 1
        heapq.heappush(self._waiting, (self._tag(member), self._number, member))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._scheduled = False
        start = now = time.perf_counter()
        last = self._number
        if start - self._thread_read_s > _ITERATION_S:
            self._thread_s, self._thread_read_s = time.thread_time(), start
        # No member twice in one iteration: others may begin before its next turn.
        while self._waiting and self._waiting[0][1] <= last and now - start <= _ITERATION_S:
            self._virtual_s, _, member = heapq.heappop(self._waiting)
            began = now
            more = member.turn(now + _SLICE_S)
            now = time.perf_counter()
            took = now - began
            if took > _MOST_CHARGED_S:
                # Perhaps another thread or program used the core. thread_time costs ten times as much as perf_counter.
                took = min(took, time.thread_time() - self._thread_s)
            member.used_s += took
            member.finish_s = self._virtual_s + took
            if more:
                self._put(member)
        self._spent_s = now - start
        if self._waiting:
            self._schedule()

"""How connections share the event loop's time, by a clock that only their work moves."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ganserve_server.transport import turns
from ganserve_server.transport.turns import LoopTurns


class Loop:
    """Runs what is called soon, an iteration at a time."""

    def __init__(self) -> None:
        self.soon: deque[Callable[[], object]] = deque()

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.soon.append(callback)

    def iterate(self) -> None:
        for _ in range(len(self.soon)):
            self.soon.popleft()()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.stolen_s = 0.0  # time in which other programs had the core

    def time(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now - self.stolen_s


class Peer:
    """Has so many pieces of work, each of which takes so long."""

    def __init__(self, clock: Clock, piece_s: float, pieces: int = 1_000_000) -> None:
        self.clock, self.piece_s, self.pieces = clock, piece_s, pieces
        self.seen_s = self.used_s = self.finish_s = 0.0
        self.took_s = 0.0
        self.stolen_s = 0.0  # of the next turn, by another program
        self.waiting = False

    def turn(self, until: float) -> bool:
        self.waiting = False
        self.clock.now += self.stolen_s
        self.clock.stolen_s += self.stolen_s
        self.stolen_s = 0.0
        while self.pieces and self.clock.now < until:
            self.pieces -= 1
            self.clock.now += self.piece_s
            self.took_s += self.piece_s
        return self.pieces > 0

    def waits(self) -> None:
        self.waiting = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=clock.time, thread_time=clock.thread_time))
    return clock


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def shared(loop: Loop, clock: Clock) -> LoopTurns:
    loop_: Any = loop
    return LoopTurns(loop_)


def test_time_is_shared_evenly_however_long_the_pieces_are(shared: LoopTurns, loop: Loop, clock: Clock) -> None:
    peers = [Peer(clock, 0.0005), Peer(clock, 0.020)]
    for peer in peers:
        shared.begin(peer)
    for _ in range(1000):
        loop.iterate()
    short, long = peers
    assert abs(short.took_s - long.took_s) <= 0.022  # a piece of one, a slice of the other


def test_a_turn_is_not_charged_for_what_other_programs_take(shared: LoopTurns, loop: Loop, clock: Clock) -> None:
    """A connection whose turn was charged a second once waited for 2.6 s."""
    peers = [Peer(clock, 0.0005), Peer(clock, 0.0005)]
    for peer in peers:
        shared.begin(peer)
    for _ in range(10):
        loop.iterate()
    peers[0].stolen_s = 1.0
    for _ in range(100):
        loop.iterate()
    assert abs(peers[0].took_s - peers[1].took_s) <= 0.012  # an iteration, a slice and a piece of each


def test_who_takes_little_waits_for_a_turn_of_one_other(shared: LoopTurns, loop: Loop, clock: Clock) -> None:
    """In the order of arrival it would wait for all fifty, 100 ms."""
    for _ in range(50):
        shared.begin(Peer(clock, 0.0005))
    for _ in range(100):
        loop.iterate()
    caller = Peer(clock, 0.0002, pieces=0)
    waited = []
    for _ in range(40):
        caller.pieces = 2
        clock.now += 0.02  # its part of the time, for 2 % is 0.4 ms
        began = clock.now
        shared.begin(caller)
        while caller.pieces:
            loop.iterate()
        waited.append(clock.now - began)
        for _ in range(5):
            loop.iterate()
    assert max(waited) <= 0.0105  # an iteration and a turn


def test_those_that_took_nothing_yet_do_not_all_run_in_one_iteration(
    shared: LoopTurns, loop: Loop, clock: Clock
) -> None:
    peers = [Peer(clock, 0.010, pieces=1) for _ in range(50)]
    began = clock.now
    for peer in peers:
        shared.begin(peer)
    assert clock.now - began == pytest.approx(0.020)
    assert sum(peer.waiting for peer in peers) == 48
    for _ in range(50):
        loop.iterate()
    assert not any(peer.pieces for peer in peers)


def test_time_that_was_taken_is_forgotten_at_two_percent(shared: LoopTurns, loop: Loop, clock: Clock) -> None:
    heavy, other = Peer(clock, 0.010, pieces=1), Peer(clock, 0.001)
    shared.begin(heavy)  # 10 ms, of which 4 are counted: 2 ms too many, which takes 100 ms
    shared.begin(other)
    heavy.pieces = 1
    clock.now += 0.09
    shared.begin(heavy)
    assert heavy.waiting
    for _ in range(20):
        loop.iterate()
    assert not heavy.pieces
    heavy.pieces, heavy.used_s, heavy.seen_s = 1, 0.010, clock.now
    clock.now += 0.41
    shared.begin(heavy)
    assert not heavy.pieces


def test_pieces_that_cannot_wait_for_turns_are_spread_over_iterations(
    shared: LoopTurns, loop: Loop, clock: Clock
) -> None:
    done = []

    def piece(number: int) -> None:
        clock.now += 0.0009
        done.append(number)
        if number == 4:
            raise RuntimeError("of one")

    shared.spread(lambda number=number: piece(number) for number in range(10))  # type: ignore[misc]
    loop.iterate()
    assert done == [0, 1, 2]
    with pytest.raises(RuntimeError):
        loop.iterate()
    for _ in range(3):
        loop.iterate()
    assert done == list(range(10))
    assert shared.idle

"""gRPC over HTTP/2, the server's side: connections, the way to the methods, and the bounds of what peers do.

A method is a function that gets a call and the request's bytes, and that later replies through the call: so the
methods that are called most cost no task. The servicers of grpcio's own packages run unchanged:
`add_registered_method_handlers` takes what the generated code registers.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Callable, Iterable
from socket import socket
from typing import Any

import grpc

from ganserve_server.errors import Unavailable
from ganserve_server.machine import give_back_memory
from ganserve_server.shared.scoreboard import AcceptOrder
from ganserve_server.transport.answering import BaseServer
from ganserve_server.transport.call import Head, Http2Call, address_of, read_head
from ganserve_server.transport.http2 import CANCEL, GOAWAY_TIMEOUT_S, Connection
from ganserve_server.transport.limits import Limits
from ganserve_server.transport.pools import Pool
from ganserve_server.transport.turns import LoopTurns

_log = logging.getLogger(__name__)

_CLOSE_GRACE_S = 1.0
_AGED_GRACE_S = GOAWAY_TIMEOUT_S + 0.1
_AGED_WRITE_TIMEOUT_S = 10.0  # of a connection that ends, for its age or for a drain
_BACKLOG = 1024
_YIELD_S = 0.001  # in which a worker with fewer connections takes the next
_ACCEPT_PAUSE_S = 1.0  # where there are no more file descriptors
_UNUSED_S = 10.0  # without a call: workers share out new connections by those in use
_IDLE_S = 1.0  # after which a connection makes place for another
# What the C library and Python keep free is returned after so many bytes at once, or an eighth of them after so long.
_GIVE_BACK_BYTES, _GIVE_BACK_EVERY_S = 32 << 20, 12.0


class GrpcServer(BaseServer[Http2Call]):
    """Listens, and leads calls to methods.

    Args:
        limits: what peers may have the server keep, do and wait for.
        tls: gives what a new connection is greeted with; None: plain text.
        on_tls_failure: called with the reason and the peer's address when it and this side do not agree on TLS.
        on_aged: called for each connection that is drained for its age, which is the limits' give or take a tenth: so
            that a load balancer's long-lived ones spread over replicas that were added.
        on_ended: called for each connection that is ended for another reason, with that: idle, crowded, unread.
        on_turned_away: called for each connection that is closed at once: there are too many.
        options: `BaseServer`'s.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        tls: Callable[[], ssl.SSLContext] | None = None,
        on_tls_failure: Callable[[OSError, str], None] = lambda *_: None,
        on_aged: Callable[[], None] = lambda: None,
        on_ended: Callable[[str], None] = lambda _: None,
        on_turned_away: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        super().__init__(limits=limits, **options)
        self.requests = Pool(limits.request_bytes, limits.request_bytes_each)
        self.unguarded = Pool(limits.unguarded_bytes, limits.unguarded_bytes_each)
        self.answers = Pool(limits.answer_bytes, limits.answer_bytes_each, of_answers=True)
        self._loop_turns = LoopTurns(self.loop)
        self.running = 0
        self._tls, self._on_tls_failure = tls, on_tls_failure
        self._on_aged, self._on_ended, self._on_turned_away = on_aged, on_ended, on_turned_away
        self._connections: dict[Connection[Head], None] = {}  # oldest first
        self._empty = asyncio.Event()
        self._empty.set()
        self._listening: list[socket] = []
        self._accepted = 0  # sockets that are not closed yet
        self._handshakes: dict[asyncio.Task[None], None] = {}  # oldest first
        self._accept_order = None if self._board is None else AcceptOrder(self._board)
        self._unused = 0  # connections without a call of late
        self._looking: asyncio.TimerHandle | None = None
        self._gave_back, self._give_back_again = 0.0, False  # by time.monotonic

    @property
    def load(self) -> tuple[int, int]:
        """How many connections and calls there are."""
        return len(self._connections), self.running

    def new_request_id(self) -> str:
        """Return an id that no other call has."""
        return f"{random.getrandbits(128):032x}"

    def kept_bytes(self) -> dict[str, int]:
        """Return how many bytes the server keeps for its peers, by what they are."""
        return {"requests": self.requests.bytes, "unguarded": self.unguarded.bytes, "answers": self.answers.bytes}

    def start(self, sockets: Iterable[socket]) -> None:
        """Listen on sockets that are bound.

        Raises:
            OSError: somebody else does.
        """
        self._count_connections()
        for bound in sockets:
            bound.setblocking(False)
            bound.listen(_BACKLOG)
            self._listening.append(bound)
            self.loop.add_reader(bound, self._accept, bound)
        self._looking = self.loop.call_later(self.limits.sweep_s, self._look)

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections, let the calls that run finish, cut off those that take longer, and close."""
        self._draining = True
        listening, self._listening = self._listening, []
        for bound in listening:
            self.loop.remove_reader(bound)
            bound.close()
        for connection in tuple(self._connections):
            connection.drain()
            self._cut_off_unawaited(connection, "the server is shutting down")
        await self._emptied(timeout_s)
        calls = [call for connection in self._connections for call in connection.streams.values()]
        if calls:
            _log.warning("calls cut off", extra={"calls": len(calls), "drain_timeout_s": timeout_s})
        for call in calls:
            assert isinstance(call, Http2Call)
            call.fail(Unavailable("the server has shut down before the call was done"))
        await self._emptied(_CLOSE_GRACE_S)
        for connection in tuple(self._connections):
            connection.transport.abort()
        if self._looking is not None:
            self._looking.cancel()
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    @staticmethod
    def _cut_off_unawaited(connection: Connection[Head], reason: str) -> None:
        for call in tuple(connection.streams.values()):
            assert isinstance(call, Http2Call)
            if call.method is not None and not call.method.awaited:
                call.fail(Unavailable(reason))
                if not call.ended:
                    connection.reset(call, CANCEL)  # its peer reads nothing, and would hold up the end

    async def _emptied(self, timeout_s: float) -> None:
        """Wait until there are no connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()

    def _look(self) -> None:
        """End what has exceeded its time, and return memory that peers made the server take."""
        limits, now = self.limits, time.monotonic()
        unused = 0
        for connection in tuple(self._connections):
            connection.look(now, busy=_is_busy(connection))
            unused += now - connection.idle_since > _UNUSED_S
            write_timeout_s = limits.write_timeout_s
            if connection.draining:
                write_timeout_s = min(write_timeout_s or _AGED_WRITE_TIMEOUT_S, _AGED_WRITE_TIMEOUT_S)
            since = connection.stands_still_since()
            if write_timeout_s and since is not None and now - since > write_timeout_s:
                self._on_ended("unread")
                connection.abandon()
                continue
            for call in tuple(connection.streams.values()):
                assert isinstance(call, Http2Call)
                call.look(now, limits.body_timeout_s, write_timeout_s)
            if (
                limits.idle_timeout_s
                and now - connection.idle_since > limits.idle_timeout_s
                and not connection.draining
            ):
                self._on_ended("idle")
                connection.drain()
        self._unused = unused
        self._count_connections()
        pools = (self.requests, self.unguarded, self.answers)
        dropped = sum(pool.peak - pool.bytes for pool in pools)
        due = now - self._gave_back > _GIVE_BACK_EVERY_S
        if dropped > _GIVE_BACK_BYTES or (due and (self._give_back_again or dropped > _GIVE_BACK_BYTES // 8)):
            # Twice: timers of connections that have ended keep some of the memory for 10 s more.
            self._gave_back, self._give_back_again = now, not (due and self._give_back_again)
            for pool in pools:
                pool.peak = pool.bytes
            task = self.loop.create_task(asyncio.to_thread(give_back_memory))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        self._looking = self.loop.call_later(limits.sweep_s, self._look)

    def on_finished(self, call: Http2Call, code: grpc.StatusCode, text: str) -> None:
        """Take note of a call's end."""
        self.running -= 1
        if self._board is not None:
            self._board.set_calls(self.running)
        self._on_finished(call, code, text)

    def _accept(self, listening: socket) -> None:
        """Take one connection, if no other worker that can has fewer: the one that has is woken too."""
        pause_s = 0.0
        if self._accept_order is not None and not self._accept_order.may_accept():
            pause_s = _YIELD_S
        else:
            try:
                accepted, place = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("a connection cannot be accepted", extra={"reason": str(error)})
                pause_s = _ACCEPT_PAUSE_S
            else:
                if self._accept_order is not None:
                    self._accept_order.accepted()
                if not self._has_place():
                    # Without a word: gRPC's clients would take a GOAWAY for a connection that was there, and connect
                    # again at once, thousands of times a second.
                    accepted.close()
                    self._on_turned_away()
                    return
                accepted.setblocking(False)
                self._accepted += 1
                self._count_connections()
                task = self.loop.create_task(self._adopt(accepted, address_of(place)))
                self.tasks.add(task)
                self._handshakes[task] = None
                task.add_done_callback(self._adopted)
        if pause_s:
            self.loop.remove_reader(listening)
            self.loop.call_later(pause_s, self._accept_again, listening)

    def _accept_again(self, listening: socket) -> None:
        if listening in self._listening:
            self.loop.add_reader(listening, self._accept, listening)

    def _has_place(self) -> bool:
        """Tell whether there is a place for one more connection; one that does nothing is ended for it."""
        most = self.limits.max_connections
        if self._accepted < most:
            return True
        if self._accepted - sum(one.draining for one in self._connections) < most:
            return self._accepted < most + most // 8 + 1  # those that drain are gone soon
        now = time.monotonic()
        for connection in self._connections:
            connection.look(now, busy=_is_busy(connection))
        silent = next((one for one in self._connections if not one.greeted), None)
        quiet = (one for one in self._connections if not one.draining and not _is_busy(one))
        idle = min(quiet, key=lambda one: one.idle_since, default=None)
        if self._handshakes:
            next(iter(self._handshakes)).cancel()
        elif silent is not None:
            silent.abandon()
        elif idle is not None and now - idle.idle_since >= _IDLE_S:
            idle.drain()
        else:
            return False
        self._on_ended("crowded")
        return True

    async def _adopt(self, accepted: socket, peer: str) -> None:
        tls: dict[str, Any] = {}
        if self._tls is not None:
            timeout_s = self.limits.handshake_timeout_s or None
            tls = {"ssl": self._tls(), "ssl_handshake_timeout": timeout_s, "ssl_shutdown_timeout": 1.0}
        try:
            await self.loop.connect_accepted_socket(self._new_connection, accepted, **tls)
        except (OSError, asyncio.CancelledError) as error:
            if tls and isinstance(error, OSError):
                self._on_tls_failure(error, peer)
            accepted.close()
            self._accepted -= 1
            self._count_connections()

    def _adopted(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        del self._handshakes[task]

    def _new_connection(self) -> Connection[Head]:
        return Connection(
            read_head=read_head,
            open_stream=self._open,
            limits=self.limits,
            answers=self.answers,
            turns=self._loop_turns,
            trusted=self.guard is None,
            on_made=self._made,
            on_lost=self._lost,
        )

    def _made(self, connection: Connection[Head]) -> None:
        self._connections[connection] = None
        self._empty.clear()
        if self._draining:
            connection.drain()  # it was accepted before the listeners were closed
        elif self.limits.max_connection_age_s:
            age_s = self.limits.max_connection_age_s * random.uniform(0.9, 1.1)
            connection.end_later(age_s, self._age)

    def _age(self, connection: Connection[Head]) -> None:
        self._on_aged()
        connection.drain()
        # Later: a probe that has come is answered, and a watcher may still be on its way.
        reason = "the connection has been open for long; call again on another"
        self.loop.call_later(_AGED_GRACE_S, self._cut_off_unawaited, connection, reason)

    def _lost(self, connection: Connection[Head]) -> None:
        self._connections.pop(connection, None)
        self._accepted -= 1
        self._count_connections()
        if not self._connections:
            self._empty.set()

    def _count_connections(self) -> None:
        if self._board is not None:
            self._board.set_connections(self._accepted)
            # Those that are kept, and not used, are no reason for the next ones to go to another worker.
            self._board.set_in_use(max(0, self._accepted - self._unused))

    def _open(self, connection: Connection[Head], stream_id: int, head: Head) -> Http2Call:
        self.running += 1
        if self._board is not None:
            self._board.set_calls(self.running)
        call = Http2Call(self, connection, stream_id, head)
        if self._draining and call.method is not None and not call.method.awaited:
            self.loop.call_soon(call.fail, Unavailable("the server is shutting down"))
        return call


def _is_busy(connection: Connection[Head]) -> bool:
    """Tell whether a connection has a call that a drain waits for; others, such as a watch of health, may last."""
    calls = connection.streams.values()
    return any(isinstance(call, Http2Call) and (call.method is None or call.method.awaited) for call in calls)

"""The server side of gRPC over HTTP/2: accepts connections, dispatches calls to methods, and enforces the limits.

A method is a function that gets a call and the request's bytes, and replies later through the call. So the most
frequent methods need no task. The servicers of grpcio's own packages run unchanged: `add_registered_method_handlers`
takes the handlers that generated code registers.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import random
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from socket import IPPROTO_TCP, MSG_PEEK, socket
from typing import Any

import grpc

from ganserve_server.errors import Unavailable
from ganserve_server.machine import give_back_memory
from ganserve_server.shared.scoreboard import AcceptOrder
from ganserve_server.transport.answering import BaseServer
from ganserve_server.transport.call import Http2Call, address_of
from ganserve_server.transport.headers import Head, read_head
from ganserve_server.transport.http2 import CANCEL, GOAWAY_TIMEOUT_S, READ_BYTES, Connection
from ganserve_server.transport.internals import set_tls_read_bytes
from ganserve_server.transport.limits import Limits
from ganserve_server.transport.pools import Pool
from ganserve_server.transport.turns import LoopTurns

_log = logging.getLogger(__name__)

_CLOSE_GRACE_S = 1.0
_AGED_GRACE_S = GOAWAY_TIMEOUT_S + 0.1
_AGED_WRITE_TIMEOUT_S = 10.0  # of a connection that drains
_BACKLOG = 1024
# A socket option, and the states in its first byte after a reset and after a FIN: linux/tcp.h, net/tcp_states.h.
_TCP_INFO, _LEFT = 11, (7, 8)
_YIELD_S = 0.001  # in which a worker with fewer connections accepts the next one
_ACCEPT_PAUSE_S = 1.0  # after accepting failed
_LOG_AGAIN_S = 60.0  # between two log lines that accepting fails
_UNUSED_S = 10.0  # without a call; workers balance new connections by the connections in use
_IDLE_S = 1.0  # after which a connection may be closed to make room for another
_SEARCH_AGAIN_S = 5e-5  # for each connection, between searches for unused ones: searching takes about 1% of the time
_ACCEPT_S = 0.001  # in one iteration of the loop
_SILENT_S = 0.005  # for the first byte of a new connection
# Return free memory to the system after 32 MiB were freed, or after 12 s if at least an eighth of that was freed.
_GIVE_BACK_BYTES, _GIVE_BACK_EVERY_S = 32 << 20, 12.0
_LOST_BYTES = 64 << 10  # that the end of a connection frees beside the pools, mostly of TLS


class GrpcServer(BaseServer[Http2Call]):
    """Listens, and dispatches calls to methods.

    Args:
        limits: bounds on the memory, work and time that peers can take.
        tls: returns the TLS context for a new connection; None: plain text.
        on_tls_failure: called with the error and the peer's address when a TLS handshake fails.
        on_aged: called for each connection that drains because of its age: `max_connection_age_s`, plus or minus 10%.
            Because connections age, a load balancer's long-lived connections spread to new replicas.
        on_ended: called for each connection that the server ends for another reason: with that
            reason, the peer's address if it is known, and a text.
        on_turned_away: called for each connection that is closed at once, with the reason: `connections`, because there
            are too many, or `descriptors`, because there is no file descriptor for it.
        options: `BaseServer`'s.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        tls: Callable[[], ssl.SSLContext] | None = None,
        on_tls_failure: Callable[[OSError, str], None] = lambda *_: None,
        on_aged: Callable[[], None] = lambda: None,
        on_ended: Callable[[str, str, str], None] = lambda *_: None,
        on_turned_away: Callable[[str], None] = lambda _: None,
        **options: Any,
    ) -> None:
        super().__init__(limits=limits, **options)
        self.requests = Pool(limits.request_bytes, limits.request_bytes_each)
        self.unguarded = Pool(limits.unguarded_bytes, limits.unguarded_bytes_each)
        self.answers = Pool(limits.answer_bytes, limits.answer_bytes_each, of_answers=True)
        self._loop_turns = LoopTurns(self.loop)
        self.running = 0
        self._tls, self._on_tls_failure = tls, on_tls_failure
        if tls is not None:
            set_tls_read_bytes(READ_BYTES)
        self._on_aged, self._on_ended, self._on_turned_away = on_aged, on_ended, on_turned_away
        self._connections: dict[Connection[Head], None] = {}  # oldest first
        self._empty = asyncio.Event()
        self._empty.set()
        self._listening: list[socket] = []
        self._places: set[socket] = set()  # of connections, including new ones before and in their handshake
        self._unstarted: set[socket] = set()  # whose handshake has not begun
        self._ending = 0  # connections that drain
        self._spare: int | None = None  # a file descriptor to give up for a connection that is turned away
        self._logged_failure = -_LOG_AGAIN_S  # by time.monotonic
        self._behind = False  # more connections wait than the last slice of time was enough for
        self._silent: dict[socket, asyncio.TimerHandle] = {}  # new connections whose peer has sent nothing
        # Oldest first, each with its start by time.monotonic.
        self._handshakes: dict[socket, tuple[asyncio.Task[None], float]] = {}
        self._accept_order = None if self._board is None else AcceptOrder(self._board)
        self._unused = 0  # the number of connections without a recent call
        self._unused_ones: deque[Connection[Head]] = deque()  # may be closed to make room
        self._searched = 0.0  # the last search for unused connections, by time.monotonic
        self._looking: asyncio.TimerHandle | None = None
        self._lost_since = 0  # connections that ended since memory was given back
        self._gave_back, self._give_back_again = 0.0, False  # by time.monotonic

    @property
    def load(self) -> tuple[int, int]:
        """How many connections and calls there are."""
        return len(self._connections), self.running

    def new_request_id(self) -> str:
        """Return an id that no other call has."""
        return f"{random.getrandbits(128):032x}"

    def kept_bytes(self) -> dict[str, int]:
        """Return how many bytes the server keeps for its peers, by pool."""
        return {"requests": self.requests.bytes, "unguarded": self.unguarded.bytes, "answers": self.answers.bytes}

    def start(self, sockets: Iterable[socket]) -> None:
        """Listen on sockets that are bound.

        Raises:
            OSError: another program listens there.
        """
        self._count_connections()
        for bound in sockets:
            bound.setblocking(False)
            bound.listen(_BACKLOG)
            self._listening.append(bound)
            self.loop.add_reader(bound, self._accept, bound)
        self._spare = _open_spare()
        self._looking = self.loop.call_later(self.limits.sweep_s, self._look)

    async def drain(self, timeout_s: float) -> None:
        """Accept no more connections, let running calls finish, end calls that exceed the timeout, and close."""
        self._draining = True
        listening, self._listening = self._listening, []
        for bound in listening:
            self.loop.remove_reader(bound)
            bound.close()
        spare, self._spare = self._spare, None  # a drain may be called again
        if spare is not None:
            os.close(spare)
        for accepted, timer in self._silent.items():
            timer.cancel()
            accepted.close()
        self._places.difference_update(self._silent)
        self._silent.clear()
        for connection in tuple(self._connections):
            self._end(connection)
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
        while not self._loop_turns.idle:  # noqa: ASYNC110 (calls of connections that were lost end soon)
            await asyncio.sleep(0)

    @staticmethod
    def _cut_off_unawaited(connection: Connection[Head], reason: str) -> None:
        for call in tuple(connection.streams.values()):
            assert isinstance(call, Http2Call)
            if call.method is not None and not call.method.awaited:
                call.fail(Unavailable(reason))
                if not call.ended:
                    connection.reset(call, CANCEL)  # the peer reads nothing, and would delay the end

    async def _emptied(self, timeout_s: float) -> None:
        """Wait until there are no connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()

    def _look(self) -> None:
        """End connections and calls that exceed their times, and return freed memory to the system."""
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
                self._ended(connection, "unread", f"the peer has read nothing for {write_timeout_s:g} s")
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
                self._ended(connection, "idle", f"there was no call for {limits.idle_timeout_s:g} s")
                self._end(connection)
        self._unused = unused
        self._unused_ones.clear()  # it would keep ended connections alive
        self._count_connections()
        pools = (self.requests, self.unguarded, self.answers)
        dropped = sum(pool.peak - pool.bytes for pool in pools)
        due = now - self._gave_back > _GIVE_BACK_EVERY_S
        some = dropped + self._lost_since * _LOST_BYTES > _GIVE_BACK_BYTES // 8
        if dropped > _GIVE_BACK_BYTES or (due and (self._give_back_again or some)):
            # Twice: timers of ended connections keep some of the memory for 10 s more.
            self._gave_back, self._give_back_again = now, not (due and self._give_back_again)
            self._lost_since = 0
            for pool in pools:
                pool.peak = pool.bytes
            task = self.loop.create_task(asyncio.to_thread(give_back_memory))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        self._looking = self.loop.call_later(limits.sweep_s, self._look)

    def on_finished(self, call: Http2Call, code: grpc.StatusCode, text: str) -> None:
        """Record a call that has ended."""
        self.running -= 1
        if self._board is not None:
            self._board.set_calls(self.running)
        self._on_finished(call, code, text)

    def _accept(self, listening: socket) -> None:
        """Accept waiting connections for a short time, while no other available worker has fewer."""
        until, pause_s = time.perf_counter() + _ACCEPT_S, 0.0
        while not pause_s and time.perf_counter() < until:
            # The connection wakes the worker with fewer connections, too.
            if self._accept_order is not None and not self._accept_order.may_accept():
                pause_s = _YIELD_S
                break
            try:
                accepted = self._accept_one(listening)
            except (BlockingIOError, ConnectionAbortedError):
                self._behind = False
                return
            except OSError as error:
                self._log_failure(error)
                pause_s = _ACCEPT_PAUSE_S
                break
            if self._accept_order is not None:
                self._accept_order.accepted()
            if accepted is not None:
                self._take(accepted[0], address_of(accepted[1]))
        self._behind = not pause_s
        if pause_s:
            self.loop.remove_reader(listening)
            self.loop.call_later(pause_s, self._accept_again, listening)

    def _accept_one(self, listening: socket) -> tuple[socket, Any] | None:
        """Accept a connection; if there is no file descriptor for it, close it at once and return None.

        Raises:
            OSError: as of `socket.accept`.
        """
        try:
            return listening.accept()
        except OSError as error:
            if self._spare is None:
                self._spare = _open_spare()
            if error.errno not in (errno.EMFILE, errno.ENFILE) or self._spare is None:
                raise
            os.close(self._spare)
            try:
                listening.accept()[0].close()  # fails if none waits: without a descriptor, accept does not look
            finally:
                self._spare = _open_spare()
            self._log_failure(error)
        self._on_turned_away("descriptors")
        return None

    def _log_failure(self, error: OSError) -> None:
        if time.monotonic() - self._logged_failure >= _LOG_AGAIN_S:
            self._logged_failure = time.monotonic()
            _log.error("a connection cannot be accepted", extra={"reason": str(error)})

    def _take(self, accepted: socket, peer: str) -> None:
        """Serve a connection, unless there is no room for it or its peer has closed it."""
        accepted.setblocking(False)
        first = _peek(accepted)
        # Connections wait in the kernel's queue behind those of a peer that connects and closes all the time. Serving
        # one that has ended takes ten times as long as to see it.
        if first == b"" or (self._behind and _has_left(accepted)):
            self._refuse(accepted, peer)
            return
        if not self._has_place():
            # Without a GOAWAY: gRPC's clients would treat the connection as established, and reconnect at once,
            # thousands of times a second.
            accepted.close()
            self._on_turned_away("connections")
            return
        self._places.add(accepted)
        self._count_connections()
        if first is None:
            # So a peer that only connects and closes, as some probes do, costs a tenth of starting a connection.
            timer = self.loop.call_later(_SILENT_S, self._take_silent, accepted, peer)
            self._silent[accepted] = timer
        else:
            self._serve(accepted, peer)

    def _take_silent(self, accepted: socket, peer: str) -> None:
        """Serve a connection whose peer had sent nothing when it was accepted, unless the peer has closed it since."""
        del self._silent[accepted]
        if _peek(accepted) == b"":
            self._release(accepted)
            self._refuse(accepted, peer)
        else:
            self._serve(accepted, peer)

    def _refuse(self, accepted: socket, peer: str) -> None:
        """Close a connection that its peer has closed."""
        accepted.close()
        if self._tls is not None:
            self._on_tls_failure(ConnectionResetError(), peer)

    def _serve(self, accepted: socket, peer: str) -> None:
        task = self.loop.create_task(self._adopt(accepted, peer))
        self.tasks.add(task)
        self._unstarted.add(accepted)
        self._handshakes[accepted] = task, time.monotonic()
        task.add_done_callback(functools.partial(self._adopted, accepted))

    def _release(self, accepted: socket) -> None:
        """Free the place of a connection that has ended or did not begin; more than one call does no harm."""
        self._places.discard(accepted)
        self._count_connections()

    def _accept_again(self, listening: socket) -> None:
        if listening in self._listening:
            self.loop.add_reader(listening, self._accept, listening)

    def _has_place(self) -> bool:
        """Return whether there is room for one more connection; make room by ending an unused one."""
        most = self.limits.max_connections
        if len(self._places) < most:
            return True
        if len(self._places) - self._ending < most:
            return len(self._places) < most + most // 8 + 1  # draining connections end soon
        now = time.monotonic()
        handshakes = (one for one in self._handshakes.values() if not one[0].cancelling())
        handshake, began = next(handshakes, (None, now))
        if handshake is not None and now - began >= _IDLE_S:
            handshake.cancel()
        elif (connection := self._next_unused(now)) is not None:
            if connection.greeted:
                connection.leave()
            else:
                connection.abandon()
        elif self._silent:
            accepted = next(iter(self._silent))
            self._silent.pop(accepted).cancel()
            self._release(accepted)
            accepted.close()
        elif handshake is not None and self._tls is not None:
            handshake.cancel()
        else:
            return False
        self._on_ended("crowded", "", "another connection took its place")
        return True

    def _next_unused(self, now: float) -> Connection[Head] | None:
        """Return a connection to end: first those that sent no HTTP/2 preface, then the longest idle; or None."""

        def is_unused(connection: Connection[Head]) -> bool:
            if connection.draining or connection.closing or connection not in self._connections:
                return False
            connection.look(now, busy=(busy := _is_busy(connection)))
            return not connection.greeted or (not busy and now - connection.idle_since >= _IDLE_S)

        # Searching thousands of connections for each new one would delay the calls of all connections.
        if not self._unused_ones and now - self._searched > _SEARCH_AGAIN_S * len(self._connections):
            self._searched = now
            found = filter(is_unused, tuple(self._connections))
            self._unused_ones.extend(sorted(found, key=lambda one: (one.greeted, one.idle_since)))
        while self._unused_ones:
            if is_unused(connection := self._unused_ones.popleft()):
                return connection
        return None

    async def _adopt(self, accepted: socket, peer: str) -> None:
        tls: dict[str, Any] = {}
        if self._tls is not None:
            timeout_s = self.limits.handshake_timeout_s or None
            tls = {"ssl": self._tls(), "ssl_handshake_timeout": timeout_s, "ssl_shutdown_timeout": 1.0}
        self._unstarted.discard(accepted)
        try:
            await self.loop.connect_accepted_socket(lambda: self._new_connection(accepted), accepted, **tls)
        except (OSError, asyncio.CancelledError) as error:
            # The transport closes the socket. `_lost` handles a connection that was made.
            if accepted in self._handshakes:
                if tls and isinstance(error, OSError):
                    self._on_tls_failure(error, peer)
                self._release(accepted)

    def _adopted(self, accepted: socket, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        self._handshakes.pop(accepted, None)
        if accepted in self._unstarted:  # it was cancelled before its first step
            self._unstarted.discard(accepted)
            accepted.close()
            self._release(accepted)

    def _new_connection(self, accepted: socket) -> Connection[Head]:
        return Connection(
            read_head=read_head,
            open_stream=self._open,
            limits=self.limits,
            answers=self.answers,
            turns=self._loop_turns,
            trusted=self.guard is None,
            on_made=functools.partial(self._made, accepted),
            on_lost=functools.partial(self._lost, accepted),
            on_failed=self._ended,
        )

    def _made(self, accepted: socket, connection: Connection[Head]) -> None:
        self._handshakes.pop(accepted, None)
        self._connections[connection] = None
        self._empty.clear()
        if self._draining:
            self._end(connection)  # it was accepted before the listeners were closed
        elif self.limits.max_connection_age_s:
            age_s = self.limits.max_connection_age_s * random.uniform(0.9, 1.1)
            connection.end_later(age_s, self._age)

    def _age(self, connection: Connection[Head]) -> None:
        self._on_aged()
        self._end(connection)
        # Later: a probe that has arrived is answered, and a call of Watch may still be in flight.
        reason = "the connection has reached its maximum age; call again on another connection"
        self.loop.call_later(_AGED_GRACE_S, self._cut_off_unawaited, connection, reason)

    def _end(self, connection: Connection[Head]) -> None:
        self._ending += not connection.draining
        connection.drain()

    def _ended(self, connection: Connection[Head], reason: str, text: str) -> None:
        self._on_ended(reason, address_of(connection.transport.get_extra_info("peername")), text)

    def _lost(self, accepted: socket, connection: Connection[Head]) -> None:
        self._connections.pop(connection, None)
        self._lost_since += 1
        self._ending -= connection.draining
        self._release(accepted)
        if not self._connections:
            self._empty.set()

    def _count_connections(self) -> None:
        if self._board is not None:
            self._board.set_connections(len(self._places))
            # Unused connections do not count: they are no reason to send the next connection to another worker.
            self._board.set_in_use(max(0, len(self._places) - self._unused))

    def _open(self, connection: Connection[Head], stream_id: int, head: Head) -> Http2Call:
        self.running += 1
        if self._board is not None:
            self._board.set_calls(self.running)
        call = Http2Call(self, connection, stream_id, head)
        if self._draining and call.method is not None and not call.method.awaited:
            self.loop.call_soon(call.fail, Unavailable("the server is shutting down"))
        return call


def _is_busy(connection: Connection[Head]) -> bool:
    """Return whether a connection has a call that a drain waits for; a health Watch, for example, is none."""
    calls = connection.streams.values()
    return any(isinstance(call, Http2Call) and (call.method is None or call.method.awaited) for call in calls)


def _open_spare() -> int | None:
    with contextlib.suppress(OSError):
        return os.open(os.devnull, os.O_RDONLY)
    return None


def _has_left(accepted: socket) -> bool:
    """Return whether the peer has closed the connection, even if what it sent is not read yet; Linux only."""
    try:
        return sys.platform == "linux" and accepted.getsockopt(IPPROTO_TCP, _TCP_INFO, 1)[0] in _LEFT
    except OSError:
        return False


def _peek(accepted: socket) -> bytes | None:
    """Return the first byte that a peer has sent, b"" if it has closed the connection, or None if it sent nothing."""
    try:
        return accepted.recv(1, MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""

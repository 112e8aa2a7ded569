"""Flow control of what is sent (RFC 9113, 5.2 and 6.9): the peer's windows, and the answers that wait for them."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

from ganserve_server.transport.pools import Evict, Holding, Pool

DEFAULT_WINDOW = 65535
MAX_WINDOW = 2**31 - 1
# What Python, and the stream's own object, take beside a waiting answer's bytes; measured, rounded up.
_KEPT_WITH_ANSWER = 2048


class Overflow(Exception):  # noqa: N818
    """The peer has made a window larger than 2^31-1."""


class Flow:
    """The part of a stream that `SendFlow` owns, and it alone changes."""

    __slots__ = ("header_block", "holding", "id", "left", "trailer_block", "waiting", "window")

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.window = 0  # bytes of DATA that the peer takes; below zero after it has made all windows smaller
        self.header_block: bytes | None = None  # goes before the data
        self.waiting: deque[bytes | memoryview] | None = None  # not empty
        self.left = 0  # bytes in it
        self.trailer_block: bytes | None = None  # go after the data; empty: what is sent last ends the stream
        self.holding: Holding | None = None  # while anything waits


class Part(NamedTuple):
    """What may be sent of a stream now, in this order; trailers end it, empty ones by what goes before."""

    stream: Flow
    head: bytes | None
    data: bytes | memoryview | None
    trailers: bytes | None


class SendFlow:
    """The windows of a connection and its streams, and what waits for them.

    Every size that it gives out is from 1 to what the windows and the peer's frames allow.

    Args:
        pool: where what waits is counted, with an overhead an answer.
    """

    __slots__ = ("_heads", "_ready", "frame_size", "initial_window", "pool", "window")

    def __init__(self, pool: Pool, frame_size: int) -> None:
        self.pool, self.frame_size = pool, frame_size
        self.window = self.initial_window = DEFAULT_WINDOW
        # Streams with something that may be sent, next one first: data that their own windows let pass, and what needs
        # no window. The others are not looked at: a peer could have a thousand, and open one again and again.
        self._ready: OrderedDict[int, Flow] = OrderedDict()
        self._heads: OrderedDict[int, Flow] = OrderedDict()

    def passes(self, stream: Flow, size: int) -> bool:
        """Take so much of the windows, if they allow all of it and nothing of the stream waits."""
        if stream.holding is not None or (size and (size > stream.window or size > self.window)):
            return False
        stream.window -= size
        self.window -= size
        return True

    def keep(
        self,
        stream: Flow,
        key: object,
        evict: Evict,
        head: bytes | None,
        data: bytes | memoryview,
        trailers: bytes | None,
    ) -> None:
        """Let some of a stream's answer wait behind what waits already; it may be evicted at once."""
        if head is not None:
            stream.header_block = head
        if data:
            if stream.waiting is None:
                stream.waiting = deque()
            stream.waiting.append(data)
            stream.left += len(data)
        stream.trailer_block = trailers
        if stream.holding is None:
            stream.holding = Holding(self.pool, key, evict)
        self._sort(stream)
        self._count(stream)

    def grant(self, stream: Flow | None, more: int) -> None:
        """Open a stream's window, or the connection's.

        Raises:
            Overflow: it is too large now.
        """
        if stream is None:
            self.window += more
        else:
            stream.window += more
            self._sort(stream)
        if (self.window if stream is None else stream.window) > MAX_WINDOW:
            raise Overflow

    def resize(self, initial_window: int, streams: Iterable[Flow]) -> None:
        """Change the windows of all streams, to below zero too (RFC 9113, 6.9.2).

        Raises:
            Overflow: one is too large now.
        """
        more, self.initial_window = initial_window - self.initial_window, initial_window
        for stream in streams:
            self.grant(stream, more)

    def next(self) -> Part | None:
        """Take what may be sent next, a frame of each stream in turn; None: nothing may."""
        if self._heads:
            _, stream = self._heads.popitem(last=False)
        elif self._ready and self.window > 0:
            _, stream = self._ready.popitem(last=False)
        else:
            return None
        head, stream.header_block = stream.header_block, None
        data: bytes | memoryview | None = None
        if stream.waiting and stream.window > 0 and self.window > 0:
            first = stream.waiting[0]
            size = min(len(first), stream.window, self.window, self.frame_size)
            stream.window -= size
            self.window -= size
            stream.left -= size
            if size == len(first):
                data = first
                stream.waiting.popleft()
            else:
                first = memoryview(first)
                data, rest = first[:size], first[size:]
                # A view keeps the whole message, of which only what is left is counted.
                stream.waiting[0] = bytes(rest) if 2 * len(rest) < memoryview(first.obj).nbytes else rest
        trailers = None
        if stream.waiting:
            self._sort(stream)
            self._count(stream)
            assert stream.holding is not None
            stream.holding.progress()
        else:
            trailers, stream.trailer_block = stream.trailer_block, None
            self._forget(stream)
        return Part(stream, head, data, trailers)

    def drop(self, stream: Flow) -> None:
        """Forget what waits of a stream: it is over."""
        stream.header_block = stream.trailer_block = None
        if stream.waiting:
            stream.waiting.clear()
        stream.left = 0
        self._ready.pop(stream.id, None)
        self._heads.pop(stream.id, None)
        self._forget(stream)

    def _sort(self, stream: Flow) -> None:
        """Put a stream where `next` finds it, exactly if it may send something; the only place that does."""
        if stream.holding is None:
            return
        if stream.header_block is not None or not stream.waiting:
            self._heads[stream.id] = stream
        elif stream.window > 0:
            self._ready[stream.id] = stream
        else:
            self._ready.pop(stream.id, None)

    @staticmethod
    def _forget(stream: Flow) -> None:
        stream.waiting = None
        if stream.holding is not None:
            holding, stream.holding = stream.holding, None
            holding.resize(0)

    @staticmethod
    def _count(stream: Flow) -> None:
        assert stream.holding is not None
        extra = len(stream.header_block or b"") + len(stream.trailer_block or b"")
        stream.holding.resize(stream.left + extra + _KEPT_WITH_ANSWER)

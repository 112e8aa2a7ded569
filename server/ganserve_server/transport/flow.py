"""Flow control of sent data (RFC 9113, 5.2 and 6.9): the peer's windows, and the answers that wait for them."""

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

from ganserve_server.transport.pools import Evict, Holding, Pool

DEFAULT_WINDOW = 65535
MAX_WINDOW = 2**31 - 1
# Overhead of a waiting answer: Python's objects and the stream itself; measured, rounded up.
_KEPT_WITH_ANSWER = 2048


class Overflow(Exception):  # noqa: N818
    """The peer has made a window larger than 2^31-1."""


class Flow:
    """The part of a stream that `SendFlow` owns; only `SendFlow` changes it."""

    __slots__ = ("header_block", "holding", "id", "left", "trailer_block", "waiting", "window")

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.window = 0  # bytes of DATA that the peer accepts; below zero after the peer has shrunk all windows
        self.header_block: bytes | None = None  # sent before the data
        self.waiting: deque[bytes | memoryview] | None = None  # pieces of data, none of them empty
        self.left = 0  # bytes in `waiting`
        self.trailer_block: bytes | None = None  # sent after the data; empty: the stream ends without trailers
        self.holding: Holding | None = None  # while anything waits


class Part(NamedTuple):
    """The part of a stream that may be sent now, in field order. Trailers end the stream; empty ones are not sent."""

    stream: Flow
    head: bytes | None
    data: bytes | memoryview | None
    trailers: bytes | None


class SendFlow:
    """The windows of a connection and its streams, and the answers that wait for them.

    Each piece of data that `next` returns has at least 1 byte and fits the windows and the peer's frame size.

    Args:
        pool: counts the waiting bytes, with an overhead for each answer.
        frame_size: the largest frame that the peer accepts, in bytes.
    """

    __slots__ = ("_heads", "_ready", "frame_size", "initial_window", "pool", "window")

    def __init__(self, pool: Pool, frame_size: int) -> None:
        self.pool, self.frame_size = pool, frame_size
        self.window = self.initial_window = DEFAULT_WINDOW
        # Streams that may send, the next one first: `_ready` has those with data and an open window of their own,
        # `_heads` those with header blocks, which need no window. Blocked streams are not scanned: a peer could have a
        # thousand of them, and open one window again and again.
        self._ready: OrderedDict[int, Flow] = OrderedDict()
        self._heads: OrderedDict[int, Flow] = OrderedDict()

    def passes(self, stream: Flow, size: int) -> bool:
        """Take `size` bytes from both windows, if both allow all of it and nothing of the stream waits."""
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
        """Queue a part of a stream's answer behind the parts that already wait; this may evict it at once."""
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
        """Enlarge a stream's window, or the connection's if `stream` is None.

        Raises:
            Overflow: the window exceeds 2^31-1.
        """
        if stream is None:
            self.window += more
        else:
            stream.window += more
            self._sort(stream)
        if (self.window if stream is None else stream.window) > MAX_WINDOW:
            raise Overflow

    def resize(self, initial_window: int, streams: Iterable[Flow]) -> None:
        """Change the windows of all streams; they may become negative (RFC 9113, 6.9.2).

        Raises:
            Overflow: a window exceeds 2^31-1.
        """
        more, self.initial_window = initial_window - self.initial_window, initial_window
        for stream in streams:
            self.grant(stream, more)

    def next(self) -> Part | None:
        """Take the next part that may be sent, a frame of each stream in turn; None if nothing may be sent."""
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
                # A view keeps the whole message in memory, but only the rest is counted: copy a small rest.
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
        """Drop the waiting data of a stream that is over."""
        stream.header_block = stream.trailer_block = None
        if stream.waiting:
            stream.waiting.clear()
        stream.left = 0
        self._ready.pop(stream.id, None)
        self._heads.pop(stream.id, None)
        self._forget(stream)

    def _sort(self, stream: Flow) -> None:
        """Put a stream where `next` finds it if it may send something; only this method does so."""
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

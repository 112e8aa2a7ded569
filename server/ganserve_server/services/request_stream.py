"""A stream of requests: each is answered or refused in order, and a refused request does not end the stream.

A limited number of requests runs at a time. The next requests wait unread, so that neither requests nor answers fill
the memory.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ganserve_server.compute.inputs import Draw
from ganserve_server.errors import ServingError
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import CallWork, Job, Made
from ganserve_server.transport.interface import Call, RequestSink

# Limits of one stream.
_MAX_RUNNING = 256
_MAX_RUNNING_BYTES = 16 << 20  # of requests and pixels: a finished answer waits until the answers before it are sent
_MAX_PENDING_BYTES = 1 << 20
_MAX_AT_ONCE = 64  # requests; a refused one takes 10 to 20 µs of the event loop
_NOTHING: "deque[Any]" = deque(maxlen=0)  # for streams without requests: an empty deque takes 600 bytes


class StreamedRequest:
    """One request of a stream, and its answer once it is made."""

    __slots__ = ("answer", "job", "pixel_bytes", "request_bytes")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.answer: bytes | None = None
        self.pixel_bytes = self.request_bytes = 0


class RequestStream(ABC):
    """Takes requests while there is room, and sends their answers in order."""

    __slots__ = ("_call", "_ended", "_running", "_running_bytes", "_unread", "_waits", "_woken", "_work")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._unread: deque[bytes] = _NOTHING
        self._running: deque[StreamedRequest] = _NOTHING
        self._running_bytes = 0
        self._woken = self._ended = self._waits = False
        call.on_cancel = self._cancel
        call.work = self._work = CallWork()

    @property
    def sink(self) -> RequestSink:
        """The functions that receive the stream's requests and its end."""
        return self._on_request, self._on_end

    @abstractmethod
    def take(self, content: bytes) -> StreamedRequest:
        """Read a request, and queue it now or in `queue_taken`."""

    def queue_taken(self) -> None:  # noqa: B027  nothing to do where `take` queues
        """Queue the requests that `take` has held back, because there is no room for more or no more have arrived."""

    def submit(
        self,
        requests: Sequence[StreamedRequest],
        batcher: Batcher,
        draw: Draw,
        done: Callable[[Made | ServingError], None],
        *,
        deadline: float | None,
        bulk: bool,
    ) -> None:
        """Queue one draw for some requests; `done` sets their answers.

        Raises:
            ServingError: the draw is refused.
        """

        def answered(made: Made | ServingError) -> None:
            try:
                done(made)
                self.send_answers()
            except Exception as error:
                self._call.fail(error)

        job = batcher.submit(
            draw, answered, fairness_key=self._call.fairness_key, deadline=deadline, bulk=bulk, work=self._work
        )
        self._work.count += draw.count
        for request in requests:
            request.job = job

    def send_answers(self) -> None:
        """Send the answers that are next in order, then take the requests that there is room for."""
        call, running, answers, request_bytes = self._call, self._running, [], 0
        while running and (answer := running[0].answer) is not None:
            request = running.popleft()
            self._running_bytes -= request.pixel_bytes + request.request_bytes
            request_bytes += request.request_bytes
            answers.append(answer)
        if answers:
            call.send(*answers)
            # Not earlier: the parsed request (latents, the id for the response) takes as much memory as its bytes.
            call.consumed(request_bytes, len(answers))
        if call.pending_bytes > _MAX_PENDING_BYTES and not self._waits:
            self._waits = True
            call.spawn(self._resume_once_sent(), cancel=self._cancel)
        if self._begin():
            self._wake_soon()  # some may be answered already; take more after other connections' turns
        elif self._ended and not self._unread and not running:
            call.finish()

    def _on_request(self, content: bytes) -> None:
        if self._unread is _NOTHING:
            self._unread, self._running = deque(), deque()
        self._unread.append(content)
        self._wake_soon()

    def _on_end(self) -> None:
        self._ended = True
        self._wake_soon()

    def _wake_soon(self) -> None:
        if not self._woken:
            self._woken = True
            self._call.soon(self._wake)

    def _wake(self, _: float) -> None:
        self._woken = False
        try:
            self.send_answers()
        except Exception as error:
            self._call.fail(error)

    def _begin(self) -> bool:
        """Take requests while there is room; return whether any was taken."""
        taken = 0
        while (
            self._unread
            and taken < _MAX_AT_ONCE
            and len(self._running) < _MAX_RUNNING
            and self._running_bytes < _MAX_RUNNING_BYTES
            and not self._waits
        ):
            content = self._unread.popleft()
            taken += 1
            request = self.take(content)
            request.request_bytes = len(content)
            self._running.append(request)
            self._running_bytes += request.pixel_bytes + request.request_bytes
        if taken:
            self.queue_taken()
        return taken > 0

    async def _resume_once_sent(self) -> None:
        await self._call.drained()
        self._waits = False
        self.send_answers()

    def _cancel(self) -> None:
        self._unread.clear()
        for request in self._running:
            if request.job is not None:
                request.job.cancel()
        self._running.clear()

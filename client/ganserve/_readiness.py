"""The wait for starting servers: the delay until the next question, and the last problem."""

import time

import grpc

from ganserve._retries import SHORTEST_TRY_S, full_jitter_s
from ganserve._wait_log import WaitLog
from ganserve.errors import DeadlineExceededError, GanserveError


class Readiness:
    """One wait for servers that are starting.

    Args:
        timeout_s: how long to wait.
        what: the name of the awaited server or model, for errors and the log.
    """

    def __init__(self, timeout_s: float, what: str) -> None:
        self._timeout_s, self._what = timeout_s, what
        self._deadline = time.monotonic() + timeout_s
        self._tries = 0
        self._log = WaitLog()

    def remaining_s(self) -> float:
        """Return the remaining part of the timeout, which is above 0."""
        return max(0.001, self._deadline - time.monotonic())

    def delay_s(self, error: GanserveError | None) -> float:
        """Return how long to wait before the next question; it leaves time for one more try.

        Args:
            error: the problem; None if the server answers that it does not serve.

        Raises:
            DeadlineExceededError: the time is over; the text has the last problem.
        """
        self._tries += 1
        left_s = self._deadline - time.monotonic()
        why = "the server answers that it is not serving" if error is None else error.text
        if left_s > SHORTEST_TRY_S:
            delay_s = min(full_jitter_s(self._tries), left_s - SHORTEST_TRY_S)
            self._log.waiting(
                f"{self._what} is not ready: {why}; asking again for up to {left_s:.0f} s",
                "" if error is None else error.reason,
                self._timeout_s - left_s + delay_s,
            )
            return delay_s
        raise DeadlineExceededError(
            f"{self._what} was not ready within {self._timeout_s:g} s: {why}",
            advice="" if error is None else error.advice,
            code=grpc.StatusCode.DEADLINE_EXCEEDED,
            reason="not_ready",
        ) from error

    def ready(self) -> None:
        """Log the end of the wait, if there was one."""
        if self._tries:
            self._log.answered(self._timeout_s - (self._deadline - time.monotonic()))

"""When to retry a call, and for how long.

The SDK retries where that is safe and can help: after UNAVAILABLE, and after RESOURCE_EXHAUSTED if the server says when
to retry. Every call may be repeated: images are functions of their seeds, and if the server draws the seed, any answer
is correct. Three limits bound the retries: the deadline of the call; a patience, which is short for an address that has
never answered; and a budget of the client, so that retries do not make a server's overload much worse.
"""

import random
import threading
import time

from ganserve._wait_log import WaitLog
from ganserve.errors import DeadlineExceededError, GanserveError, OverloadedError, UnavailableError

SHORTEST_TRY_S = 0.1  # a shorter try would probably report a timeout rather than the real problem

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 2.0
_PATIENCE_S = 60.0  # with servers that have answered before
_PATIENCE_BEFORE_FIRST_ANSWER_S = 3.0  # an address that has never answered is probably wrong
# Retries. All calls on a lost connection fail at once: 500 of them at 200 calls a second to two replicas.
_BUDGET = 1000.0
_BUDGET_PER_SECOND = 10.0
_BUDGET_PER_CALL = 0.2


class RetryBudget:
    """The retries that a client has left: each call adds a fifth of a retry, and each second adds ten.

    A token bucket like Finagle's RetryBudget (twitter.github.io/finagle/guide/Clients.html, 2017). Without a budget,
    the clients of a failing server would double or triple its load. The ten per second are for clients with few calls.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = _BUDGET
        self._filled_at = time.monotonic()

    def deposit(self) -> None:
        """Count a call. Concurrent threads may lose a deposit, but a lock would cost more."""
        self._left = min(_BUDGET, self._left + _BUDGET_PER_CALL)

    def withdraw(self) -> bool:
        """Take one retry; return whether there was one."""
        with self._lock:
            now = time.monotonic()
            left = min(_BUDGET, self._left + _BUDGET_PER_SECOND * (now - self._filled_at))
            self._filled_at = now
            self._left = left - 1 if left >= 1 else left
            return left >= 1


class RetryPolicy:
    """The state that all retries of a client share: its budget, and whether its servers have ever answered."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.budget = RetryBudget()
        self.answered = False

    def succeeded(self) -> None:
        """Count a call that was answered."""
        self.answered = True
        self.budget.deposit()

    def after_fork(self) -> None:
        """Replace the budget: another thread of the parent may have held its lock."""
        self.budget = RetryBudget()


class Attempts:
    """The consecutive failures of one request. `policy` is the policy of its client."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._since = 0.0  # the time of the first failure
        self._last = ""  # the text of the last failure
        self._log = WaitLog()

    def delay_s(self, error: GanserveError, deadline: float) -> float:
        """Return how long to wait before the next try, or raise the error if there should be none.

        The delay has full jitter, which AWS's "Exponential Backoff and Jitter" (2015) found best: it is random from 0
        to a bound that doubles. The delay that a server asks for is added, so that the rejected calls do not all return
        at the same time. The last delay is shortened to leave time for one more try.

        Args:
            error: the error of the last try.
            deadline: the deadline of the request, by time.monotonic.
        """
        now = time.monotonic()
        if not self._failures:
            self._since = now
        self._failures += 1
        least_s = 0.0
        if isinstance(error, OverloadedError) and error.retry_after_s is not None:
            least_s = error.retry_after_s
        elif not isinstance(error, UnavailableError):
            if isinstance(error, DeadlineExceededError) and self._last:
                error.add_text(f", tried {self._failures} times; before that: {self._last}")
            raise error
        self._last = error.text
        if isinstance(error, OverloadedError):
            self._policy.answered = True
        patience_s = _PATIENCE_S if self._policy.answered else _PATIENCE_BEFORE_FIRST_ANSWER_S
        until = min(deadline, self._since + patience_s)
        longest_s = until - SHORTEST_TRY_S - now
        if not self._policy.enabled or longest_s <= least_s or not self._policy.budget.withdraw():
            if self._failures > 1:
                error.add_text(f", tried {self._failures} times in {now - self._since:.1f} s")
            raise error
        delay_s = min(least_s + full_jitter_s(self._failures), longest_s)
        waiting_s = now + delay_s - self._since
        self._log.waiting(f"{error.text}; trying again for up to {until - now:.0f} s", error.reason, waiting_s)
        return delay_s

    def answered(self) -> None:
        """Record that a server has answered: forget the failures, and log the end of the wait."""
        self._policy.answered = True
        if self._failures:
            self._log.answered(time.monotonic() - self._since)
            self._failures, self._last = 0, ""

    def succeeded(self) -> None:
        """Count a complete answer."""
        self._policy.succeeded()
        self.answered()


def full_jitter_s(failures: int) -> float:
    """Return a random delay after this number of consecutive failures."""
    return random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** min(failures - 1, 10)))

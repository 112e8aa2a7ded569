"""Logs what a client waits for, to the logger `ganserve`: each try at DEBUG, and fewer and fewer tries at INFO."""

import logging

_LOG_AGAIN_S = 5.0  # the wait before the second INFO line; later lines follow whenever the wait has doubled

_log = logging.getLogger("ganserve")


class WaitLog:
    """Logs one wait. INFO has the first try for each reason, then tries at growing intervals; DEBUG has each try."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._reasons: set[str] = set()
        self._again_s = _LOG_AGAIN_S

    def waiting(self, text: str, reason: str, waiting_s: float) -> None:
        """Log what the client waits for; `waiting_s` is the length of the wait at the next try, in seconds."""
        level = logging.DEBUG
        if reason not in self._reasons or waiting_s >= self._again_s:
            level = logging.INFO
            self._reasons.add(reason)
            self._again_s = max(_LOG_AGAIN_S, 2 * waiting_s)
        _log.log(level, text, extra={"waiting_s": waiting_s})

    def answered(self, waited_s: float) -> None:
        """Log that the wait is over."""
        _log.info("answered after %.1f s", waited_s, extra={"waiting_s": None})
        self._begin()

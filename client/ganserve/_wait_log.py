"""Logs what a client waits for, to the logger `ganserve`: each try in DEBUG, and ever fewer of them in INFO."""

import logging

_LOG_AGAIN_S = 5.0  # of waiting; after that, whenever the wait has doubled

_log = logging.getLogger("ganserve")


class WaitLog:
    """Logs one wait: in INFO the first try for each reason and then tries at growing intervals, in DEBUG each try."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._reasons: set[str] = set()
        self._again_s = _LOG_AGAIN_S

    def waiting(self, text: str, reason: str, waiting_s: float) -> None:
        """Log what the client waits for; `waiting_s` is how long the wait is by the next try."""
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

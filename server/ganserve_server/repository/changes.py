"""Decides which differences between the repository and the served versions count.

Three kinds do not count yet: a file that is still changing, a version that cannot be read, and the removal of a model's
last version that was seen only once. The server then acts as if nothing had changed, and says why.
"""

import dataclasses
import math
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from ganserve_server.repository.scan import MODEL_FILE_NAME, Key, Look, Stamp

UNKNOWN: Stamp = (0, 0, 0, 0)  # of a file that is to be read at the next look, whatever its stamp
# A copy in place writes more often than this, so it is read once. A longer time would delay every new version.
_SETTLE_S = 1.0
# A folder that is removed and created again, or a link that is removed and set again, is back sooner.
_CONFIRM_S = 3.0
_GONE = "its file is gone; the server unloads it unless a second look finds it"
_EMPTY = "it has no version of any model; is its volume mounted? UnloadModel stops serving what is still served"


@dataclasses.dataclass(slots=True)
class Decision:
    """What follows from a look.

    Attributes:
        found: the versions with their stamps. A version whose difference does not count has its previous stamp.
        notes: why a version is not as in the repository, or not served.
        unreadable: paths that cannot be read, each with the reason.
        again_s: in how many seconds another look may decide more; infinite if nothing is open.
    """

    found: dict[Key, Stamp]
    notes: dict[Key, str]
    unreadable: dict[Path, str]
    again_s: float


class Changes:
    """Compares looks at a repository.

    Args:
        repository: its folder.
    """

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._changing: dict[Key, tuple[Stamp, float]] = {}  # the latest stamp, and since when the file has it
        self._gone: dict[str, float] = {}  # models of which all served versions are gone, and since when

    def blind(self, error: OSError, stamps: Mapping[Key, Stamp], served: Collection[Key]) -> Decision:
        """Decide when the repository cannot be listed: everything stays."""
        return self._all_stays(f"it cannot be listed: {error.strerror}", stamps, served)

    def decide(
        self, seen: Look, stamps: Mapping[Key, Stamp], served: Collection[Key], *, settled: bool = False
    ) -> Decision:
        """Decide what counts.

        Args:
            seen: what the look found.
            stamps: the stamps of the files that were loaded or rejected.
            served: the versions that are served.
            settled: whether all files count as complete, because somebody asked for this look.
        """
        if served and not (seen.found or seen.awaited or seen.unreadable_paths):
            return self._all_stays(_EMPTY, stamps, served)
        waiting = dict.fromkeys(seen.awaited, f"there is no {MODEL_FILE_NAME} in its folder yet")
        hidden = {key: f"its file cannot be read: {reason}" for key, reason in seen.unreadable.items()}
        decision = Decision({}, waiting | hidden, dict(seen.unreadable_paths), math.inf)
        now = time.monotonic()
        self._decide_on_files(decision, seen, stamps, now, settled=settled)
        self._decide_on_removals(decision, seen, stamps, served, now)
        return decision

    def _all_stays(self, reason: str, stamps: Mapping[Key, Stamp], served: Collection[Key]) -> Decision:
        self._gone.clear()
        notes = dict.fromkeys(served, _note(self._repository, reason))
        return Decision(dict(stamps), notes, {self._repository: reason}, math.inf)

    def _decide_on_files(
        self, decision: Decision, seen: Look, stamps: Mapping[Key, Stamp], now: float, *, settled: bool
    ) -> None:
        changing: dict[Key, tuple[Stamp, float]] = {}
        for key, stamp in seen.found.items():
            known = stamps.get(key)
            if settled or stamp is None or known in (stamp, UNKNOWN):
                decision.found[key] = stamp
                continue
            before, since = self._changing.get(key, (None, now))
            if before != stamp:
                since = now
            changing[key] = stamp, since
            if (left_s := since + _SETTLE_S - now) <= 0:
                decision.found[key] = stamp
                continue
            decision.again_s = min(decision.again_s, left_s)
            decision.notes[key] = "its file is still changing"
            if key in stamps:
                decision.found[key] = known
        self._changing = changing

    def _decide_on_removals(
        self, decision: Decision, seen: Look, stamps: Mapping[Key, Stamp], served: Collection[Key], now: float
    ) -> None:
        gone: dict[str, float] = {}
        for name in {name for name, _ in served}:
            of_model = {key for key in served if key[0] == name}
            missing = {key for key in of_model if seen.found.get(key) is None}
            hidden = missing & seen.unreadable.keys()
            if (folder := self._repository / name) in seen.unreadable_paths:
                hidden = missing
                decision.notes |= dict.fromkeys(hidden, _note(folder, seen.unreadable_paths[folder]))
            kept = hidden
            if missing == of_model and not hidden:
                since = gone[name] = self._gone.get(name, now)
                if (left_s := since + _CONFIRM_S - now) > 0:
                    decision.again_s = min(decision.again_s, left_s)
                    decision.notes |= dict.fromkeys(missing, _GONE)
                    kept = missing
            decision.found |= {key: stamps[key] for key in kept}
        self._gone = gone


def _note(path: Path, reason: str) -> str:
    return f"{path} cannot be read: {reason}"

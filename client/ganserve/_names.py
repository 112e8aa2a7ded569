"""Finds the known name that a misspelt name probably means."""

import difflib
from collections.abc import Sequence


def matching(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that equals `name`, or the only known name that differs just in case, or None."""
    if name in known:
        return name
    matching = [each for each in known if each.casefold() == name.casefold()]
    return matching[0] if len(matching) == 1 else None


def closest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most similar, ignoring case, or None."""
    by_folded = {each.casefold(): each for each in known}
    wanted = name.casefold()
    found = difflib.get_close_matches(wanted, by_folded, n=1) or [each for each in by_folded if wanted in each]
    return by_folded[found[0]] if wanted and found else None


def did_you_mean(wrong: Sequence[str], known: Sequence[str]) -> str:
    """Return the end of an error's text, with the known names that the unknown ones probably mean; empty if none."""
    meant = [close for name in wrong if name not in known and (close := closest(name, known)) is not None]
    return f"; did you mean {' and '.join(map(repr, dict.fromkeys(meant)))}?" if meant else ""

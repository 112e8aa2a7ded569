"""Suggests the known name that a user probably meant."""

import difflib
from collections.abc import Iterable

_MAX_CHARACTERS = 100  # the time of a comparison grows with the square of the length


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name that is most similar to `name`, ignoring case; an empty text if none is."""
    if not 1 <= len(name) <= _MAX_CHARACTERS:
        return ""
    by_folded = {one.casefold(): one for one in known}
    wanted = name.casefold()
    near = difflib.get_close_matches(wanted, by_folded, 1) or [one for one in by_folded if wanted in one]
    return f"; did you mean {by_folded[near[0]]!r}?" if near else ""

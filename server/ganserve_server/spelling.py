"""Suggests the name that was probably meant."""

import difflib
from collections.abc import Iterable

_MAX_CHARACTERS = 100  # comparing takes time that grows with their square


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is most like `name`, ignoring case; an empty text if none is."""
    if not 1 <= len(name) <= _MAX_CHARACTERS:
        return ""
    by_folded = {one.casefold(): one for one in known}
    wanted = name.casefold()
    near = difflib.get_close_matches(wanted, by_folded, 1) or [one for one in by_folded if wanted in one]
    return f"; did you mean {by_folded[near[0]]!r}?" if near else ""

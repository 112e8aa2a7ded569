"""Prints what is wrong to standard error, a line for each problem."""

import sys
from collections.abc import Iterable


def print_problems(problems: Iterable[str]) -> None:
    """Print problems, each behind the program's name."""
    for problem in problems:
        print(f"ganserve-server: {problem}", file=sys.stderr)

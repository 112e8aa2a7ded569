"""How the evaluation reports what it does, for its callers to show."""

from typing import Protocol


class Report(Protocol):
    """Called when a stage starts, with `done` 0, and then with the share of the stage that is done, up to 1."""

    def __call__(self, stage: str, done: float = 0.0, /) -> None:  # noqa: D102
        ...


def silent(_stage: str, _done: float = 0.0) -> None:
    """Report nothing."""

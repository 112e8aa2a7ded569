"""The errors that the trainer reports in one line, without a stack trace."""

import re


class TrainerError(Exception):
    """An error that the user can fix: the text says what was wrong and what to do. Exit status 2."""


class DivergedError(TrainerError):
    """The losses or weights of a run are no longer finite; its last checkpoint is from before."""


class CollapsedError(TrainerError):
    """The mode collapse alarm rang, and ended the run; its last checkpoint is from then."""


def one_line(error: Exception) -> str:
    """Return the first line of an error's text, without the codes and the places in the source of onnxruntime."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/?\S+\.(?:cc|h):\d+ (?:.*\) )?", "", lines[0])

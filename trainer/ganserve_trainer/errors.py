"""The errors that the trainer reports in one line, without a stack trace."""


class TrainerError(Exception):
    """An error that the user can fix: the text says what was wrong and what to do. Exit status 2."""


class DivergedError(TrainerError):
    """The losses or weights of a run are no longer finite; its last checkpoint is from before."""


class CollapsedError(TrainerError):
    """The mode collapse alarm rang, and ended the run; its last checkpoint is from then."""

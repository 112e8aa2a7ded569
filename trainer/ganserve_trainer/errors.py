"""The error that the trainer reports in one line, without a stack trace."""


class TrainerError(Exception):
    """An error that the user can fix: the text says what was wrong and what to do. Exit status 2."""

"""What the trainer tells its user in one line, without a stack trace."""


class TrainerError(Exception):
    """Something the user can put right: the text says what was wrong and what to do. Exit status 2."""

"""How the program ends: one exit status for each kind of outcome, and one line for each error."""

import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import grpc
import typer

from ganserve.errors import FLAGS, DeadlineExceededError, GanserveError, InvalidRequestError, UnavailableError

# The exception of typer and click for a wrong command line. Newer versions of typer contain their own click, so no name
# works in all versions.
CommandLineError: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]


class ExitStatus(IntEnum):
    """The exit statuses of every command."""

    OK = 0
    NO = 1
    COMMAND_LINE = 2
    NO_ANSWER = 3
    FILE = 4
    INTERRUPTED = 130
    PIPE_CLOSED = 141


EXIT_STATUSES = {
    ExitStatus.OK: "success; what was checked is true",
    ExitStatus.NO: "what was checked is not true, the server has no such model or version, or it refused the call",
    ExitStatus.COMMAND_LINE: "the command line, or a value in it, is wrong",
    ExitStatus.NO_ANSWER: "no server at the address, or no answer in time",
    ExitStatus.FILE: "a file cannot be read or written",
    ExitStatus.INTERRUPTED: "stopped by Ctrl-C",
    ExitStatus.PIPE_CLOSED: "the reader of the pipe closed it",
}


class EndedError(Exception):
    """Wraps the exception that ended a command, as its cause. Otherwise typer would handle it in its own way."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command, so that BrokenPipeError and KeyboardInterrupt become the cause of an EndedError."""

    @functools.wraps(command)
    def run(*arguments: Any, **named: Any) -> None:
        try:
            command(*arguments, **named)
        except (BrokenPipeError, KeyboardInterrupt) as error:
            raise EndedError from error

    return run


def outcome(error: BaseException) -> tuple[ExitStatus, str]:
    """Return the exit status and the one-line text, possibly empty, for an exception that ended a command.

    Raises:
        BaseException: the error itself, if no command should end with it.
    """
    if isinstance(error, EndedError) and error.__cause__ is not None:
        return outcome(error.__cause__)
    if isinstance(error, CommandLineError):
        return ExitStatus.COMMAND_LINE, one_line(error.format_message())  # type: ignore[attr-defined]
    if isinstance(error, UnavailableError | DeadlineExceededError):
        return ExitStatus.NO if _answered(error) else ExitStatus.NO_ANSWER, one_line(error)
    if isinstance(error, GanserveError):
        # The arguments are wrong, whether the SDK or the server rejects them. FAILED_PRECONDITION is different: the
        # request may be right, but the server is not ready for it.
        wrong = isinstance(error, InvalidRequestError) and error.code is not grpc.StatusCode.FAILED_PRECONDITION
        return ExitStatus.COMMAND_LINE if wrong else ExitStatus.NO, one_line(error)
    if isinstance(error, BrokenPipeError):
        return ExitStatus.PIPE_CLOSED, ""
    if isinstance(error, OSError):
        named = error.filename is not None and error.strerror is not None
        return ExitStatus.FILE, one_line(f"{error.filename}: {error.strerror}" if named else error.strerror or error)
    if isinstance(error, ValueError):
        return ExitStatus.COMMAND_LINE, one_line(error)
    if isinstance(error, MemoryError):
        return ExitStatus.COMMAND_LINE, "this needs more memory than is available; request less at a time"
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return ExitStatus.INTERRUPTED, one_line("interrupted", error)
    raise error


def _answered(error: GanserveError) -> bool:
    """Return whether a server answered during a wait, so that the awaited state, and not the server, is missing."""
    last = error.__cause__
    unreachable = isinstance(last, GanserveError) and last.reason == "unreachable"
    return error.reason == "not_ready" and not unreachable and not isinstance(last, DeadlineExceededError)


def one_line(text: object, error: BaseException | None = None) -> str:
    """Return a text in one line, with the notes and the request id of the error, if there is one."""
    error = text if isinstance(text, BaseException) else error
    reason = text.with_names(FLAGS) if isinstance(text, GanserveError) else str(text)
    notes: list[str] = getattr(error, "__notes__", [])
    line = " ".join("; ".join([reason, *notes]).split())
    request_id: str | None = getattr(error, "request_id", None)
    return line if request_id is None or request_id in line else f"{line} (request id {request_id})"

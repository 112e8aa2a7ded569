"""Detects forks during a call: gRPC does not survive them, and the child process may hang or crash (grpcio 1.85)."""

import os

from ganserve.errors import UnavailableError

_inside: dict[object, None] = {}  # what is inside gRPC now: a thread's number, or a stream
_lost: list[str] = []  # what was inside gRPC when this process was forked; empty if gRPC is usable
# Objects of the parent process. The child keeps them alive: ending them would end connections that it does not own.
_of_parents: list[object] = []


def enter_call(call: object) -> None:
    """Note that a call is inside gRPC: a thread's number, or a stream."""
    _inside[call] = None


def leave_call(call: object) -> None:
    """Note that the call has left gRPC."""
    _inside.pop(call, None)


def lose_in_fork(what: str) -> None:
    """Note, in a child process, that gRPC is unusable in it."""
    _lost.append(what)


def lost_in_fork() -> bool:
    """Return whether gRPC is unusable in this process because of what its parent had inside gRPC."""
    return bool(_lost)


def leave_to_parent(owned: object) -> None:
    """Keep alive, in a child process, a channel or a call that only the parent may end."""
    _of_parents.append(owned)


def check_fork() -> None:
    """Raise UnavailableError if this process was forked while calls were running."""
    if _lost:
        raise UnavailableError(
            f"this process was forked while its parent had {_lost[0]}, which gRPC does not survive; "
            "fork before, or use multiprocessing's 'spawn' or 'forkserver'",
            reason="forked",
        )


def _after_fork_in_child() -> None:
    if _inside:
        lose_in_fork("calls or streams running")
        _inside.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)

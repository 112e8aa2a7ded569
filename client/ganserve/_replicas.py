"""The replicas behind a client's address, for questions to all of them rather than only the next one."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from ganserve._endpoint import HOST_PORT
from ganserve.errors import (
    AuthenticationError,
    DeadlineExceededError,
    GanserveError,
    InvalidRequestError,
    ServerError,
    UnavailableError,
)


@dataclass(frozen=True, slots=True)
class Replica:
    """One of a client's addresses, and whether it serves the model or version that `Client.replicas` asks for.

    >>> [replica.serving for replica in client.replicas("cdcgan-mnist")]
    [True]

    Attributes:
        address: IP:PORT.
        serving: whether it serves now.
        error: why it does not serve; None if it serves, or if it answers that it does not.
    """

    address: str
    serving: bool
    error: GanserveError | None = None

    def __str__(self) -> str:
        if self.error is not None:
            state = "UNKNOWN" if isinstance(self.error, AuthenticationError) else "NOT SERVING"
            return f"{self.address} {state} ({self.error.text})"
        return f"{self.address} {'SERVING' if self.serving else 'NOT SERVING'}"


def targets(target: str) -> list[str]:
    """Return a gRPC target for each current address behind a target. Asks DNS through the system, and blocks meanwhile.

    If a name has IPv4 and IPv6 addresses, only IPv4 counts: probably both belong to the same replicas.

    Raises:
        UnavailableError: DNS does not know the name, or does not answer.
        InvalidRequestError: the addresses behind the target cannot be listed.
    """
    scheme, _, rest = target.partition(":")
    if scheme in ("ipv4", "ipv6"):
        return [f"{scheme}:{address.strip()}" for address in rest.split(",")]
    if scheme.startswith("unix"):
        return [target]
    name = HOST_PORT.fullmatch(target.removeprefix("dns:///"))
    if name is None:
        raise InvalidRequestError(
            f"the addresses behind {target} cannot be listed; give HOST:PORT, or several IP:PORT separated by commas"
        )
    try:
        found = socket.getaddrinfo(name[1].strip("[]"), int(name[2]), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"{name[1]} has no addresses: {error.strerror}", reason="unreachable") from error
    of_ipv4 = {f"ipv4:{where[0]!s}:{name[2]}" for family, *_, where in found if family == socket.AF_INET}
    of_ipv6 = {f"ipv6:[{where[0]!s}]:{name[2]}" for family, *_, where in found if family == socket.AF_INET6}
    return sorted(of_ipv4 or of_ipv6)


def awaited(address: str, model: str | None, version: SupportsIndex | None) -> str:
    """Return the name of what a client waits for, for errors and the log."""
    what = "the server" if model is None else f"model {model}" if version is None else f"version {version} of {model}"
    return f"{what} at each address of {address}"


def silent(replicas: Sequence[Replica]) -> bool:
    """Return whether no replica answered."""
    return all(isinstance(replica.error, UnavailableError | DeadlineExceededError) for replica in replicas)


def refusal(replicas: Sequence[Replica]) -> GanserveError | None:
    """Return an error that waiting does not resolve, or None."""
    errors = (replica.error for replica in replicas)
    return next((error for error in errors if isinstance(error, AuthenticationError | ServerError)), None)


def not_everywhere(replicas: Sequence[Replica]) -> UnavailableError | None:
    """Return an error that names the replicas that do not serve, or None if all do."""
    missing = [str(replica) for replica in replicas if not replica.serving]
    if not missing:
        return None
    return UnavailableError(
        f"{len(missing)} of {len(replicas)} do not serve it: {'; '.join(missing)}",
        reason="unreachable" if silent(replicas) else None,
    )

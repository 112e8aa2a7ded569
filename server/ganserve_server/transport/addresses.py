"""Where the server listens: HOST:PORT as a user gives it, to sockets."""

import errno
import socket
from typing import Any

from ganserve_server.start_errors import StartError

_HINTS = {
    errno.EADDRINUSE: "another program listens there, or this server by another of its addresses",
    errno.EADDRNOTAVAIL: "this machine does not have it; 0.0.0.0 is every address it has",
    errno.EACCES: "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
    socket.EAI_NONAME: "give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for every one",
}


def bind(address: str, flag: str) -> list[socket.socket]:
    """Bind an address, every one that its name stands for; nothing can connect until a server listens there.

    Raises:
        StartError: it is no address, or not one of this machine, or taken.
    """
    _, port = split(address, flag)
    sockets: list[socket.socket] = []
    try:
        found = places(address, flag)
        for family, place in found:
            # A port of the system's choice is one port.
            if port == 0 and sockets:
                break
            # With the protocol said: asyncio turns TCP's delays off only for what it knows to be TCP.
            bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # "::" is every address of both kinds, as servers in containers expect; of "*", it is one of two.
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, place[0] != "::" or len(found) > 1)
            bound.bind(place)
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise refused(address, flag, error) from error
    return sockets


def places(address: str, flag: str) -> list[tuple[socket.AddressFamily, Any]]:
    """Return what an address stands for, as sockets take it.

    Raises:
        StartError: it is no address.
        OSError: its name is not known.
    """
    host, port = split(address, flag)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # of a name that DNS cannot have
        raise StartError(f"cannot listen on {address} ({flag}): {error}") from error
    return [(family, place) for family, _, _, _, place in found]


def refused(address: str, flag: str, error: OSError) -> StartError:
    """Say that an address cannot be listened on."""
    hint = f"; {_HINTS[error.errno]}" if error.errno in _HINTS else ""
    return StartError(f"cannot listen on {address} ({flag}): {error.strerror}{hint}")


def name(bound: socket.socket, address: str) -> str:
    """Return the address with the port that was taken."""
    return f"{address.rpartition(':')[0]}:{bound.getsockname()[1]}"


def split(address: str, flag: str) -> tuple[str, int]:
    """Split HOST:PORT.

    Raises:
        StartError: it is none.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("["), host.endswith("]")
    number = int(port) if port.isdecimal() and len(port) <= 5 else None
    if not colon or not host or number is None or number > 65535 or any(bracketed) != all(bracketed):
        expected = "HOST:PORT, such as 127.0.0.1:50051 or [::]:50051, with a port from 0 to 65535"
        raise StartError(f"{flag} is {address!r}; it must be {expected}")
    return host, number


def reachable(host: str) -> str:
    """Return where a server on this machine answers: one that listens on all addresses does on the machine's own."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)

"""Turns HOST:PORT, as a user writes it, into bound sockets."""

import errno
import socket
from typing import Any

from ganserve_server.start_errors import StartError

_HINTS = {
    errno.EADDRINUSE: "another program listens there, or this server does because of another address setting",
    errno.EADDRNOTAVAIL: "this machine does not have this address; 0.0.0.0 stands for all its addresses",
    errno.EACCES: "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
    socket.EAI_NONAME: "give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them",
}


def bind(address: str, flag: str) -> list[socket.socket]:
    """Bind all addresses that a host name stands for; nothing can connect until a server listens there.

    Raises:
        StartError: it is not an address, not one of this machine, or taken.
    """
    _, port = split(address, flag)
    sockets: list[socket.socket] = []
    try:
        found = places(address, flag)
        for family, place in found:
            # Port 0: the system chooses one port, for the first address only.
            if port == 0 and sockets:
                break
            # With the protocol, because asyncio sets TCP_NODELAY only on sockets that it knows to be TCP.
            bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # "::" stands for all addresses, IPv4 too, as is usual in containers; for "*", it is one of two sockets.
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, place[0] != "::" or len(found) > 1)
            bound.bind(place)
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise refused(address, flag, error) from error
    return sockets


def places(address: str, flag: str) -> list[tuple[socket.AddressFamily, Any]]:
    """Resolve HOST:PORT; return each socket address with its family.

    Raises:
        StartError: it is not an address.
        OSError: its host name is unknown.
    """
    host, port = split(address, flag)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # the name is not possible in DNS
        raise StartError(f"cannot listen on {address} ({flag}): {error}") from error
    return [(family, place) for family, _, _, _, place in found]


def refused(address: str, flag: str, error: OSError) -> StartError:
    """Return the error for an address that the server cannot listen on."""
    hint = f"; {_HINTS[error.errno]}" if error.errno in _HINTS else ""
    return StartError(f"cannot listen on {address} ({flag}): {error.strerror}{hint}")


def name(bound: socket.socket, address: str) -> str:
    """Return the address with the port of the bound socket."""
    return f"{address.rpartition(':')[0]}:{bound.getsockname()[1]}"


def split(address: str, flag: str) -> tuple[str, int]:
    """Split HOST:PORT.

    Raises:
        StartError: it is not HOST:PORT.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("["), host.endswith("]")
    number = int(port) if port.isdecimal() and len(port) <= 5 else None
    if not colon or not host or number is None or number > 65535 or any(bracketed) != all(bracketed):
        expected = "HOST:PORT, such as 127.0.0.1:50051 or [::]:50051, with a port from 0 to 65535"
        raise StartError(f"{flag} is {address!r}; it must be {expected}")
    return host, number


def reachable(host: str) -> str:
    """Return the host at which to reach a server on this machine: the loopback address if it listens on all."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)

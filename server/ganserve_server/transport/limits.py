"""Bounds on the memory, work and time that a peer can take: all numbers in one place."""

from dataclasses import dataclass

MAX_REFLECTION_STREAMS = 20  # at a time, of one caller or connection
MAX_HEADER_LIST_BYTES = 16384  # of a request, by RFC 9113's count (6.5.2)


_MOST_RESERVED = 256  # file descriptors


def connections_within(descriptors: int) -> int:
    """Return how many connections a process may have that can open so many more files.

    Half of them, but at most 256, are for other purposes: connections of operators and of the metrics, model files,
    certificates, traces.
    """
    for_connections = descriptors - min(_MOST_RESERVED, descriptors // 2)
    return max(1, (for_connections - 2) * 8 // 9)  # an eighth more may drain (`grpc_server`), and one is accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one process's transport. Bytes are the process's own; the kernel's buffers are extra."""

    max_connections: int = 2000  # at a time
    max_streams: int = 1000  # calls at a time on one connection
    max_request_bytes: int = 4 << 20  # in one message; the default holds a thousand latents of a thousand values
    # Incomplete requests: of all callers, and of one caller (without tokens, of one connection).
    request_bytes: int = 128 << 20
    request_bytes_each: int = 32 << 20
    # Incomplete requests to services that need no token: of all connections, and of one.
    unguarded_bytes: int = 8 << 20
    unguarded_bytes_each: int = 1 << 20
    unguarded_request_bytes: int = 4096  # in one message
    # Unread answers; a single answer may have 64 MiB.
    answer_bytes: int = 320 << 20
    answer_bytes_each: int = 128 << 20
    # Times; 0: no bound.
    handshake_timeout_s: float = 10.0  # TLS, and HTTP/2's preface
    header_timeout_s: float = 10.0  # a header block
    body_timeout_s: float = 60.0  # a message, from its first byte to its last
    write_timeout_s: float = 300.0  # a peer reads nothing of the answers that wait for it
    idle_timeout_s: float = 1800.0  # a connection without calls
    max_connection_age_s: float = 0.0

    @property
    def sweep_s(self) -> float:
        """The interval between two checks for exceeded times."""
        times = (self.body_timeout_s, self.write_timeout_s, self.idle_timeout_s)
        return min(1.0, *(max(0.05, one / 4) for one in times if one))

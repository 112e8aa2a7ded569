"""`ganserve-server bounds`: the limits of what clients can make the server keep, do and wait for."""

from collections.abc import Iterable
from typing import NamedTuple

from ganserve_server.processes.log_writer import MAX_BYTES, MAX_LINES, TIMEOUT_S
from ganserve_server.services import health
from ganserve_server.transport import http2
from ganserve_server.transport.limits import MAX_HEADER_LIST_BYTES, MAX_REFLECTION_STREAMS, Limits

# Bytes of a connection that uses all of its limits: header table, remembered headers, an unfinished header block, and
# input that waits for its turn. TLS adds its state, and OpenSSL's buffers. Measured and rounded up.
CONNECTION_BYTES, TLS_BYTES = 144 << 10, 128 << 10


class Bound(NamedTuple):
    """A row: what is bounded, for whom, how much for each, for all, for how long, and what happens beyond."""

    what: str
    whose: str
    each: str
    all: str
    time: str
    beyond: str


def worst_case_bytes(limits: Limits) -> int:
    """Return how much all peers can make one process keep, without the kernel's buffers and the models."""
    connections = limits.max_connections * (CONNECTION_BYTES + TLS_BYTES)
    return connections + limits.request_bytes + limits.unguarded_bytes + limits.answer_bytes + MAX_BYTES


def bounds(limits: Limits, batch_timeout_s: float) -> list[Bound]:
    """Return the rows of the page."""
    each = _size(CONNECTION_BYTES + TLS_BYTES)
    connections = (
        f"{limits.max_connections} × {each} = {_size(limits.max_connections * (CONNECTION_BYTES + TLS_BYTES))}"
    )
    ends, refused = "the connection ends (ENHANCE_YOUR_CALM)", "the call ends with RESOURCE_EXHAUSTED"
    oldest = "the oldest call of the owner that has kept the most for longest ends with RESOURCE_EXHAUSTED"
    return [
        Bound(
            "connections",
            "anyone",
            each,
            connections,
            _time(limits.idle_timeout_s),
            "an idle connection ends, or else the new one",
        ),
        Bound(
            "handshakes (TLS, preface)",
            "anyone",
            "",
            "the same as connections",
            _time(limits.handshake_timeout_s),
            "closed",
        ),
        Bound(
            "a header block",
            "connection",
            f"{_size(http2.MAX_BLOCK_BYTES)} in {http2.MAX_CONTINUATIONS} frames",
            "part of the connection's",
            _time(limits.header_timeout_s),
            ends,
        ),
        Bound("decoded headers of a call", "call", _size(MAX_HEADER_LIST_BYTES), "", "", refused),
        Bound(
            "open calls", "connection", str(limits.max_streams), "the same as unfinished requests", "", "REFUSED_STREAM"
        ),
        Bound(
            "unfinished requests and running streams, 8 KiB for each call",
            "token, or connection",
            _size(limits.request_bytes_each),
            _size(limits.request_bytes),
            f"{_time(limits.body_timeout_s)} for each message",
            oldest,
        ),
        Bound(
            "unfinished requests of health checks",
            "connection",
            _size(limits.unguarded_bytes_each),
            _size(limits.unguarded_bytes),
            f"{_time(limits.body_timeout_s)} for each message",
            oldest,
        ),
        Bound(
            "watches of health",
            "connection",
            str(health.MAX_WATCHERS_PER_CONNECTION),
            str(health.MAX_WATCHERS),
            "",
            "a watch of the connection with the most ends with RESOURCE_EXHAUSTED",
        ),
        Bound("streams of reflection", "token, or connection", str(MAX_REFLECTION_STREAMS), "", "", refused),
        Bound(
            "answers that are not read",
            "token, or connection",
            f"{_size(limits.answer_bytes_each)}, or one answer",
            _size(limits.answer_bytes),
            _time(limits.write_timeout_s),
            oldest,
        ),
        Bound(
            "acknowledgements that are not read",
            "connection",
            _size(http2.MAX_CONTROL_BYTES),
            "the same as answers",
            _time(limits.write_timeout_s),
            ends,
        ),
        Bound("streams opened and reset", "connection", _bucket(http2.RESETS), "", "", f"refused, then {ends}"),
        Bound("errors on streams", "connection", _bucket(http2.VIOLATIONS), "", "", ends),
        Bound("SETTINGS", "connection", _bucket(http2.SETTINGS_FRAMES), "", "", ends),
        Bound("PING, PRIORITY, empty and unknown frames", "connection", _bucket(http2.IDLE_FRAMES), "", "", ends),
        Bound(
            "headers without a valid token",
            "connection",
            f"{_size(http2.STRANGE_BYTES[0])}, then {_size(http2.STRANGE_BYTES[1])}/s",
            "",
            "",
            "the server reads the connection later",
        ),
        Bound(
            "lines of the log that nobody reads",
            "anyone",
            "",
            f"{MAX_LINES} lines, {_size(MAX_BYTES)}",
            f"{_time(TIMEOUT_S)} at the end",
            "lines are dropped and counted",
        ),
        Bound(
            "the event loop's time",
            "connection",
            "2 ms",
            "8 ms for each iteration",
            "",
            "the other connections come first",
        ),
        Bound(
            "a batch",
            "model",
            "",
            "",
            _time(batch_timeout_s),
            "the version is taken out of service; its calls end with INTERNAL",
        ),
    ]


def page(limits: Limits, batch_timeout_s: float) -> Iterable[str]:
    """Yield the lines of the table, as Markdown, and the sum."""
    yield "| what | owner | each | all | time | above the limit |"
    yield "|---|---|---|---|---|---|"
    for bound in bounds(limits, batch_timeout_s):
        yield f"| {' | '.join(bound)} |".replace("|  |", "| |").replace("|  |", "| |")
    yield ""
    yield f"Worst case of one process, with TLS: {_size(worst_case_bytes(limits))}, excluding its models."


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def _time(seconds: float) -> str:
    return f"{seconds:g} s" if seconds else "no bound"


def _bucket(bucket: tuple[int, int]) -> str:
    return f"{bucket[0]}, then {bucket[1]}/s"

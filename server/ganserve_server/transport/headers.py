"""The headers of a gRPC request over HTTP/2, and those of an answer, encoded by HPACK."""

import base64
import functools
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from ganserve_server.transport.answering import request_id_of
from ganserve_server.transport.http2 import BAD_VALUE, FIELD_NAME, Fields, literal
from ganserve_server.transport.limits import MAX_HEADER_LIST_BYTES

ANSWER_HEADERS = (
    b"\x88" + literal(b"content-type", b"application/grpc") + literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
)
STATUS_OK = literal(b"grpc-status", b"0")
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_TIMEOUT_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_CONTENT_TYPE = re.compile(rb"application/grpc(\+proto)?(;.*)?")  # grpc-web and JSON are other protocols
_OF_HTTP1 = (b"connection", b"proxy-connection", b"transfer-encoding", b"keep-alive", b"upgrade")
# Headers that may have only one value: of two, a proxy could use one and this server the other.
_SINGLE = (b"authorization", b"content-type", b"grpc-timeout", b"grpc-encoding")


@dataclass(frozen=True, slots=True)
class Head:
    """The parsed headers of a request."""

    path: str
    timeout_s: float | None
    length: int | None  # of the body, by content-length
    encoding: bytes  # of the messages
    request_id: str | None
    metadata: Mapping[bytes, bytes]
    refusal: bytes | None  # the HTTP status of a request that is not gRPC
    size: int  # of the header list, by RFC 9113's count


def read_head(fields: Fields) -> Head:
    """Read a request's headers.

    Raises:
        ValueError: they break HTTP/2's rules (RFC 9113, 8.2 and 8.3).
    """
    pseudo: dict[bytes, bytes] = {}
    metadata: dict[bytes, bytes] = {}
    size, twice = sum(len(name) + len(value) + 32 for name, value in fields), False
    # With more fields, the headers exceed their limit and the call is refused. Checking them all would take long.
    for name, value in fields[: MAX_HEADER_LIST_BYTES // 32]:
        if BAD_VALUE.search(value):
            raise ValueError("a value has a NUL or a line end")
        if name.startswith(b":"):
            if metadata or name in pseudo or name not in (b":method", b":path", b":scheme", b":authority"):
                raise ValueError("a pseudo-header is unknown, misplaced or repeated")
            pseudo[name] = value
        elif not FIELD_NAME.fullmatch(name) or name in _OF_HTTP1:
            raise ValueError("a header is not allowed in HTTP/2")
        elif name == b"te" and value != b"trailers":
            raise ValueError("te must be trailers or absent")
        else:
            if name in metadata:
                if name == b"content-length":
                    raise ValueError("content-length occurs twice")
                twice = twice or name in _SINGLE
            metadata[name] = value
    if not (pseudo.get(b":path") and b":method" in pseudo and b":scheme" in pseudo):
        raise ValueError("a pseudo-header is missing")
    length = metadata.get(b"content-length")
    if length is not None and not length.isdigit():
        raise ValueError("content-length must be a number")
    refusal = None
    timeout = metadata.get(b"grpc-timeout")
    in_time = None if timeout is None else _TIMEOUT.fullmatch(timeout)
    if pseudo[b":method"] != b"POST":
        refusal = b"405"
    elif not _CONTENT_TYPE.fullmatch(metadata.get(b"content-type", b"")):
        refusal = b"415"
    elif twice or (timeout is not None and in_time is None):
        refusal = b"400"  # an unreadable deadline must not count as no deadline
    return Head(
        path=pseudo[b":path"].decode("latin-1"),
        timeout_s=int(in_time[1]) * _TIMEOUT_UNITS_S[in_time[2]] if in_time else None,
        length=None if length is None else int(length),
        encoding=metadata.get(b"grpc-encoding", b"identity"),
        request_id=request_id_of(metadata),
        metadata=metadata,
        refusal=refusal,
        size=size,
    )


_MESSAGE_SAFE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


@functools.lru_cache(256)  # under overload the same status is sent thousands of times a second
def status_fields(code: grpc.StatusCode, text: str, details: bytes) -> bytes:
    """Encode the header fields of a call's status."""
    status = literal(b"grpc-status", str(code.value[0]).encode())
    if text:
        status += literal(b"grpc-message", urllib.parse.quote(text, safe=_MESSAGE_SAFE).encode())
    if details:
        status += literal(b"grpc-status-details-bin", base64.b64encode(details).rstrip(b"="))
    return status

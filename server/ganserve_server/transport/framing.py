"""Messages as gRPC frames and compresses them: a flag, a length of four bytes, and the message."""

import zlib

import grpc

from ganserve_server.errors import MalformedMessage, MessageTooLarge, ServingError

PREFIX_BYTES = 5  # the compressed flag and the length
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
# A message may decompress to this many bytes; beyond that, to at most 100 times its compressed size.
_FREELY_INFLATED_BYTES, _MOST_INFLATED = 256 << 10, 100


def framed(message: bytes) -> bytes:
    """Return a message, not compressed, with its prefix."""
    return b"\x00" + len(message).to_bytes(4, "big") + message


def decompressed(message: bytes, flag: int, encoding: bytes, limit: int) -> bytes:
    """Decompress a message of at most `limit` bytes whose compressed flag is not 0.

    Raises:
        ServingError: the flag or the encoding is unknown, or the message is damaged or too large.
    """
    bits = _WINDOW_BITS.get(encoding)
    if flag > 1:
        raise MalformedMessage("the compressed flag of a message must be 0 or 1")
    if encoding == b"identity":
        raise NotCompressed("a message is marked as compressed, but the header grpc-encoding names no compression")
    if bits is None:
        raise UnknownCompression(f"messages compressed with {encoding.decode('latin-1')} cannot be read")
    # Otherwise 4 KB could become 4 MiB: 10 ms of the event loop, for every connection that sends such a message.
    most = min(limit, max(_FREELY_INFLATED_BYTES, _MOST_INFLATED * len(message)))
    inflate = zlib.decompressobj(bits)
    try:
        message = inflate.decompress(message, most + 1)
    except zlib.error as error:
        raise MalformedMessage("the message cannot be decompressed") from error
    if len(message) > most:
        raise MessageTooLarge(f"the request has more than {most} bytes once decompressed; send it uncompressed")
    if not inflate.eof:
        raise MalformedMessage("the compressed message is incomplete")
    return message


class UnknownCompression(ServingError):  # noqa: N818
    """The request is compressed in a way that the server cannot read."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "compression"


class NotCompressed(ServingError):  # noqa: N818
    """A message is marked as compressed, but grpc-encoding names no compression."""

    code = grpc.StatusCode.INTERNAL
    reason = "compression"

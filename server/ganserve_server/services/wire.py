"""Protobuf's wire format, for responses that are put together from serialised pieces.

The only module that writes tags and lengths. https://protobuf.dev/programming-guides/encoding
"""

import functools

# Wire types. LENGTH_DELIMITED is that of bytes and of messages.
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5


def tag(field_number: int) -> bytes:
    """Write the tag of a field of bytes, or of a message."""
    return varint(field_number << 3 | LENGTH_DELIMITED)


@functools.lru_cache(1024)
def varint(value: int) -> bytes:
    """Write a number as a varint, such as the length before a field's content."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def embedded(field_tag: bytes, message: bytes) -> bytes:
    """Write a serialised message as a field of another."""
    return b"".join((field_tag, varint(len(message)), message))

"""Protobuf's wire format, for responses that are concatenated from serialised pieces.

Only this module writes tags and lengths. https://protobuf.dev/programming-guides/encoding
"""

import functools

# Wire types. Bytes and messages are LENGTH_DELIMITED.
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5


def tag(field_number: int) -> bytes:
    """Encode the tag of a bytes field or a message field."""
    return varint(field_number << 3 | LENGTH_DELIMITED)


@functools.lru_cache(1024)
def varint(value: int) -> bytes:
    """Encode a number as a varint, such as the length before a field's content."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def embedded(field_tag: bytes, message: bytes) -> bytes:
    """Encode a serialised message as a field of another message."""
    return b"".join((field_tag, varint(len(message)), message))

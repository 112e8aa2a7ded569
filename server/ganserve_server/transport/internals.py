"""What the transport uses of asyncio and hpack although their documentation does not promise it.

Everything of this kind is here. `tests/transport/test_internals.py` fails, and names the versions, if one has changed.
"""

import asyncio
import asyncio.sslproto

from hpack.table import HeaderTable


def set_tls_read_bytes(size: int) -> None:
    """Set the read buffer of new TLS connections: asyncio's 256 KiB would take 2.5 GiB for 10,000 connections."""
    asyncio.sslproto.SSLProtocol.max_size = size


def set_read_bytes(transport: asyncio.Transport, size: int) -> None:
    """Set the most bytes that one read of a plain connection returns, and the read limit of a TLS connection."""
    if hasattr(transport, "max_size"):
        setattr(transport, "max_size", size)  # noqa: B010 (not of the abstract class)
    if hasattr(transport, "set_read_buffer_limits"):
        transport.set_read_buffer_limits(high=size)


def transport_below_tls(transport: asyncio.Transport) -> asyncio.WriteTransport | None:
    """Return the transport that carries the encrypted bytes of a TLS connection; None for a plain connection."""
    below: asyncio.WriteTransport | None = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return below


class CountingHeaderTable(HeaderTable):
    """A dynamic table of HPACK that counts its changes: a cached header block is valid until the table changes."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        """Add a field, as the decoder does for each field to be indexed."""
        self.changes += 1
        super().add(name, value)

"""The parts of other packages that this one reaches into: these tests name the version that changed one."""

import asyncio
import asyncio.sslproto
import ssl
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import hpack
import pytest
import trustme
import typer

from ganserve._cli.outcome import CommandLineError
from ganserve_server.transport.internals import (
    CountingHeaderTable,
    set_read_bytes,
    set_tls_read_bytes,
    transport_below_tls,
)

PYTHON, HPACK, TYPER = f"Python {sys.version}", f"hpack {version('hpack')}", f"typer {version('typer')}"


class Peer(asyncio.Protocol):
    """Runs a check in a connection of a server, and keeps the sizes of its reads."""

    def __init__(self, check: Callable[[asyncio.Transport], None], done: "asyncio.Future[None]") -> None:
        self._check, self._done = check, done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        try:
            self._check(transport)
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)


def connect(check: Callable[[asyncio.Transport], None], tls: tuple[ssl.SSLContext, ssl.SSLContext] | None) -> None:
    """Run a check on a server's side of a real connection; `tls` is the server's and the client's context."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        server = await loop.create_server(lambda: Peer(check, done), "127.0.0.1", 0, ssl=tls and tls[0])
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=tls and tls[1], server_hostname="localhost" if tls else None
        )
        await asyncio.wait_for(done, 30)
        writer.close()
        server.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


def test_the_transport_below_tls_is_the_socket_s(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    def check(transport: asyncio.Transport) -> None:
        below = transport_below_tls(transport)
        assert below is not None, f"{PYTHON}: transport_below_tls finds none"
        assert below is not transport
        assert below.get_write_buffer_size() == 0
        descriptor = transport.get_extra_info("socket").fileno()
        assert below.get_extra_info("socket").fileno() == descriptor, f"{PYTHON}: another transport is below TLS"

    connect(check, tls)


def test_a_plain_connection_has_no_transport_below() -> None:
    connect(lambda transport: pytest.fail(PYTHON) if transport_below_tls(transport) else None, None)


def test_one_read_returns_at_most_what_was_set() -> None:
    """asyncio passes `max_size` to socket.recv."""

    def check(transport: asyncio.Transport) -> None:
        attributes: Any = transport
        assert attributes.max_size > 1000, f"{PYTHON}: its transports have no max_size"
        set_read_bytes(transport, 1000)
        assert attributes.max_size == 1000
        recv = attributes._sock.recv
        read: list[int] = []
        attributes._sock = _Socket(attributes._sock, lambda size: read.append(size) or recv(size))
        attributes._read_ready__data_received()
        assert read == [1000], f"{PYTHON}: max_size does not limit a read"

    connect(check, None)


class _Socket:
    def __init__(self, real: Any, recv: Callable[[int], bytes]) -> None:
        self._real, self.recv = real, recv

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_the_read_buffer_of_tls_connections_can_be_set(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    default = asyncio.sslproto.SSLProtocol.max_size
    monkeypatch.setattr(asyncio.sslproto.SSLProtocol, "max_size", default)  # restores it
    set_tls_read_bytes(12_345)

    def check(transport: asyncio.Transport) -> None:
        buffer = transport._ssl_protocol._ssl_buffer  # type: ignore[attr-defined]
        assert len(buffer) == 12_345, f"{PYTHON}: SSLProtocol.max_size does not set its buffer's size"
        set_read_bytes(transport, 4096)

    connect(check, tls)


def test_the_decoder_adds_to_its_table_by_add() -> None:
    encoder, decoder = hpack.Encoder(), hpack.Decoder()
    table = decoder.header_table = CountingHeaderTable()
    block = encoder.encode([("x-one", "1"), ("x-two", "2")])
    decoder.decode(block)
    assert table.changes == 2, f"{HPACK}: the decoder changes its table without `add`"
    decoder.decode(encoder.encode([("x-one", "1"), ("x-two", "2")]))
    assert table.changes == 2


@pytest.mark.parametrize("arguments", [["--nothing"], ["--count", "many"], []])
def test_each_error_of_a_command_line_has_the_one_base(arguments: list[str]) -> None:
    program = typer.Typer()

    @program.command()
    def command(name: str, count: int = 1) -> None: ...

    with pytest.raises(CommandLineError) as caught:
        program(arguments, standalone_mode=False)
    assert type(caught.value).__module__.endswith("exceptions"), f"{TYPER}: another base of its errors"
    assert CommandLineError is not Exception, f"{TYPER}: another base of its errors"

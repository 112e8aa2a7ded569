"""Both transports do the same for services and their callers, and the one that is not chosen is not there."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import trustme
from google.rpc import error_details_pb2, status_pb2
from tests.conftest import START_TIMEOUT_S, RunningServer
from tests.server.test_security import CA, serial_of, write_certificate
from tests.server.test_start_and_drain import failing_start, wait_for_sample

from ganserve import Client, GanserveError
from ganserve_server.errors import InvalidRequest, Unauthenticated
from ganserve_server.transport import new_server
from ganserve_server.transport.addresses import bind, name
from ganserve_server.transport.interface import Call, Method, RequestSink, Server
from ganserve_server.transport.limits import Limits

Start = Callable[..., RunningServer]
Code = grpc.StatusCode


@dataclass
class Served:
    """A server in this process, a channel to it, and what it says of calls."""

    server: Server
    channel: grpc.aio.Channel
    finished: "asyncio.Queue[tuple[str, Code]]" = field(default_factory=asyncio.Queue)
    refused: list[str] = field(default_factory=list)

    async def ask(self, path: str, request: bytes = b"", **given: Any) -> tuple[Code, str, dict[str, Any]]:
        """Call a method for one message; return status, its text, and the trailers."""
        call = self.channel.unary_stream(path)(request, **given)
        trailers = {key: value for key, value in await call.trailing_metadata() or ()}  # noqa: C416
        return await call.code(), await call.details() or "", trailers


@pytest.fixture
async def served(transport: str) -> AsyncIterator[Served]:
    def guard(call: Call) -> None:
        if b"wrong" in call.metadata:
            raise Unauthenticated("who is it?")

    server = new_server(
        cast(Any, transport),
        cast(Any, SimpleNamespace(pem=None, context=None)),
        on_tls_failure=lambda *_: None,
        on_finished=lambda call, code, _: running.finished.put_nowait((call.path, code)),
        on_refused=lambda _, error: running.refused.append(error.reason),
        guard=guard,
        on_internal_error=lambda *_: None,
        limits=Limits(max_request_bytes=100_000),
    )
    sockets = bind("127.0.0.1:0", "--address")
    async with grpc.aio.insecure_channel(name(sockets[0], "127.0.0.1:0")) as channel:
        running = Served(server, channel)
        server.start(sockets)
        yield running
    await server.drain(10)


async def test_errors_end_calls_with_their_status(served: Served) -> None:
    def wrong(call: Call, _: bytes) -> None:
        raise InvalidRequest("seed", "the seed is ü")

    def broken(call: Call, _: bytes) -> None:
        raise KeyError("a secret")

    async def aborts(call: Call) -> None:
        await call.abort(Code.DATA_LOSS, "gone")

    served.server.add_method("/a/wrong", Method(start=wrong))
    served.server.add_method("/a/broken", Method(start=broken))
    served.server.add_method("/a/aborts", Method(start=lambda call, _: call.spawn(aborts(call))))
    code, text, trailers = await served.ask("/a/wrong", metadata=(("x-request-id", "mine"),))
    assert (code, text, trailers["x-request-id"]) == (Code.INVALID_ARGUMENT, "the seed is ü", "mine")
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (code.value[0], text)
    assert error_details_pb2.ErrorInfo.FromString(status.details[-1].value).reason == "INVALID"
    code, text, trailers = await served.ask("/a/broken")
    assert (code, "secret" in text, "grpc-status-details-bin" in trailers) == (Code.INTERNAL, False, False)
    assert (await served.ask("/a/aborts"))[:2] == (Code.DATA_LOSS, "gone")
    assert (await served.ask("/no/such"))[0] is Code.UNIMPLEMENTED
    assert (await served.ask("/a/wrong", metadata=(("wrong", "1"),)))[0] is Code.UNAUTHENTICATED
    codes = (Code.INVALID_ARGUMENT, Code.INTERNAL, Code.DATA_LOSS, Code.UNIMPLEMENTED, Code.UNAUTHENTICATED)
    assert [(await served.finished.get())[1] for _ in codes] == list(codes)
    assert served.refused == ["invalid", "no_such_method", "unauthenticated"]
    assert served.server.load[1] == 0


async def test_many_messages_come_before_the_status(served: Served) -> None:
    def many(call: Call, request: bytes) -> None:
        call.send(request, b"2")
        call.send(b"3")
        if request:
            call.finish()
        else:
            call.fail(InvalidRequest("seed", "no more"))

    served.server.add_method("/a/many", Method(start=many))
    assert [message async for message in served.channel.unary_stream("/a/many")(b"1")] == [b"1", b"2", b"3"]
    call = served.channel.unary_stream("/a/many")(b"")
    assert [await call.read() for _ in range(3)] == [b"", b"2", b"3"]
    assert (await call.code(), await call.details()) == (Code.INVALID_ARGUMENT, "no more")


async def test_a_call_that_is_left_or_late_stops_its_work(served: Served) -> None:
    calls: asyncio.Queue[Call] = asyncio.Queue()
    stopped: asyncio.Queue[Call] = asyncio.Queue()

    def start(call: Call, _: bytes) -> None:
        call.on_cancel = lambda: stopped.put_nowait(call)
        calls.put_nowait(call)

    served.server.add_method("/a/never", Method(start=start))
    method = served.channel.unary_unary("/a/never")
    for timeout_s, code in ((None, Code.CANCELLED), (0.5, Code.DEADLINE_EXCEEDED)):
        asked = asyncio.ensure_future(method(b"", timeout=timeout_s))
        call = await calls.get()
        assert (call.deadline is None) == (timeout_s is None)
        if timeout_s is None:
            asked.cancel()
        assert await asyncio.wait_for(stopped.get(), START_TIMEOUT_S) is call
        assert await served.finished.get() == ("/a/never", code)
        call.reply(b"")  # too late, and no error
        await asyncio.wait((asked,))


async def test_of_a_stream_no_more_is_read_than_the_method_has_room_for(served: Served) -> None:
    came: asyncio.Queue[bytes] = asyncio.Queue()
    opened: asyncio.Queue[Call] = asyncio.Queue()

    def start(call: Call) -> RequestSink:
        opened.put_nowait(call)
        return came.put_nowait, call.finish

    served.server.add_method("/a/each", Method(open=start))
    asked = served.channel.stream_stream("/a/each")()
    call, size, count = None, 10_000, 200

    async def write() -> None:
        for _ in range(count):
            await asked.write(bytes(size))
        await asked.done_writing()

    writing = asyncio.create_task(write())
    call = await opened.get()
    for _ in range(5):
        await came.get()
    await asyncio.wait((writing,), timeout=0.5)
    assert came.qsize() * size < 400_000  # and the client could not send its 2 MB
    call.consumed(5 * size, 5)
    for _ in range(count - 5):
        await came.get()
        call.consumed(size)
    await writing
    assert await asked.code() is Code.OK


async def test_a_burst_of_calls_is_answered(served: Served) -> None:
    served.server.add_method("/a/echo", Method(start=lambda call, request: call.reply(request)))
    method = served.channel.unary_unary("/a/echo")
    sent = [str(number).encode() for number in range(1000)]
    assert await asyncio.gather(*(method(message) for message in sent)) == sent


def test_a_server_says_which_transport_it_has(server: RunningServer, transport: str) -> None:
    assert server.transport == transport


def test_the_other_transport_is_not_imported(transport: str) -> None:
    program = """
import asyncio, sys
from types import SimpleNamespace
from ganserve_server.processes import admin_listener, alone, worker
from ganserve_server.transport import new_server
from ganserve_server.transport.limits import Limits
async def main():
    given = dict.fromkeys(("on_tls_failure", "on_finished", "on_refused", "on_internal_error"), print)
    new_server(sys.argv[1], SimpleNamespace(pem=None, context=None), limits=Limits(), **given)
    transports = {f"ganserve_server.transport.{name}_server" for name in ("grpc", "grpcio")}
    print(*sorted({"hpack", *transports} & set(sys.modules)), flush=True)
    __import__("os")._exit(0)  # grpcio's server would have to be stopped
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program, transport], capture_output=True, text=True, check=True)
    wanted = {"own": ["ganserve_server.transport.grpc_server", "hpack"]}
    assert done.stdout.split() == wanted.get(transport, ["ganserve_server.transport.grpcio_server"])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_server_on_the_port_is_refused(workers: str, transport: str, start_server: Start) -> None:
    running = start_server("--workers", workers)
    assert "cannot listen" in failing_start("--address", running.address, "--transport", transport, code=1)
    with Client(running.address) as client:
        assert len(client.generate("mlp-mnist", count=2)) == 2


def test_a_worker_that_is_killed_is_replaced_on_the_same_port(start_server: Start) -> None:
    running = start_server("--workers", "2")
    pid = running.process.pid
    worker = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    subprocess.run(["kill", f"-{signal.SIGKILL}", str(worker)], check=True)
    running.wait_for("worker started")
    for _ in range(10):
        with Client(running.address) as client:
            assert len(client.generate("mlp-mnist", count=2)) == 2
    assert running.stop() == 0


def test_mutual_tls_and_new_certificates(start_server: Start, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    CA.cert_pem.write_to_path(ca_file)
    chain, key = write_certificate(tmp_path / "server")
    mine, others = write_certificate(tmp_path / "mine"), write_certificate(tmp_path / "others", trustme.CA())
    running = start_server("--tls-certificate-file", chain, "--tls-key-file", key, "--tls-client-ca-file", ca_file)

    def models(*certificate: Path) -> int:
        files = dict(zip(("certificate_file", "key_file"), map(str, certificate), strict=False))
        with Client(
            running.address, ca_file=str(ca_file), timeout_s=20 if certificate == mine else 1, **files
        ) as client:
            return len(client.models())

    assert models(*mine) > 0
    for certificate in ((), others):
        with pytest.raises(GanserveError):
            models(*certificate)
    before = serial_of(running.address, str(ca_file))
    new = write_certificate(tmp_path / "new")
    new[1].replace(key)
    new[0].replace(chain)
    loaded = 'ganserve_file_reloads_total{kind="certificates",outcome="loaded"}'
    wait_for_sample(running, loaded, lambda count: count >= 1)
    assert serial_of(running.address, str(ca_file)) != before
    assert models(*mine) > 0

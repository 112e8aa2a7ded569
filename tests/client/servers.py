"""Servers that a test makes misbehave: real ones of grpcio, and sockets that say just what a test wants."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ganserve import AsyncClient, Client, GeneratedImage
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

CHUNK = 4
DRAWN_SEED = 1000
WAIT_S = 20

both = pytest.mark.parametrize("twin", [Client, AsyncClient])

Way = Callable[[Iterable[Any]], Any]


async def asynchronously(seeds: Iterable[Any]) -> AsyncIterator[Any]:
    for seed in seeds:
        yield seed


# Who is given seeds, and how.
ways = pytest.mark.parametrize(
    ("twin", "given"),
    [(Client, iter), (AsyncClient, iter), (AsyncClient, asynchronously)],
    ids=["Client", "AsyncClient", "AsyncClient-async-iterable"],
)


def answer(request: pb.GenerateImagesRequest, start: int = 0, stop: int | None = None) -> pb.GenerateImagesResponse:
    """Images of one pixel, whose value is the seed's, or the first of its latent's."""
    stop = request.count or 1 if stop is None else stop
    if request.HasField("latents"):
        dim = len(request.latents.values) // request.count
        values = [int(value) for value in request.latents.values[::dim]][start:stop]
        seeds = []
    else:
        first = request.seed if request.HasField("seed") else DRAWN_SEED
        values = seeds = [(first + index) % 2**32 for index in range(start, stop)]
    return pb.GenerateImagesResponse(
        model=request.model,
        version=request.version or 3,
        digest="sha256:1",
        provider="CPUExecutionProvider",
        count=stop - start,
        height=1,
        width=1,
        channels=1,
        truncation=1,
        seeds=seeds,
        labels=list(request.labels)[start:stop] if len(request.labels) > 1 else list(request.labels) * (stop - start),
        encoding=pb.ENCODING_RAW,
        pixels=bytes(value % 256 for value in values),
    )


def chunks(request: pb.GenerateImagesRequest) -> Iterator[pb.StreamImagesResponse]:
    for start in range(0, request.count, CHUNK):
        yield pb.StreamImagesResponse(chunk=answer(request, start, min(start + CHUNK, request.count)))


def each_answer(request: pb.GenerateImagesRequest) -> pb.GenerateEachResponse:
    return pb.GenerateEachResponse(response=answer(request))


def each_error(code: grpc.StatusCode, reason: str, text: str) -> pb.GenerateEachResponse:
    return pb.GenerateEachResponse(error=pb.Error(code=code.value[0], reason=reason, message=text))


def _kept(requests: Any, taken: list[pb.GenerateImagesRequest]) -> Iterator[pb.GenerateImagesRequest]:
    for request in requests:
        taken.append(request.generate)
        yield request.generate


class Servicer(pb_grpc.GenerationServiceServicer, health_pb2_grpc.HealthServicer):
    """Does what the test says with its nth request, counted from 0; keeps the requests and the metadata."""

    def __init__(self, behave: Callable[[int, Any, Any], Any]) -> None:
        self._behave = behave
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def _next(self, request: Any, context: Any) -> int:
        with self._lock:
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            return len(self.requests) - 1

    def GenerateImages(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._behave(self._next(request, context), request, context)

    def StreamImages(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield from self._behave(self._next(request.generate, context), request.generate, context)

    def GenerateEach(self, requests: Any, context: Any) -> Any:  # noqa: N802
        """The call's requests are what is kept: those that the test takes, as it takes them."""
        taken: list[pb.GenerateImagesRequest] = []
        yield from self._behave(self._next(taken, context), _kept(requests, taken), context)

    ListModels = GetModel = Check = GenerateImages


@contextmanager
def serving(
    behave: Callable[[int, Any, Any], Any],
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[tuple[str, Servicer]]:
    threads = futures.ThreadPoolExecutor(8)
    server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
    servicer = Servicer(behave)
    pb_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    server.start()
    try:
        yield f"{address.rpartition(':')[0]}:{port}", servicer
    finally:
        server.stop(0).wait()
        threads.shutdown()


def honest(number: int, request: Any, context: Any) -> Any:
    return answer(request)


def honest_each(number: int, requests: Any, context: Any) -> Any:
    return map(each_answer, requests)


def honest_stream(number: int, request: Any, context: Any) -> Any:
    return chunks(request)


def abort_overloaded(context: Any, retry_after_s: float) -> None:
    """Refuse as ganserve-server does when its queue is full."""
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(retry_after_s * 1e9))
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    details = status_pb2.Status(details=[packed]).SerializeToString()
    context.set_trailing_metadata((("grpc-status-details-bin", details), ("x-request-id", "id-1")))
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")


def serving_status(status: int) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status=status)  # type: ignore[arg-type]


Twin = type[Client] | type[AsyncClient]


def ask(twin: Twin, address: str, method: str, *args: Any, options: Any = None, **kwargs: Any) -> Any:
    """Call a method of either client; what an iterator gives comes as a list."""
    if issubclass(twin, Client):
        with twin(address, **options or {}) as client:
            result = getattr(client, method)(*args, **kwargs)
            return list(result) if isinstance(result, Generator) else result

    async def ask_in_loop() -> Any:
        try:
            async with twin(address, **options or {}) as client:
                result = getattr(client, method)(*args, **kwargs)
                return [item async for item in result] if isinstance(result, AsyncGenerator) else await result
        finally:
            # gRPC ends its own as soon as its thread has heard of a call's end.
            if left := asyncio.all_tasks() - {asyncio.current_task()}:
                _, left = await asyncio.wait(left, timeout=5)
            assert not left, "a task is left"

    return asyncio.run(ask_in_loop())


def until_it_fails(
    twin: Twin, address: str, *args: Any, **kwargs: Any
) -> tuple[list[GeneratedImage], BaseException | None]:
    """Return what `generate_each` yields, and what it raises then."""
    images: list[GeneratedImage] = []

    async def read() -> None:
        async with AsyncClient(address) as client:
            async for image in client.generate_each(*args, **kwargs):
                images.append(image)  # noqa: PERF401

    try:
        if twin is AsyncClient:
            asyncio.run(read())
        else:
            with Client(address) as client:
                images.extend(client.generate_each(*args, **kwargs))
    except Exception as error:
        return images, error
    return images, None


class Gate:
    """A socket in front of a server: each connection is handled as the test says, or passed on."""

    def __init__(self, handle: Callable[[int, socket.socket], object]) -> None:
        self._handle = handle
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._start(self._accept)

    def _start(self, run: Callable[..., object], *args: Any) -> None:
        thread = threading.Thread(target=run, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            number, self.connections = self.connections, self.connections + 1
            self._start(self._handled, number, connection)

    def _handled(self, number: int, connection: socket.socket) -> None:
        try:
            self._handle(number, connection)
        except OSError:
            return  # the client is gone
        finally:
            _shut(connection)

    def pass_on(self, connection: socket.socket, address: str, look: Callable[[bytes], object] | None = None) -> None:
        """Copy both ways until one side ends; `look` sees what the client sends."""
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self._start(_copy, upstream, connection, None)
            _copy(connection, upstream, look)

    def drop(self) -> None:
        """End all connections that there are."""
        for connection in self._open:
            _shut(connection)

    def close(self) -> None:
        _shut(self._listener)
        self._listener.close()
        self._threads[0].join()
        self.drop()
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def _copy(source: socket.socket, target: socket.socket, look: Callable[[bytes], object] | None) -> None:
    try:
        while data := source.recv(1 << 16):
            if look is not None:
                look(data)
            target.sendall(data)
    except OSError:
        pass
    finally:
        _shut(source)
        _shut(target)


@contextmanager
def gate(handle: Callable[[Gate, int, socket.socket], object]) -> Iterator[Gate]:
    made: Gate | None = None

    def with_gate(number: int, connection: socket.socket) -> object:
        assert made is not None
        return handle(made, number, connection)

    made = Gate(with_gate)
    try:
        yield made
    finally:
        made.close()


def fails_first(code: grpc.StatusCode, times: int = 1) -> Any:
    def behave(number: int, request: Any, context: Any) -> Any:
        if number < times:
            context.abort(code, "what was wrong")
        return answer(request)

    return behave


def breaks_after(code: grpc.StatusCode, sent: int, times: int = 1) -> Any:
    """Streams that break after so many chunks, and then one that does not."""

    def behave(number: int, request: Any, context: Any) -> Any:
        for index, chunk in enumerate(chunks(request)):
            if number < times and index == sent:
                context.abort(code, "broken")
            yield chunk
        if number < times and sent * CHUNK >= request.count:
            context.abort(code, "broken")

    return behave


def read_until_the_end(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass

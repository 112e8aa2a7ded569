"""grpcio, its blocking interface."""

import contextlib
import queue
import time
from collections.abc import Iterator

import grpc
import scenarios as given
from scenarios import Target, check

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc


def connect(target: Target, *options: tuple[str, int]) -> grpc.Channel:
    every = [("grpc.use_local_subchannel_pool", 1), *options]
    if target.ca_file:
        return grpc.secure_channel(target.address, grpc.ssl_channel_credentials(target.ca), every)
    return grpc.insecure_channel(target.address, every)


class Each:
    """A stream of requests that is written by hand."""

    def __init__(self, channel: grpc.Channel, timeout_s: float = given.LIMIT_S) -> None:
        self._requests: queue.SimpleQueue[pb.GenerateEachRequest | None] = queue.SimpleQueue()
        sent: Iterator[pb.GenerateEachRequest] = iter(self._requests.get, None)
        self.call = pb_grpc.GenerationServiceStub(channel).GenerateEach(sent, timeout=timeout_s)

    def ask(self) -> None:
        self._requests.put(given.EACH)

    def answer(self) -> None:
        given.check_answer(next(self.call))

    def half_close(self) -> None:
        self._requests.put(None)

    def end(self) -> None:
        self.half_close()
        check(next(self.call, None) is None, "there is an answer too many")
        check(self.call.code() is grpc.StatusCode.OK, f"the stream ends with {self.call.code()}")


def one(channel: grpc.Channel, **options: object) -> None:
    stub = pb_grpc.GenerationServiceStub(channel)
    given.check_one(stub.GenerateImages(given.ONE, timeout=given.LIMIT_S, **options))


def unary(target: Target) -> None:
    with connect(target) as channel:
        one(channel)


def pixels(target: Target) -> None:
    with connect(target) as channel:
        response = pb_grpc.GenerationServiceStub(channel).GenerateImages(given.SOME, timeout=given.LIMIT_S)
    given.check_pixels(response.pixels, target)


def each(target: Target) -> None:
    with connect(target) as channel:
        requests = [given.EACH, given.EACH_WRONG, given.EACH]
        call = pb_grpc.GenerationServiceStub(channel).GenerateEach(iter(requests), timeout=given.LIMIT_S)
        outcomes = [response.WhichOneof("outcome") for response in call]
        check(outcomes == ["response", "error", "response"], f"the answers are {outcomes}")
        stream = Each(channel)
        for _ in range(3):
            stream.ask()
            stream.answer()
        stream.end()


def stream(target: Target) -> None:
    with connect(target) as channel:
        chunks = pb_grpc.GenerationServiceStub(channel).StreamImages(given.STREAM, timeout=given.LIMIT_S)
        count = sum(response.chunk.count for response in chunks)
    check(count == given.STREAM_COUNT, f"{count} images")


def deadline(target: Target) -> None:
    with connect(target) as channel:
        one(channel)
        for timeout_s in (0.001, 0.3):
            call = Each(channel, timeout_s).call
            check(call.code() is grpc.StatusCode.DEADLINE_EXCEEDED, f"after {timeout_s} s the status is {call.code()}")
        one(channel)


def cancel(target: Target) -> None:
    with connect(target) as channel:
        call = pb_grpc.GenerationServiceStub(channel).StreamImages(given.ENDLESS)
        next(call)
        call.cancel()
        check(call.code() is grpc.StatusCode.CANCELLED, f"the status is {call.code()}")
        one(channel)


def gzip(target: Target) -> None:
    with connect(target) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        response = stub.GenerateImages(given.COMPRESSIBLE, timeout=given.LIMIT_S, compression=grpc.Compression.Gzip)
    check(list(response.labels) == [7] * 256, "the labels are others")


def metadata(target: Target) -> None:
    with connect(target) as channel:
        one(channel, metadata=[("x-large", given.ACCEPTED_METADATA)])


def oversized(target: Target) -> None:
    with connect(target) as channel:
        other = Each(channel)
        for _ in range(3):
            try:
                one(channel, metadata=[("x-large", given.REFUSED_METADATA)])
            except grpc.RpcError as error:
                given.check_refused(error.code().name, error.details())
            else:
                raise given.ScenarioError("20 KB of metadata are accepted")
            other.ask()
            other.answer()
            one(channel)
        other.end()


def bounds(target: Target) -> None:
    """Send headers near the limits of servers and proxies, in size and in number.

    The limits differ, and so do the answers; the streams of other callers are checked elsewhere.
    """
    with connect(target) as channel:
        for fields in (1, 60, 75, 95, 97, 99, 101, 103, 150):
            for size in range(12 << 10, 18 << 10, 512):
                headers = [(f"x-{number:04}", "X" * (size // fields - 6)) for number in range(fields)]
                with contextlib.suppress(grpc.RpcError):
                    one(channel, metadata=headers)
    with connect(target) as channel:
        one(channel)


def details(target: Target) -> None:
    with connect(target) as channel:
        try:
            pb_grpc.GenerationServiceStub(channel).GenerateImages(given.WRONG, timeout=given.LIMIT_S)
        except grpc.RpcError as error:
            trailers = dict(error.trailing_metadata())
            given.check_details(error.code().name, trailers.get("grpc-status-details-bin", b""))
        else:
            raise given.ScenarioError("it was answered")


def keepalive(target: Target) -> None:
    pings = (("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 30000))
    with connect(target, *pings, ("grpc.http2.max_pings_without_data", 0)) as channel:
        stream = Each(channel)
        stream.ask()
        stream.answer()
        time.sleep(given.QUIET_S)
        stream.ask()
        stream.answer()
        stream.end()


def streams(target: Target) -> None:
    with connect(target) as channel:
        every = [Each(channel) for _ in range(given.OPEN_STREAMS)]
        for stream in every:
            stream.ask()
        for stream in every:
            stream.answer()
        for stream in every:
            stream.half_close()
        for stream in every:
            stream.end()


def age(target: Target) -> None:
    with connect(target) as channel:
        end = time.monotonic() + given.AGE_S
        while time.monotonic() < end:
            one(channel)


given.run(
    unary, pixels, each, stream, deadline, cancel, gzip, metadata, oversized, bounds, details, keepalive, streams, age
)

"""grpclib, gRPC on the package h2."""

import asyncio
import ssl

import scenarios as given
from google.rpc import error_details_pb2
from grpclib.client import Channel, Stream, StreamStreamMethod, UnaryStreamMethod, UnaryUnaryMethod
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from scenarios import Target, check

from ganserve.v1 import generation_pb2 as pb

EachStream = Stream[pb.GenerateEachRequest, pb.GenerateEachResponse]


def connect(target: Target, config: Configuration | None = None) -> Channel:
    host, _, port = target.address.rpartition(":")
    context = None
    if target.ca_file:
        context = ssl.create_default_context(cafile=target.ca_file)
        context.set_alpn_protocols(["h2"])
    return Channel(host, int(port), ssl=context, config=config)


def generate(channel: Channel) -> UnaryUnaryMethod[pb.GenerateImagesRequest, pb.GenerateImagesResponse]:
    return UnaryUnaryMethod(channel, f"{given.PATH}GenerateImages", pb.GenerateImagesRequest, pb.GenerateImagesResponse)


def stream_images(channel: Channel) -> UnaryStreamMethod[pb.StreamImagesRequest, pb.StreamImagesResponse]:
    return UnaryStreamMethod(channel, f"{given.PATH}StreamImages", pb.StreamImagesRequest, pb.StreamImagesResponse)


def open_each(channel: Channel, timeout_s: float = given.LIMIT_S) -> EachStream:
    method = StreamStreamMethod(channel, f"{given.PATH}GenerateEach", pb.GenerateEachRequest, pb.GenerateEachResponse)
    return method.open(timeout=timeout_s)


async def one(channel: Channel, metadata: dict[str, str] | None = None) -> None:
    given.check_one(await generate(channel)(given.ONE, timeout=given.LIMIT_S, metadata=metadata))


async def exchange(stream: EachStream) -> None:
    await stream.send_message(given.EACH)
    answer = await stream.recv_message()
    check(answer is not None, "the stream ended")
    given.check_answer(answer)


async def end(stream: EachStream) -> None:
    await stream.end()
    check(await stream.recv_message() is None, "there is an answer too many")
    await stream.recv_trailing_metadata()  # raises unless the status is OK


async def unary(target: Target) -> None:
    async with connect(target) as channel:
        await one(channel)


async def pixels(target: Target) -> None:
    async with connect(target) as channel:
        response = await generate(channel)(given.SOME, timeout=given.LIMIT_S)
    given.check_pixels(response.pixels, target)


async def each(target: Target) -> None:
    async with connect(target) as channel:
        async with open_each(channel) as stream:
            for request in (given.EACH, given.EACH_WRONG, given.EACH):
                await stream.send_message(request)
            await stream.end()
            outcomes = [response.WhichOneof("outcome") async for response in stream]
        check(outcomes == ["response", "error", "response"], f"the answers are {outcomes}")
        async with open_each(channel) as stream:
            for _ in range(3):
                await exchange(stream)
            await end(stream)


async def stream(target: Target) -> None:
    async with connect(target) as channel:
        responses = await stream_images(channel)(given.STREAM, timeout=given.LIMIT_S)
    count = sum(response.chunk.count for response in responses)
    check(count == given.STREAM_COUNT, f"{count} images")


async def deadline(target: Target) -> None:
    async with connect(target) as channel:
        await one(channel)
        for timeout_s in (0.001, 0.3):
            try:
                async with open_each(channel, timeout_s) as stream:
                    await stream.send_request()
                    await stream.recv_message()
            except GRPCError as error:
                check(error.status is Status.DEADLINE_EXCEEDED, f"after {timeout_s} s the status is {error.status}")
            except TimeoutError:
                pass  # how grpclib says that its own timer was first
            else:
                raise given.ScenarioError(f"no error after {timeout_s} s")
        await one(channel)


async def cancel(target: Target) -> None:
    async with connect(target) as channel:
        async with stream_images(channel).open() as stream:
            await stream.send_message(given.ENDLESS, end=True)
            await stream.recv_message()
            await stream.cancel()
        await one(channel)


async def metadata(target: Target) -> None:
    async with connect(target) as channel:
        await one(channel, {"x-large": given.ACCEPTED_METADATA})


async def oversized(target: Target) -> None:
    async with connect(target) as channel, open_each(channel) as other:
        for _ in range(3):
            try:
                await one(channel, {"x-large": given.REFUSED_METADATA})
            except GRPCError as error:
                given.check_refused(error.status.name, error.message)
            except StreamTerminatedError:
                pass  # a reset, for which other clients say INTERNAL
            else:
                raise given.ScenarioError("20 KB of metadata are accepted")
            await exchange(other)
            await one(channel)
        await end(other)


async def details(target: Target) -> None:
    async with connect(target) as channel:
        try:
            await generate(channel)(given.WRONG, timeout=given.LIMIT_S)
        except GRPCError as error:
            check(error.status is Status.INVALID_ARGUMENT, f"the status is {error.status}")
            found = {type(detail): detail for detail in error.details or ()}
            request = found.get(error_details_pb2.BadRequest, error_details_pb2.BadRequest())
            info = found.get(error_details_pb2.ErrorInfo, error_details_pb2.ErrorInfo())
            fields = [violation.field for violation in request.field_violations]
            check(fields == ["truncation"], f"BadRequest names {fields}")
            check((info.reason, info.domain) == ("INVALID", "ganserve"), f"ErrorInfo is {info}")
        else:
            raise given.ScenarioError("it was answered")


async def keepalive(target: Target) -> None:
    config = Configuration(_keepalive_time=1.0, _keepalive_timeout=30.0, _http2_max_pings_without_data=0)
    async with connect(target, config) as channel, open_each(channel) as stream:
        await exchange(stream)
        await asyncio.sleep(given.QUIET_S)
        await exchange(stream)
        await end(stream)


async def streams(target: Target) -> None:
    opened, all_open = 0, asyncio.Event()

    async with connect(target) as channel:

        async def use() -> None:
            nonlocal opened
            async with open_each(channel) as stream:
                await exchange(stream)
                opened += 1
                if opened == given.OPEN_STREAMS:
                    all_open.set()
                await all_open.wait()
                await end(stream)

        await asyncio.gather(*(use() for _ in range(given.OPEN_STREAMS)))


given.run(unary, pixels, each, stream, deadline, cancel, metadata, oversized, details, keepalive, streams)

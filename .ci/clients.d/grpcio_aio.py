"""grpcio, its asyncio interface."""

import asyncio
import time

import grpc
import grpc.aio
import scenarios as given
from scenarios import Target, check

from ganserve.v1 import generation_pb2_grpc as pb_grpc


def connect(target: Target, *options: tuple[str, int]) -> grpc.aio.Channel:
    every = [("grpc.use_local_subchannel_pool", 1), *options]
    if target.ca_file:
        return grpc.aio.secure_channel(target.address, grpc.ssl_channel_credentials(target.ca), every)
    return grpc.aio.insecure_channel(target.address, every)


async def one(channel: grpc.aio.Channel, **options: object) -> None:
    stub = pb_grpc.GenerationServiceStub(channel)
    given.check_one(await stub.GenerateImages(given.ONE, timeout=given.LIMIT_S, **options))


def open_each(channel: grpc.aio.Channel, timeout_s: float = given.LIMIT_S) -> grpc.aio.StreamStreamCall:
    return pb_grpc.GenerationServiceStub(channel).GenerateEach(timeout=timeout_s)


async def exchange(call: grpc.aio.StreamStreamCall) -> None:
    await call.write(given.EACH)
    given.check_answer(await call.read())


async def end(call: grpc.aio.StreamStreamCall) -> None:
    await call.done_writing()
    check(await call.read() is grpc.aio.EOF, "there is an answer too many")
    check(await call.code() is grpc.StatusCode.OK, f"the stream ends with {await call.code()}")


async def unary(target: Target) -> None:
    async with connect(target) as channel:
        await one(channel)


async def pixels(target: Target) -> None:
    async with connect(target) as channel:
        response = await pb_grpc.GenerationServiceStub(channel).GenerateImages(given.SOME, timeout=given.LIMIT_S)
    given.check_pixels(response.pixels, target)


async def each(target: Target) -> None:
    async with connect(target) as channel:
        call = open_each(channel)
        for request in (given.EACH, given.EACH_WRONG, given.EACH):
            await call.write(request)
        await call.done_writing()
        outcomes = [response.WhichOneof("outcome") async for response in call]
        check(outcomes == ["response", "error", "response"], f"the answers are {outcomes}")
        call = open_each(channel)
        for _ in range(3):
            await exchange(call)
        await end(call)


async def stream(target: Target) -> None:
    async with connect(target) as channel:
        count = 0
        async for response in pb_grpc.GenerationServiceStub(channel).StreamImages(given.STREAM, timeout=given.LIMIT_S):
            count += response.chunk.count
    check(count == given.STREAM_COUNT, f"{count} images")


async def deadline(target: Target) -> None:
    async with connect(target) as channel:
        await one(channel)
        for timeout_s in (0.001, 0.3):
            code = await open_each(channel, timeout_s).code()
            check(code is grpc.StatusCode.DEADLINE_EXCEEDED, f"after {timeout_s} s the status is {code}")
        await one(channel)


async def cancel(target: Target) -> None:
    async with connect(target) as channel:
        call = pb_grpc.GenerationServiceStub(channel).StreamImages(given.ENDLESS)
        await call.read()
        call.cancel()
        code = await call.code()
        check(code is grpc.StatusCode.CANCELLED, f"the status is {code}")
        await one(channel)


async def gzip(target: Target) -> None:
    async with connect(target) as channel:
        response = await pb_grpc.GenerationServiceStub(channel).GenerateImages(
            given.COMPRESSIBLE, timeout=given.LIMIT_S, compression=grpc.Compression.Gzip
        )
    check(list(response.labels) == [7] * 256, "the labels are others")


async def metadata(target: Target) -> None:
    async with connect(target) as channel:
        await one(channel, metadata=[("x-large", given.ACCEPTED_METADATA)])


async def oversized(target: Target) -> None:
    async with connect(target) as channel:
        other = open_each(channel)
        for _ in range(3):
            try:
                await one(channel, metadata=[("x-large", given.REFUSED_METADATA)])
            except grpc.aio.AioRpcError as error:
                given.check_refused(error.code().name, error.details())
            else:
                raise given.ScenarioError("20 KB of metadata are accepted")
            await exchange(other)
            await one(channel)
        await end(other)


async def details(target: Target) -> None:
    async with connect(target) as channel:
        try:
            await pb_grpc.GenerationServiceStub(channel).GenerateImages(given.WRONG, timeout=given.LIMIT_S)
        except grpc.aio.AioRpcError as error:
            found = error.trailing_metadata().get("grpc-status-details-bin", b"")
            given.check_details(error.code().name, bytes(found))
        else:
            raise given.ScenarioError("it was answered")


async def keepalive(target: Target) -> None:
    pings = (("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 30000))
    async with connect(target, *pings, ("grpc.http2.max_pings_without_data", 0)) as channel:
        call = open_each(channel)
        await exchange(call)
        await asyncio.sleep(given.QUIET_S)
        await exchange(call)
        await end(call)


async def streams(target: Target) -> None:
    async with connect(target) as channel:
        every = [open_each(channel) for _ in range(given.OPEN_STREAMS)]
        await asyncio.gather(*(exchange(call) for call in every))
        await asyncio.gather(*(end(call) for call in every))


async def age(target: Target) -> None:
    async with connect(target) as channel:
        finish = time.monotonic() + given.AGE_S

        async def repeat() -> None:
            while time.monotonic() < finish:
                await one(channel)

        await asyncio.gather(*(repeat() for _ in range(4)))


given.run(unary, pixels, each, stream, deadline, cancel, gzip, metadata, oversized, details, keepalive, streams, age)

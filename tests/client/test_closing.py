"""Iterators, tasks and clients that end: their calls end too, and nothing is left behind."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tests.client.servers import (
    WAIT_S,
    Twin,
    abort_overloaded,
    answer,
    both,
    chunks,
    each_answer,
    serving,
)

from ganserve import (
    AsyncClient,
    Client,
    GeneratedImage,
    RequestCancelledError,
    _forks,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@both
@pytest.mark.parametrize("method", ["stream", "stream_batches", "generate_each"])
def test_closing_an_iterator_cancels_the_stream(twin: Twin, method: str) -> None:
    told = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        context.add_callback(told.set)
        yield from map(each_answer, request) if method == "generate_each" else chunks(request)
        told.wait(WAIT_S)

    endless: Any = {"seeds": itertools.count()} if method == "generate_each" else {"count": 10**6, "seed": 1}
    calls: list[Any] = []  # held, as a traceback or a debugger does: gRPC cancels what nobody holds by itself

    def hold(client: Client | AsyncClient) -> None:
        stubs = client._calls.connected()
        name = "generate_each" if method == "generate_each" else "stream_images"
        start = getattr(stubs, name)
        setattr(stubs, name, lambda *given, **named: calls.append(start(*given, **named)) or calls[-1])

    async def use(address: str) -> None:
        async with AsyncClient(address) as client:
            hold(client)
            images = getattr(client, method)("any", **endless)
            await anext(images)
            await images.aclose()
            assert await asyncio.to_thread(told.wait, WAIT_S)

    with serving(behave) as (address, _):
        if twin is AsyncClient:
            asyncio.run(use(address))
            return
        with Client(address) as client:
            hold(client)
            images = getattr(client, method)("any", **endless)
            next(images)
            images.close()
            assert told.wait(WAIT_S)


async def test_a_cancelled_task_cancels_its_call() -> None:
    came, told = threading.Event(), threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        context.add_callback(told.set)
        came.set()
        told.wait(WAIT_S)
        return answer(request)

    with serving(behave) as (address, _):
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.generate("any"))
            assert await asyncio.to_thread(came.wait, WAIT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(told.wait, WAIT_S)


def holds(method: str, came: threading.Event) -> Any:
    """Answer once the client is gone; `came` is set when a call is there."""
    over = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        context.add_callback(over.set)
        came.set()
        over.wait(WAIT_S)
        return iter(()) if method == "generate_each" else chunks(request) if method == "stream" else answer(request)

    return behave


@pytest.mark.parametrize("method", ["generate", "stream", "generate_each"])
def test_closing_the_client_ends_its_calls(method: str) -> None:
    came = threading.Event()
    with serving(holds(method, came)) as (address, _):
        client = Client(address)
        calls: dict[str, Callable[[], Iterable[GeneratedImage]]] = {
            "generate": lambda: client.generate("any"),
            "stream": lambda: client.stream("any", count=1),
            "generate_each": lambda: client.generate_each("any", [1]),
        }
        closing = threading.Thread(target=lambda: (came.wait(WAIT_S), client.close()))
        closing.start()
        with pytest.raises(RequestCancelledError, match="closed"):
            list(calls[method]())
        closing.join()
        with pytest.raises(RequestCancelledError, match="closed"):
            client.generate("any")


@pytest.mark.parametrize("method", ["generate", "stream", "generate_each"])
async def test_closing_the_async_client_ends_its_calls(method: str) -> None:
    came = threading.Event()
    with serving(holds(method, came)) as (address, _):
        client = AsyncClient(address)

        async def call() -> None:
            if method == "generate":
                await client.generate("any")
            else:
                images = client.stream("any", count=1) if method == "stream" else client.generate_each("any", [1])
                _ = [image async for image in images]

        task = asyncio.create_task(call())
        assert await asyncio.to_thread(came.wait, WAIT_S)
        await client.close()
        with pytest.raises(RequestCancelledError, match="closed"):
            await task


def test_closing_the_client_ends_a_wait_for_the_next_try() -> None:
    came = threading.Event()

    def behave(number: int, request: Any, context: Any) -> Any:
        came.set()
        abort_overloaded(context, 20)

    with serving(behave) as (address, _):
        client = Client(address)

        def close() -> None:
            came.wait(WAIT_S)
            while _forks._inside:  # the call is not over
                pass
            client.close()

        closing = threading.Thread(target=close)
        closing.start()
        started = time.monotonic()
        with pytest.raises(RequestCancelledError, match="closed"):
            client.generate("any", timeout_s=60)
        assert time.monotonic() - started < 10
        closing.join()

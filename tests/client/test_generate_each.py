"""The image of each of many seeds that do not follow one another, by both clients, from real servers."""

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.client.servers import Twin, Way, ask, both, until_it_fails, ways
from tests.conftest import RunningServer

from ganserve import AsyncClient, Client, GanserveError, InvalidRequestError, OverloadedError

IN_FLIGHT = 256
SCATTERED = [seed * 2654435761 % 2**32 for seed in range(1000)]


@ways
@pytest.mark.parametrize(
    ("model", "labels"),
    [
        ("mlp-mnist", None),
        pytest.param("cdcgan-mnist", None, marks=pytest.mark.slow),
        ("cdcgan-mnist", np.int64(7)),
        ("cdcgan-mnist", [place % 7 for place in range(1000)]),
        pytest.param("cdcgan-fashion-mnist", "sneaker", marks=pytest.mark.slow),
        ("cdcgan-fashion-mnist", [("Bag", "coat", 3)[place % 3] for place in range(1000)]),
    ],
)
def test_every_seed_gets_its_image_in_order(
    server: RunningServer, client: Client, twin: Twin, given: Way, model: str, labels: Any
) -> None:
    images = ask(twin, server.address, "generate_each", model, given(SCATTERED), label=labels, truncation=0.75)
    assert [image.seed for image in images] == SCATTERED
    for place in range(0, 1000, 37):
        label = labels[place] if isinstance(labels, list) else labels
        alone = client.generate(model, seed=SCATTERED[place], label=label, truncation=0.75)[0]
        assert np.array_equal(images[place].pixels, alone.pixels)
        assert images[place].provenance == alone.provenance


def test_seeds_may_be_numbers_of_numpy(client: Client) -> None:
    images = client.generate_each("cdcgan-mnist", np.array([5, 2**32 - 1], np.uint32), label=np.array([1, 2]))
    assert [(image.seed, image.label) for image in images] == [(5, 1), (2**32 - 1, 2)]


@ways
def test_where_there_are_no_seeds_no_call_is_made(twin: Twin, given: Way) -> None:
    assert ask(twin, "127.0.0.1:1", "generate_each", "mlp-mnist", given([])) == []


@ways
@pytest.mark.parametrize("how", ["kill", pytest.param("terminate", marks=pytest.mark.slow)])
def test_a_server_may_restart_meanwhile(
    start_server: Callable[..., RunningServer], client: Client, twin: Twin, given: Way, how: str
) -> None:
    first = start_server("--drain-timeout-s", "0.5")
    seeds = SCATTERED[:700]

    def restart(seed: int) -> int:
        if seed == seeds[500]:
            getattr(first.process, how)()
            first.process.wait()
            start_server("--address", first.address)
        return seed

    images = ask(twin, first.address, "generate_each", "cdcgan-mnist", given(map(restart, seeds)))
    assert [image.seed for image in images] == seeds
    for image in images[::23]:
        assert np.array_equal(image.pixels, client.generate("cdcgan-mnist", seed=image.seed).pixels[0])


@both
def test_a_queue_that_is_too_short_for_all_that_is_asked_for_loses_none(
    start_server: Callable[..., RunningServer], twin: Twin
) -> None:
    running = start_server("--max-queue-images", "20")
    images = ask(twin, running.address, "generate_each", "dcgan-mnist", SCATTERED)
    assert [image.seed for image in images] == SCATTERED


@both
def test_without_retries_a_full_queue_is_an_error(start_server: Callable[..., RunningServer], twin: Twin) -> None:
    running = start_server("--max-queue-images", "2")
    with pytest.raises(OverloadedError, match="no room for 1 more") as caught:
        ask(twin, running.address, "generate_each", "dcgan-mnist", SCATTERED, options={"retries": False})
    assert caught.value.reason == "queue_full"


class Counted:
    """Endless seeds, and how many of them have been read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        for seed in itertools.count():
            self.read += 1
            yield 3 * seed


@ways
def test_endless_seeds_are_read_only_as_far_as_there_is_need(server: RunningServer, twin: Twin, given: Way) -> None:
    seeds, ahead = Counted(), []

    async def read() -> None:
        async with AsyncClient(server.address) as client:
            images = client.generate_each("mlp-mnist", given(seeds))
            async for image in images:
                ahead.append(seeds.read - (image.seed or 0) // 3)
                if len(ahead) == 1000:
                    await images.aclose()

    def read_blocking() -> None:
        with Client(server.address) as client:
            images = client.generate_each("mlp-mnist", seeds)
            ahead.extend(seeds.read - (image.seed or 0) // 3 for image in itertools.islice(images, 1000))
            images.close()

    read_blocking() if twin is Client else asyncio.run(read())
    assert ahead[0] == 1  # what all others are to be like is known only then
    assert 0.7 * IN_FLIGHT < max(ahead) <= IN_FLIGHT + 1
    assert seeds.read <= 1000 + IN_FLIGHT


def test_closing_the_iterator_or_forgetting_it_leaves_nothing_behind(server: RunningServer) -> None:
    before = set(threading.enumerate())
    with Client(server.address) as client:
        for closed in (True, False):
            images = client.generate_each("mlp-mnist", itertools.count())
            assert next(images).seed == 0
            if closed:
                images.close()
            del images
            watching = [thread for thread in set(threading.enumerate()) - before if thread.name == "ganserve-watch"]
            for thread in watching:
                thread.join(5)
                assert not thread.is_alive()


def test_a_program_may_end_before_the_iterator(server: RunningServer) -> None:
    program = f"""
import itertools
from ganserve import Client
images = Client({server.address!r}).generate_each("mlp-mnist", itertools.count())
print(next(images).seed, next(images).seed)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.stderr) == ("0 1\n", "")


@ways
def test_what_the_seeds_raise_is_raised_after_the_images_of_those_before(
    server: RunningServer, twin: Twin, given: Way
) -> None:
    raised = OverloadedError("of the caller's own: the SDK must not try again")

    def seeds() -> Iterator[int]:
        yield from range(300)
        raise raised

    def no_seeds() -> Iterator[int]:
        raise raised
        yield 1

    images, caught = until_it_fails(twin, server.address, "mlp-mnist", given(seeds()))
    assert [image.seed for image in images] == list(range(300))
    assert caught is raised
    assert until_it_fails(twin, "127.0.0.1:1", "mlp-mnist", given(no_seeds())) == ([], raised)
    images, caught = until_it_fails(twin, server.address, "cdcgan-mnist", given(range(1000)), label=map(int, "123x"))
    assert [image.label for image in images] == [1, 2, 3]
    assert type(caught) is ValueError


@ways
@pytest.mark.parametrize("wrong", [-1, 2**32, 1.5, "7", None, True])
def test_a_wrong_seed_is_named_after_the_images_of_those_before(
    server: RunningServer, twin: Twin, given: Way, wrong: Any
) -> None:
    images, caught = until_it_fails(twin, server.address, "mlp-mnist", given([9, 4, wrong, 5]))
    assert [image.seed for image in images] == [9, 4]
    assert isinstance(caught, InvalidRequestError)
    assert str(caught) == f"seed is {wrong!r}; it must be an integer from 0 to 4294967295"
    assert caught.field == "seed"


@ways
@pytest.mark.parametrize("wrong", [-1, 1.5, None, "\ud800"])
def test_a_wrong_label_is_named_after_the_images_of_those_before(
    server: RunningServer, twin: Twin, given: Way, wrong: Any
) -> None:
    images, caught = until_it_fails(twin, server.address, "cdcgan-mnist", given([9, 4, 5]), label=[1, wrong, 2])
    assert [image.seed for image in images] == [9]
    assert isinstance(caught, InvalidRequestError)
    assert f"label is {wrong!a}" in str(caught)


@ways
def test_seeds_and_labels_must_be_equally_many(server: RunningServer, twin: Twin, given: Way) -> None:
    for seeds, labels, told in (
        ([3, 1, 2], [5, 6], "label is shorter than seeds: it has 2; give one for each seed"),
        ([3, 1], iter([5, 6, 7]), "seeds is shorter than label: it has 2; give one for each label"),
        ([], [5], "seeds is shorter than label: it has 0; give one for each label"),
    ):
        images, caught = until_it_fails(twin, server.address, "cdcgan-mnist", given(seeds), label=labels)
        assert [(image.seed, image.label) for image in images] == list(zip(seeds, [5, 6], strict=False))
        assert isinstance(caught, InvalidRequestError)
        assert str(caught) == told


@ways
@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("nothing", {}),
        ("mpl-mnist", {}),
        ("mlp-mnist", {"version": 9}),
        ("mlp-mnist", {"label": 1}),
        ("mlp-mnist", {"label": "one"}),
        ("cdcgan-mnist", {"label": 10}),
        ("cdcgan-mnist", {"truncation": 3}),
        ("cdcgan-fashion-mnist", {"label": "Snaeker"}),
        ("cdcgan-fashion-mnist", {"label": "hat at all"}),
        ("cdcgan-fashion-mnist", {"label": "Bag", "truncation": 3}),
    ],
)
def test_the_server_s_errors_are_those_of_a_call_of_their_own(
    server: RunningServer, client: Client, twin: Twin, given: Way, model: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(GanserveError) as alone:
        client.generate(model, seed=1, **arguments)
    images, caught = until_it_fails(twin, server.address, model, given([1, 2]), **arguments)
    assert images == []
    assert isinstance(caught, GanserveError)
    assert (type(caught), str(caught)) == (type(alone.value), str(alone.value))
    assert (caught.code, caught.reason) == (alone.value.code, alone.value.reason)
    field = getattr(caught, "field", None)
    assert field is None or field == getattr(alone.value, "field", None)
    assert caught.request_id


@both
def test_arguments_that_make_no_sense_are_refused_at_once(server: RunningServer, twin: Twin) -> None:
    made = twin(server.address)
    for wrong in (
        {"seeds": 5},
        {"seeds": None},
        {"label": 1.5},
        {"label": True},
        {"label": "\ud800"},
        {"model": None},
        {"version": -1},
        {"truncation": "much"},
        {"timeout_s": 0},
    ):
        with pytest.raises(InvalidRequestError):
            made.generate_each(**{"model": "cdcgan-mnist", "seeds": [1], **wrong})  # type: ignore[arg-type]


async def test_the_next_seed_may_depend_on_the_last_image(server: RunningServer) -> None:
    """An async iterable is waited for only while there is nothing else to wait for."""
    came: asyncio.Queue[int] = asyncio.Queue()

    async def seeds() -> AsyncIterator[int]:
        seed = 1
        for _ in range(50):
            yield seed
            seed = await came.get()

    made = []
    async with AsyncClient(server.address) as client:
        async for image in client.generate_each("mlp-mnist", seeds()):
            made.append(image.seed)
            came.put_nowait(int(image.pixels.sum()))
    assert len(set(made)) == 50


async def test_an_async_iterable_is_left_with_the_images(server: RunningServer) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def seeds() -> AsyncIterator[int]:
        try:
            yield 1
            asked.set()
            await asyncio.Event().wait()
        finally:
            left.set()

    async with AsyncClient(server.address) as client:
        images = client.generate_each("mlp-mnist", seeds())
        assert (await anext(images)).seed == 1
        waiting = asyncio.ensure_future(anext(images))
        await asked.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert left.is_set()


@both
def test_images_do_not_wait_for_seeds_that_come_slowly(server: RunningServer, twin: Twin) -> None:
    """An image comes after its seed and the few that are read while an answer takes; if all were read, after 12."""
    read = []

    def seeds() -> Iterator[int]:
        for seed in range(25):
            time.sleep(0.03)
            read.append(seed)
            yield seed

    ahead = []

    async def use() -> None:
        async with AsyncClient(server.address) as client:
            async for image in client.generate_each("mlp-mnist", seeds()):
                ahead.append(len(read) - (image.seed or 0))  # noqa: PERF401

    if twin is AsyncClient:
        asyncio.run(use())
    else:
        with Client(server.address) as client:
            ahead.extend(len(read) - (image.seed or 0) for image in client.generate_each("mlp-mnist", seeds()))
    assert sorted(ahead)[len(ahead) // 2] < 8

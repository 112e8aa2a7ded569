"""The queue and its batches, over an engine that waits for the test's word."""

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute import engine as engine_module
from ganserve_server.compute.engine import Engine
from ganserve_server.compute.inputs import Draw, Feeds, Inputs
from ganserve_server.compute.model import ModelVersion
from ganserve_server.compute.watchdog import Run
from ganserve_server.errors import DeadlineExceeded, DeadlineTooShort, EngineFailed, QueueFull
from ganserve_server.observe.metrics import Metrics
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import CallWork, Made
from ganserve_server.queueing.scheduler import Scheduler
from ganserve_server.settings import BUNDLED_MODELS
from ganserve_server.shared.scoreboard import Scoreboard

WAIT_S = 30


class HeldEngine:
    """Makes one-pixel images whose value is the seed; each batch waits until it is released."""

    wide_is_faster = False
    on_cpu = True
    inline_images = 0
    least_batch = 1
    gains_nothing_from_batches = False
    inputs = Inputs.of(pb.ModelCard())

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.wide: list[bool] = []  # of each of them
        self.started = threading.Semaphore(0)
        self.released = threading.Semaphore(0)
        self.fail_on: int | None = None
        self.bucket = 1
        self.image_s = 0.001

    def seconds_for(self, images: int) -> float:
        return images * self.image_s

    def padding(self, count: int) -> int:
        return -count % self.bucket

    def feeds(self, draws: list[Draw]) -> Feeds:
        return {"latent": np.concatenate([draw.seeds for draw in draws if draw.seeds is not None])}

    def compute(self, feeds: Feeds, *, wide: bool = False, run: Run | None = None) -> NDArray[np.uint8]:
        seeds = feeds["latent"]
        self.batches.append(seeds.tolist())
        self.wide.append(wide)
        self.started.release()
        assert self.released.acquire(timeout=WAIT_S)
        if self.fail_on in seeds:
            raise RuntimeError("the engine broke")
        pixels: NDArray[np.uint8] = (seeds % 256).astype(np.uint8).reshape(-1, 1, 1, 1)
        return pixels

    async def wait_for_batch(self) -> None:
        assert await asyncio.to_thread(self.started.acquire, timeout=WAIT_S)


@pytest.fixture
def engine() -> Iterator[HeldEngine]:
    held = HeldEngine()
    yield held
    for _ in range(1000):
        held.released.release()


@pytest.fixture
async def batcher(engine: HeldEngine) -> AsyncIterator[Batcher]:
    scheduler = Scheduler(1)
    yield queue_of(engine, scheduler)
    for _ in range(1000):
        engine.released.release()
    await asyncio.to_thread(scheduler.close)


def queue_of(
    engine: HeldEngine,
    scheduler: Scheduler,
    metrics: Metrics | None = None,
    max_batch_size: int = 8,
    max_queue_images: int = 20,
) -> Batcher:
    model = ModelVersion("held", 1, "sha256:0", pb.ModelCard(), engine, b"")  # type: ignore[arg-type]
    return Batcher(model, max_batch_size, max_queue_images, metrics=metrics or Metrics(), scheduler=scheduler)


def draw(first: int, count: int = 1) -> Draw:
    return Draw(count, np.arange(first, first + count, dtype=np.uint32), {}, 1.0)


async def make(batcher: Batcher, draw: Draw, time_remaining_s: float | None = None, **options: Any) -> Made:
    deadline = None if time_remaining_s is None else time.monotonic() + time_remaining_s
    return await batcher.make(draw, fairness_key=options.pop("fairness_key", "caller"), deadline=deadline, **options)


def begin(
    batcher: Batcher, first: int, count: int = 1, time_remaining_s: float | None = None, **options: Any
) -> "asyncio.Task[Made]":
    return asyncio.create_task(make(batcher, draw(first, count), time_remaining_s, **options))


async def settle() -> None:
    """Let every task that can run, run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_waits_while_the_engine_is_busy_shares_the_next_batch(engine: HeldEngine, batcher: Batcher) -> None:
    tasks = [begin(batcher, 0)]
    await engine.wait_for_batch()
    tasks += [begin(batcher, seed, 2) for seed in (10, 20, 30)]
    await settle()
    engine.released.release()
    await engine.wait_for_batch()
    engine.released.release()
    made = await asyncio.gather(*tasks)
    assert engine.batches == [[0], [10, 11, 20, 21, 30, 31]]
    assert [each.pixels.ravel().tolist() for each in made] == [[0], [10, 11], [20, 21], [30, 31]]


async def test_a_lone_request_does_not_wait_for_company(engine: HeldEngine, batcher: Batcher) -> None:
    engine.released.release()
    assert (await make(batcher, draw(5))).pixels.ravel().tolist() == [5]


async def test_a_large_request_shares_every_batch_with_later_small_ones(engine: HeldEngine, batcher: Batcher) -> None:
    large = begin(batcher, 100, 28)
    await engine.wait_for_batch()
    small = begin(batcher, 7)  # when one batch runs and one stands ready
    await settle()
    engine.released.release()
    await engine.wait_for_batch()
    engine.released.release()
    await engine.wait_for_batch()
    assert engine.batches == [[*range(100, 108)], [*range(108, 116)], [7, *range(116, 123)]]
    engine.released.release()
    assert (await small).pixels.ravel().tolist() == [7]
    assert not large.done()
    engine.released.release()
    assert (await large).pixels.ravel().tolist() == [*range(100, 128)]


@pytest.mark.parametrize("keys", [("a", "a"), ("a", "b")])
async def test_large_requests_take_turns_of_a_batch_in_the_share_of_their_number(
    engine: HeldEngine, keys: tuple[str, str]
) -> None:
    scheduler = Scheduler(1)
    batcher = queue_of(engine, scheduler, max_queue_images=100)
    tasks = [begin(batcher, 0)]
    await engine.wait_for_batch()
    tasks += [begin(batcher, seed, fairness_key="small") for seed in range(1, 11)]
    tasks += [begin(batcher, first, 16, fairness_key=key) for first, key in zip((100, 200), keys, strict=True)]
    for _ in range(7):
        engine.released.release()
    await asyncio.gather(*tasks)
    assert engine.batches[1:] == [
        [1, 2, 3, 4, 5, 6, 100, 101],  # 2 of 12 requests are large: 8 * 2 / 12 images, rounded up
        [7, 8, 9, 10, 102, 103, 104, 105],  # a share of 8 * 2 / 6 images, and the one that is left over
        [106, 107, *range(200, 206)],  # a turn is 8 images, in however many batches
        [206, 207, *range(108, 114)],
        [114, 115, *range(208, 214)],
        [214, 215],
    ]
    await asyncio.to_thread(scheduler.close)


async def test_a_batch_stands_ready_behind_one_that_runs(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    few = begin(batcher, 10, 7)
    await settle()
    assert batcher.waiting == 7  # more may come to join them
    last = begin(batcher, 20)
    await settle()
    assert batcher.waiting == 0
    ready = time.monotonic()
    await asyncio.sleep(0.02)
    stood_s = time.monotonic() - ready
    engine.released.release()
    assert await asyncio.to_thread(engine.started.acquire, timeout=WAIT_S)
    engine.released.release()
    await asyncio.gather(first, few, last)
    assert engine.batches == [[0], [20, *range(10, 17)]]
    assert (await few).queue_s > stood_s  # to stand ready is to wait


async def test_a_batch_that_stands_ready_leaves_out_what_nobody_waits_for(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    gone, stays = begin(batcher, 10, 3), begin(batcher, 20, 3)
    end = time.monotonic() + 0.05
    late = begin(batcher, 30, 2, end - time.monotonic(), accepted=True)
    await settle()
    assert batcher.waiting == 0
    gone.cancel()
    await asyncio.sleep(end - time.monotonic() + 0.001)
    engine.released.release()
    engine.released.release()
    with pytest.raises(DeadlineExceeded):
        await late
    assert (await stays).pixels.ravel().tolist() == [20, 21, 22]
    await first
    assert engine.batches == [[0], [20, 21, 22]]


async def test_a_full_queue_refuses_the_next_request_and_says_when_to_come_back(
    engine: HeldEngine, batcher: Batcher
) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    waiting = begin(batcher, 1, 28)  # 8 of which stand ready
    await settle()
    with pytest.raises(QueueFull, match="holds 20") as caught:
        await make(batcher, draw(50))
    assert caught.value.retry_after_s > 0
    for _ in range(5):
        engine.released.release()
    await asyncio.gather(first, waiting)
    engine.released.release()
    assert (await make(batcher, draw(50))).pixels.ravel().tolist() == [50]


async def test_one_caller_cannot_fill_the_queue_for_the_others(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    ready = begin(batcher, 1, 8, fairness_key="many")  # in the batch that stands ready
    many = [begin(batcher, 100 + 4 * n, 4, fairness_key="many") for n in range(5)]
    await settle()
    few = [begin(batcher, 200 + 5 * n, 5, fairness_key="few") for n in range(2)]
    await settle()
    # Half of the queue is this caller's share: its next request is refused, and so is more of the other's.
    with pytest.raises(QueueFull, match="holds 20"):
        await make(batcher, draw(210, 3), fairness_key="few")
    with pytest.raises(QueueFull, match="holds 20"):
        await make(batcher, draw(300, 4), fairness_key="many")
    for _ in range(6):
        engine.released.release()
    assert [len((await task).pixels) for task in (first, ready, *many[:2], *few)] == [1, 8, 4, 4, 5, 5]
    for refused in many[2:]:
        with pytest.raises(QueueFull, match="holds 20"):
            await refused


async def test_no_room_is_made_at_the_cost_of_what_has_begun_or_is_not_counted_or_is_no_larger(
    engine: HeldEngine,
) -> None:
    scheduler = Scheduler(1)
    batcher = queue_of(engine, scheduler, max_queue_images=8)
    tasks = [begin(batcher, 0)]
    await engine.wait_for_batch()
    tasks.append(begin(batcher, 1, 13, fairness_key="begun"))  # 8 of which stand ready
    await settle()
    tasks.append(begin(batcher, 20, 5, fairness_key="stream", accepted=True))
    tasks.append(begin(batcher, 30, 2, fairness_key="equal"))
    await settle()
    # 5 + 2 images count, and 2 more are one too many, though a fourth of the queue is this caller's share.
    with pytest.raises(QueueFull, match="holds 8"):
        await make(batcher, draw(40, 2), fairness_key="other")
    for _ in range(4):
        engine.released.release()
    assert [len((await task).pixels) for task in tasks] == [1, 13, 5, 2]
    await asyncio.to_thread(scheduler.close)


async def test_a_batch_has_no_more_than_its_size_though_bulk_leaves_some_of_its_share(engine: HeldEngine) -> None:
    scheduler = Scheduler(1)
    batcher = queue_of(engine, scheduler, max_batch_size=16, max_queue_images=100)
    tasks = [begin(batcher, 0)]
    await engine.wait_for_batch()
    tasks += [begin(batcher, seed, fairness_key="small") for seed in range(1, 21)]
    tasks += [begin(batcher, 100, 40, fairness_key="large"), begin(batcher, 500, bulk=True)]
    for _ in range(6):
        engine.released.release()
    await asyncio.gather(*tasks)
    # An eighth is for bulk, and one of 21 requests is large: 14 * 1 / 21 images, rounded up. Bulk leaves one image.
    assert engine.batches[1] == [*range(1, 14), 100, 500, 14]
    await asyncio.to_thread(scheduler.close)


async def test_bulk_requests_take_no_room_of_others(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    many = begin(batcher, 1, 28, fairness_key="many")
    await settle()
    with pytest.raises(QueueFull, match="holds 20"):
        await make(batcher, draw(50), fairness_key="few", bulk=True)
    for _ in range(5):
        engine.released.release()
    await asyncio.gather(first, many)


async def test_a_queue_may_be_filled_to_its_bound_and_what_was_cancelled_leaves_it(
    engine: HeldEngine, batcher: Batcher
) -> None:
    gone = begin(batcher, 0, 24)  # 8 run, 8 stand ready, and 8 wait
    await engine.wait_for_batch()
    gone.cancel()
    await settle()
    assert batcher.waiting == 0
    tasks = [begin(batcher, 100, 17), begin(batcher, 50, 2, fairness_key="other"), begin(batcher, 60)]
    await settle()
    assert batcher.waiting == 20
    with pytest.raises(QueueFull, match="holds 20"):
        batcher.submit(draw(70), lambda _: None, fairness_key="caller", deadline=None)
    engine.released.release(5)
    await asyncio.gather(*tasks)


async def test_an_empty_queue_takes_a_request_larger_than_its_bound(engine: HeldEngine, batcher: Batcher) -> None:
    for _ in range(5):
        engine.released.release()
    assert len((await make(batcher, draw(0, 40))).pixels) == 40


async def test_the_later_chunks_of_streams_do_not_fill_the_queue(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    chunks = [asyncio.create_task(make(batcher, draw(100 * n, 20), accepted=True)) for n in range(5)]
    small = begin(batcher, 7)
    await settle()
    for _ in range(20):
        engine.released.release()
    assert (await small).pixels.ravel().tolist() == [7]
    await asyncio.gather(first, *chunks)


async def test_a_cancelled_request_never_reaches_the_engine(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    gone, stays = begin(batcher, 10, 20), None
    await settle()
    gone.cancel()
    await settle()
    stays = begin(batcher, 40, 8)
    await settle()
    engine.released.release()
    await engine.wait_for_batch()
    engine.released.release()
    assert (await stays).pixels.ravel().tolist() == [*range(40, 48)]
    await first
    assert engine.batches == [[0], [*range(40, 48)]]
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_an_expired_request_never_reaches_the_engine(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    # As a stream's chunk, which is not refused for its deadline.
    late = begin(batcher, 10, time_remaining_s=0.0, accepted=True)
    stays = begin(batcher, 20, time_remaining_s=1000.0)
    await settle()
    engine.released.release()
    engine.released.release()
    with pytest.raises(DeadlineExceeded):
        await late
    await asyncio.gather(first, stays)
    assert engine.batches == [[0], [20]]


async def test_a_failed_batch_answers_its_own_callers_and_nobody_elses(engine: HeldEngine, batcher: Batcher) -> None:
    engine.fail_on = 10
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    failing = [begin(batcher, 10, 20)]
    await settle()
    engine.released.release()
    await engine.wait_for_batch()
    after = begin(batcher, 40)
    await settle()
    for _ in range(3):
        engine.released.release()
    results = await asyncio.gather(first, *failing, after, return_exceptions=True)
    assert isinstance(results[1], EngineFailed)
    assert str(results[1]) == "internal error"
    assert results[0].pixels.ravel().tolist() == [0]
    assert results[2].pixels.ravel().tolist() == [40]
    assert engine.batches[:2] == [[0], [*range(10, 18)]]
    assert engine.batches[-1] == [40]
    assert not any(26 in batch for batch in engine.batches)
    # Nothing of the failed request is left to fill the queue.
    for _ in range(3):
        engine.released.release()
    assert len((await make(batcher, draw(50, 20))).pixels) == 20


async def test_a_request_that_cannot_make_its_deadline_is_refused_at_once(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    waiting = begin(batcher, 10, 7)
    await settle()
    batcher._pace_s = 2.0  # an image takes two seconds, because of the other models' work: 16 are ahead or asked for
    with pytest.raises(DeadlineTooShort, match="8 images of model held would take about 38 s") as caught:
        await make(batcher, draw(50, 8), 30.0)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s == pytest.approx(1.2 * 16 * 2 - 30, abs=0.5)
    with pytest.raises(DeadlineExceeded, match="8 images take about 16 s here"):
        await make(batcher, draw(50, 8), 10.0)
    fits = begin(batcher, 50, 8, 1000.0)
    await settle()
    for _ in range(3):
        engine.released.release()
    await asyncio.gather(first, waiting, fits)


@pytest.mark.parametrize(
    ("key", "count", "bulk", "before"),
    [
        ("c", 1, False, 6),  # as many as this request's from each of the 4 small and 2 large requests
        ("c", 1, True, 7),  # and from the bulk request
        ("a", 1, False, 7),  # 3 of its own caller, and one of the other caller in each of 4 rounds
        ("a", 2, False, 24),  # a turn of 8 images of its own caller, and one of the other caller in each of 2 rounds
        ("c", 10, False, 33),  # no more than wait
    ],
)
async def test_a_deadline_is_checked_by_what_comes_before_the_request(
    engine: HeldEngine, key: str, count: int, bulk: bool, before: int
) -> None:
    scheduler = Scheduler(1)
    batcher = queue_of(engine, scheduler, max_queue_images=100)
    tasks = [begin(batcher, 0)]
    await engine.wait_for_batch()
    tasks.append(begin(batcher, 10, 8))  # stands ready
    await settle()
    tasks += [begin(batcher, 20 + place, fairness_key=caller) for place, caller in enumerate("aaab")]
    tasks += [begin(batcher, 100, 12, fairness_key=caller) for caller in "ab"]
    tasks.append(begin(batcher, 200, 5, fairness_key="b", bulk=True))
    await settle()
    assert batcher.waiting == 33
    batcher._pace_s = 1.0  # a second for each image: 9 run or stand ready; a fifth more for safety
    needed_s = {6: "19", 7: "20", 24: "42", 33: "62"}[before]  # 1.2 * (9 + before + count), in two digits
    with pytest.raises(DeadlineTooShort, match=f"would take about {needed_s} s,"):
        await make(batcher, draw(50, count), 18.0, fairness_key=key, bulk=bulk)
    for _ in range(7):
        engine.released.release()
    await asyncio.gather(*tasks)
    await asyncio.to_thread(scheduler.close)


async def test_callers_have_turns_however_many_requests_they_send(engine: HeldEngine, batcher: Batcher) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    greedy = [begin(batcher, 100 + n, fairness_key="greedy") for n in range(18)]
    await settle()
    modest = begin(batcher, 7, fairness_key="modest")
    await settle()
    for _ in range(4):
        engine.released.release()
    await asyncio.gather(first, *greedy, modest)
    assert engine.batches[1:3] == [[*range(100, 108)], [108, 7, *range(109, 115)]]


async def test_bulk_gets_an_eighth_while_others_wait_and_all_that_they_leave(
    engine: HeldEngine, batcher: Batcher
) -> None:
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    bulk = begin(batcher, 100, 10, bulk=True)
    small = [begin(batcher, seed) for seed in range(1, 10)]
    await settle()
    for _ in range(4):
        engine.released.release()
    await asyncio.gather(first, bulk, *small)
    assert engine.batches[1:] == [[1, 2, 3, 4, 5, 6, 7, 100], [8, 9, *range(101, 107)], [107, 108, 109]]


async def test_bulk_does_not_take_whole_batches_of_one_image(engine: HeldEngine) -> None:
    scheduler = Scheduler(1)
    batcher = queue_of(engine, scheduler, max_batch_size=1)
    bulk = begin(batcher, 100, 12, bulk=True)
    await engine.wait_for_batch()
    small = begin(batcher, 7)
    await settle()
    for _ in range(13):
        engine.released.release()
    await asyncio.gather(bulk, small)
    assert [7] in engine.batches[:4]
    await asyncio.to_thread(scheduler.close)


async def test_bulk_gets_every_eighth_batch_of_one_image(engine: HeldEngine) -> None:
    scheduler = Scheduler(1)
    batcher = queue_of(engine, scheduler, max_batch_size=1)
    tasks = [begin(batcher, 0)]
    await engine.wait_for_batch()
    tasks += [begin(batcher, seed) for seed in range(1, 10)]
    tasks.append(begin(batcher, 100, 2, bulk=True))
    for _ in range(12):
        engine.released.release()
    await asyncio.gather(*tasks)
    assert engine.batches == [[0], [1], [2], [3], [4], [5], [6], [7], [100], [8], [9], [101]]
    await asyncio.to_thread(scheduler.close)


@pytest.mark.parametrize("image_s", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("images", "bulk"), [(48, False), (1000, False), (1000, True)])
async def test_a_lone_caller_of_a_slow_model_waits_for_at_most_one_batch(
    engine: HeldEngine, image_s: float, images: int, bulk: bool
) -> None:
    """A batch lasts 20 ms or one image, whichever is longer, and none stands ready."""
    scheduler = Scheduler(1)
    engine.image_s = image_s
    batcher = queue_of(engine, scheduler, max_batch_size=64, max_queue_images=2000)
    large = begin(batcher, 100, images, fairness_key="large", bulk=bulk)
    await engine.wait_for_batch()
    lone = begin(batcher, 7, fairness_key="lone")
    await settle()
    for _ in range(2):
        batcher._core_s = image_s  # for the held batches took no time
        engine.released.release()
        await engine.wait_for_batch()
    most = 2 if image_s == 0.01 else 1
    assert len(engine.batches[0]) == most
    assert 7 in engine.batches[1]
    engine.released.release()
    assert (await lone).pixels.ravel().tolist() == [7]
    large.cancel()
    for _ in range(10):
        engine.released.release()
    await asyncio.to_thread(scheduler.close)


async def test_images_that_gain_nothing_from_batches_are_made_one_by_one_if_they_take_long(engine: HeldEngine) -> None:
    engine.gains_nothing_from_batches = True
    for image_s, batches in ((0.009, [[0], [1], [2], [3]]), (0.007, [[0, 1, 2, 3]])):
        scheduler = Scheduler(1)
        engine.image_s = image_s
        engine.batches.clear()
        made = begin(queue_of(engine, scheduler), 0, 4)
        for _ in batches:
            await engine.wait_for_batch()
            engine.released.release()
        await made
        assert engine.batches == batches
        await asyncio.to_thread(scheduler.close)


async def test_a_lone_caller_of_a_slow_model_does_not_wait_for_all_images_of_another_call(engine: HeldEngine) -> None:
    scheduler = Scheduler(1)
    engine.image_s = 0.1
    batcher = queue_of(engine, scheduler, max_batch_size=64)
    others = begin(batcher, 100, 4, fairness_key="others")
    await engine.wait_for_batch()
    lone = begin(batcher, 7, fairness_key="lone")
    await settle()
    for _ in range(5):
        batcher._core_s = engine.image_s  # for the held batches took no time
        engine.released.release()
    await asyncio.gather(others, lone)
    assert engine.batches.index([7]) <= 2
    await asyncio.to_thread(scheduler.close)


async def test_large_requests_of_a_slow_model_take_turns_by_time(engine: HeldEngine) -> None:
    scheduler = Scheduler(1)
    engine.image_s = 0.2
    batcher = queue_of(engine, scheduler, max_batch_size=64, max_queue_images=2000)
    tasks = [begin(batcher, first, 6, fairness_key=str(first)) for first in (100, 200)]
    for _ in range(12):
        await engine.wait_for_batch()
        batcher._core_s = 0.2
        batcher._take_turns()
        engine.released.release()
    await asyncio.gather(*tasks)
    made = [seed for batch in engine.batches for seed in batch]
    assert made == [100, 101, 200, 201, 102, 103, 202, 203, 104, 105, 204, 205]  # at most 0.5 s each
    await asyncio.to_thread(scheduler.close)


async def test_a_slow_model_has_its_turn_beside_a_fast_one(engine: HeldEngine) -> None:
    """Batches of the fast model always stand ready, so no core is ever free."""
    scheduler = Scheduler(1)
    fast = queue_of(engine, scheduler, max_queue_images=1000)
    engine.image_s = 1.0
    slow = queue_of(engine, scheduler, max_queue_images=1000)
    tasks = [begin(fast, seed, 8) for seed in range(0, 80, 8)]
    await engine.wait_for_batch()
    tasks.append(begin(slow, 500))
    for _ in range(11):
        engine.released.release()
    await asyncio.gather(*tasks)
    assert [500] in engine.batches[:5]
    await asyncio.to_thread(scheduler.close)


async def test_few_images_of_one_model_are_overtaken_by_anothers_once_each_time(engine: HeldEngine) -> None:
    scheduler = Scheduler(1)
    busy, quiet = queue_of(engine, scheduler), queue_of(engine, scheduler)
    tasks = [begin(busy, 100, 80)]
    await engine.wait_for_batch()
    for seed in (7, 9):
        tasks.append(begin(quiet, seed))
        await settle()
        for _ in range(4):  # one after the other, so that a core is never free
            engine.released.release()
            await engine.wait_for_batch()
            await settle()
    # One batch ran or stood ready, one was the busy queue's turn, and one overtook the few images.
    busy_batches = [[*range(first, first + 8)] for first in range(100, 180, 8)]
    assert engine.batches == [*busy_batches[:4], [7], *busy_batches[4:7], [9]]
    for _ in range(5):
        engine.released.release()
    await asyncio.gather(*tasks)
    await asyncio.to_thread(scheduler.close)


async def test_overtaken_queues_are_next_and_in_their_order(engine: HeldEngine) -> None:
    scheduler = Scheduler(1)
    busy, *quiet = (queue_of(engine, scheduler) for _ in range(3))
    tasks = [begin(busy, 100, 80)]
    await engine.wait_for_batch()
    tasks += [begin(queue, seed) for queue, seed in zip(quiet, (7, 8), strict=True)]
    await settle()
    for _ in range(5):
        engine.released.release()
        await engine.wait_for_batch()
        await settle()
    # Two batches were there first; one was the busy queue's turn, and one overtook the few images of the others.
    assert engine.batches == [*([*range(first, first + 8)] for first in (100, 108, 116, 124)), [7], [8]]
    for _ in range(7):
        engine.released.release()
    await asyncio.gather(*tasks)
    await asyncio.to_thread(scheduler.close)


@pytest.mark.parametrize("fails", [False, True])
async def test_idle_time_is_not_taken_for_work(engine: HeldEngine, fails: bool) -> None:
    engine.image_s = 0.001
    scheduler = Scheduler(1)
    batcher = queue_of(engine, scheduler)
    first = begin(queue_of(engine, scheduler), 0)  # of another model
    await engine.wait_for_batch()
    if fails:
        engine.fail_on = 10
    waited_for = begin(batcher, 10)  # while no core is free
    await settle()
    if not fails:
        waited_for.cancel()
    engine.released.release()
    engine.released.release()
    await asyncio.gather(first, waited_for, return_exceptions=True)
    if not fails:
        assert engine.released.acquire(timeout=WAIT_S)
    await asyncio.sleep(2)  # what would be taken for work
    engine.released.release()
    await make(batcher, draw(20, 8))
    running = begin(batcher, 30)
    await asyncio.to_thread(engine.started.acquire, timeout=WAIT_S)
    waiting = begin(batcher, 40, 28)
    await settle()
    with pytest.raises(QueueFull) as caught:
        await make(batcher, draw(90))
    assert caught.value.retry_after_s < 0.25
    for _ in range(6):
        engine.released.release()
    await asyncio.gather(running, waiting)
    await asyncio.to_thread(scheduler.close)


async def test_inputs_that_cannot_be_made_fail_their_own_batch(
    engine: HeldEngine, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine.feeds

    def feeds(draws: list[Draw]) -> Feeds:
        if any(7 in each.seeds for each in draws if each.seeds is not None):
            raise RuntimeError("no such input")
        return made(draws)

    monkeypatch.setattr(engine, "feeds", feeds)
    with pytest.raises(EngineFailed):
        await make(batcher, draw(7))
    engine.released.release()
    assert (await make(batcher, draw(5))).pixels.ravel().tolist() == [5]


async def test_the_number_of_waiting_images_is_a_metric(engine: HeldEngine) -> None:
    scheduler, metrics = Scheduler(1), Metrics()
    batcher = queue_of(engine, scheduler, metrics=metrics)

    def waiting() -> float | None:
        return metrics.registry.get_sample_value("ganserve_queue_images", {"model": "held"})

    tasks = [begin(batcher, 0)]
    await engine.wait_for_batch()
    tasks += [begin(batcher, seed) for seed in (10, 20, 30)]
    await settle()
    assert waiting() == 3
    tasks[-1].cancel()
    await settle()
    assert waiting() == 2
    tasks.append(begin(batcher, 40, 4))
    await settle()
    assert waiting() == 6
    engine.released.release(2)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert waiting() == 0
    await asyncio.to_thread(scheduler.close)


async def test_the_pace_is_the_time_between_images_while_some_wait(engine: HeldEngine, batcher: Batcher) -> None:
    batcher._pace_s = 3.0
    batcher._saturated_since = time.monotonic() - 8.0
    batcher.deliver([], np.zeros((8, 1, 1, 1), np.uint8), 0.0, 0.008, 1, busy=True)
    assert batcher._pace_s == pytest.approx(3.0 + 0.1 * (8.0 / 8 - 3.0), abs=0.01)  # a full batch weighs a tenth


@pytest.mark.parametrize(("largest", "small"), [(64, 8), (16, 2), (4, 1)])
async def test_a_request_of_an_eighth_of_a_batch_is_small(engine: HeldEngine, largest: int, small: int) -> None:
    scheduler = Scheduler(1)
    assert queue_of(engine, scheduler, max_batch_size=largest).small == small
    await asyncio.to_thread(scheduler.close)


async def test_the_work_of_a_call_counts_each_batch_once(engine: HeldEngine, batcher: Batcher) -> None:
    work = CallWork(3)
    assert (work.taken, work.queue_s, work.compute_s) == (0, 0.0, 0.0)
    tasks = [begin(batcher, 0, work=work)]
    await engine.wait_for_batch()
    assert work.taken == 1
    tasks += [begin(batcher, seed, work=work) for seed in (10, 20)]
    await settle()
    engine.released.release(2)
    made = await asyncio.gather(*tasks)
    assert engine.batches == [[0], [10, 20]]
    assert made[1].compute_s == made[2].compute_s
    assert work.compute_s == made[0].compute_s + made[1].compute_s
    assert work.queue_s == made[0].queue_s


async def test_each_worker_owns_its_part_of_the_cores(engine: HeldEngine) -> None:
    memory = os.memfd_create("board")
    os.ftruncate(memory, 4096)
    for cores, workers, own in ((6, 2, 3), (8, 4, 2), (2, 4, 1)):
        scheduler = Scheduler(cores, Scoreboard(memory, workers=workers, mine=0))
        assert (scheduler._own.count, scheduler._others.count) == (own, cores - own)
        await asyncio.to_thread(scheduler.close)


async def test_an_answer_that_cannot_be_written_hurts_nobody_else(engine: HeldEngine, batcher: Batcher) -> None:
    outcomes: list[Any] = []

    def broken(outcome: Any) -> None:
        outcomes.append(outcome)
        if isinstance(outcome, Made):
            raise RuntimeError("cannot be written")

    first = begin(batcher, 0)
    await engine.wait_for_batch()
    batcher.submit(draw(1), broken, fairness_key="a", deadline=None)
    other = begin(batcher, 2, fairness_key="b")
    await settle()
    for _ in range(2):
        engine.released.release()
    assert (await other).pixels.ravel().tolist() == [2]
    await first
    assert isinstance(outcomes[1], EngineFailed)


async def test_a_batch_that_has_two_parts_of_a_request_takes_its_time_once(engine: HeldEngine) -> None:
    scheduler, metrics = Scheduler(1), Metrics()
    batcher = queue_of(engine, scheduler, metrics)
    first = begin(batcher, 0)
    await engine.wait_for_batch()
    small, large = begin(batcher, 50, fairness_key="a"), begin(batcher, 100, 16, fairness_key="b")
    await settle()
    for _ in range(4):
        engine.released.release()
    made = await large
    # A batch's second part begins where the turn of the request ends.
    assert engine.batches == [[0], [50, *range(100, 107)], [*range(107, 115)], [115]]
    computed_s = metrics.registry.get_sample_value("ganserve_compute_seconds_sum", {"model": "held"})
    assert computed_s is not None
    assert (await first).compute_s + made.compute_s == pytest.approx(computed_s)
    assert (await small).compute_s < made.compute_s
    await asyncio.to_thread(scheduler.close)


async def test_a_request_waits_until_its_first_batch_starts(engine: HeldEngine) -> None:
    scheduler, metrics = Scheduler(1), Metrics()
    batcher = queue_of(engine, scheduler, metrics)
    made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    job = batcher.submit(draw(0, 16), made.set_result, fairness_key="caller", deadline=None)
    await engine.wait_for_batch()
    first_runs = time.monotonic()
    engine.released.release(2)
    assert 0 < (await made).queue_s <= first_runs - job.accepted
    assert len(engine.batches) == 2
    assert metrics.registry.get_sample_value("ganserve_queue_seconds_count", {"model": "held"}) == 1
    await asyncio.to_thread(scheduler.close)


@pytest.mark.parametrize(("image_s", "sizes"), [(0.0004, [16, 16, 16, 16]), (0.00001, [32, 32])])
async def test_batches_leave_others_to_stand_ready_if_they_last_as_long_as_the_next_calls_are_on_their_way(
    image_s: float, sizes: list[int], engine: HeldEngine
) -> None:
    scheduler = Scheduler(2)
    engine.image_s = image_s
    model = ModelVersion("held", 1, "sha256:0", pb.ModelCard(), engine, b"")  # type: ignore[arg-type]
    batcher = Batcher(model, 64, max_queue_images=100, metrics=Metrics(), scheduler=scheduler)
    calls = [begin(batcher, seed) for seed in range(64)]
    for _ in sizes:
        engine.released.release()
    await asyncio.gather(*calls)
    assert [len(batch) for batch in engine.batches] == sizes
    await asyncio.to_thread(scheduler.close)


async def test_two_cores_make_the_parts_of_a_request_at_a_time_and_they_come_back_in_order(engine: HeldEngine) -> None:
    scheduler = Scheduler(2)
    batcher = queue_of(engine, scheduler)
    large = begin(batcher, 0, 16)
    await engine.wait_for_batch()
    await engine.wait_for_batch()
    assert sorted(engine.batches) == [[*range(8)], [*range(8, 16)]]
    engine.released.release()
    engine.released.release()
    assert (await large).pixels.ravel().tolist() == [*range(16)]
    await asyncio.to_thread(scheduler.close)


async def test_a_worker_has_the_cores_of_the_others_while_they_compute_nothing(engine: HeldEngine) -> None:
    memory = os.memfd_create("board")
    os.ftruncate(memory, 4096)
    mine, other = Scoreboard(memory, workers=2, mine=0), Scoreboard(memory, workers=2, mine=1)
    scheduler = Scheduler(2, mine)
    batcher = queue_of(engine, scheduler)
    for seed, running, at_once in ((0, 0, 2), (16, 1, 1), (32, 0, 2)):
        other.set_running(running)
        large = begin(batcher, seed, 16)
        for _ in range(at_once):
            await engine.wait_for_batch()
        assert (other.others_running(), scheduler._own.taken, scheduler._others.taken) == (
            at_once,
            3 - at_once,
            at_once - 1,
        )
        engine.released.release(2)
        assert (await large).pixels.ravel().tolist() == [*range(seed, seed + 16)]
        if at_once == 1:
            await engine.wait_for_batch()
        assert other.others_running() == 0
    await asyncio.to_thread(scheduler.close)
    os.close(memory)


async def test_a_worker_uses_its_own_core_before_it_borrows(engine: HeldEngine) -> None:
    memory = os.memfd_create("board")
    os.ftruncate(memory, 4096)
    mine, other = Scoreboard(memory, workers=2, mine=0), Scoreboard(memory, workers=2, mine=1)
    scheduler = Scheduler(2, mine)
    batcher = queue_of(engine, scheduler)
    tasks = [begin(batcher, 0, 8)]
    await engine.wait_for_batch()
    other.set_running(1)  # on its own core, which nobody has borrowed
    tasks.append(begin(batcher, 8, 8))
    await settle()
    assert batcher.waiting == 0
    assert other.others_running() == 1  # the second batch stands ready
    engine.released.release(2)
    await asyncio.gather(*tasks)
    await asyncio.to_thread(scheduler.close)
    os.close(memory)


async def test_one_batch_stands_ready_behind_each_core_borrowed_or_not(engine: HeldEngine) -> None:
    memory = os.memfd_create("board")
    os.ftruncate(memory, 4096)
    scheduler = Scheduler(2, Scoreboard(memory, workers=2, mine=0))
    batcher = queue_of(engine, scheduler)
    large = begin(batcher, 0, 48)
    await settle()
    assert batcher.waiting == 16  # of 6 batches, two run and two stand ready
    engine.released.release(6)
    assert (await large).pixels.ravel().tolist() == [*range(48)]
    await asyncio.to_thread(scheduler.close)
    os.close(memory)


async def test_images_that_fill_a_bucket_up_are_counted(engine: HeldEngine) -> None:
    scheduler, metrics = Scheduler(1), Metrics()
    batcher = queue_of(engine, scheduler, metrics)
    engine.bucket = 4
    for count in (3, 3, 8):
        engine.released.release()
        await make(batcher, draw(0, count))
    assert metrics.registry.get_sample_value("ganserve_padding_images_total", {"model": "held"}) == 2
    assert metrics.registry.get_sample_value("ganserve_images_total", {"model": "held", "version": "1"}) == 14
    await asyncio.to_thread(scheduler.close)


async def test_a_batch_without_a_bound_is_never_made_where_calls_are_read(engine: HeldEngine, batcher: Batcher) -> None:
    engine.image_s = 0.0
    task = begin(batcher, 5)
    await engine.wait_for_batch()
    engine.released.release()
    assert (await task).pixels.ravel().tolist() == [5]


async def test_a_lone_caller_has_all_cores_and_loses_them_when_calls_meet(engine: HeldEngine) -> None:
    engine.wide_is_faster = True
    scheduler = Scheduler(2)
    batcher = queue_of(engine, scheduler)

    async def lone_calls(count: int) -> None:
        for seed in range(count):
            engine.released.release()
            await make(batcher, draw(seed))

    await lone_calls(10)
    assert engine.wide == [False] * 8 + [True] * 2
    met = [begin(batcher, 0)]
    await settle()
    met.append(begin(batcher, 1, 8))
    await settle()
    assert batcher.waiting == 8  # no batch stands ready behind one on all cores
    engine.released.release(2)
    await asyncio.gather(*met)
    await lone_calls(1)
    assert engine.wide[10:] == [True, False, False]
    await asyncio.to_thread(scheduler.close)


async def test_a_lone_caller_does_not_have_the_cores_on_which_other_workers_compute(engine: HeldEngine) -> None:
    memory = os.memfd_create("board")
    os.ftruncate(memory, 4096)
    mine, other = Scoreboard(memory, workers=2, mine=0), Scoreboard(memory, workers=2, mine=1)
    engine.wide_is_faster = True
    scheduler = Scheduler(2, mine)
    batcher = queue_of(engine, scheduler)
    for running, calls in ((1, 10), (0, 1)):
        other.set_running(running)
        for seed in range(calls):
            engine.released.release()
            await make(batcher, draw(seed))
    assert engine.wide == [False] * 10 + [True]
    await asyncio.to_thread(scheduler.close)
    os.close(memory)


@pytest.mark.parametrize(
    ("image_s", "side", "batches"),
    [(0.001, 28, 1), (50e-6, 28, 1), (25e-6, 28, 3), (10e-6, 28, 4), (10e-6, 64, 4), (10e-6, 128, 1)],
)
async def test_a_message_of_a_stream_has_several_batches_of_a_fast_model_up_to_a_mebibyte(
    engine: HeldEngine, image_s: float, side: int, batches: int
) -> None:
    engine.image_s = image_s
    card = pb.ModelCard(height=side, width=side, channels=1)
    model = ModelVersion("held", 1, "sha256:0", card, engine, b"")  # type: ignore[arg-type]
    scheduler = Scheduler(1)
    batcher = Batcher(model, 64, max_queue_images=20, metrics=Metrics(), scheduler=scheduler)
    assert batcher.chunk_size() == 64 * batches
    assert batcher.first_chunk_size() == 64
    await asyncio.to_thread(scheduler.close)


@pytest.mark.parametrize(
    ("side", "channels", "batch_size", "first", "chunk"),
    [
        (64, 3, 64, 64, 64),
        (128, 3, 64, 64, 64),
        (256, 3, 64, 20, 20),  # 3984 KiB / (192 KiB + 256 + 1 KiB) = 20.6
        (512, 3, 64, 5, 5),  # / (768 KiB + 512 + 1 KiB) = 5.2
        (512, 4, 64, 3, 3),  # / (1 MiB + 512 + 1 KiB) = 3.9
        (1024, 3, 64, 1, 1),  # / (3 MiB + 1 KiB + 1 KiB) = 1.3
        (1024, 4, 64, 1, 1),
        (4096, 4, 64, 1, 1),
        (1, 1, 1000, 1000, 3976),  # not 4 batches: / (1 + 1 + 1 KiB) = 3976.2
    ],
)
async def test_a_message_of_a_stream_has_less_than_4_mebibytes_or_one_image(
    engine: HeldEngine, side: int, channels: int, batch_size: int, first: int, chunk: int
) -> None:
    engine.image_s = 1e-7
    card = pb.ModelCard(height=side, width=side, channels=channels)
    model = ModelVersion("held", 1, "sha256:0", card, engine, b"")  # type: ignore[arg-type]
    scheduler = Scheduler(1)
    batcher = Batcher(model, batch_size, max_queue_images=20, metrics=Metrics(), scheduler=scheduler)
    assert (batcher.first_chunk_size(), batcher.chunk_size()) == (first, chunk)
    await asyncio.to_thread(scheduler.close)


@pytest.mark.parametrize(("one_s", "wide_s", "faster"), [(0.0003, 0.00005, True), (0.00009, 0.00005, False)])
def test_an_image_of_a_tenth_of_a_millisecond_is_made_by_one_core(
    one_s: float, wide_s: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def run(draws: list[Draw], *, wide: bool = False) -> None:
        nonlocal now
        now += (wide_s if wide else one_s) * draws[0].count

    model = (BUNDLED_MODELS / "mlp-mnist" / "1" / "model.onnx").read_bytes()
    timed = Engine(model, Inputs.of(pb.ModelCard(latent_dim=100)), "cpu", threads=2)
    monkeypatch.setattr(timed, "run", run)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: now))
    timed.measure()
    assert timed.wide_is_faster == faster


class Flickering(Scoreboard):
    """The other worker computes, or does not, whenever one looks."""

    def others_running(self) -> int:
        return self._random.randrange(2)

    _random = random.Random(1)


@pytest.mark.parametrize(("image_s", "images"), [(0.01, 50), (0.1, 4), (0.5, 2), (1.0, 2)])
async def test_a_message_of_a_slow_model_has_what_the_cores_make_in_a_quarter_of_a_second(
    engine: HeldEngine, image_s: float, images: int
) -> None:
    scheduler = Scheduler(2)
    engine.image_s = image_s
    card = pb.ModelCard(height=1, width=1, channels=1)
    model = ModelVersion("held", 1, "sha256:0", card, engine, b"")  # type: ignore[arg-type]
    batcher = Batcher(model, 64, max_queue_images=20, metrics=Metrics(), scheduler=scheduler)
    assert (batcher.first_chunk_size(), batcher.chunk_size()) == (images, images)
    await asyncio.to_thread(scheduler.close)


async def test_what_another_worker_does_meanwhile_loses_no_request(engine: HeldEngine) -> None:
    """One that it did between two looks left images in the queue for ever."""
    memory = os.memfd_create("board")
    os.ftruncate(memory, 4096)
    scheduler = Scheduler(2, Flickering(memory, 2, 0))
    batcher = queue_of(engine, scheduler)
    for _ in range(1000):
        engine.released.release()
    async with asyncio.timeout(WAIT_S):
        for first in range(0, 2000, 20):
            made = await make(batcher, draw(first, 20), fairness_key=first)
            assert made.pixels.ravel().tolist() == [seed % 256 for seed in range(first, first + 20)]
    await asyncio.to_thread(scheduler.close)
    os.close(memory)

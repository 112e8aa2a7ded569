import dataclasses
import math
from pathlib import Path

import pytest
import torch

from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.report.history import Alarm, History, Modes, Point
from ganserve_trainer.train.modes import ModeCounter
from ganserve_trainer.train.monitoring import (
    COPIES,
    DISCRIMINATOR_OVERPOWERS,
    DROPPED_MODES,
    MODE_COLLAPSE,
    Monitor,
    build_probe,
    diversity,
    nearest_distance,
)

HEALTHY = Point(0, 0.0, 1.2, 1.0, 0.7, 0.7, 1.0, 1.0, 0.5)
STEP = 1280  # 20 batches of 64


def points(*stretches: tuple[int, dict[str, float]]) -> list[Point]:
    """Return so many points of each kind, one after the other; the first is healthy and long."""
    kinds = [changes for count, changes in ((20, {}), *stretches) for _ in range(count)]
    return [HEALTHY._replace(images_seen=STEP * n, **changes) for n, changes in enumerate(kinds, 1)]


def rung(history: list[Point], *, critic: bool = False) -> list[Alarm]:
    monitor = Monitor(critic=critic)
    return [alarm for point in history for alarm in monitor.observe(point)]


def names(history: list[Point], *, critic: bool = False) -> list[tuple[int, str]]:
    return [(alarm.images_seen // STEP, alarm.name) for alarm in rung(history, critic=critic)]


def test_the_nearest_distance_is_a_median_of_root_mean_squares_within_groups() -> None:
    # Of the first group: pixels 0, 1, 4 have their nearest at 1, 1, 3; of the second: 10, 10, 30 at 0, 0, 20.
    values = torch.tensor([0.0, 1.0, 4.0, 10.0, 10.0, 30.0])
    images = values[:, None, None, None].expand(-1, 3, 2, 2)
    assert nearest_distance(images, 2).item() == pytest.approx(1.0)
    assert nearest_distance(images[:3], 1).item() == pytest.approx(1.0)
    assert nearest_distance(images[3:], 1).item() == pytest.approx(0.0)
    assert nearest_distance(images * 2, 2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("conditional", [False, True])
def test_real_images_are_as_diverse_as_real_images_and_copies_are_not(conditional: bool, data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    probe = build_probe(dataset.images, dataset.labels, conditional=conditional)
    assert probe.size == 100
    if conditional:
        assert probe.label is not None
        assert probe.label.tolist() == [label for label in range(10) for _ in range(10)]
        index = torch.cat([(dataset.labels == label).nonzero()[-10:, 0] for label in range(10)])
    else:
        assert probe.label is None
        index = torch.arange(300, 400)
    real = dataset.images[index].float() / 127.5 - 1
    assert diversity(real, probe).item() == pytest.approx(1, abs=0.1)
    assert diversity(real[:1].expand(100, -1, -1, -1), probe).item() == 0
    # One image a class is a collapsed generator too, though all the classes differ.
    collapsed = real[::10].repeat_interleave(10, dim=0)
    assert diversity(collapsed, probe).item() == 0


def test_a_probe_of_many_or_small_classes_takes_ten_that_have_enough_images() -> None:
    labels = torch.arange(1000).repeat_interleave(12)
    images = torch.randint(256, (12_000, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probe = build_probe(images, labels, conditional=True)
    assert probe.label is not None
    assert (probe.size, probe.classes, len(probe.label)) == (100, 10, 100)
    assert probe.label[::10].tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    # Class 0 has 8 images, classes 1 and 2 have 3.
    small = build_probe(images[:14], torch.tensor([0] * 8 + [1] * 3 + [2] * 3), conditional=True)
    assert small.label is not None
    assert small.label.tolist() == [0] * 8
    alone = build_probe(images[:3], torch.arange(3), conditional=True)
    assert math.isnan(diversity(torch.zeros(3, 1, 4, 4), alone).item())
    same = build_probe(images[:1].expand(50, -1, -1, -1), labels[:50], conditional=False)
    assert math.isnan(diversity(torch.zeros(50, 1, 4, 4), same).item())


def test_a_probe_leaves_the_random_state_alone(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    before = torch.get_rng_state()
    first, second = (build_probe(dataset.images, dataset.labels, conditional=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.real_distance == second.real_distance


def test_a_healthy_run_rings_nothing() -> None:
    # The extremes of healthy runs; see the thresholds in monitoring.py.
    assert rung(points((200, {"diversity": 0.2, "real_accuracy": 0.992, "fake_accuracy": 1.0}))) == []


def test_a_collapse_rings_once_until_it_has_cleared() -> None:
    low = {"diversity": 0.002}
    assert names(points((4, low), (1, {}), (4, low))) == []
    assert names(points((40, low))) == [(25, MODE_COLLAPSE)]
    # One good point, or some that are hardly better, clear nothing.
    assert len(rung(points((40, low), (1, {}), (40, low), (40, {"diversity": 0.12}), (40, low)))) == 1
    assert names(points((40, low), (5, {}), (40, low))) == [(25, MODE_COLLAPSE), (70, MODE_COLLAPSE)]


def test_an_untrained_generator_has_not_collapsed() -> None:
    history = points((300, {}))
    blur = [point._replace(diversity=0.05) for point in history[:15]]
    assert rung(blur + history[15:]) == []
    assert names([point._replace(diversity=0.05) for point in history]) == [(16, MODE_COLLAPSE)]


def test_an_overpowering_discriminator_rings_once_until_it_has_cleared() -> None:
    strong = {"real_accuracy": 0.999, "fake_accuracy": 1.0}
    assert names(points((50, {"fake_accuracy": 1.0}))) == []
    assert names(points((50, {"real_accuracy": 1.0}))) == []
    assert names(points((50, strong))) == [(30, DISCRIMINATOR_OVERPOWERS)]
    # A weaker point now and then is only a dip of the mean.
    dips = points((50, strong), (1, {**strong, "real_accuracy": 0.95}), (50, strong))
    assert len(rung(dips)) == 1
    assert len(rung(points((50, strong), (10, {}), (50, strong)))) == 2
    assert rung(points((50, strong)), critic=True) == []
    assert names(points((50, {"diversity": 0.0})), critic=True) == [(25, MODE_COLLAPSE)]


def test_an_alarm_says_what_was_seen_since_when_and_what_to_do() -> None:
    trouble = {"diversity": 0.0123, "real_accuracy": 0.999, "fake_accuracy": 1.0, "generator_loss": 9.87}
    collapse, overpowers = rung(points((50, trouble)))
    for text in ("0.012 times", f"since {21 * STEP:,} images", "--minibatch", "--learning-rate"):
        assert text in collapse.message
    for text in ("99.9%", "100.0%", f"since {21 * STEP:,} images", "9.87", "--discriminator-learning-rate"):
        assert text in overpowers.message


def test_a_resumed_run_rings_what_the_whole_one_would_have() -> None:
    trouble = {"diversity": 0.0, "real_accuracy": 1.0, "fake_accuracy": 1.0}
    history = points((30, trouble), (15, {}), (30, trouble))
    whole = rung(history)
    assert len(whole) == 4
    for cut in range(len(history)):
        monitor = Monitor(history[:cut])
        later = [alarm for point in history[cut:] for alarm in monitor.observe(point)]
        assert later == [alarm for alarm in whole if alarm.images_seen > STEP * cut]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_ring_nothing(value: float) -> None:
    assert rung(points((50, {"diversity": abs(value), "real_accuracy": value, "fake_accuracy": value}))) == []


@pytest.mark.parametrize("labelled", [True, False])
def test_missing_digits_and_copies_ring_and_new_digits_do_not(labelled: bool, data_root: Path) -> None:
    digits, test = (load_dataset("mnist", data_root, train=train) for train in (True, False))
    spec = digits.spec if labelled else dataclasses.replace(digits.spec, class_names=())
    counter = ModeCounter(dataclasses.replace(digits, spec=spec), conditional=False)
    assert (counter.names == digits.spec.class_names) is labelled

    def rings(images: torch.Tensor) -> list[str]:
        generator, monitor = torch.Generator().manual_seed(0), Monitor()

        def generate(asked: torch.Tensor) -> torch.Tensor:
            drawn = torch.randint(len(images), (len(asked),), generator=generator)
            return images[drawn].float() / 127.5 - 1

        counts = [counter.count(20_000 * n, generate) for n in (1, 2, 3)]
        return [alarm.name for count in counts for alarm in monitor.observe_modes(count)]

    assert rings(test.images[test.labels == 1]) == [DROPPED_MODES]
    assert rings(test.images[test.labels < 6]) == [DROPPED_MODES]
    assert rings(digits.images) == [COPIES]
    if labelled:  # the test part has no images of some clusters
        assert rings(test.images) == []


def test_a_class_that_is_asked_for_and_not_made_is_missing(data_root: Path) -> None:
    digits = load_dataset("mnist", data_root, train=True)
    counter = ModeCounter(digits, conditional=True)

    def generate(asked: torch.Tensor) -> torch.Tensor:
        """Make a real digit of each label, but a 4 instead of a 9."""
        chosen = torch.where(asked == 9, 4, asked)
        first = torch.stack([(digits.labels == digit).nonzero()[0, 0] for digit in range(10)])
        return digits.images[first[chosen]].float() / 127.5 - 1

    count = counter.count(20_000, generate)
    shares = [made / asked for made, asked in zip(count.generated, count.expected, strict=True)]
    assert shares[9] < 0.1
    assert min(shares[:9]) > 0.9


def test_an_alarm_for_modes_rings_once_until_it_has_cleared_also_when_resumed() -> None:
    good = Modes(0, ("a", "b"), (500.0, 500.0), (500.0, 500.0), 0.9, 1.0)
    bad = good._replace(generated=(990.0, 10.0))
    counts = [
        count._replace(images_seen=20_000 * n)
        for n, count in enumerate([good, bad, bad, bad, bad, good, good, good, bad, bad, bad], 1)
    ]
    monitor = Monitor()
    rung = [alarm for count in counts for alarm in monitor.observe_modes(count)]
    assert [alarm.images_seen for alarm in rung] == [80_000, 220_000]
    assert "b (2%)" in rung[0].message
    kept = History.from_plain(History(modes=counts[:4]).to_plain())
    assert Monitor(modes=kept.modes).observe_modes(counts[4]) == []
    assert History.from_plain({"points": [], "measurements": [], "alarms": []}).modes == []

"""Learning-rate schedules against values worked out by hand, and batches that are computed in parts."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import Settings, free_on_resume, from_preset
from ganserve_trainer.train.checkpoints import load_checkpoint
from ganserve_trainer.train.loop import train
from ganserve_trainer.train.run import Run


def rate(images_seen: int, elapsed_s: float = 0.0, **changes: object) -> float:
    settings = from_preset("dcgan", {"learning_rate": 0.01, "images": 1000} | changes)
    generator, discriminator = settings.learning_rates(images_seen, elapsed_s)
    assert discriminator == generator
    return generator


def test_schedules_have_the_values_of_their_formulas() -> None:
    assert [rate(seen) for seen in (0, 500, 1000)] == [0.01, 0.01, 0.01]
    # decay_from alone is linear, as it always was.
    assert [rate(seen, decay_from=0.5) for seen in (0, 500, 750, 1000)] == [0.01, 0.01, 0.005, 0.0]
    assert rate(750, decay_from=0.5, schedule="linear") == 0.005
    assert [rate(seen, schedule="linear") for seen in (0, 250, 1000)] == [0.01, 0.0075, 0.0]
    # (1 + cos(pi · progress)) / 2: at a third of the way 0.75, at the middle 0.5, at two thirds 0.25.
    cosine = [rate(seen, schedule="cosine", images=900) for seen in (0, 300, 450, 600, 900, 1000)]
    assert cosine == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0, 0.0], abs=1e-15)
    assert rate(700, schedule="cosine", decay_from=0.4) == pytest.approx(0.005)
    # The warm-up is a factor: 0.25 · 0.9.
    assert [rate(seen, warm_up_images=400) for seen in (0, 100, 400, 900)] == [0.0, 0.0025, 0.01, 0.01]
    assert rate(100, warm_up_images=400, schedule="linear") == pytest.approx(0.01 * 0.25 * 0.9)
    assert from_preset(
        "dcgan", {"schedule": "linear", "images": 100, "discriminator_learning_rate": 0.4}
    ).learning_rates(50) == (0.0005, 0.2)


def test_a_schedule_goes_by_minutes_where_these_end_the_run_first() -> None:
    halves = {"decay_from": 0.5, "minutes": 2.0}
    assert [rate(10, elapsed, **halves) for elapsed in (0, 60, 90, 120, 130)] == [0.01, 0.01, 0.005, 0.0, 0.0]
    assert rate(750, 60.0, **halves) == 0.005
    assert rate(10, 1e6) == 0.01


def test_schedules_that_contradict_decay_from_are_refused_and_the_length_is_fixed_where_rates_depend_on_it() -> None:
    with pytest.raises(TrainerError, match=r"schedule constant never falls, but decay_from is 0\.5"):
        from_preset("dcgan", {"schedule": "constant", "decay_from": 0.5})
    assert {"images", "minutes"} <= set(free_on_resume(from_preset("dcgan", {"warm_up_images": 9})))
    assert not {"images", "minutes"} & set(free_on_resume(from_preset("dcgan", {"schedule": "cosine"})))


def test_a_run_follows_its_schedule_by_the_clock(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0  # advances by 6 s with each step
    monkeypatch.setattr("ganserve_trainer.train.loop.time.monotonic", lambda: now)
    monkeypatch.setattr("ganserve_trainer.train.loop._POINT_EVERY_STEPS", 1)
    rates = []
    step = Run.step

    def record(run: Run) -> torch.Tensor:
        nonlocal now
        figures = step(run)
        now += 6.0
        rates.append(run.generator_weights.learning_rate)
        return figures

    monkeypatch.setattr(Run, "step", record)
    changes = {"width": 4, "batch_size": 16, "precision": "fp32", "minutes": 0.5, "schedule": "linear"}
    settings = from_preset("mlp", {"learning_rate": 0.01, "sample_every_images": 10**6} | changes)
    digits = load_dataset("mnist", data_root, train=True)
    assert train(settings, digits, tmp_path, resume=False, report=lambda *_: None)
    # 30 s are five steps; each step has the rate of the clock before it.
    assert rates == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    assert load_checkpoint(tmp_path).elapsed_s == 30


def trained(settings: Settings, data_root: Path) -> Run:
    dataset = load_dataset("mnist", data_root, train=True, image_size=settings.image_size)
    run = Run(settings, dataset, torch.device("cpu"))
    for _ in range(3):
        run.step()
    return run


def test_a_batch_in_parts_trains_as_the_whole_batch(data_root: Path) -> None:
    # Networks without batch statistics, but with groups of images, which each part has as a whole. Momentum, because
    # Adam's first steps are otherwise the signs of gradients, which rounding may turn.
    changes: dict[str, object] = {
        "image_size": 16,
        "width": 4,
        "batch_size": 32,
        "growth_images": 10,
        "precision": "fp32",
    }
    changes |= {"minibatch": "stddev", "loss": "hinge", "r1": 1.0, "r1_every_steps": 2, "beta1": 0.5, "beta2": 0.999}
    changes |= {"discriminator_steps": 2, "generator_steps": 2, "conditional": True, "learning_rate": 2e-4}
    whole = from_preset("pggan", changes)
    one, four = trained(whole, data_root), trained(dataclasses.replace(whole, accumulate=4), data_root)
    assert one.images_seen == four.images_seen == 192
    for mine, theirs in ((one.generator, four.generator), (one.discriminator, four.discriminator)):
        for name, weight in mine.state_dict().items():
            assert torch.allclose(weight, theirs.state_dict()[name], atol=1e-5), name
    for mine, theirs in zip(one.discriminator_weights.gradients(), four.discriminator_weights.gradients(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_batch_in_parts_is_computed_in_parts_and_summed_in_fp32(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = from_preset("mlp", {"width": 4, "batch_size": 32, "precision": "bf16", "accumulate": 4})
    dataset = load_dataset("mnist", data_root, train=True)
    run = Run(settings, dataset, torch.device("cpu"))
    sizes = []
    run.generator.register_forward_hook(lambda _network, _given, images: sizes.append(len(images)))
    run.step()
    assert sizes == [8] * 8
    assert all(gradient.dtype == torch.float32 for gradient in run.discriminator_weights.gradients())


def test_parts_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(TrainerError, match="batch_size 32 must be a multiple of 3"):
        from_preset("dcgan", {"batch_size": 32, "accumulate": 3})
    with pytest.raises(TrainerError, match="a multiple of 16 times the group of 4"):
        from_preset("dcgan", {"batch_size": 32, "accumulate": 16, "minibatch": "stddev"})
    with pytest.raises(TrainerError, match="means of whole batches"):
        from_preset("dcgan", {"accumulate": 2, "feature_matching": 1.0})

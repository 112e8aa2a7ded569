"""Objectives against values worked out by hand, by a discriminator whose logit is pixel · (1 + label) + label."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.losses import LOSSES, paired
from ganserve_trainer.objectives import Batch, Objective, feature_matching, gradient_penalty, r1_penalty
from ganserve_trainer.settings import from_preset
from ganserve_trainer.train.run import Run


class Pixel(nn.Module):
    """Judges images of one pixel, by one feature, pixel · (1 + label): both parts look at the label."""

    def features(self, image: Tensor, label: Tensor) -> Tensor:
        return image.flatten(1) * (1 + label)[:, None]

    def judge(self, features: Tensor, label: Tensor) -> Tensor:
        return features.sum(1) + label

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return self.judge(self.features(image, label), label)


def batch(pixels: list[float], labels: list[int]) -> Batch:
    return Batch(torch.tensor(pixels).view(-1, 1, 1, 1), torch.tensor(labels))


# Features 1 and 6, logits 1 and 7, with a mean of 4; features -6 and 0.5, logits -4 and 0.5, with a mean of -1.75.
REAL = batch([1.0, 3.0], [0, 1])
FAKE = batch([-2.0, 0.5], [2, 0])


def build(
    loss: str = "wasserstein-clip", augment: Callable[[Tensor], Tensor] = lambda images: images, **changes: object
) -> Objective:
    settings = from_preset("cdcgan", {"loss": loss, "r1": 0.0} | changes)
    discriminator: object = Pixel()
    return Objective(settings, discriminator, 3, augment, contextlib.nullcontext)


def of_discriminator(objective: Objective, step: int = 0) -> float:
    scalar, _ = objective.of_discriminator(REAL, FAKE, step)
    return scalar.item()


def of_generator(objective: Objective) -> float:
    scalar, _ = objective.of_generator(REAL, FAKE)
    return scalar.item()


def test_each_batch_is_judged_with_its_own_labels() -> None:
    # -1.75 - 4, and minus -1.75. With the real batch's labels the generated images' logits are -2 and 2.
    assert of_discriminator(build()) == pytest.approx(-5.75)
    assert of_generator(build()) == pytest.approx(1.75)


def test_figures_are_the_loss_and_the_accuracies() -> None:
    _, figures = build(r1=1.0, r1_every_steps=1).of_discriminator(REAL, FAKE, 0)
    # Of the generated images one of two has a negative logit. The penalty is not in the loss.
    assert figures.tolist() == pytest.approx([-5.75, 1.0, 0.5])
    _, loss = build(feature_matching=2.0).of_generator(REAL, FAKE)
    assert loss.item() == pytest.approx(1.75)


def test_all_images_that_the_discriminator_sees_are_augmented() -> None:
    brighter = build(augment=lambda images: images + 1)
    # Logits 2 and 9, -1 and 1.5: 0.25 - 5.5, and minus 0.25.
    assert of_discriminator(brighter) == pytest.approx(-5.25)
    assert of_generator(brighter) == pytest.approx(-0.25)
    # Logits 2 and 13, -10 and 1: -4.5 - 7.5. Twice the contrast doubles the gradients 1 and 2: 0.5 · (2² + 4²) / 2 = 5.
    contrast = build(augment=lambda images: 2 * images, r1=1.0, r1_every_steps=1)
    assert of_discriminator(contrast) == pytest.approx(-4.5 - 7.5 + 5)
    # Mean features 7 and -5.5: 12.5² = 156.25.
    contrast = build(augment=lambda images: 2 * images, feature_matching=1.0)
    assert of_generator(contrast) == pytest.approx(4.5 + 156.25)


def test_the_discriminators_objective_has_no_gradient_for_the_generator() -> None:
    # The generator's step uses the same images.
    pixels = FAKE.images.clone().requires_grad_(True)
    real = Batch(REAL.images.clone().requires_grad_(True), REAL.labels)
    scalar, _ = build().of_discriminator(real, Batch(pixels, FAKE.labels), 0)
    scalar.backward()
    assert pixels.grad is None
    scalar, _ = build().of_generator(REAL, Batch(pixels, FAKE.labels))
    scalar.backward()
    assert pixels.grad is not None
    # Minus (1 + label) of each, over 2.
    assert pixels.grad.flatten().tolist() == [-1.5, -0.5]


@pytest.mark.parametrize(("step", "expected"), [(0, -3.25), (1, -5.75), (7, -5.75), (8, -3.25)])
def test_r1_is_computed_at_every_nth_step_and_is_n_times_as_strong(step: int, expected: float) -> None:
    # The gradients are 1 and 2: 0.5 · (1² + 2²) / 2 = 1.25, times a weight of 0.5, times 4 steps: 2.5.
    assert of_discriminator(build(r1=0.5, r1_every_steps=4), step) == pytest.approx(expected)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, -5.75), (3.0, -4.25), (10.0, -0.75)])
def test_the_gradient_penalty_counts_by_its_weight(weight: float, expected: float) -> None:
    # The gradients' norms are 1 and 2 everywhere: ((1 - 1)² + (2 - 1)²) / 2 = 0.5.
    assert of_discriminator(build("wasserstein-gp", gradient_penalty=weight)) == pytest.approx(expected)
    # Only that loss has the penalty.
    assert of_discriminator(build("wasserstein-clip", gradient_penalty=weight)) == pytest.approx(-5.75)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 1.75), (2.0, 79.875)])
def test_feature_matching_counts_by_its_weight(weight: float, expected: float) -> None:
    # Mean features 3.5 and -2.75: 6.25² = 39.0625.
    assert of_generator(build(feature_matching=weight)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("two_sided", "expected"),
    [
        # (softplus(-1) + softplus(-7)) / 2 + (softplus(-4) + softplus(0.5)) / 2
        # = (0.313262 + 0.000911 + 0.018150 + 0.974077) / 2 = 0.653200, plus 0.1 · 4.
        (False, 0.653200 + 0.4),
        # And minus 0.1 · -1.75.
        (True, 0.653200 + 0.4 + 0.175),
    ],
)
def test_labels_are_smoothed_on_one_side_or_on_both(two_sided: bool, expected: float) -> None:
    objective = build("non-saturating", label_smoothing=0.1, two_sided_smoothing=two_sided)
    assert of_discriminator(objective) == pytest.approx(expected, abs=1e-5)


def test_a_mismatched_label_is_never_the_right_one() -> None:
    objective = Objective(
        from_preset("cdcgan", {"loss": "wasserstein-clip", "r1": 0.0, "mismatched_labels": 0.5}),
        Pixel(),
        2,
        lambda images: images,
        contextlib.nullcontext,
    )
    real, fake = batch([1.0, -2.0] * 32, [0, 1] * 32), batch([0.0] * 64, [0] * 64)
    scalar, figures = objective.of_discriminator(real, fake, 0)
    # Real logits 1 and -3: a mean of -1. The first 32 with the other label: 3 and -2; the other 64 of 96 fakes: 0.
    # With its right label an image would lower the sum by 2 or by 1.
    assert scalar.item() == pytest.approx(16 * (3 - 2) / 96 + 1)
    # The accuracy on fakes is that on generated images.
    assert figures.tolist()[1:] == [0.5, 0.0]


@pytest.fixture
def relativistic(monkeypatch: pytest.MonkeyPatch) -> str:
    """Add a loss as a newcomer does: one function, and its line in the table (RpGAN, Jolicoeur-Martineau, 2018)."""

    def relativistic(better: Tensor, worse: Tensor) -> Tensor:
        return F.softplus(worse - better).mean()

    monkeypatch.setitem(LOSSES, "relativistic", paired(relativistic))
    return "relativistic"


def test_a_relativistic_loss_is_one_function(relativistic: str) -> None:
    objective = build(relativistic)
    # Logits 1 and 7 against -4 and 0.5: (softplus(-5) + softplus(-6.5)) / 2 = (0.006715 + 0.001502) / 2
    assert of_discriminator(objective) == pytest.approx(0.004109, abs=1e-6)
    # (softplus(5) + softplus(6.5)) / 2 = (5.006715 + 6.501502) / 2
    assert of_generator(objective) == pytest.approx(5.754109, abs=1e-6)


def test_a_paired_loss_compares_a_mismatched_image_with_itself(relativistic: str) -> None:
    real, fake = batch([1.0, -2.0] * 2, [0, 1] * 2), batch([0.0] * 4, [0] * 4)
    objective = Objective(
        from_preset("cdcgan", {"loss": relativistic, "r1": 0.0, "mismatched_labels": 0.5}),
        Pixel(),
        2,
        lambda images: images,
        contextlib.nullcontext,
    )
    scalar, _ = objective.of_discriminator(real, fake, 0)
    # Real logits 1, -3, 1, -3 against 0: softplus(-1) and softplus(3), twice. The first two against 3 and -2, with the
    # other label: softplus(2) and softplus(1). (2 · (0.313262 + 3.048587) + 2.126928 + 1.313262) / 6
    assert scalar.item() == pytest.approx(1.693981, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, {"conditional": True, "mismatched_labels": 0.25, "feature_matching": 1.0}])
def test_a_relativistic_loss_trains(changes: dict[str, object], relativistic: str, data_root: Path) -> None:
    settings = from_preset("mlp", {"loss": relativistic, "width": 8, "batch_size": 32, "precision": "fp32"} | changes)
    run = Run(settings, load_dataset("mnist", data_root, train=True), torch.device("cpu"))
    before = [parameter.clone() for parameter in run.generator.parameters()]
    losses = torch.stack([run.step() for _ in range(16)])
    assert losses.isfinite().all()
    # Both start at log 2, where the discriminator cannot tell the images apart, and the discriminator gains on it.
    assert losses[0, 0].item() == pytest.approx(0.693, abs=0.05)
    assert losses[-1, 0] < 0.5
    assert losses[-1, 1] > 0.9
    assert all((now != then).any() for now, then in zip(run.generator.parameters(), before, strict=True))


def half_square(images: Tensor) -> Tensor:
    """D(x) = |x|² / 2, whose gradient is x."""
    return 0.5 * images.flatten(1).square().sum(1)


def test_gradient_penalty_between_real_and_generated() -> None:
    real, fake = torch.full((2, 1, 2, 2), 2.0), torch.zeros(2, 1, 2, 2)
    share = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    # At x = real the gradient's norm is 4, at the middle 2: ((4 - 1)² + (2 - 1)²) / 2
    assert gradient_penalty(half_square, real, fake, share).item() == pytest.approx(5.0)


def test_r1_is_half_the_squared_gradient_at_real_images() -> None:
    real = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    # (4 · 1² + 4 · 3²) / 2 / 2
    assert r1_penalty(half_square, real).item() == pytest.approx(10.0)


def test_penalties_train_the_discriminator() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    images = torch.ones(3, 1, 2, 2)
    r1_penalty(lambda seen: weight * half_square(seen), images).backward()
    # d/dw of w² · 4 / 2
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(8.0)


def test_feature_matching_compares_means() -> None:
    real = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    fake = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    # ((2 - 1)² + (3 - 1)²) / 2
    assert feature_matching(real, fake).item() == pytest.approx(2.5)

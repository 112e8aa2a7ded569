"""Losses against values worked out by hand: softplus(x) = log(1 + e^x)."""

import typing

import pytest
import torch
from torch import Tensor

from ganserve_trainer.losses import LOSSES, feature_matching, gradient_penalty, r1_penalty
from ganserve_trainer.settings import Loss

REAL = torch.tensor([1.0, 3.0])
FAKE = torch.tensor([-2.0, 0.5])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # (softplus(-1) + softplus(-3)) / 2 + (softplus(-2) + softplus(0.5)) / 2
        # = (0.313262 + 0.048587) / 2 + (0.126928 + 0.974077) / 2
        ("non-saturating", 0.731427),
        ("minimax", 0.731427),
        # ((0² + 2²) / 2 + (2² + 0.5²) / 2) / 2
        ("least-squares", 2.0625),
        # (0 + 0) / 2 + (0 + 1.5) / 2
        ("hinge", 0.75),
        # -0.75 - 2
        ("wasserstein-clip", -2.75),
        ("wasserstein-gp", -2.75),
    ],
)
def test_discriminator_losses(name: str, expected: float) -> None:
    assert LOSSES[name].discriminator(REAL, FAKE, 0.0, 0.0).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # (softplus(2) + softplus(-0.5)) / 2 = (2.126928 + 0.474077) / 2
        ("non-saturating", 1.300503),
        # -(softplus(-2) + softplus(0.5)) / 2
        ("minimax", -0.550503),
        # (3² + 0.5²) / 2 / 2
        ("least-squares", 2.3125),
        ("hinge", 0.75),
        ("wasserstein-clip", 0.75),
        ("wasserstein-gp", 0.75),
    ],
)
def test_generator_losses(name: str, expected: float) -> None:
    assert LOSSES[name].generator(FAKE).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "one_sided", "two_sided"),
    [
        # One-sided, target 0.9: 0.1 · (1 + 3) / 2 more. Two-sided, target 0.1: 0.1 · (-2 + 0.5) / 2 less.
        ("non-saturating", 0.731427 + 0.2, 0.731427 + 0.2 + 0.075),
        # ((0.1² + 2.1²) / 2 + (2² + 0.5²) / 2) / 2, and ((0.1² + 2.1²) / 2 + (2.1² + 0.4²) / 2) / 2
        ("least-squares", 2.1675, 2.2475),
    ],
)
def test_label_smoothing_moves_the_targets(name: str, one_sided: float, two_sided: float) -> None:
    discriminator = LOSSES[name].discriminator
    assert discriminator(REAL, FAKE, 0.1, 0.0).item() == pytest.approx(one_sided, abs=1e-5)
    assert discriminator(REAL, FAKE, 0.1, 0.1).item() == pytest.approx(two_sided, abs=1e-5)


def test_every_loss_of_the_settings_is_there() -> None:
    assert list(LOSSES) == list(typing.get_args(Loss))
    assert {name for name, loss in LOSSES.items() if loss.is_critic} == {"wasserstein-clip", "wasserstein-gp"}


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name: str) -> None:
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = LOSSES[name].discriminator(logits, -logits, 0.1, 0.1) + LOSSES[name].generator(logits)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_minimax_generator_stands_still_where_the_discriminator_is_sure() -> None:
    gradients = {}
    for name in ("minimax", "non-saturating"):
        logit = torch.tensor([-10.0], requires_grad=True)
        LOSSES[name].generator(logit).backward()
        assert logit.grad is not None
        gradients[name] = logit.grad.abs().item()
    assert gradients["minimax"] < 1e-4
    assert gradients["non-saturating"] > 0.99


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

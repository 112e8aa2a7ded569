"""Losses against values worked out by hand: softplus(x) = log(1 + e^x)."""

import dataclasses

import pytest
import torch

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.losses import LOSSES
from ganserve_trainer.settings import Settings, choices_of, from_preset

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
    assert LOSSES[name].generator(FAKE, REAL).item() == pytest.approx(expected, abs=1e-5)


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


def test_the_settings_offer_every_loss() -> None:
    (field,) = (field for field in dataclasses.fields(Settings) if field.name == "loss")
    assert choices_of(field) == tuple(LOSSES)
    with pytest.raises(TrainerError, match="loss is 'hing'; choose one of non-saturating, minimax, "):
        from_preset("mlp", {"loss": "hing"})


def test_what_losses_need_of_a_step() -> None:
    def having(trait: str) -> set[str]:
        return {name for name, loss in LOSSES.items() if getattr(loss, trait)}

    assert having("has_targets") == {"non-saturating", "minimax", "least-squares"}
    assert having("is_critic") == {"wasserstein-clip", "wasserstein-gp"}
    assert having("clips_weights") == {"wasserstein-clip"}
    assert having("penalises_gradient") == {"wasserstein-gp"}


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name: str) -> None:
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = LOSSES[name].discriminator(logits, -logits, 0.1, 0.1) + LOSSES[name].generator(logits, -logits)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_minimax_generator_stands_still_where_the_discriminator_is_sure() -> None:
    gradients = {}
    for name in ("minimax", "non-saturating"):
        logit = torch.tensor([-10.0], requires_grad=True)
        LOSSES[name].generator(logit, None).backward()
        assert logit.grad is not None
        gradients[name] = logit.grad.abs().item()
    assert gradients["minimax"] < 1e-4
    assert gradients["non-saturating"] > 0.99

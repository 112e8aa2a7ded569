"""Losses against values worked out by hand: softplus(x) = log(1 + e^x)."""

import pytest
import torch

from ganserve_trainer.losses import discriminator_loss, generator_loss


def test_discriminator_loss_on_logits() -> None:
    # softplus(-1) + softplus(-2) = 0.3133 + 0.1269
    assert discriminator_loss(torch.tensor([1.0]), torch.tensor([-2.0])).item() == pytest.approx(0.4402, abs=1e-4)


def test_generator_loss_is_averaged_over_the_batch() -> None:
    # (softplus(-1) + softplus(3)) / 2 = (0.3133 + 3.0486) / 2
    assert generator_loss(torch.tensor([1.0, -3.0])).item() == pytest.approx(1.6809, abs=1e-4)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = discriminator_loss(logits, -logits) + generator_loss(logits)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()

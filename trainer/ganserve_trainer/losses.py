"""Adversarial losses on logits, and the table of losses for `--loss`. The losses know no network and no run.

A discriminator's loss takes the logits of real and of generated images, [n] each, and the smoothing of the targets of
each. A generator's loss takes the logits of generated images and, if the loss compares both kinds, those of real
images. Each returns a mean over the batch. A new loss needs its function and a row in `LOSSES`: nothing else names a
loss.

`settings` reads the table, and the command line reads `settings` and must start fast: torch is imported in functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdversarialLoss:
    """A loss for each network, and its requirements on the rest of a step."""

    discriminator: Callable[[Tensor, Tensor, float, float], Tensor]  # real logits, fake logits, smoothing of each
    generator: Callable[[Tensor, Tensor | None], Tensor]  # fake logits, and real logits if `is_paired`
    has_targets: bool = False  # it has targets, which label smoothing can move
    is_paired: bool = False  # it compares each generated image with a real one, also in the generator's step
    # A critic's logits have no zero that separates real from fake (Arjovsky et al., 2017).
    is_critic: bool = False
    clips_weights: bool = False  # bounds the critic's weights (Arjovsky et al., 2017)
    penalises_gradient: bool = False  # adds WGAN-GP's penalty (Gulrajani et al., 2017)


def paired(loss: Callable[[Tensor, Tensor], Tensor]) -> AdversarialLoss:
    """Make the losses of both networks from one function, as relativistic GANs do (Jolicoeur-Martineau, 2018).

    Args:
        loss: takes two tensors of logits, [n] each, and is low where the first exceed the second. The discriminator
            minimises loss(real, fake), and the generator minimises loss(fake, real).
    """

    def discriminator(real_logits: Tensor, fake_logits: Tensor, _real: float = 0.0, _fake: float = 0.0) -> Tensor:
        return loss(real_logits, fake_logits)

    def generator(fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
        assert real_logits is not None
        return loss(fake_logits, real_logits)

    return AdversarialLoss(discriminator, generator, is_paired=True)


def cross_entropy_discriminator(
    real_logits: Tensor, fake_logits: Tensor, smooth_real: float = 0.0, smooth_fake: float = 0.0
) -> Tensor:
    """Binary cross-entropy of real against fake (Goodfellow et al., 2014, eq. 1).

    The targets are 1 - smooth_real and smooth_fake. In one-sided label smoothing (Salimans et al., 2016, section 3.4),
    the target of fakes is 0.
    """
    # -t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)) = softplus(x) - t x, and softplus(x) - x = softplus(-x)
    loss = _softplus(-real_logits).mean() + _softplus(fake_logits).mean()
    if smooth_real:
        loss = loss + smooth_real * real_logits.mean()
    if smooth_fake:
        loss = loss - smooth_fake * fake_logits.mean()
    return loss


def non_saturating_generator(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """Maximise log D(G(z)) (Goodfellow et al., 2014, section 3)."""
    return _softplus(-fake_logits).mean()


def minimax_generator(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """Minimise log(1 - D(G(z))) (Goodfellow et al., 2014, eq. 1); its gradient vanishes if D is confident."""
    return -_softplus(fake_logits).mean()


def least_squares_discriminator(
    real_logits: Tensor, fake_logits: Tensor, smooth_real: float = 0.0, smooth_fake: float = 0.0
) -> Tensor:
    """Half the squared distance to the targets 1 and 0, before smoothing (LSGAN, Mao et al., 2017, eq. 9)."""
    return 0.5 * ((real_logits - 1 + smooth_real).square().mean() + (fake_logits - smooth_fake).square().mean())


def least_squares_generator(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """Half the squared distance to 1 (LSGAN, Mao et al., 2017, eq. 9)."""
    return 0.5 * (fake_logits - 1).square().mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor, _real: float = 0.0, _fake: float = 0.0) -> Tensor:
    """Hinge loss with margins at 1 and -1 (Lim & Ye, 2017; Miyato et al., 2018, eq. 16)."""
    return (1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()


def wasserstein_discriminator(
    real_logits: Tensor, fake_logits: Tensor, _real: float = 0.0, _fake: float = 0.0
) -> Tensor:
    """Minus the critic's estimate of the Wasserstein distance (Arjovsky et al., 2017, eq. 2)."""
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """Maximise the critic's logits of generated images (Arjovsky et al., 2017); the hinge loss uses the same."""
    return -fake_logits.mean()


LOSSES = {
    "non-saturating": AdversarialLoss(cross_entropy_discriminator, non_saturating_generator, has_targets=True),
    "minimax": AdversarialLoss(cross_entropy_discriminator, minimax_generator, has_targets=True),
    "least-squares": AdversarialLoss(least_squares_discriminator, least_squares_generator, has_targets=True),
    "hinge": AdversarialLoss(hinge_discriminator, wasserstein_generator),
    "wasserstein-clip": AdversarialLoss(
        wasserstein_discriminator, wasserstein_generator, is_critic=True, clips_weights=True
    ),
    "wasserstein-gp": AdversarialLoss(
        wasserstein_discriminator, wasserstein_generator, is_critic=True, penalises_gradient=True
    ),
}


def _softplus(x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.softplus(x)

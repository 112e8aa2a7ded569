"""GAN losses and penalties on logits. They know nothing of the networks or the loop.

A discriminator's loss takes the logits of real and of generated images, [n] each, and where it has targets to smooth,
by how much; a generator's takes the logits of its images. All are averaged over the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class AdversarialLoss:
    """A loss for each side."""

    discriminator: Callable[[Tensor, Tensor, float, float], Tensor]  # real logits, fake logits, smoothing of each
    generator: Callable[[Tensor], Tensor]
    # A critic's logits have no zero that parts real from fake (Arjovsky et al., 2017).
    is_critic: bool = False


def cross_entropy_discriminator(
    real_logits: Tensor, fake_logits: Tensor, smooth_real: float = 0.0, smooth_fake: float = 0.0
) -> Tensor:
    """Binary cross-entropy of real against fake (Goodfellow et al., 2014, eq. 1).

    The targets are 1 - smooth_real and smooth_fake: one-sided label smoothing (Salimans et al., 2016, section 3.4)
    leaves the second at 0.
    """
    # -t log sigmoid(x) - (1 - t) log(1 - sigmoid(x)) = softplus(x) - t x, and softplus(x) - x = softplus(-x)
    loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    if smooth_real:
        loss = loss + smooth_real * real_logits.mean()
    if smooth_fake:
        loss = loss - smooth_fake * fake_logits.mean()
    return loss


def non_saturating_generator(fake_logits: Tensor) -> Tensor:
    """Maximise log D(G(z)) (Goodfellow et al., 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


def minimax_generator(fake_logits: Tensor) -> Tensor:
    """Minimise log(1 - D(G(z))) (Goodfellow et al., 2014, eq. 1); its gradient vanishes where D is sure."""
    return -F.softplus(fake_logits).mean()


def least_squares_discriminator(
    real_logits: Tensor, fake_logits: Tensor, smooth_real: float = 0.0, smooth_fake: float = 0.0
) -> Tensor:
    """Half the squared distance to the targets 1 and 0, before smoothing (LSGAN, Mao et al., 2017, eq. 9)."""
    return 0.5 * ((real_logits - 1 + smooth_real).square().mean() + (fake_logits - smooth_fake).square().mean())


def least_squares_generator(fake_logits: Tensor) -> Tensor:
    """Half the squared distance to 1 (LSGAN, Mao et al., 2017, eq. 9)."""
    return 0.5 * (fake_logits - 1).square().mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor, _real: float = 0.0, _fake: float = 0.0) -> Tensor:
    """Hinge loss with margins at 1 and -1 (Lim & Ye, 2017; Miyato et al., 2018, eq. 16)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def wasserstein_discriminator(
    real_logits: Tensor, fake_logits: Tensor, _real: float = 0.0, _fake: float = 0.0
) -> Tensor:
    """Minus the critic's estimate of the Wasserstein distance (Arjovsky et al., 2017, eq. 2)."""
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator(fake_logits: Tensor) -> Tensor:
    """Raise the critic's logits of generated images (Arjovsky et al., 2017); hinge's generator does the same."""
    return -fake_logits.mean()


LOSSES = {
    "non-saturating": AdversarialLoss(cross_entropy_discriminator, non_saturating_generator),
    "minimax": AdversarialLoss(cross_entropy_discriminator, minimax_generator),
    "least-squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
    "hinge": AdversarialLoss(hinge_discriminator, wasserstein_generator),
    "wasserstein-clip": AdversarialLoss(wasserstein_discriminator, wasserstein_generator, is_critic=True),
    "wasserstein-gp": AdversarialLoss(wasserstein_discriminator, wasserstein_generator, is_critic=True),
}


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """WGAN-GP's penalty, (|gradient| - 1)^2, before its weight (Gulrajani et al., 2017, eq. 3).

    Args:
        critic: images [n, c, h, w] to logits [n].
        real: real images.
        fake: as many generated ones, without gradient.
        share: how much of the real image each point between has, in 0…1, [n, 1, 1, 1].
    """
    between = torch.lerp(fake.float(), real.float(), share).requires_grad_(True)
    gradient = _image_gradient(critic(between), between).flatten(1)
    length: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    return (length - 1).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Half the squared gradient at real images, before its weight (Mescheder et al., 2018, eq. 9)."""
    real = real.detach().requires_grad_(True)
    return 0.5 * _image_gradient(discriminator(real), real).flatten(1).square().sum(1).mean()


def _image_gradient(logits: Tensor, images: Tensor) -> Tensor:
    gradient: Tensor
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float()


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """Squared distance between the mean features of real and generated images (Salimans et al., 2016, section 3.1).

    Features are [n, f]; averaged over f, so that a weight means the same for every width.
    """
    return (real_features.mean(0) - fake_features.mean(0)).square().mean()

"""The objectives of both networks: the whole adversarial computation of a step, in one place.

A training step asks `Objective` for the discriminator's objective and then for the generator's, each with a real and a
generated batch, and takes the gradients; nothing here changes a weight. This module may import `losses`, `networks` and
`settings`; it knows no optimiser and no data set.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ganserve_trainer.networks.discriminator import Discriminator
from ganserve_trainer.settings import MINIBATCH_GROUPS, Settings


class Batch(NamedTuple):
    """Images in -1…1, [n, channels, height, width], and their labels, int64 [n]; None for networks without classes."""

    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, slots=True)
class Objective:
    """The objectives of both networks, with one discriminator."""

    settings: Settings
    discriminator: Discriminator
    classes: int  # 0 for networks without classes
    augment: Callable[[Tensor], Tensor]  # applied to every image that the discriminator sees
    autocast: Callable[[], AbstractContextManager[object]]  # applied to every pass through the discriminator

    def of_discriminator(self, real: Batch, fake: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Return the scalar to minimise; and [3]: the loss, and the accuracies on real and on generated images."""
        settings, loss, size = self.settings, self.settings.adversarial_loss, len(real.images)
        fake = Batch(fake.images.detach(), fake.labels)
        batches = [real, fake, *self._mismatched(real)]
        with self.autocast():
            # One pass over all batches: the discriminator has no batch statistics that would mix them.
            images = self.augment(torch.cat([batch.images for batch in batches]))
            logits = self.discriminator(images, _joined([batch.labels for batch in batches]))
        real_logits, fake_logits = logits[:size], logits[size:]
        accuracies = (real_logits > 0).float().mean(), (fake_logits[:size] < 0).float().mean()
        if loss.is_paired:
            # A mismatched image is paired with itself under its own label.
            real_logits = torch.cat([real_logits, real_logits[: len(fake_logits) - size]])
        smooth_real = settings.label_smoothing
        smooth_fake = smooth_real if settings.two_sided_smoothing else 0.0
        adversarial = objective = loss.discriminator(real_logits, fake_logits, smooth_real, smooth_fake)
        judge = partial(self._judge_for_penalty, labels=real.labels)
        if loss.penalises_gradient and settings.gradient_penalty:
            share = torch.rand(size, 1, 1, 1, device=real.images.device)
            penalty = gradient_penalty(judge, real.images, fake.images, share)
            objective = objective + settings.gradient_penalty * penalty
        if settings.r1 and step % settings.r1_every_steps == 0:
            # As strong on average as a penalty at every step (lazy regularisation, Karras et al., 2020, StyleGAN2).
            weight = settings.r1 * settings.r1_every_steps
            objective = objective + weight * r1_penalty(judge, real.images)
        return objective, torch.stack([adversarial.detach(), *accuracies])

    def of_generator(self, real: Batch, fake: Batch) -> tuple[Tensor, Tensor]:
        """Return the scalar to minimise, and the adversarial loss in it, detached."""
        loss, discriminator, weight = self.settings.adversarial_loss, self.discriminator, self.settings.feature_matching
        with self.autocast():
            fake_features = discriminator.features(self.augment(fake.images), fake.labels)
            fake_logits = discriminator.judge(fake_features, fake.labels)
            if not loss.is_paired and not weight:
                adversarial = loss.generator(fake_logits, None)
                return adversarial, adversarial.detach()
            with torch.no_grad():
                real_features = discriminator.features(self.augment(real.images), real.labels)
                # Only if needed: each pass through spectral normalisation updates its state.
                real_logits = discriminator.judge(real_features, real.labels) if loss.is_paired else None
            adversarial = objective = loss.generator(fake_logits, real_logits)
            if weight:
                objective = objective + weight * feature_matching(real_features.float(), fake_features.float())
        return objective, adversarial.detach()

    def _mismatched(self, real: Batch) -> list[Batch]:
        """Return a share of the real images with wrong labels, to use as fakes, if the settings ask for them.

        They make the discriminator depend on the label (Reed et al., 2016).
        """
        settings = self.settings
        if not settings.mismatched_labels or real.labels is None:
            return []
        group = MINIBATCH_GROUPS[settings.minibatch]
        count = int(len(real.images) * settings.mismatched_labels) // group * group
        shift = torch.randint(1, self.classes, (count,), device=real.labels.device)
        return [Batch(real.images[:count], (real.labels[:count] + shift) % self.classes)]

    def _judge_for_penalty(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Return the logits of images without torch.compile, which does not support double backward."""
        with torch.compiler.set_stance("force_eager"), self.autocast():
            logits: Tensor = self.discriminator(self.augment(images), labels)
        return logits


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """WGAN-GP's penalty, (|gradient| - 1)^2, before its weight (Gulrajani et al., 2017, eq. 3).

    Args:
        critic: maps images [n, c, h, w] to logits [n].
        real: real images.
        fake: the same number of generated images, detached.
        share: the share of the real image in each interpolated image, in 0…1, [n, 1, 1, 1].
    """
    between = torch.lerp(fake.float(), real.float(), share).requires_grad_(True)
    gradient = _image_gradient(critic(between), between).flatten(1)
    length: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    return (length - 1).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Half the squared gradient at real images, before its weight (Mescheder et al., 2018, eq. 9)."""
    real = real.detach().requires_grad_(True)
    return 0.5 * _image_gradient(discriminator(real), real).flatten(1).square().sum(1).mean()


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """Squared distance between the mean features of real and generated images (Salimans et al., 2016, section 3.1).

    Features are [n, f]. The mean over f makes the setting's weight independent of the width.
    """
    return (real_features.mean(0) - fake_features.mean(0)).square().mean()


def _image_gradient(logits: Tensor, images: Tensor) -> Tensor:
    gradient: Tensor
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float()


def _joined(labels: list[Tensor | None]) -> Tensor | None:
    given = [label for label in labels if label is not None]
    return torch.cat(given) if given else None

"""Watches a run: how diverse the generator's images are, and whether a person should look.

Diversity is measured on a probe: the answers of the EMA generator to fixed latents. Nothing here draws from torch's
global random state, and what a monitor decides follows from the run's points alone: a resumed run decides the same.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ganserve_trainer.report.history import Alarm, Point

MODE_COLLAPSE = "mode collapse"
DISCRIMINATOR_OVERPOWERS = "discriminator overpowers"

_PROBE_IMAGES = 100
_PROBE_CLASSES = 10
_REAL_DRAWS = 8

# Measured on MNIST, Fashion-MNIST and CIFAR-10: healthy runs have a diversity of 0.2 to 1.1 from 20,000 images on,
# collapsed ones 0.000 to 0.003. The average starts as a blur, of 0.06 or more.
_COLLAPSED, _SPREAD = 0.1, 0.15
WARM_UP_IMAGES = 20_000
_COLLAPSE_POINTS = 5

# The means over 10 points (200 steps) of the lower accuracy reach 0.992 in runs that go on to learn, 0.998 and more in
# overpowered ones. Nothing is asked of the generator: where it is overpowered its loss may be 15 or 0 and its gradient
# norm 17 or 0, by the loss and by how it came about.
_OVERPOWERED, _BALANCED = 0.995, 0.98
_ACCURACY_POINTS = 10


@dataclass(frozen=True, slots=True)
class Probe:
    """What to ask the generator for, and how far apart real images of that kind are."""

    label: Tensor | None  # int64 [size], class by class; None for an unconditional generator
    size: int
    classes: int  # 1 for an unconditional generator
    real_distance: float  # nearest_distance of as many real images, a mean over draws


def build_probe(images: Tensor, labels: Tensor, *, conditional: bool) -> Probe:
    """Choose the probe for a training set, uint8 [n, channels, height, width] with labels [n], on its device.

    An unconditional generator is asked for 100 images; a conditional one for 10 of each class, of at most 10 classes,
    spread evenly over those that have as many training images.
    """
    generator = torch.Generator().manual_seed(0)
    members = [torch.arange(len(images))]
    label = None
    classes = torch.zeros(1, dtype=torch.int64)
    if conditional:
        counts = labels.cpu().bincount()
        each = min(_PROBE_IMAGES // _PROBE_CLASSES, int(counts.max()))
        able = (counts >= each).nonzero()[:, 0]
        chosen = torch.linspace(0, len(able) - 1, min(_PROBE_CLASSES, len(able))).round().long()
        classes = able[chosen]
        label = classes.repeat_interleave(each).to(labels.device)
        members = [(labels.cpu() == value).nonzero()[:, 0] for value in classes]
    else:
        each = min(_PROBE_IMAGES, len(images))
    distances = []
    for _ in range(_REAL_DRAWS):
        drawn = torch.cat([of_class[torch.randperm(len(of_class), generator=generator)[:each]] for of_class in members])
        real = images[drawn.to(images.device)].float().div(127.5).sub(1)
        distances.append(nearest_distance(real, len(classes)).item())
    return Probe(label, each * len(classes), len(classes), sum(distances) / len(distances))


def diversity(images: Tensor, probe: Probe) -> Tensor:
    """Compare generated images in -1…1, [probe.size, channels, height, width], with real ones; a scalar tensor.

    1: as far from one another as real images are; 0: all of a class are the same image. Noise has more than 1. NaN
    where the real images say nothing, being all the same or one a class.
    """
    return nearest_distance(images, probe.classes) / (probe.real_distance or math.nan)


def nearest_distance(images: Tensor, groups: int) -> Tensor:
    """Return the median over all images of the RMS pixel distance to the nearest other image of the same group.

    The images are [groups * n, channels, height, width], group by group; the result is a scalar tensor, and infinite
    for groups of one.
    """
    pixels = images.float().flatten(1).unflatten(0, (groups, -1))
    # Not by matrix products: under TF32 they would put identical images apart.
    distance = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return distance.amin(2).median() / math.sqrt(pixels.shape[2])


class Monitor:
    """Decides, point by point, whether an alarm rings.

    *Mode collapse*: after 20,000 images, the diversity is under 0.1 at five points in a row. It clears when it is over
    0.15 at five points in a row.

    *Discriminator overpowers*: the mean over ten points of the accuracy on real images and that of the accuracy on
    generated ones are both 0.995 or more. The generator's gradient then vanishes (minimax loss; Goodfellow et al.,
    2014, section 3) or grows noisy (non-saturating loss; Arjovsky & Bottou, 2017, theorems 2.4 and 2.6). It clears
    when one of them is under 0.98. It never rings for a Wasserstein critic, whose sign means nothing and which is
    trained to its optimum on purpose (Arjovsky et al., 2017).

    An alarm that rang stays silent until it has cleared. Values that are not finite never ring.
    """

    def __init__(self, points: Iterable[Point] = (), *, critic: bool = False) -> None:
        """Take in the points so far, whose alarms have rung already.

        Args:
            points: the run's history.
            critic: the loss is a Wasserstein one.
        """
        self._critic = critic
        self._recent: deque[Point] = deque(maxlen=_ACCURACY_POINTS)
        self._ringing: set[str] = set()
        for point in points:
            self.observe(point)

    def observe(self, point: Point) -> list[Alarm]:
        """Take in the next point; return the alarms that it rings."""
        self._recent.append(point)
        alarms = [] if self._critic else [self._overpowers()]
        return [alarm for alarm in (self._collapse(), *alarms) if alarm]

    def _collapse(self) -> Alarm | None:
        recent = list(self._recent)[-_COLLAPSE_POINTS:]
        values = [point.diversity for point in recent]
        if len(recent) < _COLLAPSE_POINTS or recent[-1].images_seen < WARM_UP_IMAGES:
            return None
        if all(value > _SPREAD for value in values):
            self._ringing.discard(MODE_COLLAPSE)
        if not all(value < _COLLAPSED for value in values):
            return None
        return self._ring(
            MODE_COLLAPSE,
            f"The generated images are at most {max(values):.3f} times as far apart as real ones since "
            f"{recent[0].images_seen:,} images (1 is as diverse as the data, 0 is one image for every latent). Try a "
            "lower --learning-rate, --minibatch stddev, another --loss, or --r1 1.",
        )

    def _overpowers(self) -> Alarm | None:
        recent = self._recent
        if len(recent) < _ACCURACY_POINTS:
            return None
        real = sum(point.real_accuracy for point in recent) / len(recent)
        fake = sum(point.fake_accuracy for point in recent) / len(recent)
        if min(real, fake) < _BALANCED:
            self._ringing.discard(DISCRIMINATOR_OVERPOWERS)
        if not (_OVERPOWERED <= real <= 1 and _OVERPOWERED <= fake <= 1):
            return None
        return self._ring(
            DISCRIMINATOR_OVERPOWERS,
            f"The discriminator is right on {real:.1%} of the real and {fake:.1%} of the generated images since "
            f"{recent[0].images_seen:,} images; the generator's loss is {recent[-1].generator_loss:.3g}, its gradient "
            f"norm {recent[-1].generator_gradient_norm:.3g}. Try a lower --discriminator-learning-rate, --dropout 0.3, "
            "--r1 1, --label-smoothing 0.1, or --augment translation.",
        )

    def _ring(self, name: str, message: str) -> Alarm | None:
        if name in self._ringing:
            return None
        self._ringing.add(name)
        return Alarm(self._recent[-1].images_seen, name, message)

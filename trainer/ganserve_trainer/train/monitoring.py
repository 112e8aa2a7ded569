"""Monitors a run: measures the diversity of the generator's images, and decides whether an alarm rings.

Diversity is measured on a probe: the images of the EMA generator for fixed latents. Nothing here uses torch's global
random state, and a monitor's decisions depend only on the run's points, so that a resumed run decides the same.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ganserve_trainer.report.history import Alarm, Modes, Point

MODE_COLLAPSE = "mode collapse"
DISCRIMINATOR_OVERPOWERS = "discriminator overpowers"
DROPPED_MODES = "dropped modes"
COPIES = "copies of training images"

_PROBE_IMAGES = 100
_PROBE_CLASSES = 10
_REAL_DRAWS = 8

# Measured on MNIST, Fashion-MNIST and CIFAR-10: healthy runs have a diversity of 0.2 to 1.1 from 20,000 images on,
# collapsed runs 0.000 to 0.003. The EMA generator starts with blurred images, with a diversity of 0.06 or more.
_COLLAPSED, _SPREAD = 0.1, 0.15
WARM_UP_IMAGES = 20_000
_COLLAPSE_POINTS = 5

# The mean over 10 points (200 steps) of the lower accuracy reaches 0.992 in runs that continue to learn, and 0.998 or
# more in overpowered runs. The generator's values are not used: in overpowered runs, its loss may be 15 or 0 and its
# gradient norm 17 or 0, depending on the loss function and on the cause.
_OVERPOWERED, _BALANCED = 0.995, 0.98
_ACCURACY_POINTS = 10

# A group has at least 120 images in three counts of as many real images: the chance of 18 or fewer is below 1e-25.
# With 20 instead of 40, real test images of a small, badly recognised class had 16 %.
_MODE_COUNTS = 3
_LEAST_EXPECTED = 40
_STARVED, _PRESENT = 0.15, 0.25
_COPIED, _NEW = 0.2, 0.3


@dataclass(frozen=True, slots=True)
class Probe:
    """The labels to ask the generator for, and the distance between real images of the same labels."""

    label: Tensor | None  # int64 [size], class by class; None for an unconditional generator
    size: int
    classes: int  # 1 for an unconditional generator
    real_distance: float  # nearest_distance of the same number of real images, averaged over draws


def build_probe(images: Tensor, labels: Tensor, *, conditional: bool) -> Probe:
    """Choose the probe for a training set, uint8 [n, channels, height, width] with labels [n], on its device.

    An unconditional generator is asked for 100 images. A conditional generator is asked for 10 images of each of at
    most 10 classes, which are evenly spaced among the classes with at least that many training images.
    """
    generator = torch.Generator().manual_seed(0)
    members = [torch.arange(len(images))]
    label = None
    classes = torch.zeros(1, dtype=torch.int64)
    if conditional:
        counts = labels.cpu().bincount()
        each = min(_PROBE_IMAGES // _PROBE_CLASSES, int(counts.max()))
        large_enough = (counts >= each).nonzero()[:, 0]
        chosen = torch.linspace(0, len(large_enough) - 1, min(_PROBE_CLASSES, len(large_enough))).round().long()
        classes = large_enough[chosen]
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
    """Compare the distances between generated images in -1…1, [probe.size, channels, height, width], with real ones.

    Returns:
        A scalar tensor. 1: the images differ as much as real images; 0: all images of a class are identical. Noise has
        more than 1. NaN if the real images cannot tell, because they are all identical or there is one for each class.
    """
    return nearest_distance(images, probe.classes) / (probe.real_distance or math.nan)


def nearest_distance(images: Tensor, groups: int) -> Tensor:
    """Return the median over all images of the RMS pixel distance to the nearest other image of the same group.

    The images are [groups * n, channels, height, width], group by group. The result is a scalar tensor; it is infinite
    for groups of one image.
    """
    pixels = images.float().flatten(1).unflatten(0, (groups, -1))
    # Without matrix products: under TF32 they would give identical images a distance above 0.
    distance = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return distance.amin(2).median() / math.sqrt(pixels.shape[2])


class Monitor:
    """Decides, point by point, whether an alarm rings.

    *Mode collapse* rings if, after 20,000 images, the diversity is below 0.1 at five points in a row. It clears when
    the diversity is above 0.15 at five points in a row.

    *Discriminator overpowers* rings if the means over ten points of the accuracy on real images and of the accuracy on
    generated images are both 0.995 or more. The generator's gradient then vanishes (minimax loss; Goodfellow et al.,
    2014, section 3) or becomes noisy (non-saturating loss; Arjovsky & Bottou, 2017, theorems 2.4 and 2.6). It clears
    when one of the means is below 0.98. It never rings for a Wasserstein critic, whose sign has no meaning and which is
    trained to its optimum on purpose (Arjovsky et al., 2017).

    *Dropped modes* rings if, in three counts in a row after 20,000 images, a class or cluster has fewer than 15 % of
    the images that it has in the data; groups of less than 4 % are too small to tell. It clears when all groups have
    25 %. *Copies of training images* rings if, in three counts in a row, the generated images are nearer to training
    images than 0.2 times the distance of held-out real images; it clears above 0.3.

    An alarm that rang stays silent until it has cleared. Values that are not finite never ring.
    """

    def __init__(self, points: Iterable[Point] = (), *, modes: Iterable[Modes] = (), critic: bool = False) -> None:
        """Observe the points and counts so far, whose alarms have already rung.

        Args:
            points: the run's history.
            modes: the run's counts of modes.
            critic: whether the logits are those of a critic, which have no zero between real and fake.
        """
        self._critic = critic
        self._recent: deque[Point] = deque(maxlen=_ACCURACY_POINTS)
        self._ringing: set[str] = set()
        self._counts: deque[Modes] = deque(maxlen=_MODE_COUNTS)
        for point in points:
            self.observe(point)
        for count in modes:
            self.observe_modes(count)

    def observe(self, point: Point) -> list[Alarm]:
        """Observe the next point; return the alarms that it rings."""
        self._recent.append(point)
        alarms = [] if self._critic else [self._overpowers()]
        return [alarm for alarm in (self._collapse(), *alarms) if alarm]

    def observe_modes(self, count: Modes) -> list[Alarm]:
        """Observe the next count of modes; return the alarms that it rings."""
        self._counts.append(count)
        if len(self._counts) < _MODE_COUNTS or self._counts[0].images_seen < WARM_UP_IMAGES:
            return []
        return [alarm for alarm in (self._dropped(), self._copies()) if alarm]

    def _dropped(self) -> Alarm | None:
        last = self._counts[-1]
        shares = {
            name: sum(count.generated[group] for count in self._counts)
            / sum(count.expected[group] for count in self._counts)
            for group, name in enumerate(last.names)
            if last.expected[group] >= _LEAST_EXPECTED
        }
        if all(share >= _PRESENT for share in shares.values()):
            self._ringing.discard(DROPPED_MODES)
        starved = [f"{name} ({share:.0%})" for name, share in shares.items() if share < _STARVED]
        if not starved:
            return None
        more = f" and {len(starved) - 10} more" if len(starved) > 10 else ""
        return self._ring(
            DROPPED_MODES,
            f"{len(starved)} of {len(last.names)} classes or clusters are missing or starved since "
            f"{self._counts[0].images_seen:,} images: {', '.join(starved[:10])}{more}, in percent of the images that "
            f"they have in the data; coverage is {last.coverage:.2f}. Try --minibatch stddev, a lower --learning-rate, "
            "--r1 1, or another --loss.",
            last.images_seen,
        )

    def _copies(self) -> Alarm | None:
        distances = [count.distance for count in self._counts]
        if all(distance > _NEW for distance in distances):
            self._ringing.discard(COPIES)
        if not all(distance < _COPIED for distance in distances):
            return None
        return self._ring(
            COPIES,
            f"The generated images are at most {max(distances):.2f} times as far from training images as new real "
            f"images are since {self._counts[0].images_seen:,} images. Try more training images, --augment "
            "translation+cutout, fewer --images, or a lower --width.",
            self._counts[-1].images_seen,
        )

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
            recent[-1].images_seen,
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
            recent[-1].images_seen,
        )

    def _ring(self, name: str, message: str, images_seen: int) -> Alarm | None:
        if name in self._ringing:
            return None
        self._ringing.add(name)
        return Alarm(images_seen, name, message)

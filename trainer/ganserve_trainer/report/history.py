"""The record of a run: a point every few steps, metrics and modes at intervals, and the alarms that rang."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_SMALLER_IS_BETTER = ("fid", "fid_over_floor")


class Point(NamedTuple):
    """The means over the steps since the last point; accuracies are shares, gradient norms are over all parameters."""

    images_seen: int
    elapsed_s: float
    discriminator_loss: float
    generator_loss: float
    real_accuracy: float  # share of real images with a positive logit
    fake_accuracy: float  # share of generated images with a negative logit
    discriminator_gradient_norm: float
    generator_gradient_norm: float
    diversity: float  # see monitoring.diversity; 1 is that of real images, 0 a collapsed generator


class Measurement(NamedTuple):
    """Metrics of the EMA generator at one point of the run, by name."""

    images_seen: int
    elapsed_s: float
    metrics: dict[str, float]


class Modes(NamedTuple):
    """How often the EMA generator makes each class or cluster of the data, and how near its images are to the data."""

    images_seen: int
    names: tuple[str, ...]  # of the groups: classes, or clusters
    generated: tuple[float, ...]  # estimated number of generated images of each group
    expected: tuple[float, ...]  # number among as many real images, or the number asked for
    coverage: float  # share of real images that have a generated image nearby (Naeem et al., 2020)
    distance: float  # median distance to the nearest training image, over that of held-out real images; 0 are copies


class Alarm(NamedTuple):
    """A condition that a person should look at."""

    images_seen: int
    name: str  # one of the names in monitoring
    message: str


@dataclass(slots=True)
class History:
    """The whole record of a run; the checkpoint holds it, so that a resumed run continues it."""

    points: list[Point] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    modes: list[Modes] = field(default_factory=list)

    def to_plain(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return plain tuples, which load from a checkpoint without running code."""
        return {
            "points": [tuple(point) for point in self.points],
            "measurements": [tuple(measurement) for measurement in self.measurements],
            "alarms": [tuple(alarm) for alarm in self.alarms],
            "modes": [tuple(count) for count in self.modes],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, list[tuple[Any, ...]]]) -> "History":
        """Rebuild what `to_plain` returned."""
        return cls(
            [Point(*point) for point in plain["points"]],
            [Measurement(*measurement) for measurement in plain["measurements"]],
            [Alarm(*alarm) for alarm in plain["alarms"]],
            [Modes(*count) for count in plain.get("modes", [])],
        )


def score(measurement: Measurement, select: str) -> float:
    """Return the value of the selected metric, higher for a better generator; -inf if it is missing or not finite."""
    value = measurement.metrics.get(select, math.nan)
    if not math.isfinite(value):
        return -math.inf
    return -value if select in _SMALLER_IS_BETTER else value


def best_of(measurements: Sequence[Measurement], select: str) -> Measurement | None:
    """Return the best measurement, the first of equal ones; None if none has a finite value."""
    best = max(measurements, key=lambda each: score(each, select), default=None)
    return None if best is None or score(best, select) == -math.inf else best

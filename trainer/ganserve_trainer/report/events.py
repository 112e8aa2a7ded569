"""Writes a run's history for TensorBoard; the step is the number of images seen."""

from pathlib import Path

import numpy as np
from PIL import Image

from ganserve_trainer.report.history import Alarm, Measurement, Modes, Point


def scalars_of(point: Point) -> dict[str, float]:
    """Return the values of the curves by the names that trackers show."""
    return {
        "loss/discriminator": point.discriminator_loss,
        "loss/generator": point.generator_loss,
        "accuracy/real": point.real_accuracy,
        "accuracy/fake": point.fake_accuracy,
        "gradient_norm/discriminator": point.discriminator_gradient_norm,
        "gradient_norm/generator": point.generator_gradient_norm,
        "diversity": point.diversity,
    }


def scalars_of_modes(modes: Modes) -> dict[str, float]:
    """Return the share of the least frequent group, coverage and distance by the names that trackers show."""
    shares = [made / wanted for made, wanted in zip(modes.generated, modes.expected, strict=True) if wanted]
    return {"modes/least_share": min(shares), "modes/coverage": modes.coverage, "modes/distance": modes.distance}


class TensorBoardWriter:
    """Writes one folder of TensorBoard events. Closing it, or leaving its `with` statement, writes the last events."""

    def __init__(self, folder: Path, *, resume_at: int | None = None) -> None:
        """Open the folder.

        Args:
            folder: the folder of the events; it is created if it does not exist.
            resume_at: the images seen at the checkpoint that the run resumes from; TensorBoard then drops later events.
        """
        # Imported here, because importing tensorboard takes a second and most commands write no events.
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard also purges purge_step itself, but the event at `resume_at` is part of the checkpoint's history.
        purge_step = None if resume_at is None else resume_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def point(self, point: Point) -> None:
        """Write the next values of the curves."""
        self._scalars(scalars_of(point), point.images_seen)

    def measurement(self, measurement: Measurement) -> None:
        """Write metrics."""
        values = {f"metrics/{name}": value for name, value in measurement.metrics.items()}
        self._scalars(values, measurement.images_seen)

    def modes(self, modes: Modes) -> None:
        """Write the share of the least frequent group, coverage and the distance to the training images."""
        self._scalars(scalars_of_modes(modes), modes.images_seen)

    def alarm(self, alarm: Alarm) -> None:
        """Write an alarm as a text."""
        self._writer.add_text(f"alarms/{alarm.name}", alarm.message, alarm.images_seen)

    def sheet(self, path: Path, images_seen: int) -> None:
        """Write a contact sheet."""
        with Image.open(path) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), images_seen, dataformats="HWC")

    def flush(self) -> None:
        """Write pending events. Called before each checkpoint, so that a run that is killed and resumed has no gap."""
        self._writer.flush()

    def close(self) -> None:
        """Write pending events, and close the folder."""
        self._writer.close()

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scalars(self, values: dict[str, float], images_seen: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, images_seen)

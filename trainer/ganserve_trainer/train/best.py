"""The best checkpoint of a run: kept in a file of its own, and chosen for an export or an evaluation.

A run that is measured keeps the checkpoint with the best value of `Settings.select` as `checkpoints/best.pt`. Resuming
continues from the newest checkpoint, not from the best.
"""

import math
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.report.history import Measurement, best_of, score
from ganserve_trainer.settings import Settings
from ganserve_trainer.train.checkpoints import FOLDER_NAME, Checkpoint, load_checkpoint, write_checkpoint

FILE_NAME = "best.pt"


class Choice(StrEnum):
    """The checkpoint of a run's folder to use."""

    BEST = "best"
    LAST = "last"


def is_out_of_patience(measurements: Sequence[Measurement], settings: Settings) -> bool:
    """Return whether the last `settings.patience` measurements, if that is not 0, were no better than one before."""
    best = best_of(measurements, settings.select)
    if not settings.patience or best is None:
        return False
    return sum(each.images_seen > best.images_seen for each in measurements) >= settings.patience


class BestCheckpoint:
    """Keeps the best checkpoint of the run in `out`; a damaged file counts as none."""

    def __init__(self, out: Path, select: str) -> None:
        self._path = out / FOLDER_NAME / FILE_NAME
        self._select = select
        self._score = -math.inf
        self.digest: str | None = None  # of the best generator
        if kept := _read(out):
            self._score = _own_score(kept, select)
            self.digest = kept.digest()

    def offer(self, checkpoint: Checkpoint) -> None:
        """Keep the checkpoint, whose last measurement is its own, if it is better than the one that is kept."""
        now = _own_score(checkpoint, self._select)
        if now > self._score:
            write_checkpoint(checkpoint, self._path)
            self._score, self.digest = now, checkpoint.digest()


def load_chosen(path: Path, choice: Choice = Choice.BEST) -> Checkpoint:
    """Read a checkpoint or, of a run's folder, the best or the last one; say on stderr which one.

    A run that was never measured has no best checkpoint; its last one is used, and so it is where best.pt is damaged.

    Raises:
        TrainerError: there is no readable checkpoint.
    """
    if not path.is_dir():
        return load_checkpoint(path)
    last = load_checkpoint(path)
    best = _read(path)
    if best is None:
        return last
    figures = [f"{name} has {_described(each)}" for name, each in ((Choice.BEST, best), (Choice.LAST, last))]
    print(f"{choice} checkpoint of {path}: {'; '.join(figures)}", file=sys.stderr)
    return best if choice is Choice.BEST else last


def _read(run: Path) -> Checkpoint | None:
    path = run / FOLDER_NAME / FILE_NAME
    if not path.exists():
        return None
    try:
        return load_checkpoint(path)
    except TrainerError as error:
        print(f"{error}; the run has no best checkpoint until its next measurement", file=sys.stderr)
        return None


def _own_score(checkpoint: Checkpoint, select: str) -> float:
    measured = checkpoint.history.measurements
    return score(measured[-1], select) if measured else -math.inf


def _described(checkpoint: Checkpoint) -> str:
    select, measured = checkpoint.settings.select, checkpoint.history.measurements
    figure = "not measured"
    if measured and select in measured[-1].metrics:
        figure = f"{select} {measured[-1].metrics[select]:.4g}"
        if measured[-1].images_seen != checkpoint.images_seen:
            figure += f" at {measured[-1].images_seen:,}"
    return f"{checkpoint.images_seen:,} images, {figure}"

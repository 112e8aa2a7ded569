"""Writes a run's report from a checkpoint."""

from pathlib import Path

from ganserve_trainer.report.page import write_report
from ganserve_trainer.settings import PRESETS, versions
from ganserve_trainer.train.checkpoints import Checkpoint


def report_on(checkpoint: Checkpoint, out: Path, *, best: str | None = None) -> None:
    """Write `report.html` into a run's folder, for the state of a checkpoint; `best` is the best generator's digest."""
    settings = checkpoint.settings
    write_report(
        out,
        settings,
        checkpoint.spec,
        checkpoint.history,
        versions(),
        preset=PRESETS[settings.preset].settings,
        images_seen=checkpoint.images_seen,
        elapsed_s=checkpoint.elapsed_s,
        device=checkpoint.device,
        finished=settings.are_fulfilled(checkpoint.images_seen, checkpoint.elapsed_s),
        checkpoint_digest=best or checkpoint.digest(),
    )

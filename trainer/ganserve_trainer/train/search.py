"""Searches for good settings with Optuna: trials that each train one run of a sweep, for the lowest FID.

All processes that search in the same folder, on any machines that share it, work on one study. A trial holds a file
lock while it runs, which the kernel releases when the process ends. So a trial whose process was killed is found at
once, and another process resumes its run.
"""

import dataclasses
import fcntl
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import Settings
from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint
from ganserve_trainer.train.loop import resolved
from ganserve_trainer.train.run import derived_seed
from ganserve_trainer.train.sweep import (
    TABLE_FILE_NAME,
    Range,
    Runner,
    combinations,
    digest,
    refuse_hopeless_values,
    table,
    write_results,
)

PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "none": optuna.pruners.NopPruner,
}
_JOURNAL_NAME = "study.journal"
_MOST_ATTEMPTS = 3  # of a trial whose process ends, for example because memory runs out


def search(
    runner: Runner,
    axes: Sequence[tuple[str, list[Any] | Range]],
    settings_of: Callable[[dict[str, Any]], Settings],
    *,
    trials: int,
    pruner: str = "median",
    storage: str | None = None,
) -> str:
    """Take part in a study until it has `trials` trials; return the table of all of them, best first.

    The study belongs to the folder, the settings, the data and the axes: if one of these changes, it is another study.
    The samples of a process that searches alone depend on the settings' seed only.

    Args:
        runner: trains and measures a run.
        axes: settings, and their values or ranges.
        settings_of: returns the settings of a trial.
        trials: the number of trials of the study, of all processes together.
        pruner: a name of `PRUNERS`; pruning needs `evaluate_every_images`.
        storage: the URL of a database for the study; None is a journal in the folder.

    Raises:
        TrainerError: no trial could be trained, or a value or the end of a range is rejected in all combinations.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ends = [(name, [span.low, span.high] if isinstance(span, Range) else span) for name, span in axes]
    corners = combinations(ends)
    refuse_hopeless_values(corners, settings_of)
    base = next(settings for values in corners if (settings := _valid(settings_of, values)))
    runner.out.mkdir(parents=True, exist_ok=True)
    described = [(name, dataclasses.asdict(span) if isinstance(span, Range) else span) for name, span in axes]
    kept = [dataclasses.asdict(resolved(base)), runner.digest_of(base), described, *runner.method()]
    lock = _FileLock(runner.out / "study.lock")
    with lock.held():
        study = optuna.create_study(
            storage=_storage(storage, runner.out),
            study_name=digest(kept)[:16],
            load_if_exists=True,
            pruner=PRUNERS[pruner](),
        )
    while (begun := _next_trial(study, lock, runner.out, trials, base.seed, shared=storage is None)) is not None:
        trial, claim = begun
        try:
            _one(trial, study, runner, axes, settings_of)
        finally:
            # A trial that was stopped here keeps its state; whoever takes the lock resumes it.
            claim.release()
        write_results(_rows(study), runner.out)
    rows = _rows(study)
    write_results(rows, runner.out)
    if not any("images" in row for row in rows):
        raise TrainerError(
            f"none of the {len(rows)} trials could be trained; the reasons are in {runner.out / TABLE_FILE_NAME}"
        )
    return table(rows)


class _FileLock:
    """A lock that the kernel releases when its process ends, also on NFS, where the file must be open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; return False if another process has it and `wait` is false."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


def _storage(url: str | None, out: Path) -> BaseStorage:
    if url is not None:
        return RDBStorage(url)
    # Optuna's own locks are files that a killed process leaves behind, for 30 s.
    lock: Any = _FileLock(out / f"{_JOURNAL_NAME}.lock")
    return JournalStorage(JournalFileBackend(str(out / _JOURNAL_NAME), lock_obj=lock))


def _next_trial(
    study: optuna.Study, lock: _FileLock, out: Path, wanted: int, seed: int, *, shared: bool
) -> tuple[Trial, _FileLock] | None:
    """Begin a trial, and hold its lock; return None if the study has the wanted number of trials."""
    with lock.held():
        _queue_lost_trials(study, out, shared=shared)
        known = study.get_trials(deepcopy=False)
        if all(trial.state is not TrialState.WAITING for trial in known) and len(_counted(known)) >= wanted:
            return None
        # A seed of its own for each trial: a process that starts again does not repeat the samples of the first trials.
        study.sampler = optuna.samplers.TPESampler(seed=derived_seed(seed, "trial", len(known)) % 2**32)
        trial = study.ask()
        claim = _claim(study, out, trial.number)
        claim.acquire()
        return trial, claim


def _claim(study: optuna.Study, out: Path, number: int) -> _FileLock:
    folder = out / "locks"
    folder.mkdir(exist_ok=True)
    return _FileLock(folder / f"{study.study_name}-{number}")


def _queue_lost_trials(study: optuna.Study, out: Path, *, shared: bool) -> None:
    """Queue those trials again whose process has ended; their runs resume from their checkpoints."""
    for lost in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        claim = _claim(study, out, lost.number)
        if not shared and not claim.path.exists():
            continue  # of a process with another folder, whose locks are not here
        if not claim.acquire(wait=False):
            continue
        attempt = int(lost.user_attrs.get("attempt", 1))
        # First the new one: if this process ends between the two, the run is only looked up twice.
        if lost.params and attempt < _MOST_ATTEMPTS:
            study.enqueue_trial(lost.params, user_attrs={"attempt": attempt + 1, "instead_of": lost.number})
            print(f"trial {lost.number} has lost its process, and is resumed", file=sys.stderr, flush=True)
        study.tell(lost.number, state=TrialState.FAIL)
        claim.release()


def _counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials without those that another trial resumes, or that had no values yet."""
    resumed = {trial.user_attrs.get("instead_of") for trial in trials}
    return [
        trial
        for trial in trials
        if trial.number not in resumed and not (trial.state is TrialState.FAIL and not trial.params)
    ]


def _one(
    trial: Trial,
    study: optuna.Study,
    runner: Runner,
    axes: Sequence[tuple[str, list[Any] | Range]],
    settings_of: Callable[[dict[str, Any]], Settings],
) -> None:
    values = {name: _suggest(trial, name, span) for name, span in axes}
    shown = ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
    print(f"trial {trial.number}: {shown}", file=sys.stderr, flush=True)

    def watch(images_seen: int, metrics: dict[str, float]) -> None:
        _report(trial, images_seen, metrics)
        if trial.should_prune():
            raise optuna.TrialPruned(f"FID {metrics['fid']:.4g} after {images_seen} images")

    try:
        settings = settings_of(values)
        folder, _ = runner.folders(values, settings)
        if checkpoint_files(folder):
            for measurement in load_checkpoint(folder).history.measurements:
                _report(trial, measurement.images_seen, measurement.metrics)
        figures = runner.run(values, settings, watch)
        if not math.isfinite(figures["fid"]):
            raise TrainerError(f"the FID is {figures['fid']}")
    except optuna.TrialPruned as pruned:
        trial.set_user_attr("outcome", f"pruned: {pruned}")
        study.tell(trial, state=TrialState.PRUNED)
    except TrainerError as error:
        trial.set_user_attr("outcome", str(error).splitlines()[0])
        study.tell(trial, state=TrialState.FAIL)
    else:
        trial.set_user_attr("figures", figures)
        study.tell(trial, figures["fid"])


def _suggest(trial: Trial, name: str, span: list[Any] | Range) -> Any:
    if not isinstance(span, Range):
        return trial.suggest_categorical(name, span)
    if isinstance(span.low, int) and isinstance(span.high, int):
        return trial.suggest_int(name, span.low, span.high, log=span.log)
    return trial.suggest_float(name, span.low, span.high, log=span.log)


def _report(trial: Trial, images_seen: int, metrics: dict[str, float]) -> None:
    if math.isfinite(metrics["fid"]):
        trial.report(metrics["fid"], images_seen)


def _valid(settings_of: Callable[[dict[str, Any]], Settings], values: dict[str, Any]) -> Settings | None:
    try:
        return settings_of(values)
    except TrainerError:
        return None


def _rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Return the finished trials: complete ones by FID, then the others."""
    ended = [trial for trial in _counted(study.get_trials(deepcopy=False)) if trial.state.is_finished()]
    ended.sort(key=lambda trial: (trial.state is not TrialState.COMPLETE, trial.values or [], trial.number))
    return [
        {
            "trial": trial.number,
            **trial.params,
            "outcome": trial.user_attrs.get("outcome", "its process ended"),
            **trial.user_attrs.get("figures", {}),
        }
        for trial in ended
    ]

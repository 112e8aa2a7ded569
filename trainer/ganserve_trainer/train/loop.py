"""Runs a training from start to end: steps, history, alarms, samples, checkpoints, report."""

import fcntl
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ganserve_trainer.data.datasets import Dataset
from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import CollapsedError, TrainerError
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.networks.architecture import parameter_count
from ganserve_trainer.networks.generator import Generator
from ganserve_trainer.networks.layers import ProgressiveGenerator
from ganserve_trainer.report.history import Alarm, Measurement, Point
from ganserve_trainer.report.metrics_file import FILE_NAME as METRICS_FILE_NAME
from ganserve_trainer.report.metrics_file import MetricsFile
from ganserve_trainer.report.page import REAL_FILE_NAME
from ganserve_trainer.report.pictures import save_contact_sheet, save_interpolations
from ganserve_trainer.report.trackers import Trackers
from ganserve_trainer.settings import Settings, free_on_resume, versions, write_config
from ganserve_trainer.train import processes
from ganserve_trainer.train.best import BestCheckpoint, is_out_of_patience
from ganserve_trainer.train.checkpoints import (
    FOLDER_NAME,
    Checkpoint,
    checkpoint_files,
    load_checkpoint,
    save_checkpoint,
)
from ganserve_trainer.train.clock import Clock
from ganserve_trainer.train.devices import best_device, bf16_is_fast
from ganserve_trainer.train.modes import EVERY_IMAGES, ModeCounter
from ganserve_trainer.train.monitoring import MODE_COLLAPSE, Monitor, build_probe, diversity
from ganserve_trainer.train.reporting import report_on
from ganserve_trainer.train.run import Run, derived_seed, diverged
from ganserve_trainer.train.starting import start_from
from ganserve_trainer.train.stopping import caught_signals

Report = Callable[[Point, float], None]  # the latest point, images per second
Measure = Callable[[Generator], dict[str, float]]

CONFIG_FILE_NAME = "run.toml"
_POINT_EVERY_STEPS = 20
_SPARSENESS = 1000
_SLOW_POINT_S = 30.0
_SHEET_COLUMNS = 10
_SHEET_ROWS = 10


def train(
    settings: Settings, dataset: Dataset, out: Path, *, resume: bool, report: Report, measure: Measure | None = None
) -> bool:
    """Train until `settings.images` images are seen or `settings.minutes` have passed; write everything to `out`.

    `out` contains `run.toml`, `checkpoints/`, `samples/`, `report.html`, `metrics.jsonl` and `tensorboard/`. SIGINT,
    SIGTERM and SIGHUP save a checkpoint and end the run early, SIGUSR1 saves one. Under torchrun every process calls
    this, and only the first process writes.

    Args:
        settings: the settings of the run.
        dataset: the training part.
        out: the run's folder.
        resume: continue the run in `out`, if there is one.
        report: called with every point of the history.
        measure: called with the EMA generator every `settings.evaluate_every_images` images and at the end; its time
            does not count.

    Returns:
        Whether the run is complete, or has ended because of `settings.patience`.

    Raises:
        TrainerError: `out` contains a run and `resume` is false, or a run with other settings or data and `resume` is
            true; another process trains in `out`; losses or weights are no longer finite, in which case the last
            checkpoint is from before; or the mode collapse alarm rang and `settings.stop_on_collapse` is set.
        OSError: a file cannot be written; the last checkpoint is complete.
    """
    processes.start()
    try:
        with ExitStack() as stack:
            with processes.failing_together():
                if processes.rank() == 0:
                    out.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(_only_trainer_of(out))
            return _train(settings, dataset, out, resume, report, measure)
    finally:
        processes.stop()


def _train(
    settings: Settings, dataset: Dataset, out: Path, resume: bool, report: Report, measure: Measure | None
) -> bool:
    run = _begin(settings, dataset, out, resume=resume)
    settings = run.settings
    with processes.failing_together():
        folder = _Folder(out, run) if processes.rank() == 0 else None
    probe = build_probe(run.images, run.labels, conditional=settings.conditional)
    probe_latent = _fixed_latents(settings, "probe", probe.size)
    if folder is not None:
        _announce(run, dataset)
    monitor = Monitor(run.history.points, modes=run.history.modes, critic=settings.adversarial_loss.is_critic)
    counter: ModeCounter | None = None  # made when a count is first due, because a short run needs none
    recent: list[Tensor] = []
    started = time.monotonic() - run.elapsed_s
    last_point = (run.elapsed_s, run.images_seen)
    sheets = Clock(settings.sample_every_minutes)
    saves = Clock(settings.checkpoint_every_minutes)

    def due(every: int) -> bool:
        return bool(every) and run.images_seen // every > (run.images_seen - run.images_a_step) // every

    with caught_signals() as asked, folder.trackers if folder is not None else nullcontext():
        if folder is not None and not run.images_seen:
            folder.sample(run)
        exhausted = is_out_of_patience(run.history.measurements, settings)
        last = exhausted or settings.are_fulfilled(run.images_seen, run.elapsed_s)
        while not last:
            recent.append(run.step())
            run.elapsed_s = time.monotonic() - started
            enough = asked.stop.is_set() or settings.are_fulfilled(run.images_seen, run.elapsed_s)
            # Points become less frequent, so that the history of a long run does not outgrow its weights.
            point_due = len(recent) >= max(_POINT_EVERY_STEPS, run.images_seen // run.images_a_step // _SPARSENESS)
            if processes.count() > 1:
                # All processes must agree. The exchange takes time, so it happens only when a point is due.
                enough = point_due and processes.any_is_true(enough, run.device)
            last = enough or run.images_seen >= settings.images
            sheet_due = folder is not None and sheets.is_due()
            save_due = folder is not None and saves.is_due()
            if processes.count() > 1:
                sheet_due = point_due and processes.any_is_true(sheet_due, run.device)
                save_due = point_due and processes.any_is_true(save_due or asked.save.is_set(), run.device)
            else:
                # The clock adds no points to the history, unless steps are slow.
                timely = point_due or run.elapsed_s - last_point[0] > _SLOW_POINT_S
                sheet_due, save_due = sheet_due and timely, (save_due and timely) or asked.save.is_set()
            sample = last or sheet_due or due(settings.sample_every_images)
            save = last or save_due or due(settings.checkpoint_every_images)
            measurement_due = due(settings.evaluate_every_images)
            complete = last and settings.are_fulfilled(run.images_seen, run.elapsed_s)
            evaluate = measure is not None and (complete or measurement_due)
            count = due(EVERY_IMAGES)
            if not (point_due or sample or save or evaluate or count):
                continue

            if save:
                asked.save.clear()
            # One transfer for all steps since the last point: reading each step's loss would stall a GPU.
            means = processes.average(torch.stack(recent).mean(0))
            recent.clear()
            diverse = diversity(run.show(probe_latent, probe.label), probe)
            numbers = torch.cat([means, run.gradient_norms(), diverse.view(1)]).tolist()
            if not all(math.isfinite(number) for number in numbers[:4]):
                raise diverged(run.images_seen)
            if settings.minutes and settings.decays:
                # The clocks of processes differ, but their learning rates must not.
                elapsed = torch.tensor(run.elapsed_s, dtype=torch.float64, device=run.device)
                run.scheduled_s = processes.average(elapsed).item()
            point = Point(run.images_seen, run.elapsed_s, *numbers)
            run.history.points.append(point)
            rate = (run.images_seen - last_point[1]) / max(run.elapsed_s - last_point[0], 1e-9)
            alarms = monitor.observe(point)
            run.history.alarms += alarms
            collapse = next((alarm for alarm in alarms if alarm.name == MODE_COLLAPSE), None)
            ends = collapse is not None and settings.stop_on_collapse
            if folder is not None:
                folder.trackers.point(point)
                folder.metrics.add(point)
                if count:
                    counter = counter or ModeCounter(dataset, conditional=settings.conditional)
                    counted = counter.count(run.images_seen, _generate(run))
                    run.history.modes.append(counted)
                    folder.trackers.modes(counted)
                    folder.metrics.add(counted)
                    dropped = monitor.observe_modes(counted)
                    run.history.alarms += dropped
                    alarms += dropped
                for alarm in alarms:
                    folder.ring(alarm)
                report(point, rate)
                if evaluate and measure is not None:
                    measurement = Measurement(run.images_seen, run.elapsed_s, measure(run.ema.network))
                    run.history.measurements.append(measurement)
                    folder.trackers.measurement(measurement)
                    folder.metrics.add(measurement)
                    folder.best.offer(run.checkpoint())
                    exhausted = is_out_of_patience(run.history.measurements, settings)
                save, sample = save or exhausted, sample or exhausted
                if save or ends:
                    folder.trackers.flush()
                    with saves.writing():
                        save_checkpoint(run.checkpoint(), out)
                if sample or ends:
                    with sheets.writing():
                        folder.sample(run)
            if evaluate:
                # Measuring is not training: its time counts neither for `minutes` nor for images per second.
                started = time.monotonic() - run.elapsed_s
            if measurement_due:
                exhausted = processes.any_is_true(exhausted, run.device)
                last = last or exhausted
            last_point = (run.elapsed_s, run.images_seen)
            if ends and collapse is not None:
                raise CollapsedError(
                    f"{collapse.message} The run ends here because of stop_on_collapse; its files are in {out}"
                )
    if folder is not None:
        _warn_if_not_full_size(run)
    if exhausted and folder is not None:
        print(
            f"{settings.select} is not better than before in the last {settings.patience} measurements: the run ends "
            f"after {run.images_seen:,} images; to continue it, increase --patience",
            file=sys.stderr,
        )
    return exhausted or settings.are_fulfilled(run.images_seen, run.elapsed_s)


def resolved(settings: Settings) -> Settings:
    """Return the settings with the precision that auto has on this machine."""
    if settings.precision != "auto":
        return settings
    return replace(settings, precision="bf16" if bf16_is_fast(best_device()) else "fp32")


def _begin(settings: Settings, dataset: Dataset, out: Path, *, resume: bool) -> Run:
    device = best_device()
    with processes.failing_together():
        settings = resolved(settings)
        checkpoint = None
        if checkpoint_files(out):
            if not resume:
                raise TrainerError(f"{out} already has a run; resume it with --resume, or choose another --out")
            checkpoint = load_checkpoint(out)
            if not settings.init_digest:
                settings = replace(settings, init_digest=checkpoint.settings.init_digest)
            _check_same_run(checkpoint, settings, dataset)
    processes.check_same(_facts(settings, dataset, checkpoint))
    with processes.failing_together():
        run = Run(settings, dataset, device)
        if checkpoint is not None:
            run.restore(checkpoint)
        elif settings.init_from:
            run.settings = replace(settings, init_digest=start_from(run))
    return run


def _facts(settings: Settings, dataset: Dataset, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Return what must be the same in all processes."""
    started = "none" if checkpoint is None else f"of {checkpoint.images_seen} images, {checkpoint.digest()[:19]}"
    return {
        "data": f"{len(dataset.images)} images, {dataset.digest()[:19]}",
        "classes": _described(dataset.spec),
        "checkpoint": started,
        # Not the path of the data set, whose digest counts.
        **{name: str(value) for name, value in asdict(settings).items() if name != "dataset"},
        **versions(),
    }


def _announce(run: Run, dataset: Dataset) -> None:
    """Print the networks, the data and the device on stderr."""
    settings = run.settings
    few = replace(dataset.spec, class_names=dataset.spec.class_names[:10])
    more = ", …" if len(dataset.spec.class_names) > 10 else ""
    print(
        f"{dataset.name}: {len(dataset.images):,} training images, {_described(few)}{more}\n"
        f"{settings.preset}: {parameter_count(run.generator):,} parameters in the generator (G), "
        f"{parameter_count(run.discriminator):,} in the discriminator (D); {settings.precision} on {run.device.type}"
        f"{f', from {run.images_seen:,} images on' if run.images_seen else ''}",
        file=sys.stderr,
        flush=True,
    )
    layers = run.generator.layers
    if isinstance(layers, ProgressiveGenerator):
        never = (
            f", and the run ends before, after {settings.images:,}"
            if settings.images < layers.full_size_after()
            else ""
        )
        print(f"the images reach their full size after {layers.full_size_after():,} images{never}", file=sys.stderr)


def _warn_if_not_full_size(run: Run) -> None:
    """Print a warning on stderr if the generator still makes images of a lower resolution."""
    layers = run.generator.layers
    if isinstance(layers, ProgressiveGenerator) and (left := layers.doublings_left()):
        height, width = run.spec.height >> left, run.spec.width >> left
        print(
            f"WARNING: the images are not full-size: they have the detail of {height}x{width} pixels, in "
            f"{run.spec.height}x{run.spec.width}. The full size is reached after {layers.full_size_after():,} images: "
            "resume with more --images, or start again with a lower --growth-images",
            file=sys.stderr,
            flush=True,
        )


class _Folder:
    """Writes a run's folder, except its checkpoints."""

    def __init__(self, out: Path, run: Run) -> None:
        self.out = out
        _remove_leftovers(out)
        with replace_atomically(out / CONFIG_FILE_NAME) as file:
            file.write(write_config(run.settings).encode())
        (out / "samples").mkdir(exist_ok=True)
        self.best = BestCheckpoint(out, run.settings.select)
        config = asdict(run.settings) | versions()
        self.trackers = Trackers(run.settings.trackers(), out, config, resume_at=run.images_seen or None)
        self.metrics = MetricsFile(out / METRICS_FILE_NAME, run.history)
        classes = min(len(run.spec.class_names), _SHEET_ROWS) if run.settings.conditional else 0
        rows = classes or _SHEET_ROWS
        self._latent = _fixed_latents(run.settings, "sheet", rows * _SHEET_COLUMNS)
        self._label = torch.arange(rows).repeat_interleave(_SHEET_COLUMNS) if classes else None
        self._names = run.spec.class_names[:classes]
        save_contact_sheet(_real(run, self._label), _SHEET_COLUMNS, out / REAL_FILE_NAME, self._names)

    def ring(self, alarm: Alarm) -> None:
        """Print and record an alarm."""
        print(f"ALARM after {alarm.images_seen} images: {alarm.name}. {alarm.message}", file=sys.stderr, flush=True)
        self.trackers.alarm(alarm)
        self.metrics.add(alarm)

    def sample(self, run: Run) -> None:
        """Write the EMA generator's images of the run's fixed latents, and the report."""
        path = self.out / "samples" / f"{run.images_seen:012d}.png"
        save_contact_sheet(run.show(self._latent, self._label), _SHEET_COLUMNS, path, self._names)
        rows = None if self._label is None else self._label[::_SHEET_COLUMNS]
        save_interpolations(run.show, run.settings.latent_dim, self.out / "interpolations.png", label=rows)
        self.trackers.sheet(path, run.images_seen)
        report_on(run.checkpoint(), self.out, best=self.best.digest)


def _real(run: Run, label: Tensor | None) -> Tensor:
    """Return training images in -1…1 for a sheet: of the labels [n], class by class, or any if there are none.

    A class with fewer images than its row repeats them.
    """
    order = torch.randperm(len(run.images), generator=torch.Generator().manual_seed(0)).to(run.device)
    if label is None:
        chosen = order[: _SHEET_ROWS * _SHEET_COLUMNS]
    else:
        members = [order[run.labels[order] == value] for value in label[::_SHEET_COLUMNS].tolist()]
        columns = torch.arange(_SHEET_COLUMNS, device=run.device)
        chosen = torch.cat([member[columns % len(member)] for member in members if len(member)])
    return run.images[chosen].float().div(127.5).sub(1)


def _generate(run: Run) -> Callable[[Tensor], Tensor]:
    """Return a function that makes images of labels [n], from latents that depend on the progress and the seed."""
    settings = run.settings
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "modes", run.images_seen))

    def generate(label: Tensor) -> Tensor:
        latent = torch.randn(len(label), settings.latent_dim, generator=generator)
        return run.show(latent, label if settings.conditional else None)

    return generate


def _fixed_latents(settings: Settings, purpose: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, purpose, 0))
    return torch.randn(count, settings.latent_dim, generator=generator)


def _check_same_run(checkpoint: Checkpoint, settings: Settings, dataset: Dataset) -> None:
    """Reject resuming with other settings or data; only the run's length and how often it reports may change.

    Raises:
        TrainerError: the settings or the data differ, or the run has already seen more images.
    """
    before, now = asdict(checkpoint.settings), asdict(settings)
    free = free_on_resume(settings)
    differing = [name for name in before if name not in free and before[name] != now[name]]
    if differing:
        changes = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differing)
        raise TrainerError(f"--resume needs the same settings, but {changes}")
    if checkpoint.dataset_digest != dataset.digest():
        raise TrainerError(
            "--resume needs the same data, but the data set's images or labels have changed: it now has "
            f"{len(dataset.images)} images; restore the data set, or start a new run in another --out"
        )
    if checkpoint.spec != dataset.spec:
        raise TrainerError(
            "--resume needs the same data, but its images have another shape, or its classes have other names: "
            f"{_described(dataset.spec)} now; {_described(checkpoint.spec)} before"
        )
    if checkpoint.images_seen > settings.images:
        raise TrainerError(f"the run has seen {checkpoint.images_seen} images already; increase --images")


def _described(spec: ImageSpec) -> str:
    return f"{spec.height}x{spec.width}x{spec.channels}, classes {', '.join(spec.class_names) or 'none'}"


@contextmanager
def _only_trainer_of(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel releases when the process ends."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainerError(f"another process is training in {out}; wait for it, or choose another --out") from error
    else:
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(out: Path) -> None:
    """Delete the temporary files of a killed process; the lock keeps other processes from writing here."""
    for folder in (out, out / FOLDER_NAME, out / "samples"):
        for path in folder.glob(".*.[0-9]*"):
            path.unlink()

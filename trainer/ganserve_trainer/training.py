"""The training loop.

Progress is counted in images seen, and every step's random state is derived from it and the seed: a run that was
stopped and resumed ends with the same weights as one that was not (on the same device and library versions).
"""

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganserve_trainer.checkpoints import (
    FILE_NAME,
    Checkpoint,
    all_finite,
    load_checkpoint,
    replace_atomically,
    save_checkpoint,
)
from ganserve_trainer.datasets import Dataset
from ganserve_trainer.devices import best_device, bf16_is_fast
from ganserve_trainer.ema import EMA
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.losses import discriminator_loss, generator_loss
from ganserve_trainer.networks import build_discriminator, build_generator
from ganserve_trainer.pictures import save_contact_sheet, save_loss_curve
from ganserve_trainer.settings import Settings

Report = Callable[[int, float, float, float], None]  # images seen, both losses, images per second

_REPORT_EVERY_STEPS = 20
_SHEET_COLUMNS = 10
_SHEET_ROWS = 10


class Run:
    """One run: networks, optimisers and EMA on one device, at `images_seen` images."""

    def __init__(self, settings: Settings, dataset: Dataset, device: torch.device) -> None:
        self.settings = settings
        self.spec = dataset.spec
        self.device = device
        self.dataset_digest = dataset.digest()
        self.images_seen = 0
        self.elapsed_s = 0.0
        self.losses: list[tuple[int, float, float]] = []
        self._images = dataset.images.to(device)
        self._labels = dataset.labels.to(device)
        if len(self._images) < settings.batch_size:
            raise TrainerError(
                f"the data set has {len(self._images)} images, fewer than a batch; use --batch-size {len(self._images)}"
            )
        torch.manual_seed(settings.seed)
        self.generator = build_generator(settings, self.spec).to(device).to(memory_format=torch.channels_last)
        self.discriminator = build_discriminator(settings, self.spec).to(device).to(memory_format=torch.channels_last)
        self.ema = EMA(self.generator, settings.ema_half_life_images)
        betas = (settings.beta1, settings.beta2)
        self._generator_optimizer, self._discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=betas, fused=True)
            for network in (self.generator, self.discriminator)
        )
        self._bf16 = settings.precision == "bf16"
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def step(self) -> Tensor:
        """Train both networks on one batch; return the discriminator's and the generator's loss, [2]."""
        settings = self.settings
        real, label = self._real_batch()
        # Drawn on the CPU, so that CPU and GPU start from the same latents.
        torch.manual_seed(_derived_seed(settings.seed, "step", self.images_seen))
        latent = torch.randn(settings.batch_size, settings.latent_dim).to(self.device)
        fake_label = torch.randint(len(self.spec.class_names), (settings.batch_size,)).to(self.device)
        conditional = settings.conditional

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            fake = self.generator(latent, fake_label if conditional else None).float()
            # One pass over real and fake together: the discriminator has no batch statistics that would mix them.
            both = torch.cat([real, fake.detach()])
            logits = self.discriminator(both, torch.cat([label, fake_label]) if conditional else None).float()
            d_loss = discriminator_loss(*logits.chunk(2))
        self._descend(self._discriminator_optimizer, d_loss)

        self.discriminator.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            g_loss = generator_loss(self.discriminator(fake, fake_label if conditional else None).float())
        self._descend(self._generator_optimizer, g_loss)
        self.discriminator.requires_grad_(True)

        self.images_seen += settings.batch_size
        self.ema.update(self.generator, settings.batch_size, self.images_seen)
        return torch.stack([d_loss.detach(), g_loss.detach()])

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def _real_batch(self) -> tuple[Tensor, Tensor]:
        """Take the next images of this epoch's order: [n, c, h, w] in -1…1, and their labels [n]."""
        size = self.settings.batch_size
        batches = len(self._images) // size
        epoch, batch = divmod(self.images_seen // size, batches)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_derived_seed(self.settings.seed, "epoch", epoch))
            self._order = torch.randperm(len(self._images), generator=generator).to(self.device)
            self._epoch = epoch
        index = self._order[batch * size : (batch + 1) * size]
        images = self._images[index].to(torch.float32).div_(127.5).sub_(1)
        return images.contiguous(memory_format=torch.channels_last), self._labels[index]

    def contact_sheet(self, path: Path) -> None:
        """Write what the EMA generator makes of the run's fixed latents; a conditional one, a row a class."""
        generator = torch.Generator().manual_seed(_derived_seed(self.settings.seed, "sheet", 0))
        rows = len(self.spec.class_names) if self.settings.conditional else _SHEET_ROWS
        latent = torch.randn(rows * _SHEET_COLUMNS, self.settings.latent_dim, generator=generator).to(self.device)
        label = torch.arange(rows, device=self.device).repeat_interleave(_SHEET_COLUMNS)
        with torch.no_grad():
            images = self.ema.network(latent, label if self.settings.conditional else None)
        save_contact_sheet(images, _SHEET_COLUMNS, path)

    def checkpoint(self) -> Checkpoint:
        """Take down the whole state.

        Raises:
            TrainerError: the weights are no longer finite.
        """
        if not all(all_finite(network.state_dict()) for network in (self.generator, self.discriminator)):
            raise _diverged(self.images_seen)
        return Checkpoint(
            settings=self.settings,
            spec=self.spec,
            dataset_digest=self.dataset_digest,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            images_seen=self.images_seen,
            elapsed_s=self.elapsed_s,
            losses=self.losses,
            generator=self.generator.state_dict(),
            discriminator=self.discriminator.state_dict(),
            ema=self.ema.network.state_dict(),
            generator_optimizer=self._generator_optimizer.state_dict(),
            discriminator_optimizer=self._discriminator_optimizer.state_dict(),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint's state."""
        self.images_seen = checkpoint.images_seen
        self.elapsed_s = checkpoint.elapsed_s
        self.losses = list(checkpoint.losses)
        self.generator.load_state_dict(checkpoint.generator)
        self.discriminator.load_state_dict(checkpoint.discriminator)
        self.ema.network.load_state_dict(checkpoint.ema)
        self._generator_optimizer.load_state_dict(checkpoint.generator_optimizer)
        self._discriminator_optimizer.load_state_dict(checkpoint.discriminator_optimizer)


def train(settings: Settings, dataset: Dataset, out: Path, *, resume: bool, report: Report) -> bool:
    """Train until `settings.images` images are seen; write checkpoint, contact sheets and loss curve into `out`.

    SIGINT and SIGTERM save a checkpoint and end the run early. Returns whether the run is complete.

    Raises:
        TrainerError: `out` holds a run and `resume` is false, or one that does not fit and `resume` is true; or
            losses or weights are no longer finite, in which case the last checkpoint is from before.
    """
    device = best_device()
    if settings.precision == "auto":
        settings = replace(settings, precision="bf16" if bf16_is_fast(device) else "fp32")
    path = out / FILE_NAME
    checkpoint = None
    if path.exists():
        if not resume:
            raise TrainerError(f"{out} already holds a run; go on with it by --resume, or choose another --out")
        checkpoint = load_checkpoint(path)
        _check_same_run(checkpoint, settings, dataset)
    run = Run(settings, dataset, device)
    if checkpoint is not None:
        run.restore(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    with replace_atomically(out / "settings.json") as file:
        file.write(json.dumps(asdict(settings), indent=2).encode())

    recent: list[Tensor] = []
    started = time.monotonic() - run.elapsed_s
    report_mark = (time.monotonic(), run.images_seen)
    every = settings.sample_every_images
    with _stop_signals() as stop:
        while run.images_seen < settings.images:
            recent.append(run.step())
            done = run.images_seen >= settings.images
            leave = done or stop.is_set()
            show = done or run.images_seen // every > (run.images_seen - settings.batch_size) // every
            if len(recent) == _REPORT_EVERY_STEPS or leave or show:
                # One read-back for all these steps: reading each one's loss would stall a GPU.
                d_loss, g_loss = torch.stack(recent).mean(0).tolist()
                recent.clear()
                if not (math.isfinite(d_loss) and math.isfinite(g_loss)):
                    raise _diverged(run.images_seen)
                run.losses.append((run.images_seen, d_loss, g_loss))
                now = time.monotonic()
                report(
                    run.images_seen,
                    d_loss,
                    g_loss,
                    (run.images_seen - report_mark[1]) / max(now - report_mark[0], 1e-9),
                )
                report_mark = (now, run.images_seen)
            run.elapsed_s = time.monotonic() - started
            if leave or show:
                save_checkpoint(run.checkpoint(), path)
                _write_pictures(run, out)
            if leave:
                break
    return run.images_seen >= settings.images


def _diverged(images_seen: int) -> TrainerError:
    return TrainerError(
        f"losses or weights are no longer finite after {images_seen} images; the last checkpoint, if there is one, "
        "is from before; try a smaller --learning-rate or --precision fp32"
    )


def _write_pictures(run: Run, out: Path) -> None:
    (out / "samples").mkdir(exist_ok=True)
    run.contact_sheet(out / "samples" / f"{run.images_seen:09d}.png")
    save_loss_curve(run.losses, out / "losses.png")


def _check_same_run(checkpoint: Checkpoint, settings: Settings, dataset: Dataset) -> None:
    """Allow a resumed run to last longer and to show itself more or less often, and to differ in nothing else."""
    free = ("images", "sample_every_images")
    before, now = asdict(checkpoint.settings), asdict(settings)
    differing = [name for name in before if name not in free and before[name] != now[name]]
    if differing:
        changes = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in differing)
        raise TrainerError(f"--resume goes on with the same settings, but {changes}")
    if checkpoint.dataset_digest != dataset.digest():
        raise TrainerError("--resume goes on with the same data, but the data set's images or labels have changed")
    if checkpoint.images_seen > settings.images:
        raise TrainerError(f"the run has seen {checkpoint.images_seen} images already; give more as --images")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event on SIGINT and SIGTERM; a second one acts as usual."""
    stop = threading.Event()
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def _derived_seed(seed: int, purpose: str, count: int) -> int:
    digest = hashlib.sha256(f"{seed}/{purpose}/{count}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

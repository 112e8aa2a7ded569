"""Checkpoints: one file a run, replaced atomically, loaded without running code from it."""

import contextlib
import dataclasses
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks import Generator, ImageSpec, build_generator
from ganserve_trainer.settings import Settings

FORMAT = 1
FILE_NAME = "checkpoint.pt"


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that a run needs to go on, and that an export needs."""

    settings: Settings
    spec: ImageSpec
    device: str  # "cpu", or the GPU's name
    images_seen: int
    elapsed_s: float
    losses: list[tuple[int, float, float]]  # images seen, discriminator's loss, generator's loss
    generator: dict[str, Any]
    discriminator: dict[str, Any]
    ema: dict[str, Any]
    generator_optimizer: dict[str, Any]
    discriminator_optimizer: dict[str, Any]

    def ema_generator(self) -> Generator:
        """Build the averaged generator, in evaluation mode, on the CPU."""
        generator = build_generator(self.settings, self.spec)
        generator.load_state_dict(self.ema)
        return generator.eval().requires_grad_(False)


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place on success: a reader finds the old content or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """Make a rename in this folder last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint atomically."""
    fields = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    fields["settings"] = dataclasses.asdict(checkpoint.settings)
    fields["spec"] = dataclasses.asdict(checkpoint.spec)
    with replace_atomically(path) as file:
        torch.save({"format": FORMAT, **fields}, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one of a run's folder, onto the CPU.

    Raises:
        TrainerError: the file is missing, damaged, or of another version.
    """
    if path.is_dir():
        path = path / FILE_NAME
    try:
        fields = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainerError(f"there is no checkpoint {path}; `ganserve-trainer train` writes one") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainerError(f"{path} is not a readable checkpoint of ganserve-trainer") from error
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise TrainerError(f"{path} is not a checkpoint in format {FORMAT}, the one this ganserve-trainer reads")
    settings = Settings(**fields.pop("settings"))
    spec = fields.pop("spec")
    return Checkpoint(
        settings=settings, spec=ImageSpec(**{**spec, "class_names": tuple(spec["class_names"])}), **fields
    )

"""Checkpoints: one file a run, replaced atomically, loaded without running code from it."""

import contextlib
import dataclasses
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

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
    dataset_digest: str
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
        """Build the averaged generator, in evaluation mode, on the CPU.

        Raises:
            TrainerError: the weights do not fit the settings, or are not finite.
        """
        generator = build_generator(self.settings, self.spec)
        try:
            generator.load_state_dict(self.ema)
        except RuntimeError as error:
            raise TrainerError(f"the checkpoint's weights do not fit its settings: {error}") from error
        if not all_finite(self.ema):
            raise TrainerError("the checkpoint's generator has weights that are not finite; train again")
        return generator.eval().requires_grad_(False)

    def digest(self) -> str:
        """Name the generator that `ema_generator` builds: sha256 over its tensors."""
        content = hashlib.sha256()
        for name, tensor in self.ema.items():
            content.update(f"{name} {tuple(tensor.shape)}".encode())
            content.update(tensor.contiguous().numpy().tobytes())
        return f"sha256:{content.hexdigest()}"


def all_finite(state: dict[str, Tensor]) -> bool:
    """Tell whether every value of a state_dict is a finite number."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


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
    except OSError as error:
        # A failed write carries no name, and that of the file beside would mean nothing to anybody.
        error.filename = str(path)
        raise
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
    # Not straight into the file: torch's writer hides the operating system's error behind one of its own.
    content = io.BytesIO()
    torch.save({"format": FORMAT, **fields}, content)
    with replace_atomically(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the one of a run's folder, onto the CPU.

    Raises:
        TrainerError: the file is missing, damaged, or of another version.
    """
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise TrainerError(f"there is no checkpoint {path}; `ganserve-trainer train` writes one")
    try:
        # torch.load checks no sums: a flipped bit would be trained on, or exported.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        fields = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged file makes of zip's and pickle's readers
        raise TrainerError(f"{path} is not a readable checkpoint of ganserve-trainer") from error
    if damaged:
        raise TrainerError(f"{path} is damaged ({damaged} has a wrong checksum)")
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise TrainerError(f"{path} is not a checkpoint in format {FORMAT}, the one this ganserve-trainer reads")
    try:
        fields["settings"] = Settings(**fields["settings"])
        spec = fields["spec"]
        fields["spec"] = ImageSpec(**{**spec, "class_names": tuple(spec["class_names"])})
        return Checkpoint(**fields)
    except (TypeError, KeyError) as error:
        raise TrainerError(f"{path} is not a checkpoint that this ganserve-trainer reads: {error}") from error

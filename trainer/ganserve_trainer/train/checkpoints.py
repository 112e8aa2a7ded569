"""Checkpoints are written atomically, and loaded without running code.

A run keeps its newest checkpoints, `checkpoints/<images seen>.pt`, two by default: if the newest is damaged, the run
resumes from the one before. Its best one is kept beside them (`train.best`).
"""

import dataclasses
import hashlib
import io
import itertools
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.networks.generator import Generator, build_generator
from ganserve_trainer.report.history import History
from ganserve_trainer.settings import Settings

FORMAT = 4
FOLDER_NAME = "checkpoints"


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state that a run needs to resume, and that an export needs."""

    settings: Settings
    spec: ImageSpec
    dataset_digest: str
    device: str  # "cpu", or the GPU's name
    images_seen: int
    elapsed_s: float
    history: History
    generator: dict[str, Any]
    discriminator: dict[str, Any]
    ema: dict[str, Any]
    generator_optimizer: dict[str, Any]
    discriminator_optimizer: dict[str, Any]

    def ema_generator(self) -> Generator:
        """Build the EMA generator, in evaluation mode, on the CPU.

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
        generator.grow_to(self.images_seen)
        return generator.eval().requires_grad_(False)

    def digest(self) -> str:
        """Return the SHA-256 of the EMA generator's tensors, which identifies it."""
        content = hashlib.sha256()
        for name, tensor in self.ema.items():
            content.update(f"{name} {tuple(tensor.shape)}".encode())
            content.update(tensor.contiguous().cpu().numpy().tobytes())
        return f"sha256:{content.hexdigest()}"


def all_finite(state: dict[str, Tensor]) -> bool:
    """Return whether every value of a state_dict is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def save_checkpoint(checkpoint: Checkpoint, run: Path) -> Path:
    """Write the checkpoint into the run's folder, delete all but the newest `Settings.keep`, and return the file."""
    path = run / FOLDER_NAME / f"{checkpoint.images_seen:012d}.pt"
    write_checkpoint(checkpoint, path)
    for old in checkpoint_files(run)[checkpoint.settings.keep :]:
        old.unlink()
    return path


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint into a file, atomically."""
    fields = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    fields["settings"] = dataclasses.asdict(checkpoint.settings)
    fields["spec"] = dataclasses.asdict(checkpoint.spec)
    fields["history"] = checkpoint.history.to_plain()
    # Through memory, because torch's writer replaces the operating system's error with its own.
    content = io.BytesIO()
    torch.save({"format": FORMAT, **fields}, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as file:
        file.write(content.getbuffer())


def checkpoint_files(run: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, newest first; empty if there is none."""
    return sorted((run / FOLDER_NAME).glob("[0-9]*.pt"), reverse=True)


def run_folder(path: Path) -> Path:
    """Return the folder of a run, given the folder or one of its checkpoints."""
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == FOLDER_NAME else path.parent


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the newest undamaged one of a run's folder, onto the CPU.

    A damaged checkpoint is reported on standard error, and the one before it is loaded.

    Raises:
        TrainerError: the file is missing, damaged, or in another format.
    """
    if not path.is_dir():
        return _read(path)
    files = checkpoint_files(path)
    if not files:
        raise TrainerError(f"there is no checkpoint in {path}; `ganserve-trainer train` writes one")
    for file, before in itertools.zip_longest(files, files[1:]):
        try:
            return _read(file)
        except _DamagedError as error:
            if before is None:
                raise
            print(f"{error}; going back to {before.name}", file=sys.stderr)
    raise AssertionError("unreachable: the last file returns or raises")


class _DamagedError(TrainerError):
    """The checkpoint's file is damaged."""


def _read(path: Path) -> Checkpoint:
    if not path.exists():
        raise TrainerError(f"there is no checkpoint {path}; `ganserve-trainer train` writes one")
    try:
        # torch.load verifies no checksums: a run would continue with a flipped bit, or export it.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        fields = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # zip's and pickle's readers raise anything on a damaged file
        raise _DamagedError(f"{path} is not a readable checkpoint of ganserve-trainer") from error
    if damaged:
        raise _DamagedError(f"{path} is damaged ({damaged} has a wrong checksum)")
    written = fields.pop("format", None) if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or written != FORMAT:
        advice = ""
        if isinstance(written, int):
            newer, older = "a newer ganserve-trainer wrote it: upgrade this one", "an older ganserve-trainer wrote it"
            advice = f"; {newer}" if written > FORMAT else f"; {older}: export it with that one, or train again"
        raise TrainerError(
            f"{path} is not a checkpoint in format {FORMAT}, the one this ganserve-trainer reads{advice}"
        )
    try:
        fields["settings"] = Settings(**fields["settings"])
        spec = fields["spec"]
        fields["spec"] = ImageSpec(**{**spec, "class_names": tuple(spec["class_names"])})
        fields["history"] = History.from_plain(fields["history"])
        return Checkpoint(**fields)
    except (TypeError, KeyError, TrainerError) as error:
        raise TrainerError(f"{path} is not a checkpoint that this ganserve-trainer reads: {error}") from error

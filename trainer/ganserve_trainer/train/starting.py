"""The weights that a new run starts from, instead of random ones: of a run, or of another program's file."""

import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.train.best import load_chosen
from ganserve_trainer.train.checkpoints import load_checkpoint
from ganserve_trainer.train.run import Run
from ganserve_trainer.weights_file import load_tensors, weights_that_fit

State = dict[str, Tensor]
_OWN_FIELDS = {"format", "settings", "generator", "discriminator", "ema"}
_SHOWN = 5


class _Source(NamedTuple):
    generator: State
    ema: State
    discriminator: State | None
    latent_dim: int | None


def start_from(run: Run) -> str:
    """Load what fits of `settings.init_from` into a new run's networks; return the digest of the source's weights.

    Weights fit by name and shape. Where only the number of classes differs, the generator's first layer keeps its
    weights of the latent. What does not fit keeps its initial values, and a line on stderr says so.

    Raises:
        TrainerError: the file cannot be read, has no weights that fit, or is not the one of `settings.init_digest`.
    """
    settings = run.settings
    path = Path(settings.init_from)
    source = _read(path, run)
    digest = _digest(source)
    if settings.init_digest not in ("", digest):
        raise TrainerError(
            f"the weights in {path} have the digest {digest}, but init_digest is {settings.init_digest}: restore the "
            "file that the run started from, or leave init_digest out"
        )
    weights = run.generator_weights
    fresh = weights.state_dict()
    kept, lines = _merged(fresh, source.generator, "generator", settings.latent_dim, source.latent_dim)
    weights.load_state_dict(kept, weights.optimizer_state())
    run.ema.network.load_state_dict(_merged(fresh, source.ema, "EMA", settings.latent_dim, source.latent_dim)[0])
    if settings.init_networks == "both":
        if source.discriminator is None:
            raise TrainerError(f"{path} has no discriminator that fits: use --init-networks generator")
        weights = run.discriminator_weights
        kept, more = _merged(weights.state_dict(), source.discriminator, "discriminator", None, None)
        weights.load_state_dict(kept, weights.optimizer_state())
        lines += more
    print("\n".join([f"initial weights from {path} ({digest[:19]}…)", *lines]), file=sys.stderr, flush=True)
    return digest


def _read(path: Path, run: Run) -> _Source:
    if path.is_dir():
        checkpoint = load_chosen(path)
    else:
        content = load_tensors(path, leave_out=True)
        if not (isinstance(content, dict) and content.keys() >= _OWN_FIELDS):
            return _of_others(path, content, run)
        checkpoint = load_checkpoint(path)
    return _Source(checkpoint.generator, checkpoint.ema, checkpoint.discriminator, checkpoint.settings.latent_dim)


def _of_others(path: Path, content: object, run: Run) -> _Source:
    generator, place = weights_that_fit(run.generator, content)
    print(f"{path}: the generator's weights are {place}", file=sys.stderr)
    discriminator = None
    if run.settings.init_networks == "both":
        discriminator, place = weights_that_fit(run.discriminator, content)
        print(f"{path}: the discriminator's weights are {place}", file=sys.stderr)
    return _Source(generator, generator, discriminator, None)


def _merged(
    fresh: State, source: State, network: str, latent_dim: int | None, source_latent_dim: int | None
) -> tuple[State, list[str]]:
    """Return the fresh state with the source's values where they fit, and lines on what does not."""
    merged, partly, missing = dict(fresh), [], []
    for name, mine in fresh.items():
        theirs = source.get(name)
        if name == "bounds":  # of the clusters of this run's data
            continue
        if theirs is not None and theirs.shape == mine.shape:
            merged[name] = theirs.to(mine.dtype)
        elif theirs is not None and latent_dim and latent_dim == source_latent_dim and _differs_in_inputs(mine, theirs):
            merged[name] = mine.clone()
            merged[name][:, :latent_dim] = theirs[:, :latent_dim]
            partly.append(name)
        else:
            shape = "missing" if theirs is None else f"{list(theirs.shape)} instead of {list(mine.shape)}"
            missing.append(f"{name} ({shape})")
    used = len(fresh) - len(missing)
    if len(missing) == len(fresh):
        raise TrainerError(f"no weight of the {network} fits: {_some(missing)}; check --preset, --width and image size")
    lines = [f"{network}: {used} of {len(fresh)} tensors fit"]
    if partly:
        lines.append(f"{network}: the inputs for the classes start anew in {_some(partly)}")
    if missing:
        lines.append(f"{network}: these start anew: {_some(missing)}")
    if unknown := [name for name in source if name not in fresh]:
        lines.append(f"{network}: these are not used: {_some(unknown)}")
    return merged, lines


def _differs_in_inputs(mine: Tensor, theirs: Tensor) -> bool:
    return mine.dim() == theirs.dim() == 2 and mine.shape[0] == theirs.shape[0]


def _digest(source: _Source) -> str:
    content = hashlib.sha256()
    for state in (source.generator, source.ema, source.discriminator or {}):
        for name, tensor in state.items():
            content.update(f"{name} {tuple(tensor.shape)}".encode())
            content.update(tensor.float().contiguous().numpy().tobytes())
    return f"sha256:{content.hexdigest()}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")

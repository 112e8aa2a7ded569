"""Reads the weights in files of torch and safetensors, and finds those that fit a module.

Only tensors are loaded: loading other objects runs code of the file.
"""

import collections
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError, one_line

_WRAPPERS = {"module", "_orig_mod"}  # what nn.DataParallel and torch.compile put in front of a name
_AVERAGED = {"ema", "gema", "ge", "gs", "avg", "avgg", "gavg", "averaged", "shadow"}
_GENERATORS = {"generator", "netg", "gen", "g", "model", "network"}
_SHOWN = 3
_MOST_UNKNOWN = 100  # classes of other objects than tensors
_SAFETENSORS_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}


class _Unknown:
    """Stands for an object of another class than tensors, whose code does not run."""

    def __init__(self, *_: object, **__: object) -> None:
        """Take any arguments."""

    def __setstate__(self, state: object) -> None:
        """Take any state."""


def load_tensors(path: Path, *, leave_out: bool) -> Any:
    """Return what torch.save or safetensors wrote, on the CPU.

    Args:
        path: the file.
        leave_out: whether objects of other classes than tensors may be left out.

    Raises:
        TrainerError: the file has other objects than tensors, or it is no such file.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        return _load_torch(path, leave_out=leave_out)
    except OSError:
        raise
    except Exception as error:  # torch's, zip's and pickle's readers raise anything
        unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise TrainerError(
            f"{path} is not a file of tensors only ({unknown[1] if unknown else one_line(error)}); loading other "
            "objects runs code of the file"
        ) from error


def _load_torch(path: Path, *, leave_out: bool) -> Any:
    unknown: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what other programs wrote
        while True:
            try:
                with torch.serialization.safe_globals(unknown):
                    return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                name = re.search(r"GLOBAL ([\w.]+)", str(error))
                if name is None or not leave_out or len(unknown) == _MOST_UNKNOWN or (_Unknown, name[1]) in unknown:
                    raise
                unknown.append((_Unknown, name[1]))


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    content = path.read_bytes()
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        tensors = {}
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                kind = _SAFETENSORS_TYPES.get(entry["dtype"])
                if kind is None:
                    raise TrainerError(f"{path} has weights of type {entry['dtype']}; save them as float32")
                values = np.frombuffer(content[start + begin : start + end], np.dtype(kind).newbyteorder("<"))
                tensors[name] = torch.from_numpy(values.reshape(entry["shape"]).copy())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainerError(f"{path} is not a safetensors file, or is truncated") from error
    return tensors


def pickled_module(content: object, path: Path) -> tuple[nn.Module, str]:
    """Return the generator among the modules in a file's content, and a note.

    Raises:
        TrainerError: there is no module.
    """
    found = {name: value for name, value in _leaves(content) if isinstance(value, nn.Module)}
    if not found:
        raise TrainerError(
            f"{path} has weights, but not the network; add --module MODULE:CLASS, its class, and --arguments, a JSON "
            "object of the class's arguments"
        )
    name = min(found, key=lambda name: (_rank(name), name))
    return found[name], f"network {_shown(name)}, of {', '.join(map(_shown, found))}"


def load_weights(module: nn.Module, content: object) -> str:
    """Load the weights that fit a module best, averaged ones first; return what was chosen.

    Raises:
        TrainerError: weights are missing, or have other shapes.
    """
    tensors, place, chosen = _fitting(module, content)
    wanted, kind = module.state_dict(), type(module).__name__
    needed = dict(module.named_parameters()) or wanted
    if missing := [name for name in needed if name not in chosen]:
        raise TrainerError(
            f"weights of {kind} are missing in {_shown(place)}: {_some(missing)}; check --module and --arguments"
        )
    for name, other in chosen.items():
        if tensors[other].shape != wanted[name].shape:
            raise TrainerError(
                f"{other} has shape {list(tensors[other].shape)} in the file, and {list(wanted[name].shape)} in "
                f"{kind}; check --arguments"
            )
    module.load_state_dict({name: tensors[other] for name, other in chosen.items()}, strict=False)
    used = set(chosen.values())
    unexpected = [name for name in tensors if name not in used and (not place or name.startswith(f"{place}."))]
    note = f"weights {_shown(place)}, {len(chosen)} of {len(wanted)}"
    note += f"; not in the file: {_some(name for name in wanted if name not in chosen)}" * (len(chosen) < len(wanted))
    return note + f"; not in {kind}: {_some(unexpected)}" * bool(unexpected)


def weights_that_fit(module: nn.Module, content: object) -> tuple[dict[str, Tensor], str]:
    """Return the weights in a file's content by the names in a module, whatever their shapes, and a note on the place.

    Raises:
        TrainerError: no name is one of the module's.
    """
    tensors, place, chosen = _fitting(module, content)
    return {name: tensors[other] for name, other in chosen.items()}, _shown(place)


def _fitting(module: nn.Module, content: object) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """Return all tensors of a file's content, the place of the module's, and their names there by the module's."""
    tensors: dict[str, Tensor] = {}
    for name, value in _leaves(content):
        if isinstance(value, nn.Module):
            tensors |= {".".join(filter(None, (name, inner))): each for inner, each in value.state_dict().items()}
        elif isinstance(value, Tensor):
            tensors[name] = value
    wanted, kind = module.state_dict(), type(module).__name__
    needed = dict(module.named_parameters()) or wanted
    # Wherever a name ends like one of the module, what is before it may be the place of the weights.
    places: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in tensors:
        plain = [part for part in name.split(".") if part not in _WRAPPERS]
        for parts in (plain, name.split(".")):
            for length in range(len(parts)):
                if (inner := ".".join(parts[length:])) in wanted:
                    places[".".join(parts[:length])][inner] = name
    if not places:
        raise TrainerError(
            f"the file has no weights of {kind}: it has {_some(tensors) or 'no tensors'}; {kind} has {_some(wanted)}"
        )
    place = min(places, key=lambda place: (-len(places[place].keys() & needed.keys()), _rank(place), len(place)))
    chosen = places[place]
    return tensors, place, chosen


def _leaves(content: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield what is in nested dictionaries, with the path to it."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, content


def _rank(name: str) -> int:
    """Return how likely a name is to be that of the best generator; 0 is the most likely."""
    parts = set(re.split(r"[._]", name.lower()))
    return 0 if parts & _AVERAGED else 1 if parts & _GENERATORS else 2


def _some(names: Any) -> str:
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shown(name: str) -> str:
    return repr(name) if name else "of the whole file"

"""Reads files of torch and safetensors, and loads the weights in them into a module.

Only tensors are loaded from a file, unless the user trusts it: loading other objects runs code of the file.
"""

import collections
import importlib
import json
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.importing.source import one_line

_WRAPPERS = {"module", "_orig_mod"}  # what nn.DataParallel and torch.compile put in front of a name
_AVERAGED = {"ema", "gema", "ge", "averaged", "shadow"}
_GENERATORS = {"generator", "netg", "gen", "g", "model", "network"}
_SHOWN = 3
_SAFETENSORS_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32}


def load_file(path: Path, *, trusted: bool) -> Any:
    """Return what torch.save, pickle or safetensors wrote, on the CPU.

    Raises:
        TrainerError: the file has other objects than tensors and is not trusted, or it is no such file.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's, zip's and pickle's readers raise anything
        if not trusted:
            unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise TrainerError(
                f"{path} is not a file of tensors only ({unknown[1] if unknown else one_line(error)}); loading other "
                "objects runs code of the file: if you trust it, add --trust"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception:
        try:
            with path.open("rb") as file:
                return pickle.load(file)  # as StyleGAN's files
        except Exception as error:
            raise TrainerError(
                f"{path} cannot be loaded: {one_line(error)}; run the command in the folder of the project that wrote "
                "it, so that Python finds its modules"
            ) from error


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


def build_module(place: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call a class or a function that returns a module.

    Args:
        place: `module:Class`, with the name or the file of a Python module.
        arguments: keyword arguments of the call.

    Raises:
        TrainerError: there is no such class, or the call fails.
    """
    module_name, _, name = place.rpartition(":")
    if not module_name:
        raise TrainerError(f"--module is {place!r}; it must be MODULE:CLASS, such as networks.dcgan:Generator")
    folder = Path.cwd()
    if module_name.endswith(".py"):
        folder, module_name = Path(module_name).resolve().parent, Path(module_name).stem
    sys.path.insert(0, str(folder))
    try:
        make = getattr(importlib.import_module(module_name), name)
        module = make(**arguments)
    except Exception as error:  # the user's code may raise anything
        raise TrainerError(
            f"--module {place} with --arguments {json.dumps(arguments)} fails: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise TrainerError(f"--module {place} makes a {type(module).__name__}; it must make a torch.nn.Module")
    return module


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

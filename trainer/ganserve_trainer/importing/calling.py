"""Finds out how a generator of torch is called: tries usual calls, written as Python expressions.

`--call` sets such an expression, in which `g` is the network, `z` the latents [n, latent_dim], `y` the labels, int64
[n], and `psi` the truncation [n]; torch and the functions of `ganserve_trainer.wrap` have their names.
"""

import dataclasses
import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ganserve_trainer import wrap
from ganserve_trainer.errors import TrainerError, one_line
from ganserve_trainer.export.inputs import Input, Inputs, Label, Latent, Truncation
from ganserve_trainer.importing.looking import LARGEST_LATENT, WRAPPER_ADVICE, as_images
from ganserve_trainer.importing.noise import FixedNoise
from ganserve_trainer.importing.source import Wishes

_TRIED = 3  # images
_NAMES = {"torch": torch} | {
    name: each for name, each in vars(wrap).items() if isinstance(each, types.FunctionType) and not name.startswith("_")
}
_SIZES = re.compile(r"^(nz|z_?dim|dim_?z|dz|n_?z|latent_?(dim|size)|noise_?dim(ension)?)$", re.IGNORECASE)
_CLASSES = re.compile(r"^(n|num|nb|no)_?(class|classes|labels?)$|^(c_?dim|y_?dim|classes|class_?num)$", re.IGNORECASE)
_LABELS = re.compile(r"label|class|shared|^emb|_emb|embed", re.IGNORECASE)
_PSI = re.compile(r"trunc|psi", re.IGNORECASE)
_BLEND = re.compile(r"alpha|fade|blend", re.IGNORECASE)  # between two resolutions, of which the last one is wanted
_STAGE = re.compile(r"step|stage|depth|level", re.IGNORECASE)
_LAST_STAGE = 10
_MOST_CLASSES = 1 << 15
# Arguments that make the images those of inference, the same each time.
_CONSTANTS = {"noise_mode": "'const'", "randomize_noise": "False", "fused_modconv": "False", "force_fp32": "True"}
_SWITCHES = {"training": "False", "is_training": "False", "eval": "True"}


@dataclass(frozen=True, slots=True)
class Call:
    """How to call a module."""

    text: str
    latent_dim: int
    classes: int  # 0: there is no label

    @property
    def inputs(self) -> Inputs:
        """The inputs of a served model: those that the expression has."""
        names = compile(self.text, "--call", "eval").co_names
        listed: dict[str, Input] = {"latent": Latent((self.latent_dim,))}
        listed |= {"label": Label()} if "y" in names else {}
        listed |= {"truncation": Truncation()} if "psi" in names else {}
        return Inputs(listed, self.classes if "y" in names else 0)

    def __call__(
        self, module: nn.Module, latent: Tensor, label: Tensor | None = None, truncation: Tensor | None = None
    ) -> tuple[Any, int]:
        """Return what the module returns, with constant noise, and how many times it drew noise."""
        psi = torch.ones(len(latent)) if truncation is None else truncation
        given = _NAMES | {"g": module, "z": latent, "y": label, "psi": psi}
        with FixedNoise() as noise:
            made = eval(self.text, {"__builtins__": __builtins__}, given)
        return made, noise.drawn

    def __str__(self) -> str:
        """Return the expression, with what its names are."""
        sizes = [f"z: latents [n, {self.latent_dim}]"]
        listed = list(self.inputs)
        sizes += [f"y: labels of {self.classes} classes"] * ("label" in listed)
        sizes += ["psi: truncation"] * ("truncation" in listed)
        return f"{self.text}  ({'; '.join(sizes)})"


def find_call(module: nn.Module, wishes: Wishes, arguments: Mapping[str, Any]) -> tuple[Call, dict[str, Tensor], int]:
    """Return the first usual call that makes images, or the user's, what it returned, and how often it drew noise.

    Args:
        module: the generator.
        wishes: what the user set.
        arguments: what it was built with, among which may be the size of a latent.

    Raises:
        TrainerError: no usual call gives images, or the user's fails.
    """
    name = type(module).__name__
    classes = _classes(module, wishes, arguments)
    if wishes.call is None:
        expressions = list(_expressions(module, bool(wishes.class_names), classes))
    else:
        expressions = [wishes.call]
        try:
            compile(wishes.call, "--call", "eval")
        except SyntaxError as error:
            raise TrainerError(
                f"--call {wishes.call!r} is not a Python expression: {error.msg}; write it like 'g(z, one_hot(y, 10))'"
            ) from error
    failed = ""  # the first failure, of the likeliest size and call
    for size in _sizes(module, wishes, arguments, classes):
        for text in expressions:
            labelled = re.search(r"\by\b", text) is not None
            for count in (classes or [0]) if labelled else [0]:
                call = Call(text.replace("CLASSES", str(count)), size, count or int(labelled))
                try:
                    made, drawn = try_call(call, module)
                except Exception as error:  # a module raises anything for other inputs than it wants
                    if not failed:
                        lines = str(error).strip().splitlines() or [""]
                        scripted = isinstance(module, torch.jit.ScriptModule)  # its errors begin with a stack
                        failed = f"{call} fails: {lines[-1] if scripted else one_line(error)}"
                    continue
                if any(
                    len(each) == _TRIED and as_images(name, each.numpy(), wishes.layout) for name, each in made.items()
                ):
                    if labelled and not count:
                        call = dataclasses.replace(call, classes=_count(call, module))
                    return call, made, drawn
                shapes = ", ".join(str(list(each.shape)) for each in made.values()) or "no tensor"
                failed = failed or f"{call} makes {shapes}"
    if wishes.class_names and not any("y" in re.findall(r"\w+", text) for text in expressions):
        raise TrainerError(f"--classes is set, but {name}{_signature(module)} takes no label")
    set_options = ["--latent-dim"] * (wishes.latent_dim is not None) + ["--call"] * (wishes.call is not None)
    advice = [f"check {' and '.join(set_options)}"] if set_options else []
    missing = ["--latent-dim"] * (wishes.latent_dim is None)
    missing += ["--classes"] * (not classes and _parameters(module)[1] > 1)
    missing += ["""--call, such as --call 'g(z, one_hot(y, 10))'"""] * (wishes.call is None)
    advice += [f"add {' and '.join(missing)}"] if missing else []
    raise TrainerError(
        f"no usual call of {name}{_signature(module)} makes images; {failed or 'no size of a latent is known'}; "
        f"{', or '.join(advice)}. {WRAPPER_ADVICE}"
    )


def try_call(call: Call, module: nn.Module, label: int = 0) -> tuple[dict[str, Tensor], int]:
    """Return the tensors that a module makes of a few latents of zeros, and how many times it drew noise."""
    listed = call.inputs
    given = {"latent": torch.zeros(_TRIED, call.latent_dim)}
    given |= {"label": torch.full((_TRIED,), label)} if "label" in list(listed) else {}
    given |= {"truncation": torch.ones(_TRIED)} if "truncation" in list(listed) else {}
    with torch.no_grad():
        made, drawn = call(module, **given)
        return {name: each.float() for name, each in named_tensors(made).items()}, drawn


def _count(call: Call, module: nn.Module) -> int:
    """Return how many labels a call takes: what a table of them has fails beyond its end."""

    def works(label: int) -> bool:
        try:
            try_call(call, module, label)
        except Exception:  # a module raises anything
            return False
        return True

    low, high = 0, 1
    while works(high):
        low, high = high, 2 * high
        if high > _MOST_CLASSES:
            raise TrainerError(f"{call.text} takes any label; add --classes, their names or their number")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return high


def named_tensors(made: Any) -> dict[str, Tensor]:
    """Return the tensors among what a module returned: by their keys, or by their numbers."""

    def tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name or "0", value
        elif isinstance(value, Mapping):
            for key, each in value.items():
                yield from tensors(each, f"{name}.{key}".lstrip("."))
        elif isinstance(value, list | tuple):
            for index, each in enumerate(value):
                yield from tensors(each, f"{name}.{index}".lstrip("."))

    return dict(tensors(made, ""))


def _expressions(module: nn.Module, labelled: bool, classes: list[int]) -> Iterator[str]:
    """Yield usual calls, the likeliest first; CLASSES stands for the number of classes."""
    if callable(getattr(module, "decode", None)):  # an autoencoder, whose forward takes images
        yield from ("g.decode(z)", "g.decode(as_map(z))")
        return
    names, required, takes_any = _parameters(module)
    labels = ["y", "one_hot(y, CLASSES)"]
    if isinstance(getattr(module, "shared", None), nn.Embedding):  # BigGAN's, of which all layers take the output
        labels = ["g.shared(y)", *labels]
    if not classes:
        labels = ["", "None"] if required < 2 else ["None", "y"]
    elif not labelled and required < 2:
        labels = [*labels, "", "None"] if len(names) > 1 or takes_any else ["", *labels]
    if len(names) < 2 and not takes_any:
        labels = [label for label in labels if not label]
    switches = [f"{name}={value}" for name, value in _SWITCHES.items() if name in names]
    known = [name for name in _CONSTANTS if name in names]
    kept = [[*known, *(_CONSTANTS if takes_any else [])][: len(_CONSTANTS)]] if known or takes_any else []
    if takes_any:  # which of them the inner networks take is not written down
        kept = [["noise_mode", "fused_modconv", "force_fp32"], ["noise_mode", "force_fp32"], ["noise_mode"], *kept]
    constants = [[f"{name}={_CONSTANTS[name]}" for name in names_kept] for names_kept in (*kept, [])]
    constants = [[*each, *switches] for each in constants]
    if all(isinstance(getattr(module, part, None), nn.Module) for part in ("mapping", "synthesis")):
        for label in labels:
            w = f"g.mapping({', '.join(filter(None, ['z', label or 'None']))})"
            for each in constants:
                yield f"g.synthesis({', '.join([f'truncate({w}, g.mapping.w_avg, psi)', *each])})"
    others = [_values(name) for name in names[2:required]]
    if all(others):
        for latent in ("z", "as_map(z)", "[z]"):
            for label in labels:
                for more in _products(others):
                    for each in constants:
                        yield f"g({', '.join([latent, *filter(None, [label]), *more, *each])})"
        if required == 2 and (second := _values(names[1])):  # a number instead of a label
            for latent in ("z", "as_map(z)"):
                for value in second:
                    yield f"g({latent}, {value})"
    if required > 2 and not classes:  # such as a step and alpha, without a label
        rest = [_values(name) for name in names[1:required]]
        if all(rest):
            for latent in ("z", "as_map(z)"):
                for more in _products(rest):
                    yield f"g({', '.join([latent, *more])})"


def _products(values: list[list[str]]) -> Iterator[list[str]]:
    if not values:
        yield []
        return
    for first in values[0]:
        for rest in _products(values[1:]):
            yield [first, *rest]


def _values(name: str) -> list[str]:
    """Return what an argument may be, by its name; none if its name says nothing."""
    if _PSI.search(name):
        return ["psi", "1.0"]
    if _BLEND.search(name):
        return ["1.0"]
    if _STAGE.search(name):
        return [str(stage) for stage in range(_LAST_STAGE, -1, -1)]
    return []


def _parameters(module: nn.Module) -> tuple[list[str], int, bool]:
    """Return the names of the arguments of forward, how many it needs, and whether it takes any by name."""
    if isinstance(module, torch.jit.ScriptModule):
        listed = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        return [each.name for each in listed], sum(not each.has_default_value() for each in listed), False
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return names, sum(each.default is each.empty for each in positional), takes_any


def _signature(module: nn.Module) -> str:
    return f".forward({', '.join(_parameters(module)[0])})"


def _ints(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return the whole numbers that a module was built with, by name."""
    held = {**vars(module), **vars(getattr(module, "config", None) or object)}
    return {name: value for name, value in (*held.items(), *arguments.items()) if type(value) is int}


def _classes(module: nn.Module, wishes: Wishes, arguments: Mapping[str, Any]) -> list[int]:
    """Return how many classes there may be, the likeliest first."""
    if wishes.class_names:
        return [len(wishes.class_names)]
    named = [value for name, value in _ints(module, arguments).items() if _CLASSES.match(name)]
    if named:
        return [value for value in dict.fromkeys(named) if value > 1]
    embeddings = [(name, each) for name, each in module.named_modules() if isinstance(each, nn.Embedding)]
    likely = [each for name, each in embeddings if _LABELS.search(name)] or [each for _, each in embeddings]
    return list(dict.fromkeys(each.num_embeddings for each in likely))


def _sizes(module: nn.Module, wishes: Wishes, arguments: Mapping[str, Any], classes: list[int]) -> Iterable[int]:
    """Return the sizes that a latent may have, the likeliest first."""
    if wishes.latent_dim is not None:
        return [wishes.latent_dim]
    ints = _ints(module, arguments)
    named = [value for name, value in ints.items() if _SIZES.match(name)]
    # The first layers' weights, which may also take the label, are nearest to the latent.
    of_weights = [size for weights in module.parameters() for size in weights.shape]
    # A label may be joined to the latent, one-hot or as its embedding.
    joined = [*classes, *(each.embedding_dim for each in module.modules() if isinstance(each, nn.Embedding))]
    of_weights += [size - other for other in dict.fromkeys(joined) for size in of_weights]
    return dict.fromkeys(size for size in (*named, *ints.values(), *of_weights) if 0 < size <= LARGEST_LATENT)

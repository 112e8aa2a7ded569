"""Makes the noise that a network of torch draws constant: the same for all images, so that a seed decides its image."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NORMAL = {torch.randn, torch.randn_like, Tensor.normal_}
_UNIFORM = {torch.rand, torch.rand_like, Tensor.uniform_}
_OF_SIZES = {torch.randn, torch.rand}
_IN_PLACE = {Tensor.normal_, Tensor.uniform_}


def _arguments(args: Any, kwargs: Any, **defaults: float) -> list[float]:
    """Return the arguments after the tensor, in the order of the defaults."""
    return [
        args[index] if index < len(args) else kwargs.get(name, default)
        for index, (name, default) in enumerate(defaults.items(), 1)
    ]


class FixedNoise(TorchFunctionMode):
    """Replaces random numbers of torch with those of fixed seeds; the first axis, of the images, repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a function that draws random numbers."""
        kwargs = kwargs or {}
        if function not in _NORMAL | _UNIFORM:
            return function(*args, **kwargs)
        if function in _OF_SIZES:
            given = kwargs.get("size", args)
            sizes = list(given[0]) if len(given) == 1 and not isinstance(given[0], int | torch.SymInt) else list(given)
        else:
            sizes = list(args[0].shape)
        values = self._values([int(size) for size in sizes[1:]], normal=function in _NORMAL)
        made = values.expand(sizes[0], *values.shape[1:]) if sizes else values.reshape(())
        if function not in _IN_PLACE:
            kind = kwargs.get("dtype") or (made.dtype if function in _OF_SIZES else args[0].dtype)
            return made.to(kind)
        if function is Tensor.normal_:
            first, second = _arguments(args, kwargs, mean=0.0, std=1.0)
            return args[0].copy_(made * second + first)
        low, high = _arguments(args, kwargs, **{"from": 0.0, "to": 1.0})
        return args[0].copy_(made * (high - low) + low)

    def _values(self, sizes: list[int], *, normal: bool) -> Tensor:
        random = np.random.RandomState(self.drawn)
        self.drawn += 1
        count = math.prod(sizes)
        numbers = random.standard_normal(count) if normal else random.uniform(size=count)
        return torch.from_numpy(numbers.astype(np.float32)).reshape(1, *sizes)

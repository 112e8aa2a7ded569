"""Compares the images of an exported model with PyTorch's, and checks what the server checks of them."""

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export.diagnosis import NUMBER_OF_IMAGES, line_of, line_of_branch, summary
from ganserve_trainer.export.inputs import Inputs, Values, part, run_session, tensors
from ganserve_trainer.export.modules import run_module
from ganserve_trainer.model_file import load_session

_SMALL_BATCHES = (1, 2, 3)
_LARGEST_BATCH = 64
_COMPARED_BYTES = 1 << 30  # of all values that are computed for the images of a batch larger than the small ones
_LATENTS = 10
_FEW_GREY_LEVELS = 1.0


class _Watch(TorchDispatchMode):
    """Counts the bytes of what PyTorch computes, and checks what it converts to grey levels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed_bytes = 0
        self.problem: str | None = None  # kept, for TorchScript hides exceptions

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        given = {_place(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _place(made) not in given:
                self.computed_bytes += made.untyped_storage().nbytes()
                if made.dtype == torch.uint8 and args and isinstance(args[0], Tensor):
                    self.problem = self.problem or _no_grey_levels(args[0])
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _no_grey_levels(values: Tensor) -> str | None:
    """Return why values cannot become uint8: what a conversion makes of others differs between machines."""
    if not values.is_floating_point() or not values.numel():
        return None
    low, high = (float(value) for value in values.aminmax())
    stack = traceback.extract_stack()
    outside = max(place for place, frame in enumerate(stack) if frame.name == run_module.__name__)
    where = line_of((frame.filename, frame.lineno or 0) for frame in stack[outside:])
    if np.isnan(low):
        return (
            f"the module converts NaN to grey levels{where}: find where it divides by 0 or takes the root or the "
            "logarithm of a negative number"
        )
    if low <= -1 or high >= 256:
        return (
            f"the module converts values from {low:.4g} to {high:.4g} to uint8{where}, which has 0 to 255: call "
            ".clamp(0, 255) first"
        )
    return None


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Open an exported model.

    Raises:
        TrainerError: onnxruntime lacks an operator of it.
    """
    try:
        return load_session(model.SerializeToString())
    except Exception as error:  # onnxruntime's exceptions have no common root
        raise TrainerError(
            f"onnxruntime, which computes served models, cannot load the exported model: {summary(error)}; replace the "
            "operator that it names, or its type: float32 is safe"
        ) from None


def compare_with_pytorch(session: onnxruntime.InferenceSession, module: nn.Module, inputs: Inputs) -> None:
    """Compare an exported model's images with the module's, for several batch sizes that bounded memory holds.

    Raises:
        TrainerError: the shapes differ, a pixel differs by more than one grey level, an image depends on the others in
            its batch, or the module makes another image of the same latent or values that are no grey levels.
    """
    values = inputs.values(np.arange(_LARGEST_BATCH), varied=True)

    def make(compute: Callable[..., NDArray[np.uint8]], model: Any, end: int, start: int = 0) -> NDArray[np.uint8]:
        return compute(model, part(values, start, end))

    wrong: dict[int, str] = {}
    made: dict[int, NDArray[np.uint8]] = {}  # by onnxruntime, by the size of the batch
    sizes = list(_SMALL_BATCHES)
    for size in sizes:
        with _Watch() as watch:
            wanted = make(_run_torch, module, size)
        if watch.problem:
            raise TrainerError(watch.problem)
        if len(wanted) != size:
            raise TrainerError(
                f"from {size} latents the module makes {len(wanted)} images; it must make one image for each latent"
            )
        if size == 1:
            fitting = min(_LARGEST_BATCH, _COMPARED_BYTES // max(1, watch.computed_bytes))
            sizes += [fitting] if fitting > _SMALL_BATCHES[-1] else []
        if size == 1 and _difference(make(_run_torch, module, size), wanted) > 1:
            raise TrainerError(
                "the module makes a different image of the same latent each time, without a random operator of torch: "
                "it must not draw numbers by NumPy or Python, nor change a state in forward"
            )
        try:
            got = made[size] = make(run_session, session, size)
        except Exception as error:  # onnxruntime's exceptions have no common root
            wrong[size] = f"onnxruntime, which computes served models, fails: {summary(error)}"
            continue
        if got.shape != wanted.shape:
            wrong[size] = f"its images are {list(got.shape)} instead of {list(wanted.shape)}"
        elif (difference := _difference(got, wanted)) > 1:
            wrong[size] = f"its images differ by up to {difference} grey levels (allowed: 1)"
    for size, problem in wrong.items():
        reason = ""
        if len(wrong) < len(sizes):
            where = line_of_branch(lambda count: make(_run_torch, module, count))
            reason = f". {NUMBER_OF_IMAGES.format(where=where)}"
        raise TrainerError(f"the exported model differs from PyTorch at batch size {size}: {problem}{reason}")
    count = _SMALL_BATCHES[-1]
    alone = np.concatenate([made[1], *(make(run_session, session, index + 1, index) for index in range(1, count))])
    if (difference := _difference(alone, made[count])) > 1:
        raise TrainerError(  # the server has the same rule
            f"an image differs by up to {difference} grey levels if it is made in a batch with others; it must depend "
            "only on its own latent and label: do not compute means over the batch, as BatchNorm does in training "
            "mode"
        )


def check_effect_of_latent(session: onnxruntime.InferenceSession, inputs: Inputs) -> None:
    """Compare the images of some latents, of class 0 if there are classes; warn if they hardly differ.

    Raises:
        TrainerError: they are identical.
    """
    # One at a time: an image may need a gigabyte while it is made.
    images = np.concatenate(
        [run_session(session, inputs.values(np.array([seed * max(1, inputs.classes)]))) for seed in range(_LATENTS)]
    )
    spread = float(images.std(axis=0).mean())
    if spread == 0:
        raise TrainerError(
            f"the images of {_LATENTS} latents are identical: the latent has no effect. Check that forward uses it, "
            "that the trained weights are loaded, and that the images are from -1 to 1 before the grey levels"
        )
    if spread < _FEW_GREY_LEVELS:
        warnings.warn(
            f"the images of {_LATENTS} latents differ by {spread:.2g} grey levels only (standard deviation): check "
            "that the trained weights are loaded, and that the images are from -1 to 1 before the grey levels",
            stacklevel=3,
        )


def _run_torch(module: nn.Module, values: Values) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = run_module(module, tensors(values)).numpy()
    return pixels


def _difference(pixels: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> int:
    """Return the largest difference, in grey levels."""
    return int(np.abs(pixels.astype(np.int16) - wanted).max())

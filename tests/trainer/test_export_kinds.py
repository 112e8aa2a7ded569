"""Constructs of generators from elsewhere: each is published as the server serves it, or refused with a remedy."""

import inspect
import random
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn import functional

from ganserve_server.repository.verify import load_version
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export import comparing, export_module
from ganserve_trainer.export.inputs import Inputs
from ganserve_trainer.export.modules import prepare
from ganserve_trainer.model_file import load_session

LATENT_DIM = 8
CLASS_NAMES = ("red", "green", "blue")


class Net(nn.Module):
    """Latents [n, 8] to images of 4x4 pixels; a subclass changes how."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(LATENT_DIM, 48)
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Any:
        return self.grey_levels(self.body(latent))

    def body(self, latent: Tensor) -> Tensor:
        return self.dense(latent).view(-1, 3, 4, 4)

    def grey_levels(self, images: Tensor) -> Tensor:
        return torch.round((torch.tanh(images) + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class ByOtherNames(Net):
    """What is left of a training on several GPUs, compiled, with norms, a layer in fp16, and checks of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.DataParallel(nn.Sequential(nn.Linear(LATENT_DIM, LATENT_DIM), nn.ReLU()))
        self.compiled = torch.compile(nn.Linear(LATENT_DIM, LATENT_DIM))
        self.dense = nn.utils.spectral_norm(self.dense)
        self.convolution = nn.utils.parametrizations.spectral_norm(self.convolution)
        self.in_half = nn.Linear(LATENT_DIM, LATENT_DIM).half()
        self.dropout = nn.Dropout()
        self.register_buffer("noise", torch.randn(1, 1, 4, 4))
        self.register_buffer("mask", torch.tensor(-torch.inf))
        with torch.compiler.set_stance("force_eager"):
            self(torch.zeros(2, LATENT_DIM))  # leaves a weight that is no parameter

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        z = z + self.layers(z) + self.compiled(z) + self.in_half(z.half()).float()
        images = self.body(z)
        for size, wanted in zip(images.shape, (None, 3, 4, 4), strict=True):
            assert wanted is None or size == wanted
        noise = self.noise if noise is None else noise
        return self.grey_levels(self.dropout(self.convolution(images) + noise).clamp(min=self.mask))


class ThroughNumPy(Net):
    def body(self, latent: Tensor) -> Tensor:
        return super().body(torch.from_numpy(latent.numpy() * 2.0))


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes = nn.Embedding(3, LATENT_DIM)
        self.dense = nn.Linear(LATENT_DIM, 48)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        z = z * self.classes(y)
        if z.dim() == 3:
            z = z[0]
        images: Tensor = torch.tanh(self.dense(z)).view(-1, 4, 4, 3)
        return images


class HoldsScripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.jit.script(Scripted())

    def forward(self, label: Tensor, latent: Tensor) -> Tensor:
        images: Tensor = torch.round((self.generator(latent, label) + 1) * 127.5)
        return images.clamp(0, 255).to(torch.uint8)


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "other names": (ByOtherNames, ()),
    "compiled, on several GPUs": (lambda: torch.compile(nn.DataParallel(ThroughNumPy())), ()),
    "TorchScript inside": (HoldsScripted, CLASS_NAMES),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", PUBLISHED)
def test_what_can_be_exported_is_served(kind: str, tmp_path: Path) -> None:
    build, class_names = PUBLISHED[kind]
    file = export_module(build(), tmp_path, "mine", latent_dim=LATENT_DIM, class_names=class_names)
    model = load_version("mine", 1, file, max_model_mib=1, provider="cpu", threads=1)
    assert list(model.card.class_names) == list(class_names)
    assert (model.card.height, model.card.width, model.card.channels) == (4, 4, 3)


def test_the_export_runs_without_gpus_and_compilers_and_changes_nothing_of_the_module() -> None:
    module = torch.compile(nn.DataParallel(ByOtherNames()))
    before = [type(part) for part in module.modules()]
    wrappers = {nn.DataParallel, OptimizedModule}
    assert wrappers < set(before)
    prepared = prepare(module, Inputs.plain(LATENT_DIM, 0))
    assert not wrappers & {type(part) for part in prepared.modules()}
    assert not any(part.training for part in prepared.modules())
    assert [type(part) for part in module.modules()] == before
    assert module.training


class BranchOnShape(Net):
    def body(self, latent: Tensor) -> Tensor:
        images = super().body(latent)
        if images.shape[0] == 1:  # here
            images = self.convolution(images)
        return images


class OneByOne(Net):
    def body(self, latent: Tensor) -> Tensor:
        images = []
        for one in latent:  # here
            images.append(self.dense(one).view(3, 4, 4))  # noqa: PERF401
        return torch.stack(images)


class IntInAReshape(Net):
    def body(self, latent: Tensor) -> Tensor:
        return self.dense(latent).view(int(latent.shape[0]), 3, 4, 4)  # here


class DependsOnValues(Net):
    def body(self, latent: Tensor) -> Tensor:
        return super().body(latent if latent.mean().item() > 0 else -latent)  # here


class GroupedByImage(Net):
    def forward(self, latent: Tensor) -> Any:
        images = self.body(latent).reshape(1, -1, 4, 4)
        weight = (self.convolution.weight[None] * latent[:, :1, None, None, None]).flatten(0, 1)
        images = functional.conv2d(images, weight, padding=1, groups=latent.shape[0])  # here
        return self.grey_levels(images.view(-1, 3, 4, 4))


class LittleNoise(Net):
    def forward(self, latent: Tensor) -> Any:
        images = self.body(latent)
        return self.grey_levels(images + 1e-6 * torch.randn_like(images))  # here


class PoissonNoise(Net):
    def forward(self, latent: Tensor) -> Any:
        noise = torch.poisson(latent[:, :1, None, None].exp())  # here
        return self.grey_levels(self.body(latent) + noise)


class DropoutOn(Net):
    def forward(self, latent: Tensor) -> Any:
        images = functional.dropout(self.body(latent))  # here
        return self.grey_levels(images)


class NoiseOfPython(Net):
    def body(self, latent: Tensor) -> Tensor:
        return super().body(latent) * random.random()


class NoiseInAScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(LATENT_DIM, 48)

    def forward(self, latent: Tensor) -> Tensor:
        images = torch.tanh(self.dense(latent) + torch.randn(48))
        return torch.round((images + 1) * 127.5).to(torch.uint8).view(-1, 4, 4, 3)


class BatchStatistics(Net):
    def body(self, latent: Tensor) -> Tensor:
        return functional.batch_norm(super().body(latent), None, None, training=True)


class WithoutClamp(Net):
    def grey_levels(self, images: Tensor) -> Tensor:
        return ((3 * images + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)  # here


class NotANumber(Net):
    def grey_levels(self, images: Tensor) -> Tensor:
        return super().grey_levels((images - 100).sqrt())


class Collapsed(Net):
    def body(self, latent: Tensor) -> Tensor:
        return super().body(0 * latent)


class BFloat16(Net):
    def body(self, latent: Tensor) -> Tensor:
        return self.convolution.bfloat16()(super().body(latent).bfloat16()).float()


# The text names the construct and the remedy, and ends the line of the code where there is "# here".
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "an if on the shape": (BranchOnShape, "the number of images", "reshape with -1"),
    "a loop over images": (OneByOne, "the number of images", "all images at once"),
    "int() in a reshape": (IntInAReshape, "the number of images", "reshape with -1"),
    "an if on values": (DependsOnValues, "depends on values of a tensor", "torch.where"),
    "a convolution with groups=batch": (GroupedByImage, "groups", "its input by the styles"),
    "noise": (LittleNoise, "random numbers by RandomNormalLike", "register_buffer"),
    "noise that ONNX lacks": (PoissonNoise, "random numbers by aten.poisson", "register_buffer"),
    "noise in TorchScript": (
        lambda: torch.jit.script(NoiseInAScript()),
        "random numbers by RandomNormal",
        "register_buffer",
    ),
    "dropout": (DropoutOn, "dropout is on", "a fixed mask, a buffer"),
    "noise of Python": (NoiseOfPython, "a different image of the same latent each time", "NumPy or Python"),
    "batch statistics": (BatchStatistics, "in a batch with others", "do not compute means over the batch"),
    "no clamp": (WithoutClamp, r"values from -\d+.* to uint8", r".clamp\(0, 255\)"),
    "NaN": (NotANumber, "NaN to grey levels", "root"),
    "a latent without effect": (Collapsed, "the images of 10 latents are identical", "Check"),
    "bfloat16": (BFloat16, r"onnxruntime.*bfloat16.*Conv", "float32"),
}


QUICK = {"an if on the shape", "a convolution with groups=batch", "noise", "batch statistics", "no clamp"}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in REFUSED]
)
def test_what_cannot_be_served_is_refused_with_its_line_and_a_remedy(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build, construct, remedy = REFUSED[kind]
    module = build()
    where = f".*{line_of_here(module)}" if isinstance(module, Net) else ""
    text = refusal(module, tmp_path, f"{construct}{where}.*{remedy}")
    assert len(text) < 500
    assert capfd.readouterr() == ("", "")


def line_of_here(module: nn.Module) -> str:
    """Return a pattern of the line that has the mark, in the class of the module; "" without a mark."""
    lines, first = inspect.getsourcelines(type(module))
    marked = [number for number, line in enumerate(lines, first) if line.endswith("# here\n")]
    return rf"\({Path(__file__).name}:{marked[0]}\)" if marked else ""


def refusal(module: nn.Module, repository: Path, pattern: str, **options: Any) -> str:
    """Return the text with which the export ends: one line, without another library's stack traces and colours."""
    with pytest.raises(TrainerError, match=pattern) as caught:
        export_module(module, repository, "mine", latent_dim=LATENT_DIM, **options)
    assert not list(repository.iterdir())
    shown = "".join(traceback.format_exception(caught.value))
    assert "The above exception" not in shown
    assert "During handling" not in shown
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    return text


class Returns(Net):
    def __init__(self, images: Any) -> None:
        super().__init__()
        self.images = images

    def forward(self, latent: Tensor) -> Any:
        return self.images


class TakesNoise(Net):
    def forward(self, latent: Tensor, noise: Tensor) -> Any:
        return super().forward(latent + noise)


class TakesTruncation(Net):
    def forward(self, latent: Tensor, truncation: float = 1.0) -> Any:
        return super().forward(latent * truncation)


class Fails(Net):
    def body(self, latent: Tensor) -> Tensor:
        return self.dense(latent).view(-1, 3, 5, 5)  # here


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def with_weight(value: float) -> nn.Module:
    module = Net()
    with torch.no_grad():
        module.convolution.weight[0, 0, 0, :2] = value
    return module


@pytest.mark.parametrize(
    ("module", "pattern"),
    [
        (Returns((torch.zeros(2, 4, 4, 3), None)), "returns a tuple; .* wrap it"),
        (Returns(torch.zeros(1, 4, 4, 3, dtype=torch.uint8)), r"uint8 \[1, 4, 4, 3\]; .*one image for each latent"),
        (
            Returns(torch.zeros(2, 4, 4, 3)),
            r"float32 \[2, 4, 4, 3\]; .*images \+ 1\) \* 127\.5\).*\.to\(torch\.uint8\)",
        ),
        (Returns(torch.zeros(2, 3, 4, 5, dtype=torch.uint8)), r"uint8 \[2, 3, 4, 5\]; .*\.permute\(0, 2, 3, 1\)"),
        (TakesNoise(), r"TakesNoise\.forward\(latent, noise\) .*'noise'.*wrap"),
        (Fails(), rf"fails on 2 latents .*{line_of_here(Fails())}.*\[-1, 3, 5, 5\]"),
        (Net().half(), r"weights of torch\.float16.*call \.float\(\)"),
        (Locked(), "cannot be copied: .*lock"),
        (with_weight(np.nan), r"2 of the 81 values of convolution\.weight are NaN or infinite: export an earlier"),
        (with_weight(np.inf), r"2 of the 81 values of convolution\.weight are NaN or infinite: export an earlier"),
    ],
)
def test_what_fails_before_the_export_is_refused_with_a_remedy(module: nn.Module, pattern: str, tmp_path: Path) -> None:
    refusal(module, tmp_path, pattern)


@pytest.mark.parametrize(
    ("module", "pattern"),
    [
        (Net(), r"Net\.forward\(latent\) cannot be called with latent and label: too many .*only with class names"),
        (TakesTruncation(), r"forward\(latent, truncation=1\.0\) takes no label.*call the argument label"),
    ],
)
def test_class_names_need_a_module_that_takes_labels(module: nn.Module, pattern: str, tmp_path: Path) -> None:
    refusal(module, tmp_path, pattern, class_names=CLASS_NAMES)


def test_a_module_that_makes_two_images_of_any_latents_is_refused(tmp_path: Path) -> None:
    refusal(Returns(torch.zeros(2, 4, 4, 3, dtype=torch.uint8)), tmp_path, "from 1 latents the module makes 2 images")


def test_images_that_hardly_differ_are_published_with_a_warning(tmp_path: Path) -> None:
    module = Net()
    with torch.no_grad():
        module.dense.weight.mul_(0.01)
    with pytest.warns(UserWarning, match=r"10 latents differ by 0\.\d+ grey levels only.*weights are loaded") as caught:
        assert export_module(module, tmp_path, "mine", latent_dim=LATENT_DIM).exists()
    assert caught[0].filename == __file__


class Heavy(nn.Module):
    """Returns the latents as grey levels, after computing some MiB for each image. Notes the sizes of its batches."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.mib = mib
        self.sizes: list[int] = []

    def forward(self, latent: Tensor) -> Tensor:
        self.sizes.append(len(latent))
        torch.empty(len(latent), self.mib << 20, dtype=torch.int8)  # memory that nothing touches costs nothing
        return latent.clamp(0, 255).to(torch.uint8).view(-1, 2, 4, 1)


@pytest.mark.parametrize(
    ("mib", "sizes"), [(0, {1, 2, 3, 64}), (100, {1, 2, 3, 10}), (500, {1, 2, 3}), (2000, {1, 2, 3})]
)
def test_batches_that_are_compared_fit_in_bounded_memory(mib: int, sizes: set[int]) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["low"], value_float=0.0),
            helper.make_node("Constant", [], ["high"], value_float=255.0),
            helper.make_node("Clip", ["latent", "low", "high"], ["levels"]),
            helper.make_node("Cast", ["levels"], ["bytes"], to=TensorProto.UINT8),
            helper.make_node("Constant", [], ["shape"], value_ints=[-1, 2, 4, 1]),
            helper.make_node("Reshape", ["bytes", "shape"], ["image"]),
        ],
        "graph",
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", LATENT_DIM])],
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 2, 4, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    module = Heavy(mib)
    comparing.compare_with_pytorch(load_session(model.SerializeToString()), module, Inputs.plain(LATENT_DIM, 0))
    assert set(module.sizes) == sizes

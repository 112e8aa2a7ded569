"""The documentation's code about models runs as it stands, for generators with and without classes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import json_format
from torch import Tensor, nn
from torch.nn import functional

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.model import ModelVersion
from ganserve_server.repository.verify import CARD_KEY, load_version
from ganserve_trainer.model_file import latents

ROOT = Path(__file__).parent.parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def snippets(language: str, about: str) -> list[tuple[str, str]]:
    """Return the pages and the texts of all blocks of code about something."""
    blocks = [
        (page.name, block)
        for page in sorted(PAGES)
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    return [(page, block) for page, block in blocks if re.search(about, block)]


class Generator(nn.Module):
    """Latents [n, 32], and labels if it has classes, to images from -1 to 1."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes = nn.Embedding(classes, 32) if classes else None
        self.layers = nn.Sequential(nn.Linear(32, 768), nn.Tanh(), nn.Unflatten(1, (3, 16, 16)))

    def forward(self, z: Tensor, *labels: Tensor) -> Tensor:
        assert len(labels) == (self.classes is not None)
        images: Tensor = self.layers(z if self.classes is None else z * self.classes(*labels))
        return images


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "<documentation>", "exec"), names)
    return names


def served(path: Path) -> ModelVersion:
    return load_version("blobs", 1, path, max_model_mib=1, provider="cpu", threads=1)


def test_every_snippet_about_models_has_a_test() -> None:
    found = {
        page for page, block in snippets("python", r"torch|export_module|RandomState|onnx") if "Client" not in block
    }
    assert found == {"bring-a-generator.md", "model-file.md"}  # the first one's recipes are in test_recipes.py
    assert [page for page, _ in snippets("json", "latentDim")] == ["bring-a-generator.md"]


@pytest.mark.parametrize("classes", [3, 0])
def test_what_the_documentation_exports_is_served(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ((_, code),) = snippets("python", '"blobs"')
    ((_, card),) = snippets("json", "latentDim")
    if not classes:  # as the page says: leave out class_names, or classNames
        code, changed = re.subn(r", class_names=\[.*?\]", "", code.replace("z, y", "z"))
        card, also_changed = re.subn(r', "classNames": \[.*?\]', "", card)
        assert changed == also_changed == 1
    run(code, generator=Generator(classes))
    file = tmp_path / "models" / "blobs" / "1" / "model.onnx"
    exported = served(file).card
    assert list(exported.class_names) == ["red", "green", "blue"][:classes]

    model = onnx.load(file)
    onnx.helper.set_model_props(model, {CARD_KEY: card})
    file.write_bytes(model.SerializeToString())
    written = served(file).card
    assert written.class_names == exported.class_names
    sizes = ("latent_dim", "height", "width", "channels")
    assert [getattr(written, size) for size in sizes] == [getattr(exported, size) for size in sizes]
    assert not written.golden_images


class Faces(nn.Module):
    """A generator of 256 pixels with the inputs of the documentation's example."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(512 + 64 + 3, 3)

    def forward(self, latent: Tensor, style: Tensor, noise: Tensor, attributes: Tensor, truncation: Tensor) -> Tensor:
        colour = self.dense(torch.cat([latent.flatten(1), style, attributes], 1)) * truncation[:, None]
        images = torch.tanh(colour[:, :, None, None] + 0.1 * noise)
        return torch.round((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def test_the_documented_inputs_are_those_of_the_documented_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ((_, code),) = snippets("python", '"style": Latent')
    ((_, card),) = snippets("json", '"inputs"')
    run(code, generator=Faces())
    exported = served(tmp_path / "models" / "faces" / "1" / "model.onnx").card
    written = json_format.Parse(card, pb.ModelCard())
    for each in (*exported.inputs, *written.inputs):  # defaults may be left out
        for attribute in each.attributes.attributes:
            attribute.maximum = attribute.maximum or 1
        if each.HasField("latent"):
            each.latent.distribution = each.latent.distribution or pb.DISTRIBUTION_NORMAL
    assert list(exported.inputs) == list(written.inputs)


def test_the_documented_modulated_convolution_equals_the_fused_one() -> None:
    ((_, code),) = snippets("python", "def modulated_convolution")
    torch.manual_seed(0)
    x, weight, styles = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(2, 3)
    fused = weight[None] * styles[:, None, :, None, None]
    fused = fused * torch.rsqrt(fused.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    wanted = functional.conv2d(x.reshape(1, 6, 5, 5), fused.reshape(8, 3, 3, 3), padding=1, groups=2).view(2, 4, 5, 5)
    got = run(code)["modulated_convolution"](x, weight, styles)
    torch.testing.assert_close(got, wanted)


def test_the_documented_latent_is_that_of_the_model_file() -> None:
    ((_, code),) = snippets("python", r"RandomState\(seed\)")
    got = eval(code, {"numpy": np, "seed": 5, "latent_dim": 32, "truncation": 1})
    assert np.array_equal(got, latents(np.array([5]), 32)[0])

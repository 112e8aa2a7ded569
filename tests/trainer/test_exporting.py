"""Generators trained elsewhere: what the example publishes is served; what no server could serve it refuses."""

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import json_format
from PIL import Image
from tests.conftest import RunningServer
from tests.model_files import model_of_picture
from torch import Tensor, nn

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.repository.verify import load_version
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export import export_module
from ganserve_trainer.export.card import golden_images, with_card
from ganserve_trainer.export.inputs import Inputs
from ganserve_trainer.model_file import load_session

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "bring_a_generator.py"


def load_example() -> Any:
    specification = spec_from_file_location("bring_a_generator", EXAMPLE)
    assert specification
    assert specification.loader
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def bring(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, EXAMPLE, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=120)


def test_a_generator_from_elsewhere_is_served_as_torch_makes_it(
    tmp_path: Path, start_server: Callable[..., RunningServer]
) -> None:
    example, models = load_example(), tmp_path / "models"
    torch.manual_seed(1)
    generator = example.Generator().eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)  # random weights of the usual size make all grey levels alike
    torch.save(generator.state_dict(), tmp_path / "weights.pt")
    done = bring("--repository", models, "--name", "blobs", "--weights", tmp_path / "weights.pt")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == models / "blobs" / "1" / "model.onnx"
    assert [path.name for path in models.rglob("*")] == ["blobs", "1", "model.onnx"]

    seeds, labels = range(50, 80), [seed % 3 for seed in range(50, 80)]
    latent = np.stack([np.random.RandomState(seed).standard_normal(32) for seed in seeds]).astype(np.float32)
    with torch.no_grad():
        wanted = example.Served(generator)(torch.from_numpy(latent), torch.tensor(labels)).numpy()
    running = start_server("--models", models)
    with Client(running.address) as client:
        batch = client.generate("blobs", count=30, seed=50)
        assert client.model("blobs").class_names == ("red", "green", "blue")
    assert batch.pixels.shape == (30, 16, 16, 3)
    assert wanted.std() > 30
    assert np.abs(batch.pixels.astype(int) - wanted).max() <= 1
    served = load_version("blobs", 1, models / "blobs" / "1" / "model.onnx", max_model_mib=1, provider="cpu", threads=1)
    assert [golden.label for golden in served.card.golden_images] == [seed % 3 for seed in range(10)]


class Grey(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return torch.round((100 * latent).clamp(0, 255)).to(torch.uint8).reshape(-1, 2, 2, 1)


def test_a_published_file_has_no_stack_traces_of_the_exporter(tmp_path: Path) -> None:
    file = export_module(Grey(), tmp_path / "models", "mine", latent_dim=4)
    graph = onnx.load(file).graph
    assert len(graph.node) >= 4
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        assert not part.metadata_props
        assert not part.doc_string
    content = file.read_bytes()
    for note in (b"stack_trace", b"site-packages", Path(__file__).name.encode()):
        assert note not in content


class Floats(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent.reshape(-1, 2, 2, 1)


class ChannelsFirst(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent.to(torch.uint8).reshape(-1, 1, 2, 2)


@pytest.mark.parametrize("module", [Floats(), ChannelsFirst()])
def test_a_module_that_makes_no_images_as_they_are_served_is_not_published(module: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        TrainerError, match=r"from 2 latents the module made torch\.\w+ \[2, .*it must make torch\.uint8"
    ):
        export_module(module, tmp_path / "models", "mine", latent_dim=4)
    assert not (tmp_path / "models").exists()


def test_the_card_of_large_images_has_thumbnails_that_a_server_accepts(tmp_path: Path) -> None:
    picture = np.random.RandomState(0).randint(0, 256, (130, 70, 3), np.uint8)
    model = model_of_picture(picture)
    golden = golden_images(load_session(model.SerializeToString()), Inputs.plain(4, 0))
    for image in golden:
        assert image.digest == f"sha256:{hashlib.sha256(picture.tobytes()).hexdigest()}"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.png))), picture[::3, ::3])
        image.digest = ""  # as if this machine computed otherwise
    card = pb.ModelCard(latent_dim=4, height=130, width=70, channels=3, golden_images=golden)
    path = tmp_path / "model.onnx"
    path.write_bytes(with_card(model, card))
    served = load_version("large", 1, path, max_model_mib=1, provider="cpu", threads=1)
    assert list(served.card.golden_images) == golden


def test_the_golden_images_of_512_pixels_are_small() -> None:
    model = model_of_picture(np.random.RandomState(0).randint(0, 256, (512, 512, 3), np.uint8))
    golden = golden_images(load_session(model.SerializeToString()), Inputs.plain(4, 0))
    assert [Image.open(io.BytesIO(image.png)).size for image in golden] == [(57, 57)] * 10
    assert len(json_format.MessageToJson(pb.ModelCard(golden_images=golden))) < 140_000


def test_a_card_that_no_server_accepts_is_not_published() -> None:
    model = model_of_picture(np.zeros((2, 2, 1), np.uint8))
    names = [f"{number:014d}" for number in range(1 << 16)]  # 16 bytes each, with protobuf's tag and length
    assert with_card(model, pb.ModelCard(class_names=names))
    with pytest.raises(TrainerError, match=r"1,048,578 bytes; servers accept 1,048,576: .* 65536 classes"):
        with_card(model, pb.ModelCard(class_names=names, latent_dim=1))

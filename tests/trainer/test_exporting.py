"""Generators trained elsewhere: what the example publishes is served; what no server could serve it refuses."""

import errno
import hashlib
import io
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from ganserve_trainer.export.comparing import compare_with_pytorch
from ganserve_trainer.export.graph import trace
from ganserve_trainer.export.inputs import Inputs
from ganserve_trainer.export.publish import publish
from ganserve_trainer.model_file import load_session

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "bring_a_generator.py"


def load_example() -> Any:
    specification = spec_from_file_location("bring_a_generator", EXAMPLE)
    assert specification
    assert specification.loader
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_generator_from_elsewhere_is_served_as_torch_makes_it(
    tmp_path: Path,
    start_server: Callable[..., RunningServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example, models = load_example(), tmp_path / "models"
    torch.manual_seed(1)
    generator = example.Generator().eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)  # random weights of the usual size make all grey levels equal
    torch.save(generator.state_dict(), tmp_path / "weights.pt")
    command = [EXAMPLE, "--repository", models, "--name", "blobs", "--weights", tmp_path / "weights.pt"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    example.main()
    assert Path(capsys.readouterr().out.strip()) == models / "blobs" / "1" / "model.onnx"
    assert sorted(path.name for path in models.rglob("*")) == [".highest-version-1", "1", "blobs", "model.onnx"]

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
    model = onnx.load(file)
    graph = model.graph
    assert len(graph.node) >= 4
    # Runtimes that are older than the exporter read it.
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
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


class Large(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent.to(torch.uint8).reshape(-1, 1, 4, 1).expand(-1, 4097, -1, -1)


class OneImage(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent[:1].to(torch.uint8).reshape(-1, 2, 2, 1)


@pytest.mark.parametrize(
    ("module", "made"),
    [
        (Floats(), "float32 [2, 2, 2, 1]"),
        (ChannelsFirst(), "uint8 [2, 1, 2, 2]"),
        (OneImage(), "uint8 [1, 2, 2, 1]"),
    ],
)
def test_a_module_that_makes_no_images_as_they_are_served_is_not_published(
    module: nn.Module, made: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match=rf"made torch\.{re.escape(made)}.*it must make torch\.uint8 \[2, "):
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


class Tens(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return (latent * 0 + 10).to(torch.uint8).reshape(-1, 2, 2, 1)


class OffInOneBatch(Tens):
    """Makes grey levels of 10 plus `by` in batches of one size."""

    def __init__(self, batch_size: int, by: int) -> None:
        super().__init__()
        self.batch_size, self.by = batch_size, by

    def forward(self, latent: Tensor) -> Tensor:
        return super().forward(latent) + self.by * (len(latent) == self.batch_size)


def test_an_export_that_differs_from_pytorch_by_two_grey_levels_is_refused() -> None:
    inputs = Inputs.plain(4, 0)
    session = load_session(trace(Tens(), inputs).SerializeToString())
    for batch_size in (1, 2, 3, 64):
        for by in (-1, 1):
            compare_with_pytorch(session, OffInOneBatch(batch_size, by), inputs)
        for by in (-2, 2):
            with pytest.raises(TrainerError, match=f"at batch size {batch_size}: .*differ by up to 2 grey levels"):
                compare_with_pytorch(session, OffInOneBatch(batch_size, by), inputs)


def test_versions_count_from_one_and_hold_what_was_published(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        file = publish(b"model %d" % version, tmp_path, "mine")
        assert file == tmp_path / "mine" / str(version) / "model.onnx"
        assert file.read_bytes() == b"model %d" % version
    (tmp_path / "mine" / "2").rename(tmp_path / "mine" / "old")
    (tmp_path / "mine" / "7").mkdir()
    assert publish(b"", tmp_path, "mine") == tmp_path / "mine" / "8" / "model.onnx"
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {".highest-version-8", "1", "3", "7", "8", "old"}


def test_the_number_of_a_version_that_was_removed_is_not_given_again(tmp_path: Path) -> None:
    for _ in range(3):
        publish(b"", tmp_path, "mine")
    for removed, following in ((("3",), "4"), (("1", "2", "4"), "5")):
        for version in removed:
            shutil.rmtree(tmp_path / "mine" / version)
        assert publish(b"", tmp_path, "mine").parent == tmp_path / "mine" / following
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "5")
    assert publish(b"", tmp_path, "copy").parent == tmp_path / "copy" / "6"
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [".highest-version-6", "6"]


def test_exports_at_the_same_time_get_different_numbers_even_if_each_version_is_removed_at_once(tmp_path: Path) -> None:
    def publish_and_remove(_: int) -> str:
        version = publish(b"", tmp_path, "mine").parent
        shutil.rmtree(version)
        return version.name

    with ThreadPoolExecutor(8) as exports:
        numbers = list(exports.map(publish_and_remove, range(40)))
    assert len(set(numbers)) == 40


def test_after_the_highest_version_nothing_is_published(tmp_path: Path) -> None:
    (tmp_path / "mine" / "999999998").mkdir(parents=True)
    publish(b"", tmp_path, "mine")
    with pytest.raises(TrainerError, match=r"mine has version 999999999, .*choose another name"):
        publish(b"", tmp_path, "mine")
    shutil.rmtree(tmp_path / "mine" / "999999999")
    with pytest.raises(TrainerError, match="choose another name"):
        publish(b"", tmp_path, "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {".highest-version-999999999", "999999998"}


def test_a_number_that_somebody_has_just_used_by_hand_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def after_another(path: Path, target: Path) -> Path:
        monkeypatch.undo()
        target.mkdir()
        (target / "model.onnx").write_bytes(b"another")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", after_another)
    assert publish(b"mine", tmp_path, "mine") == tmp_path / "mine" / "2" / "model.onnx"
    assert [(tmp_path / "mine" / version / "model.onnx").read_bytes() for version in "12"] == [b"another", b"mine"]

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"):
        publish(b"", tmp_path, "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {".highest-version-3", "1", "2"}


def test_a_module_of_larger_images_than_a_server_takes_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"4097x4 .* 4096"):
        export_module(Large(), tmp_path / "models", "mine", latent_dim=4)
    assert not (tmp_path / "models").exists()


class Translucent(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return torch.round(latent.clamp(0, 2) * 100).to(torch.uint8).reshape(-1, 1, 3, 4)


def test_golden_images_have_alpha(tmp_path: Path) -> None:
    file = export_module(Translucent(), tmp_path / "models", "mine", latent_dim=12)
    card = load_version("mine", 1, file, max_model_mib=1, provider="cpu", threads=1).card
    assert (card.height, card.width, card.channels) == (1, 3, 4)
    latent = np.random.RandomState(4).standard_normal(12).astype(np.float32)
    with Image.open(io.BytesIO(card.golden_images[4].png)) as image:
        assert image.mode == "RGBA"
        assert np.array_equal(np.asarray(image).ravel(), np.round(latent.clip(0, 2) * 100).astype(np.uint8))

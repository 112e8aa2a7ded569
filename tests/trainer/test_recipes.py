"""The recipes of docs/bring-a-generator.md: each runs as it stands, on a small generator of its family."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tests.trainer.families import FAMILIES, Acgan
from torch import nn

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.repository.verify import load_version
from ganserve_trainer.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "bring-a-generator.md").read_text()
SEEDS = range(20, 23)


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


WRAPPING, RECIPES = (PAGE.partition(f"## {title}\n")[2] for title in ("Wrap a module", "Recipes"))
RECIPE = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##)", RECIPES, re.DOTALL | re.MULTILINE))


def test_every_recipe_is_tested() -> None:
    assert list(RECIPE) == [*FAMILIES, "Keras", "ONNX"]
    assert CODE.keys() | COMMANDS.keys() == RECIPE.keys()


def prepared(generator: nn.Module) -> nn.Module:
    """Give a generator random weights, under which its images have many grey levels."""
    torch.manual_seed(1)
    for layer in generator.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
            layer.reset_parameters()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_var.fill_(0.1)  # not 1, so that its statistics count
    return generator.eval()


def made() -> tuple[Any, int, "np.ndarray[Any, np.dtype[np.uint8]]"]:
    """Make images of the model that a recipe has published in this folder, as a server does."""
    (file,) = Path("models").glob("*/1/model.onnx")
    model = load_version("name", 1, file.resolve(), max_model_mib=8, provider="cpu", threads=1)
    truncation = 0.7 if model.inputs.truncation == pb.TRUNCATION_EFFECT_INPUT else 1.0
    pixels = model.engine.run([model.inputs.probes(np.array(SEEDS, np.uint32), truncation)])
    return model.card, model.card.latent_dim, pixels


def check(family: str, generator: nn.Module) -> None:
    card, latent_dim, pixels = made()
    latent = np.stack([np.random.RandomState(seed).standard_normal(latent_dim) for seed in SEEDS]).astype(np.float32)
    label = np.array(SEEDS) % max(1, len(card.class_names))
    with torch.no_grad():
        levels = FAMILIES[family][1](generator, torch.from_numpy(latent), torch.from_numpy(label)).numpy()
    wanted = levels.clip(0, 255).transpose(0, 2, 3, 1)
    assert pixels.shape == wanted.shape
    assert wanted.std() > 10
    assert np.abs(pixels - wanted).max() < 1.01


IMPORTS = "".join(re.findall(r"^(?:from|import) .*\n", fences(WRAPPING, "python")[0], re.MULTILINE))
CODE = {family: code for family, text in RECIPE.items() for code in fences(text, "python")}


def test_a_module_is_wrapped_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = prepared(Acgan(32, 3))
    exec(fences(WRAPPING, "python")[0], {"generator": generator})
    check("ACGAN", generator)


QUICK = {"cGAN", "StyleGAN2 and StyleGAN3"}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow]) for family in CODE]
)
def test_a_recipe_publishes_the_images_of_its_generator(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = prepared(FAMILIES[family][0]())
    exec(IMPORTS + CODE[family], {"generator": generator})
    check(family, generator)


COMMANDS = {family: command for family, text in RECIPE.items() for command in fences(text, "sh")}


def test_the_recipes_with_a_command_are_those_that_need_no_wrapper() -> None:
    assert list(COMMANDS) == ["DCGAN", "ACGAN", "Keras", "ONNX"]


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(command)
    assert program == "ganserve-trainer"
    monkeypatch.setattr(sys, "argv", [program, *words, *([] if "--yes" in words else ["--yes"])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


@pytest.mark.parametrize(("family", "file"), [("DCGAN", "netG_epoch_24.pth"), ("ACGAN", "acgan.pth")])
def test_the_command_of_a_recipe_publishes_the_images_of_a_checkpoint(
    family: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = prepared(FAMILIES[family][0]())
    torch.save(generator.state_dict(), file)
    Path(f"{family.lower()}.py").write_text(
        f"from tests.trainer.families import {type(generator).__name__} as Generator\n"
    )
    run(COMMANDS[family], monkeypatch)
    check(family, generator)


@pytest.mark.parametrize(("family", "shape"), [("Keras", (-1, 2, 2, 1)), ("ONNX", (-1, 1, 2, 2))])
def test_the_command_of_a_recipe_publishes_an_onnx_file(
    family: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = helper.make_graph(
        [helper.make_node("Tanh", ["z"], ["values"]), helper.make_node("Reshape", ["values", "shape"], ["images"])],
        "generator",
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(shape, np.int64), "shape")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), "generator.onnx")
    run(COMMANDS[family], monkeypatch)
    # The latent of seed 22 begins with -0.092 and -1.463: (tanh + 1) * 127.5.
    assert made()[2][2, 0, :, 0].tolist() == [116, 13]

"""From real digits to images in a client's hand, for each preset: the client's pixels are PyTorch's."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tests.conftest import RunningServer
from tests.programs import run

from ganserve import Client
from ganserve_trainer.train.checkpoints import load_checkpoint


def ganserve_trainer(*arguments: str | Path) -> str:
    done = run("ganserve-trainer", *arguments)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.mark.parametrize(
    ("preset", "evaluated"),
    [
        ("cdcgan", False),
        pytest.param("mlp", False, marks=pytest.mark.slow),
        pytest.param("dcgan", False, marks=pytest.mark.slow),
        pytest.param("cdcgan", True, marks=pytest.mark.slow),
    ],
)
def test_what_was_trained_is_what_the_client_gets(
    preset: str, evaluated: bool, data_root: Path, tmp_path: Path, start_server: Callable[..., RunningServer]
) -> None:
    run, repository = tmp_path / "run", tmp_path / "models"
    small = ("--width", "16", "--images", "128", "--batch-size", "16")
    ganserve_trainer("train", "--preset", preset, "--data-root", data_root, "--out", run, *small)
    if evaluated:
        printed = ganserve_trainer("evaluate", run, "--data-root", data_root, "--images", "200")
        assert "label_accuracy 0." in printed
        assert printed.endswith(f"next: ganserve-trainer export {run} --repository DIR --name NAME\n")
    printed = ganserve_trainer("export", run, "--repository", repository, "--name", "digits")
    assert Path(printed.strip()) == repository / "digits" / "1" / "model.onnx"
    exported = onnx.load(repository / "digits" / "1" / "model.onnx")
    assert not [node for node in exported.graph.node if node.op_type == "BatchNormalization"]
    assert str(Path.cwd()) not in str(exported.graph)

    checkpoint = load_checkpoint(run)
    generator = checkpoint.ema_generator()
    seeds = range(50, 100)
    latent = np.stack([np.random.RandomState(seed).standard_normal(checkpoint.settings.latent_dim) for seed in seeds])
    label = torch.tensor([seed % 10 for seed in seeds]) if preset == "cdcgan" else None
    with torch.no_grad():
        image = generator(torch.from_numpy(latent.astype(np.float32)), label)
    wanted = ((image + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    running = start_server("--models", repository)
    with Client(running.address) as client:
        batch = client.generate("digits", count=50, seed=50)
        model = client.model("digits")
    assert batch.version == 1
    difference = np.abs(batch.pixels.astype(int) - wanted)
    assert difference.max() <= 1
    # BatchNorm is folded into the weights before the export: a few values round to the other side.
    assert (difference > 0).mean() < 0.01
    assert wanted.std() > 1

    assert (model.architecture, model.dataset) == (preset, "mnist")
    assert model.card["training"]["imagesSeen"] == "128"
    assert model.card["training"]["configuration"]["batch_size"] == "16"
    assert len(model.card["goldenImages"]) == 10
    assert model.class_names == (tuple("0123456789") if preset == "cdcgan" else ())
    assert ("label_accuracy" in [metric.name for metric in model.metrics]) == evaluated
    if evaluated:
        kept = json.loads((run / "evaluation.json").read_text())["metrics"][0]
        assert model.metrics[0].value == pytest.approx(kept["value"])


def test_a_name_that_is_no_model_name_is_refused(tmp_path: Path) -> None:
    done = run("ganserve-trainer", "export", tmp_path, "--repository", tmp_path / "models", "--name", "../evil")
    assert done.returncode == 2
    assert "is not a model name" in done.stderr
    assert not (tmp_path / "models").exists()

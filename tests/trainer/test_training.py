import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from ganserve_trainer.checkpoints import all_finite, load_checkpoint, save_checkpoint
from ganserve_trainer.datasets import load_dataset
from ganserve_trainer.ema import EMA
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import accuracy_on, evaluate, label_accuracy, train_classifier
from ganserve_trainer.exporting import export, fold_batch_norm
from ganserve_trainer.networks import build_discriminator, build_generator, parameter_count
from ganserve_trainer.settings import PRESETS, Settings
from ganserve_trainer.training import Run, train

Program = Callable[..., "subprocess.CompletedProcess[str]"]


def tiny(preset: str, **changes: object) -> Settings:
    defaults: dict[str, object] = {
        "precision": "fp32",
        "width": 8,
        "batch_size": 32,
        "images": 128,
        "sample_every_images": 64,
    }
    return dataclasses.replace(PRESETS[preset], **(defaults | changes))  # type: ignore[arg-type]


def run(settings: Settings, data_root: Path, out: Path, *, resume: bool = False) -> bool:
    dataset = load_dataset("mnist", data_root, train=True)
    return train(settings, dataset, out, resume=resume, report=lambda *_: None)


@pytest.fixture
def trainer(data_root: Path) -> Program:
    def call(*arguments: str | Path, root: Path = data_root) -> "subprocess.CompletedProcess[str]":
        command = [Path(sys.executable).with_name("ganserve-trainer"), *arguments, "--data-root", root]
        # Nothing must be downloaded by a test.
        nowhere = os.environ | dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=nowhere)

    return call


def test_the_mlp_is_the_one_that_is_documented(data_root: Path) -> None:
    spec = load_dataset("mnist", data_root, train=True).spec
    generator, discriminator = build_generator(PRESETS["mlp"], spec), build_discriminator(PRESETS["mlp"], spec)
    widths = [layer.out_features for layer in generator.layers if isinstance(layer, nn.Linear)]
    assert widths == [256, 512, 1024, 784]
    assert [layer.out_features for layer in discriminator.layers if isinstance(layer, nn.Linear)] == [512, 256, 1]
    assert {layer.p for layer in discriminator.layers if isinstance(layer, nn.Dropout)} == {0.3}
    assert parameter_count(generator) == 100 * 256 + 256 * 512 + 512 * 1024 + 1024 * 784 + 3 * (256 + 512 + 1024) + 784


@pytest.mark.parametrize("preset", PRESETS)
def test_images_and_logits_have_the_promised_shapes(preset: str, data_root: Path) -> None:
    spec = load_dataset("mnist", data_root, train=True).spec
    settings = tiny(preset)
    label = torch.arange(5) if settings.conditional else None
    image = build_generator(settings, spec)(torch.randn(5, settings.latent_dim), label)
    assert image.shape == (5, 1, 28, 28)
    assert image.abs().max() <= 1
    assert build_discriminator(settings, spec)(image, label).shape == (5,)


def test_the_label_decides_the_image(data_root: Path) -> None:
    spec = load_dataset("mnist", data_root, train=True).spec
    generator = build_generator(tiny("cdcgan"), spec).eval()
    latent = torch.randn(1, 64).expand(2, -1)
    one, other = generator(latent, torch.tensor([1, 2]))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_ends_with_the_same_weights(preset: str, data_root: Path, tmp_path: Path) -> None:
    # 20 steps of 32: more than the one epoch that 400 images make.
    settings = tiny(preset, images=640, precision="bf16")
    assert run(settings, data_root, tmp_path / "whole")
    run(dataclasses.replace(settings, images=320), data_root, tmp_path / "halves")
    assert load_checkpoint(tmp_path / "halves").images_seen == 320
    run(settings, data_root, tmp_path / "halves", resume=True)
    whole, halves = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "halves")
    assert halves.images_seen == whole.images_seen == 640
    for part in ("generator", "discriminator", "ema"):
        mine, theirs = getattr(halves, part), getattr(whole, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), part
    start = load_checkpoint(tmp_path / "whole").generator
    run(dataclasses.replace(settings, seed=1), data_root, tmp_path / "other")
    other = load_checkpoint(tmp_path / "other").generator
    assert not any(torch.equal(start[name], other[name]) for name in start if name.endswith("0.weight"))


def test_a_run_leaves_sheets_curve_settings_and_checkpoint(data_root: Path, tmp_path: Path) -> None:
    run(tiny("cdcgan"), data_root, tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["000000064.png", "000000128.png"]
    with Image.open(tmp_path / "samples" / "000000064.png") as sheet:
        assert sheet.size == (10 * 30 + 2, 10 * 30 + 2)
    assert (tmp_path / "losses.png").stat().st_size > 1000
    assert json.loads((tmp_path / "settings.json").read_text())["preset"] == "cdcgan"
    assert [images for images, _, _ in load_checkpoint(tmp_path).losses] == [64, 128]
    assert not list(tmp_path.rglob(".*"))


def test_resuming_with_other_settings_is_refused(data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp"), data_root, tmp_path)
    with pytest.raises(TrainerError, match=r"learning_rate was 0\.0002 and is 0\.1"):
        run(tiny("mlp", learning_rate=0.1), data_root, tmp_path, resume=True)
    with pytest.raises(TrainerError, match="--resume"):
        run(tiny("mlp"), data_root, tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainerError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainerError, match="format 1"):
        load_checkpoint(tmp_path)
    torch.save({"format": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainerError, match="settings"):
        load_checkpoint(tmp_path)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp"), data_root, tmp_path)
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    content[len(content) // 3] ^= 4
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(TrainerError, match="damaged"):
        load_checkpoint(tmp_path)


def test_a_run_that_diverges_stops_and_keeps_the_good_checkpoint(data_root: Path, tmp_path: Path) -> None:
    settings = tiny("mlp", images=64)
    run(settings, data_root, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    broken = dataclasses.replace(settings, learning_rate=1e30, images=640)
    save_checkpoint(dataclasses.replace(checkpoint, settings=broken), tmp_path / "checkpoint.pt")
    # torch's optimiser state carries the learning rate of the run that is resumed.
    for state in (checkpoint.generator_optimizer, checkpoint.discriminator_optimizer):
        state["param_groups"][0]["lr"] = 1e30
    save_checkpoint(dataclasses.replace(checkpoint, settings=broken), tmp_path / "checkpoint.pt")
    with pytest.raises(TrainerError, match="no longer finite"):
        run(broken, data_root, tmp_path, resume=True)
    assert all_finite(load_checkpoint(tmp_path).ema)


def test_weights_that_are_not_finite_never_become_a_checkpoint(data_root: Path) -> None:
    training = Run(tiny("mlp"), load_dataset("mnist", data_root, train=True), torch.device("cpu"))
    assert training.checkpoint().images_seen == 0
    with torch.no_grad():
        next(training.discriminator.parameters())[0, 0] = torch.inf
    with pytest.raises(TrainerError, match="no longer finite"):
        training.checkpoint()


def test_a_generator_that_is_not_finite_is_not_exported(data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp"), data_root, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    checkpoint.ema["layers.0.weight"][0, 0] = torch.nan
    save_checkpoint(checkpoint, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(TrainerError, match="not finite"):
        export(tmp_path / "run", tmp_path / "models", "broken")
    assert not (tmp_path / "models").exists()


def test_an_epoch_shows_every_image_once_with_its_label_in_an_order_of_its_own(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    training = Run(tiny("mlp", batch_size=40), dataset, torch.device("cpu"))
    orders = []
    for _ in range(2):
        seen = []
        for _ in range(10):
            images, labels = training._real_batch()
            training.images_seen += 40
            assert images.min() == -1
            assert images.max() == 1
            raw = ((images + 1) * 127.5).round().to(torch.uint8)
            for image, label in zip(raw, labels, strict=True):
                index = int((dataset.images == image).flatten(1).all(1).nonzero()[0, 0])
                assert dataset.labels[index] == label
                seen.append(index)
        orders.append(seen)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(400))
    assert orders[0] != orders[1] != list(range(400))


def test_the_discriminator_learns_to_tell_real_from_fake(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    training = Run(tiny("mlp"), dataset, torch.device("cpu"))
    for _ in range(8):
        training.step()
    with torch.no_grad():
        real, _ = training._real_batch()
        fake = training.generator(torch.randn(32, 100))
        discriminator = training.discriminator.eval()
        assert discriminator(real).mean() > discriminator(fake).mean() + 0.05


def test_folding_batch_norm_leaves_the_function_as_it_is(data_root: Path) -> None:
    spec = load_dataset("mnist", data_root, train=True).spec
    for preset in PRESETS:
        generator = build_generator(tiny(preset, conditional=False), spec).eval()
        for layer in generator.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
        folded = fold_batch_norm(generator.layers)
        assert not [layer for layer in folded if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
        latent = torch.randn(9, PRESETS[preset].latent_dim)
        assert torch.allclose(folded(latent), generator(latent), atol=1e-5)


def test_label_accuracy_is_the_share_of_images_of_the_class_asked_for(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    classifier = train_classifier(dataset, epochs=10)
    assert accuracy_on(classifier, dataset) > 0.9
    by_class = {label: dataset.images[dataset.labels == label] for label in range(10)}

    def generate(shift: int, wrong_above: int = 10) -> float:
        def oracle(_: np.ndarray, labels: np.ndarray) -> np.ndarray:
            asked = [(label + shift) % 10 if label < wrong_above else 0 for label in labels.tolist()]
            return torch.stack([by_class[label][0] for label in asked]).permute(0, 2, 3, 1).numpy()

        return label_accuracy(classifier, oracle, 1, 10, 200)

    assert generate(0) > 0.85
    assert generate(1) < 0.15
    assert generate(0, wrong_above=5) == pytest.approx(0.5, abs=0.1)


def test_resuming_on_other_data_is_refused(data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp"), data_root, tmp_path)
    dataset = load_dataset("mnist", data_root, train=True)
    other = dataclasses.replace(dataset, images=255 - dataset.images)
    with pytest.raises(TrainerError, match="have changed"):
        train(tiny("mlp"), other, tmp_path, resume=True, report=lambda *_: None)
    with pytest.raises(TrainerError, match="128 images already"):
        run(tiny("mlp", images=64), data_root, tmp_path, resume=True)


def test_an_evaluation_of_another_checkpoint_stays_out_of_the_card(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny("cdcgan"), data_root, tmp_path)
    evaluate(tmp_path, None, data_root, 20)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    published = onnx.load(export(tmp_path, tmp_path / "models", "measured")).metadata_props[0].value
    assert "label_accuracy" in published
    evaluation["checkpoint"] = "sha256:other"
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    published = onnx.load(export(tmp_path, tmp_path / "models", "measured")).metadata_props[0].value
    assert "label_accuracy" not in published
    assert "another checkpoint" in capsys.readouterr().err
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(TrainerError, match="evaluate again"):
        export(tmp_path, tmp_path / "models", "measured")


def test_sigterm_saves_and_leaves(data_root: Path, tmp_path: Path) -> None:
    def interrupt(images_seen: int, *_: float) -> None:
        if images_seen == 640:
            os.kill(os.getpid(), signal.SIGTERM)

    dataset = load_dataset("mnist", data_root, train=True)
    settings = tiny("mlp", images=1_000_000, sample_every_images=1_000_000)
    assert not train(settings, dataset, tmp_path, resume=False, report=interrupt)
    assert 640 <= load_checkpoint(tmp_path).images_seen <= 640 + 32


def test_the_average_follows_the_weights_with_its_half_life() -> None:
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    ema = EMA(network, half_life_images=100)
    before = ema.network[0].weight.clone()
    with torch.no_grad():
        network[0].weight += 1.0
        network[1].running_mean.fill_(7.0)
    ema.update(network, batch_size=100, images_seen=1_000_000)
    assert ema.network[0].weight.item() == pytest.approx(before.item() + 0.5, abs=1e-6)
    # BatchNorm's statistics are copied.
    assert ema.network[1].running_mean.item() == 7.0
    # Early on the half-life is 0.05 of the images seen.
    ema.update(network, batch_size=10, images_seen=200)
    assert ema.network[0].weight.item() == pytest.approx(before.item() + 0.75, abs=1e-6)


def test_no_data_set_and_no_download_says_what_to_do(trainer: Program, tmp_path: Path) -> None:
    done = trainer("train", "--preset", "mlp", "--out", tmp_path / "run", root=tmp_path / "empty")
    assert done.returncode == 2
    for way in ("--data-root", "MNIST/raw/", "train-images-idx3-ubyte", "dataset-fashion-mnist"):
        assert way in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_damaged_data_is_named(data_root: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (data_root / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainerError, match="damaged"):
        load_dataset("mnist", tmp_path, train=True)
    with pytest.raises(TrainerError, match="fashion-mnist"):
        load_dataset("nothing", tmp_path, train=True)


def test_debian_s_fashion_mnist_is_found_by_itself(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    from ganserve_trainer import datasets

    for path in (data_root / "MNIST" / "raw").iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path)
    dataset = load_dataset("fashion-mnist", tmp_path / "nowhere", train=True)
    assert len(dataset.images) == 400
    assert dataset.spec.class_names[9] == "Ankle boot"


def test_unconditional_models_have_no_label_accuracy(trainer: Program, data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp"), data_root, tmp_path)
    done = trainer("evaluate", tmp_path)
    assert done.returncode == 2
    assert "unconditional" in done.stderr

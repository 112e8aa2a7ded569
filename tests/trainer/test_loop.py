import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from ganserve_trainer.cli import OTHER_NAMES, main
from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.data.spec import ImageSpec
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export.graph import fold_batch_norm
from ganserve_trainer.export.publish import export
from ganserve_trainer.networks.generator import Generator, build_generator
from ganserve_trainer.networks.layers import UnflattenPixels
from ganserve_trainer.report.history import Alarm, Point
from ganserve_trainer.settings import PRESETS, Settings, from_preset, unused_settings
from ganserve_trainer.train.checkpoints import all_finite, load_checkpoint, save_checkpoint
from ganserve_trainer.train.ema import EMA
from ganserve_trainer.train.loop import train
from ganserve_trainer.train.monitoring import DISCRIMINATOR_OVERPOWERS, MODE_COLLAPSE, Monitor
from ganserve_trainer.train.run import Run
from ganserve_trainer.train.weights import Weights

Program = Callable[..., None]
DIGITS = tuple(str(digit) for digit in range(10))


def tiny(preset: str, **changes: object) -> Settings:
    small: dict[str, object] = {"precision": "fp32", "width": 8, "batch_size": 32, "images": 128}
    if preset == "pggan":
        small |= {"image_size": 32, "growth_images": 64}
    return from_preset(preset, small | {"sample_every_images": 64, "checkpoint_every_images": 64} | changes)


def run(settings: Settings, data_root: Path, out: Path, *, resume: bool = False) -> bool:
    dataset = load_dataset("mnist", data_root, train=True, image_size=settings.image_size)
    return train(settings, dataset, out, resume=resume, report=lambda *_: None)


def interruption(images_seen: int) -> Callable[[Point, float], None]:
    """Interrupt a run, as Ctrl-C and `kill` do, when it has seen so many images."""

    def interrupt(point: Point, _: float) -> None:
        if point.images_seen == images_seen:
            os.kill(os.getpid(), signal.SIGTERM)

    return interrupt


@pytest.fixture
def trainer(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Run the program in this process, to its end without an error."""

    def call(command: str, *arguments: str | Path) -> None:
        given = ["ganserve-trainer", command, "--data-root", data_root, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code

    return call


# Whatever has a random state or a state of its own.
STATEFUL = {
    "dropout": {"dropout": 0.3},
    "spectral norm": {"spectral_norm": True, "conditioning": "projection"},
    "augmentation": {"augment": "color+translation+cutout"},
    "r1": {"r1": 1.0, "r1_every_steps": 3},
    "wasserstein-gp": {"loss": "wasserstein-gp", "discriminator_steps": 2},
    "decay": {"decay_from": 0.25},
    "clusters": {"conditional": False, "clusters": 7},
    "mismatched": {"mismatched_labels": 0.5, "generator_steps": 2},
}


# Their networks have no state but that of cdcgan's.
WITHOUT_STATE = ("dcgan", "sagan")


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        *(
            pytest.param(preset, {}, marks=[pytest.mark.slow] if preset in WITHOUT_STATE else [], id=preset)
            for preset in PRESETS
        ),
        *(pytest.param("cdcgan", changes, id=name) for name, changes in STATEFUL.items()),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(
    preset: str, changes: dict[str, object], data_root: Path, tmp_path: Path
) -> None:
    # 8 steps of 16: more than one epoch of 96 images. bf16, which CPUs emulate, only where the networks are small.
    settings = tiny(
        preset, images=128, batch_size=16, precision="bf16" if preset in {"mlp", "dcgan"} else "fp32", **changes
    )
    digits = load_dataset("mnist", data_root, train=True, image_size=settings.image_size)
    few = dataclasses.replace(digits, images=digits.images[:96], labels=digits.labels[:96])
    assert train(settings, few, tmp_path / "whole", resume=False, report=lambda *_: None)
    assert not train(settings, few, tmp_path / "halves", resume=False, report=interruption(64))
    assert 64 <= load_checkpoint(tmp_path / "halves").images_seen < 128
    train(settings, few, tmp_path / "halves", resume=True, report=lambda *_: None)
    whole, halves = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "halves")
    assert halves.images_seen == whole.images_seen == 128
    for part in ("generator", "discriminator", "ema"):
        mine, theirs = getattr(halves, part), getattr(whole, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), part


def test_another_seed_makes_another_generator(data_root: Path, tmp_path: Path) -> None:
    run(tiny("cdcgan"), data_root, tmp_path / "one")
    run(tiny("cdcgan", seed=1), data_root, tmp_path / "other")
    one, other = load_checkpoint(tmp_path / "one").ema, load_checkpoint(tmp_path / "other").ema
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("0.weight"))


def test_a_run_leaves_sheets_report_configuration_checkpoints_and_board(data_root: Path, tmp_path: Path) -> None:
    settings = tiny("cdcgan")
    run(settings, data_root, tmp_path)
    assert sorted(int(path.stem) for path in (tmp_path / "samples").iterdir()) == [0, 64, 128]
    with Image.open(tmp_path / "samples" / "000000000064.png") as sheet:
        assert sheet.height == 10 * 30 + 2
    with Image.open(tmp_path / "real.png") as real:
        assert real.height == 10 * 30 + 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000000000064.pt",
        "000000000128.pt",
    ]
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "tensorboard").iterdir())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in lines] == [64, 128]
    content = tomllib.loads((tmp_path / "run.toml").read_text())
    assert content.pop("versions")["torch"] == importlib.metadata.version("torch")
    assert content == {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    points = load_checkpoint(tmp_path).history.points
    assert [point.images_seen for point in points] == [64, 128]
    assert all(point.discriminator_gradient_norm > 0 for point in points)
    assert not list(tmp_path.rglob(".*"))


def test_resuming_with_other_settings_is_refused(data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp"), data_root, tmp_path)
    with pytest.raises(TrainerError, match=r"learning_rate was 0\.001 and is 0\.1"):
        run(tiny("mlp", learning_rate=0.1), data_root, tmp_path, resume=True)
    with pytest.raises(TrainerError, match="--resume"):
        run(tiny("mlp"), data_root, tmp_path)
    with pytest.raises(TrainerError, match="128 images already"):
        run(tiny("mlp", images=64), data_root, tmp_path, resume=True)


def test_a_run_that_diverges_stops_and_keeps_the_good_checkpoint(data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp", images=64), data_root, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    broken = tiny("mlp", learning_rate=1e30, images=640)
    save_checkpoint(dataclasses.replace(checkpoint, settings=broken), tmp_path)
    with pytest.raises(TrainerError, match="no longer finite"):
        run(broken, data_root, tmp_path, resume=True)
    assert all_finite(load_checkpoint(tmp_path).ema)


def test_weights_that_are_not_finite_never_become_a_checkpoint(data_root: Path) -> None:
    training = Run(tiny("mlp"), load_dataset("mnist", data_root, train=True), torch.device("cpu"))
    assert training.checkpoint().images_seen == 0
    with torch.no_grad():
        next(iter(training.discriminator_weights.masters.values()))[0, 0] = torch.inf
    with pytest.raises(TrainerError, match="no longer finite"):
        training.checkpoint()


def test_a_generator_that_is_not_finite_is_not_exported(data_root: Path, tmp_path: Path) -> None:
    run(tiny("mlp"), data_root, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    checkpoint.ema["layers.0.weight"][0, 0] = torch.nan
    save_checkpoint(checkpoint, tmp_path / "run")
    with pytest.raises(TrainerError, match="not finite"):
        export(tmp_path / "run", tmp_path / "models", "broken")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("discriminator_steps", [1, 3])
def test_an_epoch_shows_every_image_once_with_its_label_in_an_order_of_its_own(
    data_root: Path, discriminator_steps: int
) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    settings = tiny("cdcgan", batch_size=40, discriminator_steps=discriminator_steps)
    training = Run(settings, dataset, torch.device("cpu"))
    orders = []
    for _ in range(2):
        seen = []
        for _ in range(10):
            images, labels = training._real_batch()
            assert labels is not None
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


def test_steps_of_each_side_are_counted(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    training = Run(tiny("cdcgan", discriminator_steps=3, generator_steps=2), dataset, torch.device("cpu"))
    for _ in range(4):
        training.step()
    assert training.images_seen == 4 * 3 * 32
    for weights, steps in ((training.discriminator_weights, 12), (training.generator_weights, 8)):
        assert {int(state["step"]) for state in weights.optimizer_state().values()} == {steps}


def test_the_discriminator_has_a_learning_rate_of_its_own(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    for rate, expected in ((None, 2e-4), (0.0, 0.0), (1e-3, 1e-3)):
        training = Run(tiny("mlp", learning_rate=2e-4, discriminator_learning_rate=rate), dataset, torch.device("cpu"))
        training.step()
        assert training.discriminator_weights.learning_rate == expected
        assert training.generator_weights.learning_rate == 2e-4


def test_learning_rates_fall_to_nothing_at_the_last_image(data_root: Path, tmp_path: Path) -> None:
    settings = tiny("mlp", decay_from=0.5, images=1000, learning_rate=0.1, discriminator_learning_rate=0.2)
    rates = [settings.learning_rates(images_seen) for images_seen in (0, 500, 750, 1000, 1010)]
    assert rates == [pytest.approx(pair) for pair in [(0.1, 0.2), (0.1, 0.2), (0.05, 0.1), (0, 0), (0, 0)]]
    dataset = load_dataset("mnist", data_root, train=True)
    training = Run(settings, dataset, torch.device("cpu"))
    training.images_seen = 992
    before = {name: weight.clone() for name, weight in training.discriminator.state_dict().items()}
    training.step()
    assert training.discriminator_weights.learning_rate == pytest.approx(0.2 * 0.016)
    assert not torch.equal(before["head.weight"], training.discriminator.head.weight)
    # How fast they fall depends on the number of images, which a resumed run may then not change.
    run(tiny("mlp", decay_from=0.5, images=64), data_root, tmp_path)
    with pytest.raises(TrainerError, match="images was 64 and is 128"):
        run(tiny("mlp", decay_from=0.5, images=128), data_root, tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own
@pytest.mark.parametrize("loss", ["non-saturating", "wasserstein-gp"])
def test_penalties_go_round_the_compiler(loss: str, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor would need a C++ compiler here; what has no gradient of a gradient is the stage before it.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    dataset = load_dataset("mnist", data_root, train=True)
    losses = []
    for compiled in (False, True):
        settings = tiny("cdcgan", loss=loss, r1_every_steps=1, compile=compiled, precision="fp32", dropout=0.0)
        training = Run(settings, dataset, torch.device("cpu"))
        losses.append(torch.stack([training.step() for _ in range(3)]))
    torch.testing.assert_close(losses[0], losses[1])


def test_what_is_shown_of_a_growing_network_is_what_a_checkpoint_holds(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True, image_size=16)
    settings = tiny("pggan", image_size=16, growth_images=24, batch_size=16)
    training = Run(settings, dataset, torch.device("cpu"))
    latent = torch.randn(3, settings.latent_dim)
    for _ in range(4):
        training.step()
        kept = training.checkpoint().ema_generator()
        torch.testing.assert_close(training.show(latent, None), kept(latent))


def test_wasserstein_clip_bounds_the_critic(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    training = Run(tiny("dcgan", loss="wasserstein-clip", weight_clip=0.01), dataset, torch.device("cpu"))
    training.step()
    assert max(parameter.abs().max() for parameter in training.discriminator_weights.masters.values()) <= 0.01


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"r1": 10.0, "r1_every_steps": 1}),
        ({"loss": "wasserstein-gp", "gradient_penalty": 0.0}, {"gradient_penalty": 10.0}),
        ({}, {"mismatched_labels": 0.5}),
        ({}, {"label_smoothing": 0.2}),
        ({"label_smoothing": 0.2}, {"two_sided_smoothing": True}),
        ({}, {"augment": "translation"}),
    ],
)
def test_every_stabiliser_reaches_the_discriminator(
    base: dict[str, object], change: dict[str, object], data_root: Path
) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    gradients = []
    for changes in (base, base | change):
        training = Run(tiny("cdcgan", dropout=0.0, **changes), dataset, torch.device("cpu"))
        training.step()
        gradients.append(training.gradient_norms()[0].item())
    assert gradients[0] != gradients[1]


def test_feature_matching_reaches_the_generator(data_root: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    gradients = []
    for weight in (0.0, 100.0):
        training = Run(tiny("cdcgan", dropout=0.0, feature_matching=weight), dataset, torch.device("cpu"))
        training.step()
        gradients.append(training.gradient_norms().tolist())
    assert gradients[0][0] == pytest.approx(gradients[1][0])
    assert gradients[1][1] > 1.5 * gradients[0][1]


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


def test_folding_batch_norm_leaves_the_function_as_it_is() -> None:
    for preset in ("mlp", "dcgan"):
        generator = build_generator(tiny(preset), ImageSpec(1, 28, 28, DIGITS)).eval()
        for layer in generator.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
        folded = fold_batch_norm(generator.layers)
        assert not [layer for layer in folded.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
        latent = torch.randn(9, PRESETS[preset].settings.latent_dim)
        assert torch.allclose(folded(latent), generator(latent), atol=1e-5)
        # Served in the order of the ONNX operators: nothing to transpose.
        assert not [layer for layer in folded.modules() if isinstance(layer, UnflattenPixels)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"architecture": "progressive", "image_size": 32}, id="progressive"),
        pytest.param({"conditional": False, "clusters": 3}, id="clusters"),
        pytest.param({"attention": True}, id="attention", marks=pytest.mark.slow),
    ],
)
def test_every_architecture_is_exported_with_its_card(
    changes: dict[str, object], data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The progressive one ends while its second resolution fades in.
    run(tiny("cdcgan", growth_images=80, **changes), data_root, tmp_path / "run")
    model = onnx.load(export(tmp_path / "run", tmp_path / "models", "tiny"))
    assert "no quality metrics" in capsys.readouterr().err
    card = {entry.key: entry.value for entry in model.metadata_props}["ganserve.model_card"]
    assert '"conditional": "True"' in card or changes.get("clusters")
    shape = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim[1:]]
    assert shape == ([32, 32, 1] if changes.get("image_size") else [28, 28, 1])


def test_sigterm_saves_and_leaves(data_root: Path, tmp_path: Path) -> None:
    dataset = load_dataset("mnist", data_root, train=True)
    settings = tiny("mlp", images=1_000_000, sample_every_images=1_000_000, checkpoint_every_images=1_000_000)
    assert not train(settings, dataset, tmp_path, resume=False, report=interruption(640))
    assert 640 <= load_checkpoint(tmp_path).images_seen <= 640 + 32


def test_a_time_limit_ends_the_run_complete(data_root: Path, tmp_path: Path) -> None:
    assert run(tiny("mlp", images=10_000_000, minutes=0.01), data_root, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.images_seen < 10_000_000
    assert 0.6 <= checkpoint.elapsed_s < 10
    # It stays as it is when it is resumed.
    assert run(tiny("mlp", images=10_000_000, minutes=0.01), data_root, tmp_path, resume=True)
    assert load_checkpoint(tmp_path).images_seen == checkpoint.images_seen


def test_measuring_is_not_counted_as_training_time(data_root: Path, tmp_path: Path) -> None:
    import time

    waited = []

    def measure(network: Generator) -> dict[str, float]:
        assert not network.training
        started = time.monotonic()
        while time.monotonic() - started < 0.5:
            pass
        waited.append(time.monotonic() - started)
        return {"fid": 3.0}

    dataset = load_dataset("mnist", data_root, train=True)
    started = time.monotonic()
    settings = tiny("mlp", evaluate_every_images=64)
    train(settings, dataset, tmp_path, resume=False, report=lambda *_: None, measure=measure)
    checkpoint = load_checkpoint(tmp_path)
    assert [measured.images_seen for measured in checkpoint.history.measurements] == [64, 128]
    assert [measured.metrics for measured in checkpoint.history.measurements] == [{"fid": 3.0}] * 2
    assert checkpoint.elapsed_s < time.monotonic() - started - 0.9 * waited[0]


def test_stop_on_collapse_ends_the_run_when_the_alarm_rings(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ring_at_64(_: Monitor, point: Point) -> list[Alarm]:
        return [Alarm(64, MODE_COLLAPSE, "all images are one.")] if point.images_seen == 64 else []

    monkeypatch.setattr(Monitor, "observe", ring_at_64)
    assert run(tiny("mlp"), data_root, tmp_path / "warned")
    assert "ALARM after 64 images: mode collapse. all images are one." in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "warned").images_seen == 128
    with pytest.raises(TrainerError, match="The run ends here"):
        run(tiny("mlp", stop_on_collapse=True), data_root, tmp_path / "stopped")
    checkpoint = load_checkpoint(tmp_path / "stopped")
    assert checkpoint.images_seen == 64
    assert [alarm.name for alarm in checkpoint.history.alarms] == [MODE_COLLAPSE]
    assert "all images are one" in (tmp_path / "stopped" / "report.html").read_text()


@pytest.mark.slow
def test_a_learning_rate_far_too_high_rings_both_alarms(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rarely = {"sample_every_images": 60_000, "checkpoint_every_images": 60_000}
    run(tiny("mlp", learning_rate=0.05, r1=0.0, batch_size=64, images=60_000, **rarely), data_root, tmp_path)
    both = {MODE_COLLAPSE, DISCRIMINATOR_OVERPOWERS}
    assert both <= {alarm.name for alarm in load_checkpoint(tmp_path).history.alarms}  # besides, modes are missing
    told = capsys.readouterr().err
    page = (tmp_path / "report.html").read_text()
    for name in both:
        assert f"images: {name}. The " in told
        assert page.count(f"<strong>{name}</strong>") >= 1


@pytest.mark.parametrize(("warm_up", "early"), [(0.05, 0.75), (0.0, 0.5334)])
def test_the_average_follows_the_weights_with_its_half_life(warm_up: float, early: float) -> None:
    network = Generator(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), classes=0)
    ema = EMA(network, half_life_images=100, warm_up=warm_up)
    weights = Weights(network, (0.0, 0.99), bf16=False)
    before = ema.network.layers[0].weight.clone()
    with torch.no_grad():
        network.layers[0].weight += 1.0
        network.layers[1].running_mean.fill_(7.0)
    ema.update(weights, batch_size=100, images_seen=1_000_000)
    assert ema.network.layers[0].weight.item() == pytest.approx(before.item() + 0.5, abs=1e-6)
    # BatchNorm's statistics are copied.
    assert ema.network.layers[1].running_mean.item() == 7.0
    # With a warm-up the half-life is early on 0.05 of the images seen.
    ema.update(weights, batch_size=10, images_seen=200)
    assert ema.network.layers[0].weight.item() == pytest.approx(before.item() + early, abs=1e-4)


def test_flags_go_before_the_file_and_the_file_before_the_preset(
    trainer: Program, data_root: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('preset = "cdcgan"\nwidth = 8\nbatch_size = 16\nimages = 64\nloss = "hinge"\n')
    trainer("train", "--config", config, "--batch-size", "32", "--out", tmp_path / "run")
    settings = load_checkpoint(tmp_path / "run").settings
    assert (settings.conditional, settings.loss, settings.batch_size, settings.images) == (True, "hinge", 32, 64)
    # The run's own file repeats it, and --resume alone goes on with its settings.
    trainer("train", "--config", tmp_path / "run" / "run.toml", "--out", tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").settings == settings
    assert load_checkpoint(tmp_path / "again").digest() == load_checkpoint(tmp_path / "run").digest()
    trainer("train", "--resume", "--out", tmp_path / "run", "--images", "96")
    assert load_checkpoint(tmp_path / "run").settings == dataclasses.replace(settings, images=96)


def test_counting_modes_leaves_the_weights_as_they_are(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny("mlp"), data_root, tmp_path / "without")
    monkeypatch.setattr("ganserve_trainer.train.loop.EVERY_IMAGES", 64)
    run(tiny("mlp"), data_root, tmp_path / "with")
    without, counted = (load_checkpoint(tmp_path / name) for name in ("without", "with"))
    assert [count.images_seen for count in counted.history.modes] == [64, 128]
    assert counted.digest() == without.digest()
    assert "Modes in generated images" in (tmp_path / "with" / "report.html").read_text()


def test_settings_without_effect_are_named() -> None:
    changes = {"gradient_penalty": 5.0, "growth_images": 100, "width": 8}
    assert [text.split()[0] for text in unused_settings(from_preset("dcgan", changes))] == list(changes)[1::-1]
    assert unused_settings(from_preset("pggan", changes)) == []
    assert all(unused_settings(preset.settings) == [] for preset in PRESETS.values())


def test_a_bad_setting_is_found_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom ganserve_trainer.cli import main\n"
        "sys.argv = 'ganserve-trainer train --preset cdcgan --batch-size 1 --out run'.split()\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "2 False\n"
    assert "batch_size is 1" in found.stderr


def test_a_growing_network_that_ends_small_says_so(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny("pggan", images=64, sample_every_images=1000), data_root, tmp_path)
    told = capsys.readouterr().err
    assert "full size after 384 images, and the run ends before, after 64" in told
    assert "WARNING: the images are not full-size: they have the detail of 4x4 pixels, in 32x32." in told


def test_bad_configurations_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    for content, message in [
        ('preset = "cdcgan"\nwidht = 8\n', "did you mean width"),
        ('preset = "cdcgan"\nwidth = "8"\n', "width is '8'; it must be of type int"),
        ("width = \n", "is not a TOML file"),
        ("width = 8\n", "no preset is given"),
        ('preset = "gan"\n', "there is no preset 'gan'"),
        (None, "run.toml: No such file"),
    ]:
        config.unlink(missing_ok=True)
        if content is not None:
            config.write_text(content)
        monkeypatch.setattr(
            sys, "argv", ["ganserve-trainer", "train", "--config", str(config), "--out", str(tmp_path / "run")]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("ganserve-trainer: ")
        assert message in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [("--out", "s3://bucket/run"), ("--out", "run", "--data-root", "gs://data")])
def test_a_url_is_no_folder(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["ganserve-trainer", "train", "--preset", "mlp", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert ":// URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_that_other_programs_use_are_answered_with_ours(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ganserve-trainer", "train", "--out", "run", f"{name}=3"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"there is no {name}; use " in told
    ours = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Settings)}
    assert set(re.findall(r"--[a-z-]+", told)) - {name} <= ours | {"--out", "--data-root"}
    assert name not in ours

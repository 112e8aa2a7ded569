"""A run that starts from the weights of another one, or of another program's file."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import Settings, from_preset
from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint
from ganserve_trainer.train.loop import train


def tiny(**changes: object) -> Settings:
    small = {"width": 4, "dense_width": 16, "batch_size": 16, "images": 64, "precision": "fp32"}
    return from_preset("cdcgan", small | {"checkpoint_every_images": 16} | changes)


def classes(data_root: Path, count: int) -> Dataset:
    whole = load_dataset("mnist", data_root, train=True)
    chosen = whole.labels < count
    spec = dataclasses.replace(whole.spec, class_names=whole.spec.class_names[:count])
    return dataclasses.replace(whole, images=whole.images[chosen], labels=whole.labels[chosen], spec=spec)


def train_here(settings: Settings, dataset: Dataset, out: Path, *, resume: bool = False) -> None:
    train(settings, dataset, out, resume=resume, report=lambda *_: None)


def test_a_run_starts_from_another_with_other_classes_and_a_frozen_layer(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(tiny(), classes(data_root, 10), tmp_path / "source")
    capsys.readouterr()
    # A learning rate of 0 shows what the run starts from.
    still = tiny(init_from=str(tmp_path / "source"), learning_rate=0.0, images=16)
    train_here(still, classes(data_root, 4), tmp_path / "still")
    said = capsys.readouterr().err
    assert "the inputs for the classes start anew in layers.0.weight" in said
    assert "discriminator: these start anew: embedding.weight ([10, 16] instead of [4, 16])" in said
    source, started = load_checkpoint(tmp_path / "source"), load_checkpoint(tmp_path / "still")
    latents = slice(0, still.latent_dim)
    assert torch.equal(
        started.generator["layers.0.weight"][:, latents], source.generator["layers.0.weight"][:, latents]
    )
    for name, weight in started.discriminator.items():
        assert (name == "embedding.weight") or torch.equal(weight, source.discriminator[name])

    frozen = tiny(init_from=str(tmp_path / "source"), freeze_discriminator=1)
    train_here(frozen, classes(data_root, 4), tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole")
    for name, weight in whole.discriminator.items():
        assert torch.equal(weight, source.discriminator.get(name, weight[:0])) == name.startswith("trunk.0."), name
    assert whole.settings.init_digest.startswith("sha256:")

    # Resuming needs no source, and ends with the same weights.
    for folder in tmp_path.glob("source/checkpoints"):
        folder.rename(tmp_path / "elsewhere")
    checkpoint_files(tmp_path / "whole")[0].unlink()
    assert load_checkpoint(tmp_path / "whole").images_seen < 64
    train_here(frozen, classes(data_root, 4), tmp_path / "whole", resume=True)
    again = load_checkpoint(tmp_path / "whole")
    assert all(torch.equal(again.generator[name], weight) for name, weight in whole.generator.items())
    assert all(torch.equal(again.discriminator[name], weight) for name, weight in whole.discriminator.items())


def test_weights_of_another_program_are_found_where_names_and_shapes_fit(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = classes(data_root, 10)
    train_here(tiny(), dataset, tmp_path / "source")
    source = load_checkpoint(tmp_path / "source")
    theirs = {f"module.{name}": weight for name, weight in source.ema.items()} | {"module.other": torch.zeros(1)}
    file = tmp_path / "theirs.pth"
    torch.save({"g_ema": theirs, "epoch": 3}, file)
    started = tiny(init_from=str(file), init_networks="generator", learning_rate=0.0, images=16)
    train_here(started, dataset, tmp_path / "run")
    run = load_checkpoint(tmp_path / "run")
    assert torch.equal(run.generator["layers.0.weight"], source.ema["layers.0.weight"])
    assert f"generator: {len(run.generator)} of {len(run.generator)} tensors fit" in capsys.readouterr().err
    with pytest.raises(TrainerError, match="no weights of Discriminator"):
        train_here(dataclasses.replace(started, init_networks="both"), dataset, tmp_path / "both")
    torch.save({"g_ema": {name: weight + 1 for name, weight in theirs.items()}}, file)
    with pytest.raises(TrainerError, match="but init_digest is sha256"):
        train_here(run.settings, dataset, tmp_path / "again")


def test_freezing_needs_trained_weights_and_layers(data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="add init_from"):
        tiny(freeze_discriminator=1)
    with pytest.raises(TrainerError, match="the discriminator has 3 layers: freeze fewer"):
        train_here(tiny(init_from="x", freeze_discriminator=9), classes(data_root, 10), tmp_path)

"""The best checkpoint: kept, used by default, never resumed from; and early stopping."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.export.publish import export
from ganserve_trainer.networks.generator import Generator
from ganserve_trainer.settings import Settings, from_preset
from ganserve_trainer.train.best import Choice, load_chosen
from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint
from ganserve_trainer.train.loop import train


def tiny(**changes: object) -> Settings:
    small = {"width": 4, "batch_size": 16, "images": 96, "sample_every_images": 96, "checkpoint_every_images": 16}
    return from_preset("mlp", small | {"precision": "fp32", "evaluate_every_images": 16} | changes)


def figures(*values: float, name: str = "fid") -> Callable[[Generator], dict[str, float]]:
    left = iter(values)
    return lambda _: {name: next(left)}


def train_here(
    settings: Settings,
    data_root: Path,
    out: Path,
    measure: Callable[[Generator], dict[str, float]],
    *,
    resume: bool = False,
) -> bool:
    dataset = load_dataset("mnist", data_root, train=True)
    return train(settings, dataset, out, resume=resume, report=lambda *_: None, measure=measure)


def test_the_best_checkpoint_is_exported_beside_the_newest_ones(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(tiny(), data_root, tmp_path / "run", figures(9, 7, math.nan, 7, 8, 7.5))
    assert [path.name for path in checkpoint_files(tmp_path / "run")] == ["000000000096.pt", "000000000080.pt"]
    best, last = (load_chosen(tmp_path / "run", choice) for choice in Choice)
    assert (best.images_seen, last.images_seen) == (32, 96)
    assert load_checkpoint(tmp_path / "run").images_seen == 96  # what a resumed run continues from
    page = (tmp_path / "run" / "report.html").read_text()
    assert "7 at 32 images" in page
    capsys.readouterr()
    export(tmp_path / "run", tmp_path / "models", "best")
    assert "best checkpoint of" in (said := capsys.readouterr().err)
    assert "best has 32 images, fid 7; last has 96 images, fid 7.5" in said
    export(tmp_path / "run", tmp_path / "models", "last", Choice.LAST)
    one, other = ((tmp_path / "models" / name / "1" / "model.onnx").read_bytes() for name in ("best", "last"))
    assert b'"imagesSeen": "32"' in one
    assert b'"imagesSeen": "96"' in other


def test_a_damaged_best_checkpoint_is_told_and_replaced_by_the_last(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(tiny(images=48), data_root, tmp_path, figures(1, 2, 3))
    (tmp_path / "checkpoints" / "best.pt").write_bytes(b"")
    assert load_chosen(tmp_path).images_seen == 48
    assert "best.pt is not a readable checkpoint" in capsys.readouterr().err
    train_here(tiny(images=64), data_root, tmp_path, figures(4), resume=True)
    assert load_chosen(tmp_path).images_seen == 64


def test_a_resumed_run_keeps_its_best_checkpoint_and_ends_with_the_same_weights(
    data_root: Path, tmp_path: Path
) -> None:
    train_here(tiny(), data_root, tmp_path / "whole", figures(9, 7, 8, 8, 8, 8))
    train_here(tiny(images=48), data_root, tmp_path / "halves", figures(9, 7, 8))
    train_here(tiny(), data_root, tmp_path / "halves", figures(8, 8, 8), resume=True)
    for choice in Choice:
        whole, halves = load_chosen(tmp_path / "whole", choice), load_chosen(tmp_path / "halves", choice)
        assert whole.images_seen == halves.images_seen == (32 if choice is Choice.BEST else 96)
        assert all(torch.equal(whole.generator[name], halves.generator[name]) for name in whole.generator)


def test_a_run_without_progress_ends_early(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny(select="recall", patience=2, keep=1)
    assert train_here(settings, data_root, tmp_path, figures(0.1, 0.3, 0.3, 0.2, name="recall"))
    assert load_checkpoint(tmp_path).images_seen == 64
    assert [path.name for path in checkpoint_files(tmp_path)] == ["000000000064.pt"]
    assert load_chosen(tmp_path).images_seen == 32
    assert "recall is not better than before in the last 2 measurements" in capsys.readouterr().err
    # Resuming does not train on, unless there is more patience.
    assert train_here(settings, data_root, tmp_path, figures(), resume=True)
    assert load_checkpoint(tmp_path).images_seen == 64


def test_settings_that_need_measurements_or_labels_are_refused() -> None:
    with pytest.raises(TrainerError, match="add evaluate_every_images"):
        tiny(patience=3, evaluate_every_images=0)
    with pytest.raises(TrainerError, match="select label_accuracy needs labels"):
        tiny(select="label_accuracy")

"""What a run survives: a second process, damaged files, a full disk, a read-only folder; test_processes.py kills it."""

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.conftest import ordinary_user

from ganserve_trainer import cli
from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.settings import Settings, from_preset
from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint, save_checkpoint
from ganserve_trainer.train.loop import train


def tiny(**changes: object) -> Settings:
    small = {"width": 4, "batch_size": 16, "images": 1600, "sample_every_images": 1600, "checkpoint_every_images": 16}
    return from_preset("cdcgan", small | {"precision": "fp32"} | changes)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Have writing beyond a size in bytes fail as on a full disk, but with EFBIG."""
    before, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, highest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, highest))


def train_here(settings: Settings, data_root: Path, out: Path) -> None:
    train(settings, load_dataset("mnist", data_root, train=True), out, resume=True, report=lambda *_: None)


def test_two_processes_do_not_train_in_one_folder(data_root: Path, tmp_path: Path) -> None:
    def second(*_: object) -> None:
        with pytest.raises(TrainerError, match="another process is training"):
            train(tiny(), dataset, tmp_path, resume=True, report=lambda *_: None)
        seen.append(True)

    seen: list[bool] = []
    dataset = load_dataset("mnist", data_root, train=True)
    train(tiny(images=32), dataset, tmp_path, resume=False, report=second)
    assert seen


def test_the_newest_good_checkpoint_is_found(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(tiny(images=64), data_root, tmp_path)
    newest, before = checkpoint_files(tmp_path)
    assert (newest.name, before.name) == ("000000000064.pt", "000000000048.pt")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert load_checkpoint(tmp_path).images_seen == 48
    message = capsys.readouterr().err
    assert "000000000064.pt is" in message
    assert "going back to 000000000048.pt" in message
    before.write_bytes(b"")
    with pytest.raises(TrainerError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)


def test_a_full_disk_ends_the_run_with_a_message_and_keeps_what_was_there(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(tiny(images=64), data_root, tmp_path)
    size = checkpoint_files(tmp_path)[0].stat().st_size
    monkeypatch.setattr(cli, "app", lambda: train_here(tiny(), data_root, tmp_path))
    with files_of_at_most(size // 2), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "File too large" in capsys.readouterr().err
    assert load_checkpoint(tmp_path).images_seen == 64
    assert not list(tmp_path.rglob(".*"))


def test_a_read_only_folder_is_named(data_root: Path, tmp_path: Path, open_folder: Path) -> None:
    train_here(tiny(images=16), data_root, tmp_path)  # now everything is imported
    out = open_folder / "run"
    out.mkdir(mode=0o555)
    with ordinary_user(), pytest.raises(PermissionError, match="run"):
        train_here(tiny(), data_root, out)
    assert not list(out.iterdir())


def test_a_data_set_that_shrank_is_refused(data_root: Path, tmp_path: Path) -> None:
    train_here(tiny(images=64), data_root, tmp_path)
    dataset = load_dataset("mnist", data_root, train=True)
    fewer = dataclasses.replace(dataset, images=dataset.images[:300], labels=dataset.labels[:300])
    with pytest.raises(TrainerError, match="have changed: it now has 300 images"):
        train(tiny(), fewer, tmp_path, resume=True, report=lambda *_: None)
    renamed = dataclasses.replace(dataset, spec=dataclasses.replace(dataset.spec, class_names=tuple("abcdefghij")))
    with pytest.raises(TrainerError, match=r"classes a, b, c, .* now; 28x28x1, classes 0, 1, 2"):
        train(tiny(), renamed, tmp_path, resume=True, report=lambda *_: None)
    tinier = dataclasses.replace(dataset, images=dataset.images[:10], labels=dataset.labels[:10])
    with pytest.raises(TrainerError, match="10 images, fewer than a batch of 16; use --batch-size 10"):
        train(tiny(), tinier, tmp_path / "new", resume=False, report=lambda *_: None)


def test_checkpoints_of_other_versions_and_architectures_are_named(data_root: Path, tmp_path: Path) -> None:
    train_here(tiny(images=16), data_root, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    file = checkpoint_files(tmp_path)[0]
    content = torch.load(file, weights_only=True)
    torch.save(content | {"format": 99}, file)
    with pytest.raises(TrainerError, match="a newer ganserve-trainer wrote it: upgrade"):
        load_checkpoint(tmp_path)
    torch.save(content | {"format": 1}, file)
    with pytest.raises(TrainerError, match="an older ganserve-trainer wrote it: export it with that one"):
        load_checkpoint(tmp_path)
    torch.save({key: value for key, value in content.items() if key != "settings"}, file)
    with pytest.raises(TrainerError, match="settings"):
        load_checkpoint(tmp_path)
    # Weights of one architecture under the settings of another.
    save_checkpoint(dataclasses.replace(checkpoint, settings=tiny(images=16, width=8)), tmp_path)
    with pytest.raises(TrainerError, match="weights do not fit"):
        train_here(tiny(width=8), data_root, tmp_path)

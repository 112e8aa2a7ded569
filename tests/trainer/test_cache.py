"""The cache of decoded images: one process decodes, all others map the same file."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.programs import TIMEOUT_S, Program, ended, installed

from ganserve_trainer.cli import main
from ganserve_trainer.data import datasets, decoding, folders
from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.data.reading import Reading
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.networks.augmentation import augment


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ganserve" / "data"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            rgba = np.random.default_rng([len(name), number, ord(name[0])]).integers(0, 256, (8, 8, 4), np.uint8)
            Image.fromarray(rgba).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def load(path: Path, *, train: bool = True, reading: Reading = Reading()) -> Dataset:
    return load_dataset(str(path), Path("nowhere"), train=train, reading=reading)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images each time that some are decoded."""
    counts: list[int] = []

    def counting(items: list[object], how: decoding.Conversion) -> object:
        counts.append(len(items))
        return decode_all(items, how)  # type: ignore[arg-type]

    decode_all = decoding.decode_all
    monkeypatch.setattr(folders, "decode_all", counting)
    return counts


def test_images_are_decoded_once_until_a_file_or_a_setting_changes(
    photos: Path, cache: Path, decoded: list[int]
) -> None:
    first, test, again = load(photos), load(photos, train=False), load(photos)
    assert len(first.images) + len(test.images) == 40
    assert torch.equal(first.images, again.images)
    assert first.digest() == again.digest()
    assert decoded == [40]
    assert load(photos, reading=Reading(background="black")).digest() != first.digest()
    assert decoded == [40, 40]
    (photos / "cat" / "0.png").write_bytes((photos / "dog" / "1.png").read_bytes())
    assert load(photos).digest() != first.digest()
    assert decoded == [40, 40, 40]
    assert len(list(cache.glob("*.images"))) == 3


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_made_again(photos: Path, cache: Path, decoded: list[int], damage: str) -> None:
    digest = load(photos).digest()
    (file,) = cache.glob("*.images")
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1  # a pixel of the training part
    file.write_bytes(b"" if damage == "emptied" else content[:-100] if damage == "cut" else content)
    assert load(photos).digest() == digest
    assert decoded == [40, 40]


def test_changing_images_in_memory_leaves_the_file(photos: Path, cache: Path) -> None:
    load(photos).images.zero_()
    assert load(photos).images.any()


def test_a_folder_that_cannot_be_written_is_replaced(
    photos: Path, cache: Path, decoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir(parents=True)
    cache.touch()
    assert len(load(photos).images) + len(load(photos, train=False).images) == 40
    assert decoded == [40, 40]
    assert "Set XDG_CACHE_HOME" in capsys.readouterr().err


def test_the_least_recently_used_files_are_deleted(photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(photos)
    (old,) = cache.glob("*.images")
    os.utime(old, (1, 1))
    monkeypatch.setattr("ganserve_trainer.data.cache._KEPT_BYTES", old.stat().st_size)
    load(photos, reading=Reading(background="black"))
    (kept,) = cache.glob("*.images")
    assert kept != old


def test_memory_that_runs_out_while_reading_advises_on_the_data(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(datasets, "read_folder", exhausted)
    arguments = ["--dataset", str(photos), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["ganserve-trainer", "train", "--preset", "mlp", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert "out of memory while reading the data set" in error
    assert "--image-size" in error
    assert "batch" not in error


@pytest.mark.slow  # trains, evaluates and exports
def test_two_processes_decode_once_and_four_channels_reach_the_model(photos: Path, cache: Path, tmp_path: Path) -> None:
    command = ["train", "--preset", "cdcgan", "--dataset", str(photos), "--channels", "4", "--width", "4"]
    command += ["--images", "64", "--batch-size", "8", "--augment", "color"]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                ended(
                    Program(
                        [installed("ganserve-trainer"), *command, "--out", str(tmp_path / name)],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            )
            for name in ("one", "two")
        ]
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    (file,) = cache.glob("*.images")
    with Image.open(next((tmp_path / "one" / "samples").glob("*.png"))) as sheet:
        assert sheet.mode == "RGB"
    written = file.stat()
    for arguments in (
        ["evaluate", str(tmp_path / "one"), "--images", "20"],
        ["export", str(tmp_path / "one"), "--repository", str(tmp_path / "models"), "--name", "pets"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["ganserve-trainer", *arguments])
            with pytest.raises(SystemExit) as exit_:
                main()
            assert exit_.value.code == 0
    assert file.stat().st_ino == written.st_ino
    assert (tmp_path / "models" / "pets" / "1" / "model.onnx").is_file()


def test_colour_augmentation_leaves_transparency_as_it_is() -> None:
    images = torch.rand(4, 4, 8, 8)
    changed = augment(images, ("color",))
    assert torch.equal(changed[:, 3], images[:, 3])
    assert not torch.allclose(changed[:, :3], images[:, :3])


def test_one_image_does_not_train(tmp_path: Path, cache: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with pytest.raises(TrainerError, match="needs two, to train on and to test on"):
        load(tmp_path)

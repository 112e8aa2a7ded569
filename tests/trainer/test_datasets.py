import gzip
import hashlib
import os
import pickle
import shutil
import struct
import sys
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from tests.conftest import ordinary_user

from ganserve_trainer.cli import main
from ganserve_trainer.data import datasets
from ganserve_trainer.data.datasets import DATASETS, Dataset, load_dataset
from ganserve_trainer.errors import TrainerError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def folder_of(root: Path, pictures: Mapping[str, Image.Image]) -> str:
    for name, picture in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)
    return str(root)


def numbered(*numbers: int, prefix: str = "") -> dict[str, Image.Image]:
    """Make one small picture a number, with the number in its colour."""
    return {f"{prefix}{number}.png": Image.new("RGB", (4, 4), (number % 256, number // 256, 7)) for number in numbers}


def numbers_in(dataset: Dataset) -> list[int]:
    pixels = dataset.images[:, :, 0, 0].int()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def load(name: str, *, train: bool = True, image_size: int | None = None) -> Dataset:
    return load_dataset(name, Path("nowhere"), train=train, image_size=image_size)


def only_picture(root: Path, file_name: str, image_size: int | None = None) -> NDArray[np.uint8]:
    """Load a folder with DIR/train/<file_name>, which is there already."""
    folder_of(root, {"test/other.png": Image.new("RGB", (8, 4), (1, 2, 3))})
    dataset = load(str(root), image_size=image_size)
    assert len(dataset.images) == 1, file_name
    pixels: NDArray[np.uint8] = dataset.images[0].permute(1, 2, 0).numpy()
    return pixels


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# Built-in data sets


def test_no_data_set_and_no_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--preset", "mlp", "--out", str(tmp_path / "run"), "--data-root", str(tmp_path / "empty")]
    monkeypatch.setattr(sys, "argv", ["ganserve-trainer", *command])
    # Nothing must be downloaded by a test. An opener that was made before would not ask for the proxies.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    for way in ("--data-root", "MNIST/raw/", "train-images-idx3-ubyte", "dataset-fashion-mnist"):
        assert way in told
    assert not list(tmp_path.iterdir())


def test_a_download_is_moved_to_where_it_is_looked_for(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []

    def download(self: torchvision.datasets.MNIST) -> None:
        downloads.append(self.root)
        shutil.copytree(data_root / "MNIST" / "raw", self.raw_folder)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    for _ in range(2):
        assert len(load_dataset("mnist", tmp_path / "data", train=True).images) == 400
    assert len(downloads) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_damaged_data_is_named(data_root: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (data_root / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainerError, match="damaged"):
        load_dataset("mnist", tmp_path, train=True)


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(TrainerError) as caught:
        load("photos")
    assert set(DATASETS) == {"mnist", "fashion-mnist", "cifar10", "stacked-mnist"}
    for name in (*DATASETS, "./photos"):
        assert name in str(caught.value)


def test_debian_s_fashion_mnist_is_found_by_itself(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (data_root / "MNIST" / "raw").iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path)
    dataset = load_dataset("fashion-mnist", tmp_path / "nowhere", train=True)
    assert len(dataset.images) == 400
    assert dataset.spec.class_names[9] == "Ankle boot"


def test_mnist_s_digest_is_that_of_recorded_model_cards(data_root: Path) -> None:
    raw = data_root / "MNIST" / "raw"
    labels = np.frombuffer((raw / "train-labels-idx1-ubyte").read_bytes()[8:], np.uint8).astype("<i8")
    content = (raw / "train-images-idx3-ubyte").read_bytes()[16:] + labels.tobytes()
    dataset = load_dataset("mnist", data_root, train=True)
    assert dataset.digest() == f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def cifar10_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a small CIFAR-10, whose image i is all red of brightness i and of class i modulo 10."""
    reader = torchvision.datasets.CIFAR10
    (tmp_path / reader.base_folder).mkdir()

    def write(name: str, content: object) -> str:
        pickled = pickle.dumps(content)
        (tmp_path / reader.base_folder / name).write_bytes(pickled)
        return hashlib.md5(pickled).hexdigest()

    def batch(name: str, numbers: range) -> list[str]:
        data = np.zeros((len(numbers), 3, 1024), np.uint8)
        data[:, 0] = np.array(numbers)[:, None]
        return [name, write(name, {"data": data.reshape(-1, 3072), "labels": [number % 10 for number in numbers]})]

    monkeypatch.setattr(reader, "train_list", [batch("data_batch_1", range(20)), batch("data_batch_2", range(20, 40))])
    monkeypatch.setattr(reader, "test_list", [batch("test_batch", range(40, 60))])
    meta = reader.meta | {"md5": write("batches.meta", {"label_names": list("abcdefghij")})}
    monkeypatch.setattr(reader, "meta", meta)
    return tmp_path


def test_cifar10_is_read_as_torchvision_lays_it_out(cifar10_root: Path) -> None:
    dataset = load_dataset("cifar10", cifar10_root, train=True)
    assert dataset.images.shape == (40, 3, 32, 32)
    assert dataset.images.is_contiguous()
    assert dataset.images[39, 0].unique().tolist() == [39]
    assert dataset.images[:, 1:].max() == 0
    assert dataset.labels.tolist() == [number % 10 for number in range(40)]
    assert dataset.spec.class_names[3] == "cat"
    assert dataset.spec.channels == 3
    (cifar10_root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"broken")
    with pytest.raises(TrainerError, match=r"cifar-10-batches-py.* damaged .*batches\.meta"):
        load_dataset("cifar10", cifar10_root, train=True)


def test_digits_are_resized_as_pillow_resizes_pictures(data_root: Path) -> None:
    original = load_dataset("mnist", data_root, train=True)
    assert load_dataset("mnist", data_root, train=True, image_size=28).digest() == original.digest()
    for size in (14, 32, 64):
        resized = load_dataset("mnist", data_root, train=True, image_size=size)
        assert resized.images.shape == (400, 1, size, size)
        assert resized.images.dtype == torch.uint8
        assert (resized.spec.height, resized.spec.width) == (size, size)
        assert torch.equal(resized.labels, original.labels)
        for ours, digit in zip(resized.images[:20, 0].numpy(), original.images[:20, 0].numpy(), strict=True):
            pillows = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
            assert ours.astype(int) == pytest.approx(np.asarray(pillows).astype(int), abs=2)


@pytest.mark.parametrize(("train", "count"), [(True, 128_000), (False, 26_000)])
def test_stacked_digits_show_their_labels_in_red_green_and_blue(data_root: Path, train: bool, count: int) -> None:
    digits = load_dataset("mnist", data_root, train=train)
    label_of = {digit.tobytes(): label for digit, label in zip(digits.images.numpy(), digits.labels, strict=True)}
    stacked = load_dataset("stacked-mnist", data_root, train=train)
    assert stacked.images.shape == (count, 3, 28, 28)
    assert stacked.spec.class_names[:11] == (
        "000",
        "001",
        "002",
        "003",
        "004",
        "005",
        "006",
        "007",
        "008",
        "009",
        "010",
    )
    assert len(stacked.spec.class_names) == 1000
    for image, label in zip(stacked.images[::200].numpy(), stacked.labels[::200].tolist(), strict=True):
        shown = "".join(str(int(label_of[plane.tobytes()])) for plane in image)
        assert shown == stacked.spec.class_names[label]
    assert len(stacked.labels.unique()) == 1000


def test_stacked_digits_are_drawn_alike_each_time_and_then_resized(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_STACKED_TRAIN_IMAGES", 500)
    one, other = (load_dataset("stacked-mnist", data_root, train=True) for _ in range(2))
    assert one.digest() == other.digest()
    resized = load_dataset("stacked-mnist", data_root, train=True, image_size=32)
    assert resized.images.shape == (500, 3, 32, 32)
    assert torch.equal(resized.labels, one.labels)


# The two parts


@pytest.mark.parametrize("source", ["mnist", "stacked-mnist", "cifar10", "folder", "folder of two parts"])
def test_training_never_sees_the_test_images(
    source: str, data_root: Path, cifar10_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_STACKED_TRAIN_IMAGES", 5000)
    name, root = source, data_root
    if source == "cifar10":
        root = cifar10_root
    elif source == "folder":
        name = folder_of(tmp_path / "all", numbered(*range(100)))
    elif source == "folder of two parts":
        folder_of(tmp_path / "two", numbered(*range(20), prefix="train/"))
        name = folder_of(tmp_path / "two", numbered(*range(20, 30), prefix="test/"))
    parts = [load_dataset(name, root, train=train).images for train in (True, False)]
    if source == "stacked-mnist":
        parts = [images.flatten(0, 1) for images in parts]  # digit by digit
    train, test = ({image.tobytes() for image in images.numpy()} for images in parts)
    assert len(train) >= 20
    assert len(test) >= 5
    assert not train & test


def test_a_training_picture_that_is_also_a_test_picture_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path, numbered(1, 2, 3, prefix="train/"))
    folder_of(tmp_path, numbered(4, 5, prefix="test/"))
    shutil.copy(tmp_path / "test" / "5.png", tmp_path / "train" / "copy.png")
    (tmp_path / "train" / "link.png").symlink_to(tmp_path / "test" / "4.png")
    train, test = load(str(tmp_path)), load(str(tmp_path), train=False)
    assert numbers_in(train) == [1, 2, 3]
    assert train.skipped == 2
    assert numbers_in(test) == [4, 5]
    assert test.skipped == 0
    assert "train/copy.png: the same picture is in the test part" in capsys.readouterr().err


def test_files_that_are_added_leave_the_others_in_their_parts(tmp_path: Path) -> None:
    before = folder_of(tmp_path / "before", numbered(*range(300)))
    test = set(numbers_in(load(before, train=False)))
    assert 10 <= len(test) <= 60
    assert set(numbers_in(load(before))) == set(range(300)) - test
    # Elsewhere, and with other files before and between.
    after = folder_of(tmp_path / "elsewhere" / "after", numbered(*range(500)))
    assert {number for number in numbers_in(load(after, train=False)) if number < 300} == test


def test_a_part_without_images_says_why(tmp_path: Path) -> None:
    name = folder_of(tmp_path, numbered(1, prefix="train/"))
    folder_of(tmp_path, numbered(2, prefix="test/"))
    (tmp_path / "test" / "2.png").write_bytes(b"no picture")
    with pytest.raises(TrainerError, match=r"no image in the test part, and 1 in total.* one image in ten"):
        load(name, train=False)
    assert len(load(name).images) == 1


# Classes


def test_classes_are_the_sub_folders_by_name(tmp_path: Path) -> None:
    pictures = numbered(*range(40), prefix="pets/Zebra/") | numbered(*range(40, 80), prefix="pets/ant/")
    pictures |= numbered(*range(80, 120), prefix="pets/cat/deep/deeper/")
    folder_of(tmp_path, pictures)
    for train in (True, False):
        dataset = load(f"{tmp_path}/pets/", train=train)
        assert dataset.name == "pets"
        assert dataset.spec.class_names == ("Zebra", "ant", "cat")
        assert dataset.labels.dtype == torch.int64
        expected = [0 if number < 40 else 1 if number < 80 else 2 for number in numbers_in(dataset)]
        assert dataset.labels.tolist() == expected
        assert set(expected) == {0, 1, 2}
    assert load(f"{tmp_path}/pets").digest() == load(f"{tmp_path}/pets").digest()


def test_both_parts_know_every_class(tmp_path: Path) -> None:
    folder_of(tmp_path, numbered(1, prefix="train/b/") | numbered(2, prefix="train/a/"))
    folder_of(tmp_path, numbered(3, prefix="test/c/") | numbered(4, prefix="test/b/"))
    train, test = load(str(tmp_path)), load(str(tmp_path), train=False)
    assert train.spec == test.spec
    assert train.spec.class_names == ("a", "b", "c")
    assert dict(zip(numbers_in(train), train.labels.tolist(), strict=True)) == {1: 1, 2: 0}
    assert dict(zip(numbers_in(test), test.labels.tolist(), strict=True)) == {3: 2, 4: 1}


def test_a_folder_with_images_in_it_has_no_classes(tmp_path: Path) -> None:
    name = folder_of(tmp_path, numbered(*range(30)) | numbered(*range(30, 60), prefix="more/"))
    (tmp_path / "empty").mkdir()
    dataset = load(name)
    assert dataset.spec.class_names == ()
    assert dataset.labels.tolist() == [0] * len(dataset.images)
    assert max(numbers_in(dataset)) >= 30


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    name = folder_of(tmp_path, numbered(*range(30), prefix="plane/") | numbered(*range(30, 60), prefix="train/"))
    assert load(name).spec.class_names == ("plane", "train")
    assert load(name).labels.unique().tolist() == [0, 1]


def test_a_foreign_file_beside_the_classes_leaves_them_classes(tmp_path: Path) -> None:
    name = folder_of(tmp_path, numbered(*range(30), prefix="a/") | numbered(*range(30, 60), prefix="b/"))
    (tmp_path / "README.md").write_text("# Pets")
    assert load(name).spec.class_names == ("a", "b")


def test_a_class_without_any_image_is_named(tmp_path: Path) -> None:
    name = folder_of(tmp_path, numbered(*range(30), prefix="cat/"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy film")
    (tmp_path / "void").mkdir()
    with pytest.raises(TrainerError, match="no readable image in notes, void"):
        load(name)


def test_a_class_whose_name_no_model_card_can_hold_is_named(tmp_path: Path) -> None:
    name = folder_of(tmp_path, numbered(*range(30), prefix="caf\udce9/"))
    with pytest.raises(TrainerError, match=r"'caf\\udce9' is not valid UTF-8"):
        load(name)


# Files that are left out


def test_files_that_are_no_images_are_named_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = folder_of(tmp_path, numbered(1, 2, prefix="train/a/") | numbered(3, prefix="test/a/"))
    place = tmp_path / "train" / "a"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for kind in ("png", "jpg", "webp"):
        noise.save(place / f"whole.{kind}")
        content = (place / f"whole.{kind}").read_bytes()
        (place / f"cut.{kind}").write_bytes(content[: len(content) // 2])
        (place / f"whole.{kind}").unlink()
    (place / "text.jpg").write_text("I am a picture")
    (place / "zero.png").touch()
    (place / "bomb.png").write_bytes(png_that_claims(10_000, 10_000))
    (place / "giant.png").write_bytes(png_that_claims(60_000, 60_000))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(place / "float.tiff")
    Image.new("RGB", (4, 4)).save(place / "drawing.eps")
    (place / "dangling.png").symlink_to("nowhere.png")
    (place / "itself.png").symlink_to("itself.png")
    os.mkfifo(place / "pipe.png")
    dataset = load(name)
    assert numbers_in(dataset) == [1, 2]
    assert dataset.skipped == 12
    error = capsys.readouterr().err
    assert "12 of the 14 files of the training part are skipped" in error
    for line in (
        "train/a/bomb.png: Image size (100000000 pixels) exceeds limit",
        "train/a/cut.jpg: image file is truncated",
        "train/a/cut.png: ",
        "train/a/dangling.png: No such file",
        "train/a/drawing.eps: not an image, or of an unsupported format",
        "train/a/float.tiff: its pixels are floating-point",
        "train/a/giant.png: Image size (3600000000 pixels) exceeds limit",
        "train/a/itself.png: Too many levels of symbolic links",
        "train/a/pipe.png: not a file",
        "… and 2 more",
    ):
        assert f"\n  {line}" in error, line
    assert "zero.png" not in error
    for shown in (
        "bomb.png",
        "cut.jpg",
        "cut.png",
        "cut.webp",
        "dangling.png",
        "itself.png",
        "float.tiff",
        "giant.png",
    ):
        (place / shown).unlink()
    assert load(name).skipped == 4
    error = capsys.readouterr().err
    assert "train/a/zero.png: empty\n" in error
    assert "train/a/text.jpg: not an image" in error
    assert "more" not in error
    assert load(name, train=False).skipped == 0
    assert not capsys.readouterr().err


def test_what_may_not_be_read_is_named(open_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder_of(open_folder, numbered(1, 2, prefix="train/a/") | numbered(3, prefix="test/a/"))
    (open_folder / "train" / "a" / "2.png").chmod(0)
    with ordinary_user():
        assert load(name).skipped == 1
        assert "train/a/2.png: Permission denied" in capsys.readouterr().err
    (open_folder / "train" / "a").chmod(0)
    with ordinary_user(), pytest.raises(TrainerError, match="train/a cannot be listed: Permission denied"):
        load(name)
    (open_folder / "train" / "a").chmod(0o755)


def test_hidden_files_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder_of(tmp_path, numbered(*range(30), prefix="a/") | numbered(31, prefix=".git/"))
    for hidden in (".DS_Store", "a/Thumbs.db", "a/desktop.ini", "__MACOSX/._1.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"\0")
    datasets = [load(name, train=train) for train in (True, False)]
    assert datasets[0].spec.class_names == ("a",)
    assert sum(len(dataset.images) for dataset in datasets) == 30
    assert "skipped" not in capsys.readouterr().err


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", numbered(*range(20)))
    name = folder_of(tmp_path / "all", numbered(*range(20, 40), prefix="a/") | numbered(*range(40, 60), prefix="b/"))
    folder_of(tmp_path, numbered(60))
    for link, target in {
        "c": "elsewhere",
        "a/up": "all",
        "a/out": "",
        "a/across": "all/b/inside",
        "b/inside/back": "all/a",
    }.items():
        (tmp_path / "all" / link).parent.mkdir(exist_ok=True)
        (tmp_path / "all" / link).symlink_to(tmp_path / target)
    parts = [load(name, train=train) for train in (True, False)]
    assert parts[0].spec.class_names == ("a", "b", "c")
    assert sorted(numbers_in(parts[0]) + numbers_in(parts[1])) == list(range(60))


def test_a_folder_that_is_missing_or_has_no_images_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"absent is not a folder.*DIR/cats/1\.jpg"):
        load(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(TrainerError, match=r"no image that can be read.* DIR/train and DIR/test"):
        load(str(tmp_path))


# Pictures


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    pictures = {f"{number}.png": Image.new("RGB", (8, 4), (number, 0, 0)) for number in range(40)}
    name = folder_of(tmp_path, pictures)
    assert load(name).images.shape[1:] == (3, 4, 8)
    assert (load(name).spec.height, load(name).spec.width) == (4, 8)
    folder_of(tmp_path, {"tall.png": Image.new("RGB", (6, 9), RED)})
    for train in (True, False):
        with pytest.raises(
            TrainerError, match=r"2 sizes \(40 of 8x4, such as 0\.png; 1 of 6x9, such as tall\.png\).*--image-size"
        ):
            load(name, train=train)
        assert load(name, train=train, image_size=4).images.shape[1:] == (3, 4, 4)


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (300, 100)])
def test_the_middle_is_cropped(tmp_path: Path, size: tuple[int, int]) -> None:
    wide = np.repeat(np.array([[RED, GREEN, BLUE]], np.uint8), max(size) // 3, axis=1).repeat(min(size), axis=0)
    picture = Image.fromarray(wide if size[0] > size[1] else wide.transpose(1, 0, 2).copy())
    assert picture.size == size
    folder_of(tmp_path, {"train/x.png": picture})
    pixels = only_picture(tmp_path, "x.png", image_size=16)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[4:12, 4:12] == GREEN).all()


def test_resizing_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    folder_of(tmp_path, {"train/x.png": Image.fromarray(stripes)})
    assert only_picture(tmp_path, "x.png", image_size=16)[4:12, 4:12] == pytest.approx(127.5, abs=4)


def test_a_large_photograph_is_resized_as_if_it_were_decoded_whole(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 1024)[None, :, None] * np.array([1, 0.5, 0.2]) + np.zeros((768, 1, 1))
    photograph = Image.fromarray(ramp.astype(np.uint8))
    folder_of(tmp_path, {"train/x.jpg": photograph})
    expected = photograph.crop((128, 0, 896, 768)).resize((32, 32), Image.Resampling.BICUBIC)
    got = only_picture(tmp_path, "x.jpg", image_size=32).astype(int)
    assert got == pytest.approx(np.asarray(expected).astype(int), abs=4)


def test_grey_pictures_make_one_channel_unless_one_is_coloured(tmp_path: Path) -> None:
    grey = Image.new("L", (4, 4), 77)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 99, 99, 99])
    folder_of(tmp_path, {"train/a.png": grey, "train/b.jpg": grey.convert("RGB"), "train/c.png": palette})
    folder_of(tmp_path, {"train/d.png": Image.fromarray(np.full((4, 4), 130 * 256 + 255, np.uint16))})
    folder_of(tmp_path, {"train/e.png": Image.new("1", (4, 4), 1), "test/f.png": Image.new("L", (4, 4), 5)})
    train, test = load(str(tmp_path)), load(str(tmp_path), train=False)
    assert train.spec.channels == test.spec.channels == 1
    assert train.images.shape == (5, 1, 4, 4)
    assert train.images[:, 0, 0, 0].tolist() == [77, 77, 99, 130, 255]
    folder_of(tmp_path, {"test/g.png": Image.new("RGB", (4, 4), GREEN)})
    train, test = load(str(tmp_path)), load(str(tmp_path), train=False)
    assert train.spec.channels == test.spec.channels == 3
    assert train.images[:, :, 3, 3].tolist() == [[value] * 3 for value in (77, 77, 99, 130, 255)]
    assert test.images[1, :, 0, 0].tolist() == list(GREEN)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    half.paste((200, 100, 0, 255), (0, 0, 4, 4))
    half.paste((200, 100, 0, 128), (0, 0, 4, 1))
    folder_of(tmp_path, {"train/x.png": half})
    pixels = only_picture(tmp_path, "x.png")
    assert (pixels[1:, :4] == (200, 100, 0)).all()
    assert (pixels[:, 4:] == 255).all()
    assert pixels[0, 0].tolist() == pytest.approx([227, 177, 127], abs=1)
    palette = Image.new("P", (8, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(0, (0, 0, 4, 4))
    palette.save(tmp_path / "train" / "x.png", transparency=0)
    pixels = only_picture(tmp_path, "x.png")
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == RED).all()


def test_photographs_stand_upright(tmp_path: Path) -> None:
    lying = Image.new("RGB", (4, 8), RED)
    lying.paste(BLUE, (0, 4, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 8  # the camera was turned: rotate by 90 degrees to the left
    (tmp_path / "train").mkdir()
    lying.save(tmp_path / "train" / "x.png", exif=exif)
    pixels = only_picture(tmp_path, "x.png")
    assert pixels.shape == (4, 8, 3)
    assert (pixels[:, :4] == RED).all()
    assert (pixels[:, 4:] == BLUE).all()


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 4), BLUE), Image.new("RGB", (8, 4), RED)
    (tmp_path / "train").mkdir()
    first.save(tmp_path / "train" / "x.gif", save_all=True, append_images=[second])
    assert (only_picture(tmp_path, "x.gif") == BLUE).all()

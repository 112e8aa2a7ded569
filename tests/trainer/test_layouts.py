"""Folder layouts and kinds of files as they lie on people's disks: each is read right, or refused with the remedy."""

import csv
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ganserve_trainer.data.datasets import Dataset, load_dataset
from ganserve_trainer.data.reading import Reading
from ganserve_trainer.errors import TrainerError

Make = Callable[[Path], Path]


def load(path: Path, *, train: bool = True, reading: Reading = Reading(), image_size: int | None = None) -> Dataset:
    return load_dataset(str(path), Path("nowhere"), train=train, image_size=image_size, reading=reading)


def png(number: int, mode: str = "RGB") -> bytes:
    """Return a picture whose red is the number."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 9)).convert(mode).save(file, "PNG")
    return file.getvalue()


def files(*names: str, other: Mapping[str, str | bytes] | None = None) -> dict[str, bytes]:
    """Return the contents of files: the i-th name is a picture of number i + 1; a name that ends in / is a folder."""
    contents = {name: b"" if name.endswith("/") else png(index + 1) for index, name in enumerate(names)}
    more = {name: text.encode() if isinstance(text, str) else text for name, text in (other or {}).items()}
    return contents | more


def folder(*names: str, other: Mapping[str, str | bytes] | None = None) -> Make:
    def make(root: Path) -> Path:
        for name, content in files(*names, other=other).items():
            path = root / "data" / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if content:
                path.write_bytes(content)
        return root / "data"

    return make


def zipped(*names: str, other: Mapping[str, str | bytes] | None = None) -> Make:
    def make(root: Path) -> Path:
        with zipfile.ZipFile(root / "data.zip", "w") as archive:
            for name, content in files(*names, other=other).items():
                archive.writestr(name, content)
        return root / "data.zip"

    return make


def tarred(*names: str, ending: str = "tar", other: Mapping[str, str | bytes] | None = None) -> Make:
    def make(root: Path) -> Path:
        path = root / f"data.{ending}"
        _, _, kind = ending.partition(".")
        with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
            for name, content in files(*names, other=other).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    return make


def shards(root: Path) -> Path:
    (root / "data").mkdir()
    for shard, keys in {"train-000000": (1, 2), "train-000001": (3,), "val-000000": (4, 5)}.items():
        with tarfile.open(root / "data" / f"{shard}.tar", "w") as archive:
            for key in keys:
                for ending, content in {"jpg.txt": b"a caption", "png": png(key), "cls": b"%d" % (key % 2)}.items():
                    member = tarfile.TarInfo(f"{key:04}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return root / "data"


def archives(root: Path) -> Path:
    (root / "data").mkdir()
    for name, numbers in {"cats": (1, 2), "dogs": (3, 4)}.items():
        with zipfile.ZipFile(root / "data" / f"{name}.zip", "w") as archive:
            for number in numbers:
                archive.writestr(f"{number}.png", png(number))
    return root / "data"


def npz(**arrays: np.ndarray) -> Make:
    def make(root: Path) -> Path:
        np.savez(root / "data.npz", **arrays)
        return root / "data.npz"

    return make


def pixels(*numbers: int, channels_first: bool = False) -> np.ndarray:
    array = np.zeros((len(numbers), 4, 4, 3), np.uint8)
    array[..., 0] = np.array(numbers)[:, None, None]
    array[..., 2] = 9
    return array.transpose(0, 3, 1, 2) if channels_first else array


def table(*rows: tuple[str, ...]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def written(name: str, content: bytes) -> Make:
    def make(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root / name

    return make


@dataclass(frozen=True)
class Right:
    """What is read: each image's number, with its class; where the hash of a name decides, `all_of` both parts."""

    make: Make
    train: dict[int, str] | None = None
    test: dict[int, str] | None = None
    all_of: dict[int, str] | None = None
    classes: tuple[str, ...] = ()
    reading: Reading = Reading()
    says: str = ""


CAT_DOG = {1: "cat", 2: "cat", 3: "dog", 4: "dog"}
SPLIT = {"train": {1: "cat", 2: "dog"}, "test": {3: "cat", 4: "dog"}, "classes": ("cat", "dog")}
NONE = dict.fromkeys((1, 2, 3, 4), "")


def parts(train: str, test: str, before: str = "") -> tuple[str, ...]:
    return tuple(f"{before}{part}/{name}.png" for part in (train, test) for name in ("cat/a", "dog/a"))


BY_CLASS = ("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png")
ROWS = (("1.png", "cat"), ("2.png", "cat"), ("3.png", "dog"), ("4.png", "dog"))
METADATA = table(("file_name", "label"), *ROWS)

RIGHT = {
    "a folder of classes": Right(folder(*BY_CLASS), all_of=CAT_DOG, classes=("cat", "dog"), says="0 cat, 1 dog"),
    "a folder of images": Right(folder("1.png", "2.png", "3.png", "4.png"), all_of=NONE),
    "ImageNet: train and val": Right(folder(*parts("train", "val")), **SPLIT),
    "Train and Test": Right(folder(*parts("Train", "Test")), **SPLIT),
    "training and testing": Right(folder(*parts("training", "testing")), **SPLIT),
    "train, valid and test": Right(
        folder(*parts("train", "test"), "valid/cat/a.png"), **SPLIT, says="note: valid/ is not used"
    ),
    "ImageNet with unlabelled test images": Right(folder(*parts("train", "val"), "test/a.png"), **SPLIT),
    "a folder around train and test": Right(folder(*parts("train", "test", "photos/v2/")), **SPLIT),
    "a lone train": Right(
        folder(*(f"train/{name}" for name in BY_CLASS)), all_of=CAT_DOG, classes=("cat", "dog"), says="only train/"
    ),
    "parts without classes": Right(folder("train/1.png", "val/2.png"), {1: ""}, {2: ""}),
    "parts inside the classes": Right(
        folder("cat/train/1.png", "dog/train/2.png", "cat/val/3.png", "dog/val/4.png"), **SPLIT
    ),
    "YOLO": Right(
        folder("images/train/1.png", "images/val/2.png", other={"labels/train/1.txt": "0 .5 .5 1 1"}), {1: ""}, {2: ""}
    ),
    "Roboflow's images in parts": Right(folder("train/images/1.png", "valid/images/2.png"), {1: ""}, {2: ""}),
    "a class called train": Right(
        folder("bus/1.png", "bus/2.png", "train/3.png", "train/4.png"),
        all_of={1: "bus", 2: "bus", 3: "train", 4: "train"},
        classes=("bus", "train"),
    ),
    "numbered classes": Right(
        folder(*(f"{name}/{i}.png" for name in ("0", "1", "2", "10") for i in range(2))),
        all_of={1: "0", 2: "0", 3: "1", 4: "1", 5: "2", 6: "2", 7: "10", 8: "10"},
        classes=("0", "1", "2", "10"),
        says="0 0, 1 1, 2 2, 3 10",
    ),
    "one loose image beside the classes": Right(
        folder(*BY_CLASS, "preview.png"), all_of=NONE | {5: ""}, says="note: preview.png lies in no class folder"
    ),
    "metadata.csv": Right(
        folder("1.png", "2.png", "3.png", "4.png", other={"metadata.csv": METADATA}),
        all_of=CAT_DOG,
        classes=("cat", "dog"),
    ),
    "metadata.csv in each part": Right(
        folder(
            "train/a.png",
            "test/b.png",
            other={
                "train/metadata.csv": table(("file_name", "text", "label"), ("a.png", "hm", "x")),
                "test/metadata.csv": table(("file_name", "text", "label"), ("b.png", "hm", "x")),
            },
        ),
        {1: "x"},
        {2: "x"},
        classes=("x",),
    ),
    "metadata.jsonl": Right(
        folder(
            *("i/1.png", "i/2.png", "i/3.png", "i/4.png"),
            other={"metadata.jsonl": "\n".join(json.dumps({"file_name": f"i/{name}", "label": c}) for name, c in ROWS)},
        ),
        all_of=CAT_DOG,
        classes=("cat", "dog"),
    ),
    "captions only": Right(
        folder(
            *("1.png", "2.png"), other={"metadata.csv": table(("file_name", "text"), ("1.png", "a"), ("2.png", "b"))}
        ),
        all_of={1: "", 2: ""},
        says="has no classes",
    ),
    "StyleGAN's zip": Right(
        zipped(
            *("00000/img0.png", "00000/img1.png", "00001/img2.png", "00001/img3.png"),
            other={
                "dataset.json": json.dumps(
                    {"labels": [[f"0000{i // 2}/img{i}.png", [2, 10][i // 2]] for i in range(4)]}
                )
            },
        ),
        all_of={1: "2", 2: "2", 3: "10", 4: "10"},
        classes=("2", "10"),
    ),
    "StyleGAN without labels": Right(
        zipped("00000/img0.png", "00001/img1.png", other={"dataset.json": '{"labels": null}'}), all_of={1: "", 2: ""}
    ),
    "zip": Right(zipped(*parts("train", "test", "all/"), other={"__MACOSX/._x.png": b"?"}), **SPLIT),
    "tar": Right(tarred(*BY_CLASS), all_of=CAT_DOG, classes=("cat", "dog")),
    "tar.gz": Right(tarred(*parts("train", "test", "./x/"), ending="tar.gz"), **SPLIT),
    "tar.xz": Right(tarred(*BY_CLASS, ending="tar.xz"), all_of=CAT_DOG, classes=("cat", "dog")),
    "a zip for each class": Right(
        archives, all_of={1: "cats", 2: "cats", 3: "dogs", 4: "dogs"}, classes=("cats", "dogs")
    ),
    "WebDataset": Right(shards, {1: "1", 2: "0", 3: "1"}, {4: "0", 5: "1"}, classes=("0", "1")),
    "Keras's npz": Right(
        npz(x_train=pixels(1, 2), y_train=np.array([3, 7]), x_test=pixels(3, 4), y_test=np.array([[7], [3]])),
        {1: "3", 2: "7"},
        {3: "7", 4: "3"},
        classes=("3", "7"),
    ),
    "npz, one-hot, channels first": Right(
        npz(images=pixels(1, 2, 3, 4, channels_first=True), labels=np.eye(2)[[0, 0, 1, 1]]),
        all_of={1: "0", 2: "0", 3: "1", 4: "1"},
        classes=("0", "1"),
    ),
    "np.savez without names": Right(npz(arr_0=pixels(1, 2)), all_of={1: "", 2: ""}),
    "two folders by name": Right(
        folder("a/cat/1.png", "b/cat/2.png", "c/cat/3.png"),
        {1: "cat"},
        {3: "cat"},
        classes=("cat",),
        reading=Reading(train_folder="a", test_folder="c"),
    ),
    "parts that are split anew": Right(
        folder(*parts("train", "test")),
        all_of={1: "cat", 2: "dog", 3: "cat", 4: "dog"},
        classes=("cat", "dog"),
        reading=Reading(split=0.5),
    ),
}


def found(dataset: Dataset) -> dict[int, str]:
    names = dataset.spec.class_names or ("",)
    assert (dataset.images[:, 2] == 9).all()
    return {int(image[0, 0, 0]): names[label] for image, label in zip(dataset.images, dataset.labels, strict=True)}


@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT)
def test_a_layout_is_read_right(case: Right, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = case.make(tmp_path)
    train, test = (load(path, train=part, reading=case.reading) for part in (True, False))
    assert train.spec == test.spec
    assert train.spec.class_names == case.classes
    if case.all_of is None:
        assert found(train) == case.train
        assert found(test) == case.test
    else:
        assert found(train) | found(test) == case.all_of
        assert not found(train).keys() & found(test).keys()
        for part in (train, test):
            assert set(found(part).values()) == set(case.all_of.values())
    assert case.says in capsys.readouterr().err


ASKS = r".*--train-folder and --test-folder, .*--split 0\.8, .*--train-on-all"
REFUSED: dict[str, tuple[Make, str]] = {
    "train as a part beside classes": (folder(*parts("train", "x")), "train/ beside x/, which may be parts" + ASKS),
    "two training folders": (folder(*parts("train", "Train"), "test/cat/1.png"), "Train/ and train/" + ASKS),
    "only test": (folder("test/cat/1.png", "test/dog/1.png"), "test/, but no folder of training images" + ASKS),
    "val and test": (folder(*parts("val", "test")), "which may be parts or classes" + ASKS),
    "Tiny ImageNet's val": (
        folder("train/n01/images/1.png", "train/n02/images/2.png", "val/images/1.png"),
        r"no class in common \(n01, n02, and no classes\).*--train-folder train",
    ),
    "a class of one image": (folder("cat/1.png", "dog/1.png", "dog/2.png"), "class cat has one image, cat/1.png"),
    "one image": (folder("1.png"), "it has one image, 1.png, and needs two"),
    "no image": (folder("a/", other={"a/b.txt": "?"}), r"no image that can be read \(a/b.txt: not an image"),
    "a picture": (written("x.png", png(1)), "is one image; give the folder"),
    "HDF5": (written("x.h5", b"\x89HDF"), r"numpy\.savez"),
    "Arrow of datasets": (folder(other={"data-00000-of-00001.arrow": "?"}), "to_parquet"),
    "TFRecord": (written("x.tfrecord", b"?"), "shards of WebDataset"),
    "a video": (written("x.mp4", b"?"), "ffmpeg"),
    "unknown": (written("x.bin", b"?"), "not a zip, tar"),
    "a cut tar": (written("x.tar.gz", b"\x1f\x8b\x08\0"), "not a zip, tar|damaged or incomplete"),
    "objects in npz": (npz(images=np.array([{}, None])), "cannot be read.*numpy.savez"),
    "too few labels": (npz(images=pixels(1, 2, 3), labels=np.array([1])), "1 labels for 3 images"),
    "attributes in dataset.json": (
        zipped("1.png", other={"dataset.json": '{"labels": [["1.png", [0.5, 1]]]}'}),
        "classes must be numbers or names",
    ),
    "no file_name": (folder("1.png", other={"metadata.csv": "path,label\n1.png,a\n"}), "no column file_name"),
    "two images for a key": (
        tarred("1.left.png", "1.right.png", other={"1.cls": "0"}),
        "one has 1.left.png, 1.right.png",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_layout_is_refused_with_the_remedy(make: Make, message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(TrainerError, match=message):
        load(path)


def test_every_class_has_a_test_image_even_of_two(tmp_path: Path) -> None:
    names = [f"{name}/{index}.png" for name in "abcdefgh" for index in range(2)]
    path = folder(*names)(tmp_path)
    for train in (True, False):
        assert sorted(load(path, train=train).labels.tolist()) == list(range(8))


def test_all_images_train_if_asked(tmp_path: Path) -> None:
    path = folder(*parts("train", "val"))(tmp_path)
    everything = Reading(train_on_all=True)
    assert found(load(path, reading=everything)) == {1: "cat", 2: "dog", 3: "cat", 4: "dog"}
    with pytest.raises(TrainerError, match="no test part, because all images train"):
        load(path, train=False, reading=everything)
    elsewhere = folder("cat/a.png", "dog/b.png")(tmp_path / "other")
    with_test = replace(everything, test_folder=str(elsewhere))
    assert len(load(path, reading=with_test).images) == 2  # the others are copies of test pictures
    assert found(load(path, train=False, reading=with_test)) == {1: "cat", 2: "dog"}


def test_values_of_few_bits_are_scaled_by_the_range_of_the_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for name, value in {"train/a": 4095, "train/b": 2048, "test/c": 16}.items():
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"{name}.png")
    assert load(tmp_path).images[:, 0, 0, 0].tolist() == [255, 128]
    assert load(tmp_path, train=False).images[:, 0, 0, 0].tolist() == [1]
    assert "values of 0 to 4095, as 12 bits become 0 to 255" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 127, 255]),
        ([-1.0, 0.0, 1.0], [0, 127, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-2.0, 0.0, 2.0], [0, 127, 255]),
    ],
)
def test_floating_point_arrays_are_scaled(tmp_path: Path, values: list[float], expected: list[int]) -> None:
    images = np.broadcast_to(np.array(values, np.float32)[:, None, None], (3, 4, 4))
    np.savez(tmp_path / "x.npz", images=images)
    path = tmp_path / "x.npz"
    both = [load(path, train=train).images[:, 0, 0, 0].tolist() for train in (True, False)]
    assert sorted(both[0] + both[1]) == expected


def test_transparency_becomes_the_background_or_a_fourth_channel(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 4), (200, 100, 0, 255))
    picture.paste((7, 7, 7, 0), (4, 0, 8, 4))
    for name in ("train/a.png", "test/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name)
        picture.putpixel((0, 0), (1, 2, 3, 255))
    image = load(tmp_path, reading=Reading(background="#102030")).images[0]
    assert image[:, 0, 7].tolist() == [16, 32, 48]
    image = load(tmp_path, reading=Reading(channels=4, background="black")).images[0]
    assert image[:, 1, 1].tolist() == [200, 100, 0, 255]
    assert image[:, 0, 7].tolist() == [0, 0, 0, 0]
    assert load(tmp_path, reading=Reading(channels=1)).images.shape == (1, 1, 4, 8)
    with pytest.raises(TrainerError, match="background is 'reddish'; it must be a colour"):
        load(tmp_path, reading=Reading(background="reddish"))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(TrainerError, match="channels is 2"):
        Reading(channels=2)
    with pytest.raises(TrainerError, match="leave out train_on_all or split"):
        Reading(split=0.5, train_on_all=True)
    with pytest.raises(TrainerError, match=r"mnist is a built-in data set.*leave out train_folder"):
        load_dataset("mnist", Path("nowhere"), train=True, reading=Reading(split=0.5))


def test_parquet_files_of_datasets_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for part, numbers in {"train-00000-of-00002": (1, 2), "train-00001-of-00002": (3,), "test-0": (4, 5)}.items():
        rows = [{"image": {"bytes": png(number), "path": None}, "label": number % 2} for number in numbers]
        content = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(features)})
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(content, tmp_path / "data" / f"{part}.parquet", row_group_size=1)
    assert found(load(tmp_path)) == {1: "dog", 2: "cat", 3: "dog"}
    assert found(load(tmp_path, train=False)) == {4: "cat", 5: "dog"}


def test_parquet_files_without_pyarrow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrainerError, match=r"pip install 'ganserve\[parquet\]'"):
        load(tmp_path)

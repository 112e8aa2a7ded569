"""Lists the images of a data set as it lies on a disk, without decoding them.

A source is a folder, a zip or tar archive, a folder of archives, a NumPy file (.npz, .npy) or a folder of parquet
files. Classes come from folders, metadata.csv or metadata.jsonl (Hugging Face's imagefolder), dataset.json (StyleGAN),
`.cls` files (WebDataset), a column (parquet) or an array (.npz). `splitting` decides what trains.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganserve_trainer.errors import TrainerError

IMAGE_ENDINGS = frozenset(
    [
        *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".j2k", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
        *(".tif", ".tiff", ".webp"),
    ]
)
LAYOUT = (
    "A data set is a folder, a zip or a tar of images, with a sub-folder for each class (DIR/cats/1.jpg), or images "
    "only, which then have no class. Folders DIR/train and DIR/test (or val) are the two parts; otherwise about one "
    "image in ten is kept for testing."
)
_LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx")  # ignored, like names that start with a dot
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_CLASS_COLUMNS = ("label", "labels", "class", "category", "class_name", "label_name")
_SHARD = re.compile(r"(.*?)[-_.]?\d{2,}(-of-\d+)?$")  # pets-train-000012, train-00000-of-00004
_ROLE_IN_NAME = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|test|testing)(?:[^a-z]|$)")
_UNREAD = {
    ".7z": "unpack it, and give the folder",
    ".rar": "unpack it, and give the folder",
    ".zst": "unpack it, and give the folder",
    ".h5": "write its arrays with numpy.savez(FILE.npz, images=…, labels=…)",
    ".hdf5": "write its arrays with numpy.savez(FILE.npz, images=…, labels=…)",
    ".mat": "write its arrays with numpy.savez(FILE.npz, images=…, labels=…)",
    ".pkl": "write its arrays with numpy.savez(FILE.npz, images=…, labels=…)",
    ".pickle": "write its arrays with numpy.savez(FILE.npz, images=…, labels=…)",
    ".pt": "write its arrays with numpy.savez(FILE.npz, images=…, labels=…)",
    ".tfrecord": "write its images as files, or as the shards of WebDataset",
    ".arrow": "write it with Dataset.to_parquet(…) of the library datasets, and give the folder of the parquet files",
    ".mdb": "write its images as files: LMDB is not read",
    ".mp4": "take images out of it, for example with ffmpeg -i FILE DIR/%06d.png",
    ".csv": "call it metadata.csv, with the columns file_name and label, and give the folder of the images",
    ".jsonl": "call it metadata.jsonl, with the keys file_name and label, and give the folder of the images",
    ".json": "call it dataset.json, as StyleGAN does, and give the folder of the images",
}

Content = bytes | NDArray[Any]  # an encoded file, or pixels [h, w], [h, w, c] or [c, h, w]


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a source, which may not be an image."""

    name: str  # the path in the source, with "/"
    read: Callable[[], Content]  # raises OSError or ValueError
    class_name: str | None = None  # what the source's own labels say
    part: str | None = None  # "train", "val" or "test", where the source itself says so; None: its folders say


@dataclass(slots=True)
class Listing:
    """The content of a source."""

    items: list[Item]
    folders: list[str] = field(default_factory=list)  # all folders, including empty ones, with "/"
    labelled: bool = False  # whether the items have class names, so that folders are no classes
    notes: list[str] = field(default_factory=list)  # what the user should know


@dataclass(frozen=True, slots=True)
class Source:
    """A data set on the disk: its files, not yet opened."""

    path: Path
    files: tuple[tuple[str, Path], ...]  # names in the source, and where they are
    folders: tuple[str, ...]
    fingerprint: tuple[tuple[str, int, int], ...]  # name, bytes and time of change (ns) of each file

    @property
    def name(self) -> str:
        """The name of the folder, or of the file without its ending."""
        name = self.path.resolve().name
        return _stem(name) if self.path.is_file() else name


def open_source(path: Path) -> Source:
    """Find the files of a source.

    Raises:
        TrainerError: there is no such file or folder, a folder cannot be listed, or the file is of a kind that is not
            read.
    """
    if path.is_dir():
        files, folders = _walk(path)
    elif path.is_file():
        files, folders = [(path.name, path)], []
        _refuse_unread([path.name], path)
    else:
        raise TrainerError(f"{path.absolute()} is not a folder, and no file. {LAYOUT}")
    fingerprint = []
    for name, place in files:
        try:
            status = place.stat()
        except OSError:  # a dangling link: reading it says why
            fingerprint.append((name, -1, -1))
        else:
            fingerprint.append((name, status.st_size, status.st_mtime_ns))
    return Source(path, tuple(files), tuple(folders), tuple(fingerprint))


def list_items(source: Source, stack: ExitStack, scratch: Path) -> Listing:
    """List a source's items, sorted by name.

    Args:
        source: the source.
        stack: closes the files that the items read from.
        scratch: a folder for the content of compressed tar archives.

    Raises:
        TrainerError: a file is damaged, or what describes the images cannot be understood.
    """
    opened = _Opened(stack, scratch, source.path)
    listing = opened.file(source.path) if source.path.is_file() else opened.folder(source)
    listing.notes += _read_labels(listing, source.path)
    listing.items.sort(key=lambda item: item.name)
    return listing


def is_image_name(name: str) -> bool:
    """Return whether a file's name has the ending of an image, or none."""
    ending = PurePosixPath(name).suffix.lower()
    return ending in IMAGE_ENDINGS or not ending


def part_of(name: str) -> str | None:
    """Return which part a folder's name means: train, val or test; None if it means no part."""
    return {
        "train": "train",
        "training": "train",
        "val": "val",
        "valid": "val",
        "validation": "val",
        "test": "test",
        "testing": "test",
    }.get(name.lower())


def _walk(folder: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return a folder's visible files, sorted by name, and its sub-folders; follow links, but visit no folder twice."""
    files: list[tuple[str, Path]] = []
    folders: list[str] = []
    whole = folder.resolve()
    known = {str(place) for place in (whole, *whole.parents)}
    for place, subfolders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        targets = {os.path.realpath(Path(place, name)): name for name in sorted(subfolders) if _is_visible(name)}
        subfolders[:] = [name for target, name in targets.items() if target not in known]
        known |= targets.keys()
        inside = Path(place).relative_to(folder)
        folders += [(inside / name).as_posix() for name in subfolders]
        files += [((inside / name).as_posix(), Path(place, name)) for name in names if _is_visible(name)]
    return sorted(files), folders


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _LEFT_BY_SYSTEMS


def _refuse(error: OSError) -> None:
    raise TrainerError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _refuse_unread(names: Iterable[str], path: Path) -> None:
    for name in names:
        ending = PurePosixPath(name).suffix.lower()
        if ending in _UNREAD:
            raise TrainerError(f"{path}: files such as {name} are not read: {_UNREAD[ending]}")
        if ending in IMAGE_ENDINGS:
            raise TrainerError(f"{path} is one image; give the folder of the images")


def _stem(name: str) -> str:
    for ending in sorted((*_ARCHIVES, ".npz", ".npy", ".parquet"), key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _read_file(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise ValueError("not a file")
    return path.read_bytes()


class _Opened:
    """Opens the files of a source; the stack closes them."""

    def __init__(self, stack: ExitStack, scratch: Path, whole: Path) -> None:
        self._stack, self._scratch, self._whole = stack, scratch, whole

    def file(self, path: Path) -> Listing:
        """List what is in an archive, or in a file of arrays."""
        name = path.name.lower()
        try:
            if name.endswith(".parquet"):
                return self.parquet([(path.name, path)])
            if name.endswith((".npz", ".npy")):
                return _arrays(path)
            if zipfile.is_zipfile(path):
                return self._zip(path)
            if tarfile.is_tarfile(path):
                return self._tar(path)
        except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
            raise TrainerError(f"{path} is damaged or incomplete ({error}): copy or download it again") from error
        raise TrainerError(
            f"{path} is not a zip, tar, .npz, .npy or .parquet file, or it is damaged: give a folder of images, or one "
            "of these"
        )

    def folder(self, source: Source) -> Listing:
        """List a folder's files; archives in a folder without images are read as folders of their names."""
        names = [name for name, _ in source.files]
        if not any(PurePosixPath(name).suffix.lower() in IMAGE_ENDINGS for name in names):
            if parquet := [file for file in source.files if file[0].lower().endswith(".parquet")]:
                return self.parquet(parquet)
            if archives := [file for file in source.files if file[0].lower().endswith(_ARCHIVES)]:
                return self._archives(archives)
            if arrays := [name for name in names if name.lower().endswith((".npz", ".npy"))]:
                raise TrainerError(f"{source.path} has no images, but {arrays[0]}: give that file")
            if not any(is_image_name(name) for name in names):
                _refuse_unread([name for name in names if PurePosixPath(name).suffix.lower() in _UNREAD], source.path)
        items = [Item(name, partial(_read_file, path)) for name, path in source.files]
        return Listing(items, list(source.folders))

    def _archives(self, archives: list[tuple[str, Path]]) -> Listing:
        stems = {name: _stem(name) for name, _ in archives}
        shards = all(_SHARD.match(stem) for stem in stems.values())
        whole = Listing([])
        described: set[bool] = set()
        for name, path in archives:
            listing = self.file(path)
            described.add(listing.labelled)
            found = _ROLE_IN_NAME.search(stems[name].lower()) if shards or listing.labelled else None
            part = part_of(found[1]) if found else None
            whole.items += [replace(item, name=f"{stems[name]}/{item.name}", part=part) for item in listing.items]
            whole.folders += [stems[name], *(f"{stems[name]}/{folder}" for folder in listing.folders)]
        if len(described) > 1:
            raise TrainerError(f"{self._whole}: some of its archives have .cls files, and others have none")
        whole.labelled = shards or True in described
        if whole.labelled and True not in described:
            whole.notes.append(f"the {len(archives)} archives are the shards of one data set without classes")
        return whole

    def _zip(self, path: Path) -> Listing:
        archive = self._stack.enter_context(zipfile.ZipFile(path))
        listing = Listing([])
        for info in archive.infolist():
            name = _inside(info.filename)
            if name is None:
                continue
            if info.is_dir():
                listing.folders.append(name)
                continue
            if info.flag_bits & 1:
                raise TrainerError(f"{path} is encrypted: unpack it with its password, and give the folder")
            listing.items.append(Item(name, partial(archive.read, info)))
        return _with_folders(listing)

    def _tar(self, path: Path) -> Listing:
        file = self._stack.enter_context(self._unpacked(path))
        archive = self._stack.enter_context(tarfile.TarFile(fileobj=file))
        lock = threading.Lock()
        listing = Listing([])

        def linked(member: tarfile.TarInfo) -> bytes:
            with lock:
                try:
                    opened = archive.extractfile(member)
                except KeyError:
                    opened = None
                if opened is None:
                    raise ValueError("a link to nothing in the archive")
                return opened.read()

        def stored(member: tarfile.TarInfo) -> bytes:
            content = os.pread(file.fileno(), member.size, member.offset_data)
            if len(content) < member.size:
                raise ValueError("the archive ends in this file")
            return content

        for member in archive:
            name = _inside(member.name)
            if name is None:
                continue
            if member.isdir():
                listing.folders.append(name)
            elif member.isreg() and not member.issparse():
                listing.items.append(Item(name, partial(stored, member)))
            elif member.isreg() or member.issym() or member.islnk():
                listing.items.append(Item(name, partial(linked, member)))
        return _shard(_with_folders(listing), path)

    def _unpacked(self, path: Path) -> Any:
        """Open a tar; write a compressed one to a temporary file first, because its files can only be read in order."""
        file = path.open("rb")
        start = file.read(6)
        opener: Any = None
        if start.startswith(b"\x1f\x8b"):
            opener = gzip.open
        elif start.startswith(b"BZh"):
            opener = bz2.open
        elif start.startswith(b"\xfd7zXZ"):
            opener = lzma.open
        file.seek(0)
        if opener is None:
            return file
        print(f"unpacking {path.name} …", file=sys.stderr, flush=True)
        with file, opener(file) as packed:
            unpacked = self._stack.enter_context(tempfile.TemporaryFile(dir=self._scratch))  # noqa: SIM115
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.seek(0)
        return unpacked

    def parquet(self, files: list[tuple[str, Path]]) -> Listing:
        """List the rows of parquet files of the library datasets."""
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise TrainerError(
                f"{self._whole}: parquet files need pyarrow: pip install 'ganserve[parquet]', or pip install pyarrow"
            ) from error
        listing = Listing([], labelled=True)
        with_class = set()
        for name, path in files:
            try:
                table = self._stack.enter_context(pyarrow.parquet.ParquetFile(path))
            except (OSError, ValueError) as error:
                raise TrainerError(f"{path} is damaged, or no parquet file ({error})") from error
            found = _ROLE_IN_NAME.search(name.lower())
            items, labelled = _rows(_stem(name), path, table, part_of(found[1]) if found else None)
            listing.items += items
            with_class.add(labelled)
        if len(with_class) > 1:
            raise TrainerError(f"{self._whole}: only some of its parquet files have a column label")
        return listing


def _inside(name: str) -> str | None:
    """Return the normalised name of an archive's member, or None for a member to ignore."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts) if parts and all(_is_visible(part) for part in parts) else None


def _with_folders(listing: Listing) -> Listing:
    """Add the folders that an archive does not list itself."""
    folders = dict.fromkeys(listing.folders)
    for item in listing.items:
        parts = item.name.split("/")[:-1]
        folders.update(dict.fromkeys("/".join(parts[: end + 1]) for end in range(len(parts))))
    listing.folders = list(folders)
    return listing


def _shard(listing: Listing, path: Path) -> Listing:
    """Read a tar as a shard of WebDataset if it has `.cls` files: KEY.jpg has the class that KEY.cls says."""
    classes: dict[str, Item] = {}
    images: dict[str, list[Item]] = {}
    for item in listing.items:
        folder, _, file = item.name.rpartition("/")
        key, _, ending = file.partition(".")
        if ending.lower() == "cls":
            classes[f"{folder}/{key}"] = item
        elif f".{ending.rpartition('.')[2].lower()}" in IMAGE_ENDINGS:
            images.setdefault(f"{folder}/{key}", []).append(item)
    if not classes:
        return listing
    items = []
    for key, found in images.items():
        if len(found) > 1:
            names = ", ".join(item.name for item in found)
            raise TrainerError(
                f"{path}: a sample must have one image, but one has {names}; write shards with one image for each key"
            )
        if key in classes:
            items.append(replace(found[0], class_name=_text(classes[key].read()).strip()))
        else:
            items.append(replace(found[0], read=_failing(f"there is no {key.lstrip('/')}.cls for it")))
    return Listing(items, labelled=True)


def _failing(reason: str) -> Callable[[], Content]:
    def read() -> Content:
        raise ValueError(reason)

    return read


def _text(content: Content) -> str:
    assert isinstance(content, bytes)
    return content.decode("utf-8-sig")


def _read_labels(listing: Listing, path: Path) -> list[str]:
    """Give the items the classes of metadata.csv, metadata.jsonl or dataset.json, and return notes on them."""
    if listing.labelled:
        return []
    notes: list[str] = []
    by_name = {item.name: item for item in listing.items}
    tables = [item for item in listing.items if PurePosixPath(item.name).name in ("metadata.csv", "metadata.jsonl")]
    style = [item for item in listing.items if PurePosixPath(item.name).name == "dataset.json"]
    if tables and style:
        raise TrainerError(f"{path} has both {tables[0].name} and {style[0].name}: remove one of them")
    if not tables and not style:
        lists = [name for name in by_name if "/" not in name and name.endswith((".csv", ".jsonl", ".tsv"))]
        notes += [
            f"{name} is not read; to take classes from it, call it metadata.csv, with the columns file_name and label"
            for name in lists
        ]
        return notes
    classes: dict[str, str | None] = {}  # by item
    parts: dict[str, str | None] = {}
    without = []
    for table in (*tables, *style):
        folder = PurePosixPath(table.name).parent
        try:
            rows = list(_labels_of(table))
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise TrainerError(f"{path}: {table.name} cannot be read: {error}") from error
        if not rows or all(label is None for _, label, _ in rows):
            without.append(table.name)
        for file, label, part in rows:
            name = os.path.normpath(folder / file)
            classes[name], parts[name] = label, part
    described = [*tables, *style]
    names = ", ".join(item.name for item in described)
    kept = []
    for item in listing.items:
        if item in described or (item.name not in classes and not is_image_name(item.name)):
            continue
        if item.name not in classes and classes:
            kept.append(replace(item, read=_failing(f"{names} does not list it")))
        else:
            kept.append(replace(item, class_name=classes.get(item.name), part=parts.get(item.name)))
    kept += [Item(name, _failing(f"{names} lists it, but there is no such file")) for name in classes.keys() - by_name]
    if len(without) < len(described):
        listing.labelled = True
        kept = [
            item
            if item.class_name is not None or item.name not in classes
            else replace(item, read=_failing("no class"))
            for item in kept
        ]
    else:
        notes.append(
            f"{names} has no classes (no column {_CLASS_COLUMNS[0]}); sub-folders are classes, if there are any"
        )
        if style:
            listing.labelled = True  # StyleGAN's sub-folders only number the images
    listing.items = kept
    return notes


def _labels_of(table: Item) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield the file, the class and the part of each row."""
    text = _text(table.read())
    if table.name.endswith("dataset.json"):
        labels = json.loads(text)["labels"]
        for file, label in labels or []:
            if not isinstance(label, int | str):
                raise ValueError(f"the label of {file} is {label!r}; classes must be numbers or names")
            yield file, str(label), None
        return
    if table.name.endswith(".csv"):
        rows: Iterable[dict[str, Any]] = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    else:
        rows = (json.loads(line) for line in text.splitlines() if line.strip())
    for row in rows:
        if "file_name" not in row:
            raise ValueError(f"it has no column file_name, but {', '.join(map(str, row))}")
        lower = {str(key).lower(): value for key, value in row.items()}
        label = next((lower[column] for column in _CLASS_COLUMNS if lower.get(column) not in (None, "")), None)
        if isinstance(label, list | dict | float):
            raise ValueError(f"the label of {row['file_name']} is {label!r}; classes must be numbers or names")
        yield row["file_name"], None if label is None else str(label), part_of(str(lower.get("split", "")))


def _arrays(path: Path) -> Listing:
    """List the images of an .npz or .npy file: x_train and y_train, or train_images and train_labels, or alike."""
    try:
        with np.load(path, allow_pickle=False) if path.suffix.lower() == ".npz" else _one_array(path) as file:
            arrays = {name: np.asarray(file[name]) for name in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise TrainerError(
            f"{path} cannot be read ({error}): write it with numpy.savez(FILE.npz, images=…, labels=…), images uint8 "
            "[n, height, width, channels]"
        ) from error
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    images: dict[str | None, tuple[str, NDArray[Any]]] = {}
    labels: dict[str | None, NDArray[Any]] = {}
    for name, array in arrays.items():
        found = _ROLE_IN_NAME.search(name.lower())
        part = part_of(found[1]) if found else None
        if array.ndim >= 3:
            if part in images:
                raise TrainerError(f"{path} has two arrays of images ({shapes}): keep one, or call them train and test")
            images[part] = name, array
        elif part in labels:
            raise TrainerError(f"{path} has two arrays of labels ({shapes}): keep one, called labels")
        else:
            labels[part] = array
    if not images:
        raise TrainerError(f"{path} has no array of images, [n, height, width, channels], but {shapes or 'nothing'}")
    items: list[Item] = []
    for part, (name, array) in images.items():
        pixels = _channels_last(array)
        if pixels is None or array.dtype.kind not in "buif":
            raise TrainerError(
                f"{path}: {name} is {array.dtype} {list(array.shape)}; images are numbers [n, height, width] or [n, "
                "height, width, channels], with 1, 3 or 4 channels"
            )
        classes = _classes(path, labels.get(part), len(pixels)) if labels else [None] * len(pixels)
        digits = len(str(len(pixels) - 1))
        items += [
            Item(f"{name}/{row:0{digits}}", partial(_same, picture), classes[row], part)
            for row, picture in enumerate(pixels)
        ]
    return Listing(items, labelled=True)


def _same(picture: NDArray[Any]) -> NDArray[Any]:
    return picture


def _one_array(path: Path) -> Any:
    class Single(dict[str, NDArray[Any]]):
        def __enter__(self) -> "Single":
            return self

        def __exit__(self, *_: object) -> None: ...

    return Single(images=np.load(path, mmap_mode="r", allow_pickle=False))


def _channels_last(array: NDArray[Any]) -> NDArray[Any] | None:
    if array.ndim == 3:
        return array
    if array.ndim != 4:
        return None
    _, first, _, last = array.shape
    square = array.shape[2] == last  # which tells images of 4 pixels a side from those with transparency
    if first in (1, 3, 4) and (last not in (1, 3, 4) or (square and first != last)):
        return array.transpose(0, 2, 3, 1)
    return array if last in (1, 3, 4) else None


def _classes(path: Path, labels: NDArray[Any] | None, count: int) -> list[str | None]:
    if labels is None or len(labels) != count:
        found = "none" if labels is None else str(len(labels))
        raise TrainerError(f"{path} has {found} labels for {count} images: there must be as many")
    if labels.ndim == 2 and labels.shape[1] > 1:
        if not ((labels == 0) | (labels == 1)).all() or not (labels.sum(1) == 1).all():
            raise TrainerError(
                f"{path}: the labels have {labels.shape[1]} values for an image; give one class for each"
            )
        labels = labels.argmax(1)
    labels = labels.reshape(count)
    if labels.dtype.kind == "f":
        if not (labels == labels.round()).all():
            raise TrainerError(f"{path}: a label is {labels[labels != labels.round()][0]}; classes are whole numbers")
        labels = labels.astype(np.int64)
    return [str(label) for label in labels.tolist()]


def _rows(stem: str, path: Path, table: Any, part: str | None) -> tuple[list[Item], bool]:
    """List the rows of one parquet file, and return whether they have a class."""
    schema = table.schema_arrow
    names = list(schema.names)
    column = next((name for name in ("image", "img", "images", "jpg", "png") if name in names), None)
    kind = None if column is None else schema.field(column).type
    nested = kind is not None and hasattr(kind, "get_field_index") and kind.get_field_index("bytes") >= 0
    if kind is None or not (nested or str(kind) in ("binary", "large_binary")):
        raise TrainerError(
            f"{path} has no column image of encoded images, but {', '.join(names)}: write it with the library datasets "
            "(Dataset.to_parquet), with a feature Image"
        )
    label = next((name for name in (*_CLASS_COLUMNS, "fine_label") if name in names), None)
    known: list[str] = []
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    if label is not None:
        known = metadata.get("info", {}).get("features", {}).get(label, {}).get("names") or []
    items: list[Item] = []
    last: dict[int, Any] = {}  # the images of the row group that is being read
    lock = threading.Lock()

    def read(group: int, row: int) -> bytes:
        with lock:
            if group not in last:
                last.clear()
                last[group] = table.read_row_group(group, columns=[column]).column(0)
            value = last[group][row].as_py()
        content = value["bytes"] if nested and value is not None else value
        if not isinstance(content, bytes):
            raise ValueError("the row has no image, or only the path of one")
        return content

    row_of_file = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        values = [None] * rows if label is None else table.read_row_group(group, columns=[label]).column(0).to_pylist()
        for row, value in enumerate(values):
            if value is not None and not isinstance(value, int | str):
                raise TrainerError(f"{path}: a label is {value!r}; classes must be numbers or names")
            name = known[value] if isinstance(value, int) and 0 <= value < len(known) else value
            reader = _failing("no class") if label is not None and value is None else partial(read, group, row)
            items.append(Item(f"{stem}/{row_of_file:08}", reader, None if name is None else str(name), part))
            row_of_file += 1
    return items, label is not None

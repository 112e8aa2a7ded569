"""Keeps decoded data sets on the disk, so that ranks, runs and evaluations share them, and none is held in memory.

One file has both parts of a data set; its images are mapped into memory. Its name is a digest of the names, sizes and
times of the source's files and of all settings that change pixels. A file appears when it is complete; a damaged one is
made again. One process decodes while others wait.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.files import cache_folder, replace_atomically

FORMAT = 1  # increase it with every change that changes what a file contains
_MAGIC = b"ganserve"
_KEPT_BYTES = 32 << 30  # all files together; the ones that were used least recently are deleted


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a data set in a cache file."""

    images: int
    files: int  # the files of the part, including those that are skipped
    skipped: int
    reasons: list[str]  # why files were skipped; only the first ones
    digest: str  # of the images and then the labels


@dataclass(frozen=True, slots=True)
class Content:
    """What a cache file contains after the images of the test part, those of the training part, and both labels."""

    shape: list[int]  # channels, height, width
    class_names: list[str]
    notes: list[str]
    train: Part
    test: Part


Build = Callable[[IO[bytes], Path], Content]  # writes images and labels into a file; the folder is for temporary files


def read(key: Any, build: Build, *, train: bool) -> tuple[Content, NDArray[np.uint8], NDArray[np.int64], str]:
    """Return one part of a data set, built if the cache does not have it.

    Args:
        key: what determines the content, as values for JSON.
        build: writes the images and labels into a file.
        train: which part.

    Returns:
        The file's description; the part's images, [n, c, h, w], mapped copy-on-write; its labels; its digest.

    Raises:
        TrainerError: as `build`, or the disk is full.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, key]).encode(errors="surrogateescape")).hexdigest()
    with _folder() as (folder, lasting):
        path = folder / f"{digest[:32]}.images"
        for _ in range(2):
            if (found := _open(path, train)) is not None:
                break
            with _alone(path):
                if (found := _open(path, train)) is None:
                    _make(path, build)
        if found is None:
            raise TrainerError(f"{path} cannot be read after it was written: check the disk")
        if lasting:
            with contextlib.suppress(OSError):
                os.utime(path)
                _trim(path)
        return found


@contextlib.contextmanager
def _folder() -> Iterator[tuple[Path, bool]]:
    """Give the cache's folder; or a temporary one, with False, where that cannot be written."""
    folder = cache_folder("data")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(
            f"{folder} cannot be written ({error.strerror}): the images will be decoded at each start. Set "
            "XDG_CACHE_HOME to a folder that can be written",
            file=sys.stderr,
        )
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary), False
    else:
        yield folder, True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the file's lock, which the kernel releases when the process ends."""
    with path.with_suffix(".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that reads the same images …", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(path: Path, build: Build) -> None:
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed; the lock keeps others away
        leftover.unlink(missing_ok=True)
    try:
        with replace_atomically(path) as file:
            content = build(file, path.parent)
            described = json.dumps(asdict(content)).encode()
            file.write(described + len(described).to_bytes(8, "little") + _MAGIC)
    except OSError as error:
        raise TrainerError(
            f"{path.parent}: the images cannot be written ({error.strerror or error}), {_free(path.parent)} MiB are "
            "free: make room there, or set XDG_CACHE_HOME to a folder on another disk"
        ) from error


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free >> 20


def _open(path: Path, train: bool) -> tuple[Content, NDArray[np.uint8], NDArray[np.int64], str] | None:
    """Map one part; return None if the file is missing or damaged."""
    try:
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(whole[-16:-8], "little")
        if whole[-8:] != _MAGIC:
            return None
        stored = json.loads(whole[-16 - size : -16])
        content = Content(**(stored | {name: Part(**stored[name]) for name in ("train", "test")}))
        counts = content.test.images, content.train.images
        start = labels_at(sum(counts), content.shape)
        if len(whole) != start + 8 * sum(counts) + size + 16:
            return None
        images = np.frombuffer(whole, np.uint8, sum(counts) * int(np.prod(content.shape)))
        labels = np.frombuffer(whole, np.int64, sum(counts), start)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    mine = slice(counts[0], None) if train else slice(None, counts[0])
    images, labels = images.reshape(-1, *content.shape)[mine], labels[mine]
    digest = digest_of(images, labels)
    part = content.train if train else content.test
    return (content, images, labels, digest) if digest == part.digest else None


def labels_at(images: int, shape: list[int]) -> int:
    """Return where the labels start in a file, in bytes."""
    return -(-images * int(np.prod(shape)) // 8) * 8


def digest_of(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """Return the SHA-256 of images and labels, without their shapes."""
    content = hashlib.sha256(np.ascontiguousarray(images).reshape(-1).data)
    content.update(np.ascontiguousarray(labels).data)
    return f"sha256:{content.hexdigest()}"


def _trim(used: Path) -> None:
    """Delete the files that were used least recently, until the rest fits; runs that have them mapped keep them."""
    files = sorted(used.parent.glob("*.images"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > _KEPT_BYTES and path != used:
            path.unlink()

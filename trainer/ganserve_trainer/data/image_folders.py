"""Reads any folder of images for `datasets`: sub-folders are classes, and a part of the images is kept for testing.

Files that are not images, and damaged images, are reported, skipped and counted. It reads AVIF, BMP, GIF, JPEG, JPEG
2000, PNG, PPM, TIFF and WebP. From each file it takes the first picture, rotated by its EXIF data; transparent pixels
become white.
"""

import hashlib
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ganserve_trainer.errors import TrainerError

Image.init()  # here, rather than in the first decoding thread
# An explicit list: Pillow would pass EPS to Ghostscript, and mistakes many other files for TGA images.
_READ: tuple[str, ...] = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_FORMATS = [name for name in _READ if name in Image.OPEN]  # AVIF: from Pillow 11.3
_LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx")  # ignored, like names that start with a dot
_NAMED = 10  # the most skipped files that are listed
_DECODED_AT_ONCE = 256
_LAYOUT = (
    "A folder of images holds a sub-folder for each class (DIR/cats/1.jpg), or images only, which then have no "
    "class. If there are both DIR/train and DIR/test, they are the two parts; otherwise about one image in ten is "
    "kept for testing."
)


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the folder, which may not be an image."""

    path: Path
    name: str  # the path relative to the folder
    class_name: str  # the name of the sub-folder; "" for a file without one
    train: bool


def read_image_folder(
    folder: Path, *, train: bool, image_size: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...], int]:
    """Read one part of a folder; list skipped files on stderr.

    Both parts are always decoded, so that they agree on channels, size and classes. Training pictures that are also in
    the test part, as a copy or by a link, are skipped.

    Returns:
        Images, uint8 [n, channels, height, width], with one channel if all pictures of the folder are grey; labels,
        int64 [n]; the names of the classes; the number of skipped files of the part.

    Raises:
        TrainerError: there is no such folder, its images differ in size and `image_size` is None, or a class or the
            part has no image.
    """
    files, class_names = _list_files(folder)
    pictures: list[tuple[_File, NDArray[np.uint8]]] = []
    skipped: list[str] = []
    held_out: set[bytes] = set()  # the SHA-256 of the test part's pictures
    sizes: Counter[str] = Counter()
    first_of_size: dict[str, str] = {}
    channels, seen_classes = 1, set()
    for file, picture in _decode_all(files, image_size):
        if isinstance(picture, str):
            if file.train == train:
                skipped.append(f"{file.name}: {picture}")
            continue
        size = f"{picture.shape[2]}x{picture.shape[1]}"
        sizes[size] += 1
        first_of_size.setdefault(size, file.name)
        channels = max(channels, len(picture))
        seen_classes.add(file.class_name)
        if train and not file.train:
            held_out.add(hashlib.sha256(picture.data).digest())
        if file.train == train and len(sizes) == 1:
            pictures.append((file, picture))
    if train:
        copies = {file for file, picture in pictures if hashlib.sha256(picture.data).digest() in held_out}
        skipped += [f"{file.name}: the same picture is in the test part" for file in copies]
        pictures = [(file, picture) for file, picture in pictures if file not in copies]
    part = "training" if train else "test"
    if skipped:
        total = sum(file.train == train for file in files)
        print(f"{folder}: {len(skipped)} of the {total} files of the {part} part are skipped:", file=sys.stderr)
        for line in sorted(skipped)[:_NAMED]:
            print(f"  {line if line.isprintable() else repr(line)}", file=sys.stderr)
        if len(skipped) > _NAMED:
            print(f"  … and {len(skipped) - _NAMED} more", file=sys.stderr)
    if "" in seen_classes:
        class_names = ()
    _check(folder, sizes, first_of_size, class_names, seen_classes)
    if not pictures:
        raise TrainerError(f"{folder} has no image in the {part} part, and {sizes.total()} in total. {_LAYOUT}")
    images = np.empty((len(pictures), channels, *pictures[0][1].shape[1:]), np.uint8)
    for row, (_, picture) in zip(images, pictures, strict=True):
        row[:] = picture  # broadcasts a grey picture to three channels if other pictures have colours
    number = {name: index for index, name in enumerate(class_names)}
    labels = torch.tensor([number.get(file.class_name, 0) for file, _ in pictures])
    return torch.from_numpy(images), labels, class_names, len(skipped)


def _check(
    folder: Path, sizes: Counter[str], first_of_size: dict[str, str], class_names: tuple[str, ...], seen: set[str]
) -> None:
    if not sizes:
        raise TrainerError(f"{folder} has no image that can be read. {_LAYOUT}")
    if empty := [name for name in class_names if name not in seen]:
        raise TrainerError(
            f"{folder}: each sub-folder is a class, but there is no readable image in {', '.join(empty)}; add images, "
            "or move the sub-folder away"
        )
    if len(sizes) > 1:
        found = [f"{count} of {size}, such as {first_of_size[size]}" for size, count in sizes.most_common(5)]
        raise TrainerError(
            f"{folder} has images of {len(sizes)} sizes ({'; '.join(found)}{'; …' if len(sizes) > 5 else ''}): add "
            "--image-size, to resize and crop all images to one size"
        )
    for name in (str(folder), *class_names):
        if name.encode(errors="replace").decode() != name:
            raise TrainerError(
                f"{folder}: {name!r} is not valid UTF-8, so a model card cannot contain it; rename the folder"
            )


def _list_files(folder: Path) -> tuple[list[_File], tuple[str, ...]]:
    """Return the folder's files, sorted by name, and its classes; skip hidden files.

    Without DIR/train and DIR/test, a hash of a file's path in the folder decides its part. So adding files does not
    move other files to another part.
    """
    if not folder.is_dir():
        raise TrainerError(f"{folder.absolute()} is not a folder. {_LAYOUT}")
    parts = [folder / "train", folder / "test"]
    given = all(part.is_dir() for part in parts)
    trees = parts if given else [folder]
    whole = folder.resolve()
    around = {str(place) for place in (whole, *whole.parents, *(tree.resolve() for tree in trees))}
    files: list[_File] = []
    classes: set[str] = set()
    for tree in trees:
        known = around.copy()
        for place, subfolders, names in os.walk(tree, onerror=_refuse, followlinks=True):
            # Visit each folder once: links may form cycles.
            targets = {os.path.realpath(Path(place, name)): name for name in sorted(subfolders) if _is_visible(name)}
            subfolders[:] = [name for target, name in targets.items() if target not in known]
            known |= targets.keys()
            inside = Path(place).relative_to(tree).parts
            if not inside:
                classes.update(subfolders)
            for path in (Path(place, name) for name in names if _is_visible(name)):
                name = path.relative_to(folder).as_posix()
                chance = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
                is_train = tree == parts[0] if given else chance % 10 != 0
                files.append(_File(path, name, inside[0] if inside else "", is_train))
    return sorted(files, key=lambda file: file.name), tuple(sorted(classes))


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _LEFT_BY_SYSTEMS


def _refuse(error: OSError) -> None:
    raise TrainerError(f"{error.filename} cannot be listed: {error.strerror}") from error


def _decode_all(files: list[_File], image_size: int | None) -> Iterator[tuple[_File, NDArray[np.uint8] | str]]:
    """Decode in threads (Pillow releases the GIL), a few hundred files at a time, so that Ctrl-C takes effect."""
    # One thread per core: small pictures are mostly Python's work, and 6 threads on 2 cores took 1.5 times as long.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's warnings about pictures that it reads anyway
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(files), _DECODED_AT_ONCE):
            chunk = files[start : start + _DECODED_AT_ONCE]
            decoded = pool.map(partial(_decode, image_size=image_size), [file.path for file in chunk])
            yield from zip(chunk, decoded, strict=True)


def _decode(path: Path, image_size: int | None) -> NDArray[np.uint8] | str:
    """Return a file's first picture, [3, height, width] or for grey [1, height, width], or why it cannot be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            return "not a file"
        if status.st_size == 0:
            return "empty"
        with Image.open(path, formats=_FORMATS) as opened:
            if image_size is not None:
                opened.draft(None, (2 * image_size, 2 * image_size))  # JPEG: decode at a reduced resolution
            picture = _as_rgb(ImageOps.exif_transpose(opened))
        if image_size is not None:
            picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError:
        return "not an image, or of an unsupported format"
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        return str(getattr(error, "strerror", None) or error or type(error).__name__)
    pixels = np.asarray(picture).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[:1] if (pixels == pixels[:1]).all() else pixels)


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Convert to RGB, with white behind transparent pixels."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to 0…255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")

"""Reads a data set of files through the cache: lists, splits, decodes and describes it."""

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ganserve_trainer.data import cache
from ganserve_trainer.data.decoding import Conversion, colour, decode_all, find_range, scaling
from ganserve_trainer.data.reading import Reading
from ganserve_trainer.data.sources import LAYOUT, Source, list_items, open_source
from ganserve_trainer.data.splitting import Placed, Plan, plan
from ganserve_trainer.errors import TrainerError

_NAMED = 10  # the most skipped files that are listed
_LINE_EVERY_S = 10  # without a terminal
_ROWS_AT_ONCE = 1024


def read_folder(
    path: Path, *, train: bool, image_size: int | None, reading: Reading
) -> tuple[str, NDArray[np.uint8], NDArray[np.int64], tuple[str, ...], int, str]:
    """Read one part of a data set of files; list skipped files on stderr.

    Training pictures that are also in the test part, as a copy or by a link, are skipped.

    Returns:
        The data set's name; images, [n, channels, height, width], with one channel if all pictures are grey; labels;
        the names of the classes; the number of skipped files of the part; the digest of images and labels.

    Raises:
        TrainerError: there is no such data set, its layout is not clear, its images differ in size and `image_size` is
            None, or a class or the part has no image.
    """
    source = open_source(path)
    elsewhere = Path(reading.test_folder).expanduser() if reading.test_folder else None
    outside = open_source(elsewhere).fingerprint if elsewhere is not None and elsewhere.exists() else ()
    key = [str(path.resolve()), source.fingerprint, outside, image_size, asdict(reading), PIL.__version__]
    content, images, labels, digest = cache.read(
        key, lambda file, scratch: _build(source, image_size, reading, file, scratch), train=train
    )
    part, name = (content.train, "training") if train else (content.test, "test")
    if os.environ.get("RANK", "0") == "0":
        _report(source, content, part, name)
    if not part.images:
        if reading.train_on_all and not train:
            raise TrainerError(
                f"{path} has no test part, because all images train (train_on_all): give another --dataset to compare "
                "with, or train with --test-folder"
            )
        total = content.train.images + content.test.images
        raise TrainerError(f"{path} has no image in the {name} part, and {total} in total. {LAYOUT}")
    return source.name, images, labels, tuple(content.class_names), part.skipped, digest


def _report(source: Source, content: cache.Content, part: cache.Part, name: str) -> None:
    lines = []
    if name == "training":
        channels, height, width = content.shape
        lines.append(
            f"{source.name}: {content.train.images:,} training and {content.test.images:,} test images, "
            f"{height}x{width}, {channels} {'channel' if channels == 1 else 'channels'}; {content.notes[0]}"
        )
        if content.class_names:
            shown = ", ".join(f"{index} {each}" for index, each in enumerate(content.class_names[:100]))
            more = len(content.class_names) - 100
            lines.append(f"classes: {shown}{f', … and {more} more' if more > 0 else ''}")
        lines += [f"note: {note}" for note in content.notes[1:]]
    if part.skipped:
        lines.append(f"{source.path}: {part.skipped} of the {part.files} files of the {name} part are skipped:")
        lines += [f"  {reason}" for reason in part.reasons]
        if part.skipped > len(part.reasons):
            lines.append(f"  … and {part.skipped - len(part.reasons)} more")
    for line in lines:
        print(line if line.isprintable() else repr(line), file=sys.stderr, flush=True)


def _build(source: Source, image_size: int | None, reading: Reading, file: IO[bytes], scratch: Path) -> cache.Content:
    """Write the images and labels of both parts into a cache file."""
    with ExitStack() as stack:
        listing = list_items(source, stack, scratch)
        planned = plan(source.path, listing, reading, stack, scratch)
        how = Conversion(image_size, reading.channels, colour(reading.background))
        writer = _Writer(source, planned, file)
        # The test part first: training pictures that it has, too, are skipped.
        files = sorted(planned.files, key=lambda each: each.train)
        if not writer.write(files, how):
            how = replace(how, value_range=find_range([each.item for each in files]))
            assert how.value_range is not None
            writer = _Writer(source, planned, file)
            writer.notes.append(f"pictures of more than 8 bits: {scaling(how.value_range)[2]} become 0 to 255")
            file.seek(0)
            file.truncate()
            writer.write(files, how)
        return writer.finish()


class _Writer:
    """Writes pictures one after the other, with three channels until it is known that all are grey."""

    def __init__(self, source: Source, planned: Plan, file: IO[bytes]) -> None:
        self._source, self._plan, self._file = source, planned, file
        self.notes = list(planned.notes)
        self._sizes: Counter[str] = Counter()
        self._first_of_size: dict[str, str] = {}
        self._shape: tuple[int, ...] = ()
        self._grey = True
        self._labels: dict[bool, list[int]] = {True: [], False: []}
        self._skipped: dict[bool, list[str]] = {True: [], False: []}
        self._held_out: set[bytes] = set()  # digests of the test part's pictures
        self._seen_classes: set[str] = set()
        self._without_class: list[str] = []
        self._number = {name: index for index, name in enumerate(planned.class_names)}

    def write(self, files: list[Placed], how: Conversion) -> bool:
        """Decode and write all files; return False at the first that needs the range of the values."""
        decoded = decode_all([each.item for each in files], how)
        for placed, picture in zip(files, _shown(decoded, self._source.name, len(files)), strict=True):
            if picture is None:
                return False
            if isinstance(picture, str):
                self._skipped[placed.train].append(f"{placed.item.name}: {picture}")
            else:
                self._add(placed, picture, how)
        return True

    def _add(self, placed: Placed, picture: NDArray[np.uint8], how: Conversion) -> None:
        size = f"{picture.shape[2]}x{picture.shape[1]}"
        self._sizes[size] += 1
        self._first_of_size[size] = min(self._first_of_size.get(size, placed.item.name), placed.item.name)
        if not placed.class_name:
            self._without_class.append(placed.item.name)
        self._seen_classes.add(placed.class_name)
        digest = hashlib.blake2b(picture.data, digest_size=16, key=bytes([len(picture)])).digest()
        if not placed.train:
            self._held_out.add(digest)
        elif digest in self._held_out:
            self._skipped[True].append(f"{placed.item.name}: the same picture is in the test part")
            return
        if len(self._sizes) > 1:
            return
        if how.channels is None:
            self._grey = self._grey and len(picture) == 1
            picture = np.broadcast_to(picture, (3, *picture.shape[1:]))
        else:
            self._grey = False
        self._shape = picture.shape
        self._file.write(np.ascontiguousarray(picture).data)
        self._labels[placed.train].append(self._number.get(placed.class_name, 0))

    def finish(self) -> cache.Content:
        """Check the whole, write the labels, and return the description."""
        self._check()
        class_names = list(self._plan.class_names)
        if class_names and (loose := sorted(self._without_class)):
            more = f", like {len(loose) - 1} more" if len(loose) > 1 else ""
            self.notes.append(
                f"{loose[0]} lies in no class folder{more}, so the data set is read without classes; to have classes, "
                "move it into one, or away"
            )
            class_names = []
            self._labels = {train: [0] * len(labels) for train, labels in self._labels.items()}
        counts = {train: len(labels) for train, labels in self._labels.items()}
        if self._grey:
            self._drop_channels()
        shape = list(self._shape)
        self._file.seek(cache.labels_at(sum(counts.values()), shape))
        labels = {train: np.array(numbers, np.int64) for train, numbers in self._labels.items()}
        self._file.write(labels[False].data)
        self._file.write(labels[True].data)
        self._file.flush()
        parts = {}
        images = np.memmap(self._file.name, np.uint8, "r", shape=(sum(counts.values()), *shape))
        for train, name in ((False, "test"), (True, "train")):
            mine = slice(counts[False], None) if train else slice(None, counts[False])
            skipped = sorted(self._skipped[train])
            parts[name] = cache.Part(
                images=counts[train],
                files=sum(placed.train == train for placed in self._plan.files),
                skipped=len(skipped),
                reasons=skipped[:_NAMED],
                digest=cache.digest_of(images[mine], labels[train]),
            )
        return cache.Content(shape, class_names, [self._plan.how, *self.notes], parts["train"], parts["test"])

    def _drop_channels(self) -> None:
        """Keep the first of three equal channels, in place: rows only move towards the start."""
        _, height, width = self._shape
        rows = sum(map(len, self._labels.values()))
        self._file.flush()
        with open(self._file.name, "r+b") as file:
            for start in range(0, rows, _ROWS_AT_ONCE):
                count = min(_ROWS_AT_ONCE, rows - start)
                file.seek(3 * start * height * width)
                colours = np.frombuffer(file.read(3 * count * height * width), np.uint8)
                file.seek(start * height * width)
                file.write(np.ascontiguousarray(colours.reshape(count, 3, -1)[:, 0]).data)
            file.truncate(rows * height * width)
        self._shape = (1, height, width)

    def _check(self) -> None:
        path, sizes, class_names = self._source.path, self._sizes, self._plan.class_names
        if not sizes:
            reasons = [reason for reasons in self._skipped.values() for reason in reasons][:3]
            first = f" ({'; '.join(reasons)})" if reasons else ""
            raise TrainerError(f"{path} has no image that can be read{first}. {LAYOUT}")
        if "" not in self._seen_classes and (empty := [name for name in class_names if name not in self._seen_classes]):
            raise TrainerError(
                f"{path}: each sub-folder is a class, but there is no readable image in {', '.join(empty)}; add "
                "images, or move the sub-folder away"
            )
        if len(sizes) > 1:
            found = [f"{count} of {size}, such as {self._first_of_size[size]}" for size, count in sizes.most_common(5)]
            raise TrainerError(
                f"{path} has images of {len(sizes)} sizes ({'; '.join(found)}{'; …' if len(sizes) > 5 else ''}): add "
                "--image-size, to resize and crop all images to one size"
            )
        for name in (str(path), *class_names):
            if name.encode(errors="replace").decode() != name:
                raise TrainerError(
                    f"{path}: {name!r} is not valid UTF-8, so a model card cannot contain it; rename the folder"
                )


def _shown(
    pictures: Iterable[NDArray[np.uint8] | str | None], name: str, total: int
) -> Iterator[NDArray[np.uint8] | str | None]:
    """Show the progress: a bar or, without a terminal, a line from time to time."""
    console = Console(stderr=True)
    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name, total=total)
        due = time.monotonic() + _LINE_EVERY_S
        for index, picture in enumerate(pictures):
            yield picture
            if index % 100 == 0:
                progress.update(task, completed=index)
                if not console.is_terminal and time.monotonic() > due:
                    due += _LINE_EVERY_S
                    print(f"reading {name}: {index:,} of {total:,} images", file=sys.stderr, flush=True)

"""The plan of a data set, which `ganserve stream` stores with it and from which its images can be made again."""

import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ganserve import Client
from ganserve._arguments import Label
from ganserve.errors import NoProvenanceError
from ganserve.images import ImageBatch
from ganserve.provenance import Provenance

SEED_LIMIT = 1 << 32
_MOST_A_CALL = 50_000  # images
_MOST_TEXT = 1 << 20  # bytes of the provenance in an .npz
_BROKEN = (ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class Plan:
    """How to make the images of a data set. Image i has seed `seed` + i, and takes the labels of `labels` in turn."""

    model: str
    version: int
    digest: str
    seed: int
    labels: tuple[int, ...] | None  # None: the server's default, the classes in turn
    truncation: float
    class_names: tuple[str, ...]
    height: int
    width: int
    channels: int
    attributes: dict[str, float] = field(default_factory=dict)
    input_seeds: dict[str, int] = field(default_factory=dict)

    def seed_of(self, index: int) -> int:
        """Return the seed of image `index`."""
        return (self.seed + index) % SEED_LIMIT

    def label_of(self, index: int) -> int | None:
        """Return the label of image `index`, or None for an unconditional model."""
        if not self.class_names:
            return None
        if self.labels is None:
            return self.seed_of(index) % len(self.class_names)
        return self.labels[index % len(self.labels)]

    def batches(self, client: Client, images: range) -> Iterator[ImageBatch]:
        """Make these images in order, with calls that are small enough for a server."""
        for start in range(images.start, images.stop, _MOST_A_CALL):
            stop = min(start + _MOST_A_CALL, images.stop)
            labels: list[Label] | Label | None = None if self.labels is None else self.labels[0]
            if self.labels is not None and len(self.labels) > 1:
                labels = [self.label_of(index) or 0 for index in range(start, stop)]
            yield from client.stream_batches(
                self.model,
                count=stop - start,
                seed=self.seed_of(start),
                label=labels,
                truncation=self.truncation,
                attributes=self.attributes,
                input_seeds=self.input_seeds,
                version=self.version,
            )

    def to_json(self) -> str:
        """Serialise the plan, so that another run can resume."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan.

        Raises:
            NoProvenanceError: the text is not a plan of `ganserve stream`.
        """
        try:
            fields = json.loads(text)
            made = Provenance.from_json(json.dumps({**fields, "labels": None, "class_names": None, "label": None}))
            numbers = ("height", "width", "channels")
            labels, names = fields["labels"], fields["class_names"]
            attributes = {name: each for name, each in (made.attributes or {}).items() if isinstance(each, float)}
            if (
                made.seed is None
                or not all(type(fields[name]) is int and fields[name] > 0 for name in numbers)
                or not all(isinstance(name, str) and name.isprintable() for name in names)
                or not all(type(label) is int and 0 <= label < len(names) for label in labels or ())
                or labels == []
                or len(attributes) < len(made.attributes or {})
            ):
                raise NoProvenanceError("its fields are not those of a data set")
            return cls(
                made.model,
                made.version,
                made.digest,
                made.seed,
                None if labels is None else tuple(labels),
                made.truncation,
                tuple(names),
                fields["height"],
                fields["width"],
                fields["channels"],
                attributes,
                dict(made.input_seeds or {}),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            raise NoProvenanceError("`ganserve stream` did not write it") from None


class Archive:
    """An .npz of `ganserve stream`, read sequentially, because it may be larger than the memory.

    Raises:
        NoProvenanceError: the file is not such an .npz, or is broken.
    """

    def __init__(self, file: BinaryIO) -> None:
        try:
            archive = zipfile.ZipFile(file)
            if archive.getinfo("provenance.npy").file_size > _MOST_TEXT:
                raise NoProvenanceError("its provenance is longer than any that `ganserve stream` writes")
            with archive.open("provenance.npy") as member:
                text = str(np.lib.format.read_array(member, allow_pickle=False))
            self._images = archive.open("images.npy")
            shape, fortran_order, dtype = _read_header(self._images)
            if not shape:
                raise ValueError
        except _BROKEN:
            raise NoProvenanceError("it is not an .npz that `ganserve stream` wrote, or it is truncated") from None
        self.plan = Plan.from_json(text)
        plan = self.plan
        if fortran_order or dtype != np.uint8 or not shape[0] or shape[1:] != (plan.height, plan.width, plan.channels):
            raise NoProvenanceError("its images do not match its provenance")
        self.count = shape[0]

    def read(self, count: int) -> NDArray[np.uint8]:
        """Return the next images, [count, height, width, channels].

        Raises:
            NoProvenanceError: the file is broken.
        """
        shape = (count, self.plan.height, self.plan.width, self.plan.channels)
        try:
            return np.frombuffer(self._images.read(int(np.prod(shape))), np.uint8).reshape(shape)
        except _BROKEN:
            raise NoProvenanceError("it is damaged or truncated") from None


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if np.lib.format.read_magic(member) == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)

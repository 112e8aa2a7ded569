"""The images of one call: pixels and everything needed to make them again."""

import base64
import functools
import html
import io
import math
import operator
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from ganserve._arguments import MOST_PIXELS, check_picture_size, integer, invalid
from ganserve._attributes import Values, joined, of_image, part
from ganserve.errors import InvalidRequestError
from ganserve.provenance import Interpolation, Provenance

if TYPE_CHECKING:
    from PIL.Image import Image

    from ganserve._pictures import Sheet

# A notebook shows at most this many images, and fewer if they have more pixels in total; small images are enlarged up
# to this width.
_SHOWN_IMAGES = 100
_SHOWN_PIXELS = 4_000_000
_SHOWN_WIDTH = 640  # pixels
_SHOWN_SCALE = 8
_SHOWN_NUMBERS = 12  # seeds or labels in a caption that are not consecutive


class GeneratedImage:
    """One image of a batch. It is a view, which keeps its batch's pixels in memory; `copy.deepcopy` copies its pixels.

    >>> image = client.generate("cdcgan-mnist", count=4, seed=1, label=7)[2]
    >>> image.seed, image.label, image.pixels.shape
    (3, 7, (28, 28, 1))
    >>> image.save("seven.png").name
    'seven.png'

    It is not a dataclass, and reads its fields from the batch: a stream makes a million of these, in 0.1 µs each.
    """

    __slots__ = ("_batch", "_index")

    def __init__(self, batch: "ImageBatch", index: int) -> None:
        """Make a view of image `index`, from 0 on, of the batch."""
        self._batch = batch
        self._index = index

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pixels, uint8 [height, width, channels]."""
        pixels: NDArray[np.uint8] = self._batch.pixels[self._index]
        return pixels

    @property
    def seed(self) -> int | None:
        """The image's seed; None if the image was made from your own latent, or was interpolated between two seeds."""
        return None if self._batch.seeds is None else self._batch.seeds[self._index]

    @property
    def label(self) -> int | None:
        """The index of the image's class; None for an unconditional model."""
        return None if self._batch.labels is None else self._batch.labels[self._index]

    @property
    def model(self) -> str:
        """The model's name."""
        return self._batch.model

    @property
    def version(self) -> int:
        """The model's version."""
        return self._batch.version

    @property
    def digest(self) -> str:
        """The digest of the model's file: "sha256:" and 64 hexadecimal digits."""
        return self._batch.digest

    @property
    def provider(self) -> str:
        """The onnxruntime execution provider that ran, such as "CPUExecutionProvider"."""
        return self._batch.provider

    @property
    def truncation(self) -> float:
        """The truncation that the image was made with."""
        return self._batch.truncation

    @property
    def attributes(self) -> dict[str, float] | None:
        """The image's attributes by name; None for a model without further inputs."""
        return None if self._batch.attributes is None else of_image(self._batch.attributes, self._index)

    @property
    def input_seeds(self) -> Mapping[str, int] | None:
        """The seeds of latents that do not follow from `seed`; None for a model without further inputs."""
        return self._batch.input_seeds

    @property
    def provenance(self) -> Provenance:
        """How to make the image again, as its file has it."""
        way = self._batch.interpolation
        return Provenance(
            self.model,
            self.version,
            self.digest,
            self.seed,
            self.label,
            self.truncation,
            interpolation=None if way is None else replace(way, shown=way.shown[self._index : self._index + 1]),
            attributes=self.attributes,
            input_seeds=self.input_seeds,
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.pixels, dtype=dtype, copy=copy)

    def __eq__(self, other: object) -> bool:
        """Whether the images have the same pixels and provenance."""
        if not isinstance(other, GeneratedImage):
            return NotImplemented
        return self.provenance == other.provenance and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.model, self.version, self.digest, self.seed, self.label))

    def __repr__(self) -> str:
        way = self.provenance.interpolation
        source = "own latent" if self.seed is None else f"seed {self.seed}"
        if way is not None:
            source = f"step {way.shown[0]} of {way.steps} from seed {way.seed_a} to {way.seed_b}"
        label = "" if self.label is None else f", label {self.label}"
        return f"<GeneratedImage {_times(self.pixels.shape)} by {self.model} version {self.version}, {source}{label}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle only this image, not its batch.
        return GeneratedImage, (self._batch[self._index : self._index + 1], 0)

    def pil(self) -> "Image":
        """Return the image as a PIL image: grey ("L"), colour ("RGB"), or colour and alpha ("RGBA")."""
        return _to_pil(self.pixels)

    @overload
    def save(self, path: str | PathLike[str], format: str | None = None, *, provenance: bool = True) -> Path: ...

    @overload
    def save(self, path: IO[bytes], format: str, *, provenance: bool = True) -> None: ...

    def save(
        self, path: str | PathLike[str] | IO[bytes], format: str | None = None, *, provenance: bool = True
    ) -> Path | None:
        """Write the image to a file, whose extension decides the format, or into an open file. Creates missing folders.

        >>> import io
        >>> image, file = client.generate("cdcgan-mnist", seed=3)[0], io.BytesIO()
        >>> image.save(file, "PNG")

        Args:
            path: the path of the file, which is returned; {index}, {seed}, {label} and {model} are filled in, as by
                `ImageBatch.save`. Or a file that is open for writing bytes.
            format: PNG, JPEG, WebP or another format that Pillow writes; None takes the format of the path's extension.
            provenance: whether to write how to make the image again, into PNG, JPEG, WebP, GIF and TIFF.

        Raises:
            ValueError: the extension or the format cannot be written, the image has alpha and the format has not, or
                the path asks for a seed or label that the image lacks.
            OSError: the file can't be written.
        """
        from ganserve._pictures import write

        made = self.provenance if provenance else None
        if not isinstance(path, str | PathLike):
            write(self.pil(), path, made, format)
            return None
        filled = Path(self._batch._file_name(fspath(path), self._index))
        write(self.pil(), filled, made, format)
        return filled

    def _repr_png_(self) -> bytes:
        return self._batch[self._index : self._index + 1]._picture()


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """Images with their seeds and labels, and the model that made them.

    >>> batch = client.generate("cdcgan-mnist", count=4, seed=1, label=7)
    >>> [path.name for path in batch.save("out/{label}-{seed}.png")]
    ['7-1.png', '7-2.png', '7-3.png', '7-4.png']
    >>> batch.sheet(columns=2).save("sevens.png")
    >>> client.interpolate("cdcgan-mnist", 1, 2, label=7).gif("walk.gif", scale=4).name
    'walk.gif'

    `pixels` is uint8 [count, height, width, channels]. `seeds` is None for images of your own latents and of an
    `interpolation`. `labels` is None for an unconditional model. `attributes` has, by name, a number for all images or
    a tuple with one for each; it is None for a model without further inputs. `queue_s` and `compute_s` are the seconds
    that the images waited in the server's queue and took to compute.
    """

    pixels: NDArray[np.uint8]
    seeds: tuple[int, ...] | None
    labels: tuple[int, ...] | None
    model: str
    version: int
    digest: str
    provider: str
    truncation: float
    queue_s: float
    compute_s: float
    interpolation: Interpolation | None = None
    attributes: Values | None = None
    input_seeds: Mapping[str, int] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __eq__(self, other: object) -> bool:
        """Whether the images have the same pixels and provenance; the times may differ."""
        if not isinstance(other, ImageBatch):
            return NotImplemented
        return self._origin() == other._origin() and np.array_equal(self.pixels, other.pixels)

    def __hash__(self) -> int:
        return hash((self.model, self.version, self.digest, self.seeds, self.labels))

    def _origin(self) -> tuple[Any, ...]:
        """Return how the images were made, without the times."""
        made = (self.model, self.version, self.digest, self.truncation)
        return *made, self.seeds, self.labels, self.interpolation, self.attributes, self.input_seeds

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.pixels, dtype=dtype, copy=copy)

    def __iter__(self) -> Iterator[GeneratedImage]:
        return map(functools.partial(GeneratedImage, self), range(len(self)))

    @overload
    def __getitem__(self, index: int) -> GeneratedImage: ...

    @overload
    def __getitem__(self, index: slice) -> "ImageBatch": ...

    def __getitem__(self, index: int | slice) -> "GeneratedImage | ImageBatch":
        if isinstance(index, slice):
            way = self.interpolation
            return replace(
                self,
                pixels=self.pixels[index],
                seeds=None if self.seeds is None else self.seeds[index],
                labels=None if self.labels is None else self.labels[index],
                interpolation=None if way is None else replace(way, shown=way.shown[index]),
                attributes=part(self.attributes, index),
            )
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"image {place} of a batch of {len(self)}")
        return GeneratedImage(self, place % len(self))

    def __repr__(self) -> str:
        count, *shape = self.pixels.shape
        return f"<ImageBatch {count} of {_times(shape)} by {self.model} version {self.version}>"

    @property
    def provenance(self) -> Provenance:
        """How to make the images again, as a picture of all of them has it.

        Raises:
            ValueError: there are no images.
        """
        self._check_some()
        return Provenance(
            model=self.model,
            version=self.version,
            digest=self.digest,
            seed=None if self.seeds is None else self.seeds[0],
            label=None if self.labels is None else self.labels[0],
            truncation=self.truncation,
            count=len(self),
            seeds=self.seeds,
            labels=self.labels,
            interpolation=self.interpolation,
            attributes=self.attributes,
            input_seeds=self.input_seeds,
        )

    def pil(self) -> list["Image"]:
        """Return the images as PIL images: grey ("L"), colour ("RGB"), or colour and alpha ("RGBA")."""
        return [_to_pil(pixels) for pixels in self.pixels]

    def save(self, pattern: str | PathLike[str], *, provenance: bool = True) -> list[Path]:
        """Write one file for each image; its extension decides the format. Creates missing folders.

        Args:
            pattern: a path with {index}, {seed}, {label} or {model}, such as "out/{label}-{seed}.png".
            provenance: whether to write how to make each image again, into PNG, JPEG, WebP, GIF and TIFF;
                `read_provenance` reads it.

        Raises:
            ValueError: the pattern gives two images the same name, asks for a seed or label that the images lack, or
                has an extension of no format that can be written, or of one without alpha for images that have it.
            TypeError: the pattern is an open file.
            OSError: a file can't be written.
        """
        from ganserve._pictures import format_of

        if not isinstance(pattern, str | PathLike):
            raise TypeError(
                f"a batch is saved to a pattern of file names, one for each image, not to a {type(pattern).__name__}; "
                "an open file takes one image, or one picture of all images with sheet().save(file, 'PNG')"
            )
        pattern = fspath(pattern)
        if not pattern or Path(pattern).is_dir():
            example = os.path.join(pattern, "{index}.png")
            raise InvalidRequestError(f"{pattern!r} is a folder; give a pattern of file names, such as {example!r}")
        paths = [Path(self._file_name(pattern, index)) for index in range(len(self))]
        if len(set(paths)) < len(paths):
            one = "{" not in pattern and Path(pattern).suffix
            sheet = f", or write one picture of all images with sheet().save({pattern!r})" if one else ""
            raise InvalidRequestError(
                f"{pattern!r} gives two images the same name; put {{index}} or {{seed}} into it{sheet}"
            )
        format_of(pattern)
        return [image.save(pattern, provenance=provenance) for image in self]

    def sheet(
        self, columns: SupportsIndex | None = None, *, row_names: Sequence[str] = (), scale: SupportsIndex = 1
    ) -> "Sheet":
        """Arrange the images in one picture, row by row: a PIL image, whose `save` writes how to make them again.

        The background is black; behind images with alpha, it is transparent.

        Args:
            columns: the number of images in a row; None makes the picture nearly square.
            row_names: the text in front of each row.
            scale: enlarges every pixel to a square of scale x scale.

        Raises:
            InvalidRequestError: there are no images, columns or scale is below 1, there are more names than rows, or
                the picture would have more pixels than Pillow reads.
        """
        from ganserve._pictures import Sheet, lay_out

        provenance = self.provenance
        wide = math.ceil(math.sqrt(len(self))) if columns is None else integer("columns", columns, 1, MOST_PIXELS)
        scale = integer("scale", scale, 1, MOST_PIXELS)
        wide = min(wide, len(self))
        rows = math.ceil(len(self) / wide)
        if len(row_names) > rows or not all(isinstance(name, str) for name in row_names):
            raise invalid("row_names", f"row_names is {reprlib.repr(row_names)}; it must be at most {rows} texts")
        _, height, width, _ = self.pixels.shape
        check_picture_size(width * wide * scale, height * rows * scale)
        return Sheet.of(lay_out(self.pil(), wide, row_names, scale), provenance)

    @overload
    def gif(
        self,
        path: str | PathLike[str],
        format: str | None = None,
        *,
        frame_ms: SupportsIndex = 80,
        bounce: bool = True,
        scale: SupportsIndex = 1,
        provenance: bool = True,
    ) -> Path: ...

    @overload
    def gif(
        self,
        path: IO[bytes],
        format: str | None = None,
        *,
        frame_ms: SupportsIndex = 80,
        bounce: bool = True,
        scale: SupportsIndex = 1,
        provenance: bool = True,
    ) -> None: ...

    def gif(
        self,
        path: str | PathLike[str] | IO[bytes],
        format: str | None = None,
        *,
        frame_ms: SupportsIndex = 80,
        bounce: bool = True,
        scale: SupportsIndex = 1,
        provenance: bool = True,
    ) -> Path | None:
        """Write an animation that shows the images in turn and loops forever. Creates missing folders.

        Args:
            path: the path of the file, which is returned, or a file that is open for writing bytes. A path ends in .gif
                or .webp. GIF shows grey exactly, and colour in 256 colours a frame; WebP shows both exactly. Images
                with alpha need WebP.
            format: GIF or WebP; None takes the format of the path's extension, or GIF for an open file.
            frame_ms: the duration of each frame in ms, 20 or more; a GIF has steps of 10 ms.
            bounce: whether to go back through the images after the last one, rather than jump to the first one.
            scale: enlarges every pixel to a square of scale x scale.
            provenance: whether to write how to make the images again.

        Raises:
            ValueError: there are no images, the extension is another one, the images have alpha and the format has
                not, frame_ms is below 20, or scale is below 1.
            OSError: the file can't be written.
        """
        from ganserve._pictures import LONGEST_FRAME_MS, SHORTEST_FRAME_MS, animate

        origin = self.provenance
        scale = integer("scale", scale, 1, MOST_PIXELS)
        frame_ms = integer("frame_ms", frame_ms, SHORTEST_FRAME_MS, LONGEST_FRAME_MS)
        _, height, width, _ = self.pixels.shape
        check_picture_size(width * scale, height * scale * len(self))
        frames = self.pil()
        if bounce:
            frames += frames[-2:0:-1]
        made = origin if provenance else None
        if not isinstance(path, str | PathLike):
            animate(frames, path, "GIF" if format is None else format, frame_ms, scale, made)
            return None
        animate(frames, Path(path), format, frame_ms, scale, made)
        return Path(path)

    def _repr_png_(self) -> bytes | None:
        return self._picture() if len(self) else None

    def _repr_html_(self) -> str:
        shown = self._shown()
        facts = [f"{self.model} version {self.version}", f"{len(self)} image{'s' * (len(self) != 1)}"]
        if len(shown) < len(self):
            facts.append(f"{len(self) - len(shown)} not shown")
        if (way := self.interpolation) is not None:
            facts.append(f"{way.kind} from seed {way.seed_a} to {way.seed_b}")
        else:
            facts.append("own latents" if self.seeds is None else f"seeds {listed(self.seeds)}")
        if self.labels is not None:
            facts.append(f"labels {listed(self.labels)}")
        facts += [f"{name} {_value(value)}" for name, value in (self.attributes or {}).items() if value != ()]
        facts += [
            f"truncation {self.truncation:.4g}",
            f"{self.queue_s * 1e3:.1f} ms queued, {self.compute_s * 1e3:.1f} ms computed by {self.provider}",
        ]
        caption = f"<figcaption>{html.escape(' · '.join(facts))}</figcaption>"
        if not len(self):
            return f'<figure style="margin: 0">{caption}</figure>'
        picture = base64.b64encode(self._picture()).decode()
        name = html.escape(repr(self))
        return f'<figure style="margin: 0"><img src="data:image/png;base64,{picture}" alt="{name}">{caption}</figure>'

    def _shown(self) -> "ImageBatch":
        _, height, width, _ = self.pixels.shape
        return self[: min(_SHOWN_IMAGES, max(1, _SHOWN_PIXELS // (height * width)))]

    def _picture(self) -> bytes:
        """Return the first images, 100 at most, as a PNG; small images are enlarged."""
        shown = self._shown()
        width = self.pixels.shape[2]
        # Three images go in one row, if they fit: a 2x2 grid would have a gap.
        columns = 3 if len(shown) == 3 and 3 * width <= _SHOWN_WIDTH else math.ceil(math.sqrt(len(shown)))
        scale = min(max(1, _SHOWN_WIDTH // (columns * width)), _SHOWN_SCALE)
        file = io.BytesIO()
        shown.sheet(columns, scale=scale).save(file, "PNG")
        return file.getvalue()

    def _check_some(self) -> None:
        if not len(self):
            raise InvalidRequestError("there are no images in this batch")

    def _file_name(self, pattern: str, index: int) -> str:
        values: dict[str, Any] = {"index": index, "model": self.model, "version": self.version}
        if self.seeds is not None:
            values["seed"] = self.seeds[index]
        if self.labels is not None:
            values["label"] = self.labels[index]
        try:
            return pattern.format_map(values)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            names = ", ".join(f"{{{name}}}" for name in values)
            raise InvalidRequestError(f"{pattern!r} cannot be filled in; these images have {names}") from error


def concatenate(batches: Sequence[ImageBatch]) -> ImageBatch:
    """Join the chunks of one stream."""
    first = batches[0]
    return ImageBatch(
        pixels=np.concatenate([batch.pixels for batch in batches]),
        seeds=None if first.seeds is None else tuple(seed for batch in batches for seed in batch.seeds or ()),
        labels=None if first.labels is None else tuple(label for batch in batches for label in batch.labels or ()),
        model=first.model,
        version=first.version,
        digest=first.digest,
        provider=first.provider,
        truncation=first.truncation,
        queue_s=first.queue_s,
        compute_s=sum(batch.compute_s for batch in batches),
        interpolation=_joined([batch.interpolation for batch in batches]),
        attributes=joined([(batch.attributes, len(batch)) for batch in batches]),
        input_seeds=first.input_seeds,
    )


def gathered(images: Iterable[GeneratedImage]) -> ImageBatch:
    """Join images of one model, with any seeds, in one batch."""
    return concatenate([image._batch[image._index : image._index + 1] for image in images])


def _joined(ways: Sequence[Interpolation | None]) -> Interpolation | None:
    """Return the interpolation that all batches are parts of, or None."""
    first = ways[0]
    if first is None or not all(way is not None and replace(way, shown=first.shown) == first for way in ways):
        return None
    return replace(first, shown=tuple(step for way in ways if way is not None for step in way.shown))


def _to_pil(pixels: NDArray[np.uint8]) -> "Image":
    from PIL import Image

    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _value(value: float | tuple[float, ...]) -> str:
    return f"{min(value):.4g} to {max(value):.4g}" if isinstance(value, tuple) else f"{value:.4g}"


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def listed(numbers: Sequence[int]) -> str:
    """Format seeds or labels for people: "7" if all are equal, "5 to 20" if consecutive, or the first ones."""
    if len(set(numbers)) == 1:
        return str(numbers[0])
    if numbers and tuple(numbers) == tuple(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]} to {numbers[-1]}"
    more = ", …" if len(numbers) > _SHOWN_NUMBERS else ""
    return ", ".join(map(str, numbers[:_SHOWN_NUMBERS])) + more

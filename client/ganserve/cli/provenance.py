"""`ganserve inspect` and `ganserve reproduce`: where a picture comes from, and whether it can be made again."""

import io
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from ganserve.cli.connection import Connection, with_connection
from ganserve.cli.outcome import ExitStatus
from ganserve.cli.output import STDOUT, encoded, print_json
from ganserve.client import Client
from ganserve.conversion import Label
from ganserve.errors import NoProvenanceError
from ganserve.images import ImageBatch, concatenate
from ganserve.provenance import Provenance, read_provenance

_GAP = 2  # pixels between the images of a sheet
_LARGEST_SCALE = 64
_MOST_A_CALL = 1000
_MOST_SHOWN = 12  # numbers of a list

PictureFile = Annotated[Path, typer.Argument(help="A PNG, JPEG, WebP or GIF; '-' is standard input.", allow_dash=True)]


def inspect(picture: PictureFile, as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False) -> None:
    """Say how a picture was made, by what its file says; no server is asked. Exit status 1 if it says nothing.

    Example: ganserve inspect sevens.png
    """
    content = _read(picture)
    provenance = read_provenance(content)
    with Image.open(io.BytesIO(content)) as image:
        facts = {"format": image.format, "width": image.width, "height": image.height}
        frames = getattr(image, "n_frames", 1)
    if as_json:
        print_json({"picture": str(picture), **facts, "frames": frames, "provenance": asdict(provenance)})
        return
    moving = f", {frames} frames" if frames > 1 else ""
    print(f"{picture}: {facts['format']}, {facts['width']}x{facts['height']}{moving}")
    for name, value in _facts(provenance).items():
        print(f"{name:<11} {value}")


@with_connection
def reproduce(
    picture: PictureFile,
    tolerance: Annotated[
        int, typer.Option(min=0, max=255, help="Levels a pixel may differ: 1 between kinds of machine.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    *,
    connection: Connection,
) -> None:
    """Make a picture again and compare every pixel: exit status 0 if all agree, 1 if not.

    Of a lossy format, what is compared is what the new images give in that format. Example: ganserve reproduce a.png
    """
    content = _read(picture)
    provenance = read_provenance(content)
    with connection.client() as client:
        agreement, provider, digest = _compare(client, provenance, content)
    same = agreement is not None and agreement.largest <= tolerance
    if as_json:
        compared = None if agreement is None else asdict(agreement)
        facts = {"same": same, "compared": compared, "same_digest": digest == provenance.digest, "provider": provider}
        print_json({"picture": str(picture), **facts, "provenance": asdict(provenance)})
    else:
        print(f"{picture}: {_verdict(agreement, tolerance)} ({_of(provenance)}, on {provider})")
        if digest != provenance.digest:
            print(f"the server's version {provenance.version} is another file than the one it was made with: {digest}")
    if not same:
        raise typer.Exit(ExitStatus.NO)


@dataclass(frozen=True, slots=True)
class _Agreement:
    """How far two pictures agree."""

    pixels: int
    differing: int
    largest: int  # difference, in levels of 0 to 255

    @classmethod
    def of(cls, here: NDArray[np.uint8], there: NDArray[np.uint8]) -> "_Agreement":
        """Compare [frames, height, width, channels] with as many."""
        difference = np.abs(here.astype(np.int16) - there).max(axis=3)
        return cls(difference.size, int(np.count_nonzero(difference)), int(difference.max()))


def _read(picture: Path) -> bytes:
    return sys.stdin.buffer.read() if str(picture) == STDOUT else picture.read_bytes()


def _facts(provenance: Provenance) -> dict[str, str]:
    facts = {
        "model": provenance.model,
        "version": str(provenance.version),
        "digest": provenance.digest,
        "images": "1" if provenance.count is None else str(provenance.count),
        "seed": _numbers(provenance.seed, provenance.seeds),
        "label": _numbers(provenance.label, provenance.labels),
        "truncation": f"{provenance.truncation:g}",
    }
    if provenance.seed is None:
        facts["seed"] = "none: made from latents of the caller's own, so it cannot be made again from this"
    if provenance.label is None:
        del facts["label"]
    return facts


def _numbers(first: int | None, each: tuple[int, ...] | None) -> str:
    """Write down a few numbers, or what they are: 3; 1 to 16; 4, 8, 9."""
    if each is None or len(set(each)) == 1:
        return str(first)
    if each == tuple(range(each[0], each[0] + len(each))):
        return f"{each[0]} to {each[-1]}"
    return ", ".join(map(str, each[:_MOST_SHOWN])) + (", …" if len(each) > _MOST_SHOWN else "")


def _of(provenance: Provenance) -> str:
    facts = _facts(provenance)
    label = f", label {facts['label']}" if "label" in facts else ""
    return f"{provenance.model} version {provenance.version}, seed {facts['seed']}{label}"


def _verdict(agreement: _Agreement | None, tolerance: int) -> str:
    if agreement is None:
        return "different: its size is that of no picture of these images; it was cut or scaled"
    if not agreement.differing:
        return f"the same: all {agreement.pixels} pixels agree"
    verdict = "the same within the tolerance" if agreement.largest <= tolerance else "different"
    return (
        f"{verdict}: {agreement.differing} of {agreement.pixels} pixels differ, by {agreement.largest} levels at most"
    )


def _compare(client: Client, provenance: Provenance, content: bytes) -> tuple[_Agreement | None, str, str]:
    """Return how well the best way to lay the new images out agrees, and what made them: provider and digest."""
    if provenance.seed is None or (provenance.count is not None and provenance.seeds is None):
        raise NoProvenanceError("the picture was made from latents of the caller's own: its seeds are not known")
    best: _Agreement | None = None
    for labels in _labels(client, provenance):
        batch = _make_again(client, provenance, labels)
        for there, here in _pictures(batch, provenance, content):
            agreement = _Agreement.of(here, there)
            if best is None or agreement.differing < best.differing:
                best = agreement
            if not best.differing:
                break
        if best is not None and not best.differing:
            break
    return best, batch.provider, batch.digest


def _labels(client: Client, provenance: Provenance) -> Iterator[list[int] | None]:
    """Return the labels that the images may have had."""
    count = provenance.count or 1
    if provenance.labels is not None:
        yield list(provenance.labels)
    elif provenance.label is None:
        yield None
    else:
        yield [provenance.label] * count
        if count > 1:
            # A server's contact sheet names the first label only: all may have it, or the classes came in turn.
            classes = len(client.model(provenance.model, provenance.version).class_names)
            yield [seed % classes for seed in provenance.seeds or ()]


def _make_again(client: Client, provenance: Provenance, labels: list[int] | None) -> ImageBatch:
    seeds = (provenance.seed or 0,) if provenance.seeds is None else provenance.seeds
    batches, start = [], 0
    # A request has seeds that follow each other, and so many labels; a batch that was put together has more.
    ends = [i for i in range(1, len(seeds)) if seeds[i] != (seeds[i - 1] + 1) % 2**32 or i % _MOST_A_CALL == 0]
    for end in [*ends, len(seeds)]:
        label: list[Label] | None = None if labels is None else list(labels[start:end])
        batches.append(
            client.generate(
                provenance.model,
                count=end - start,
                seed=seeds[start],
                label=label,
                truncation=provenance.truncation,
                version=provenance.version,
            )
        )
        start = end
    return concatenate(batches)


def _pictures(
    batch: ImageBatch, provenance: Provenance, content: bytes
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Return the picture and what the images give in its format, for each layout that has its size.

    Both are [frames, height, width, channels].
    """
    _, height, width, channels = batch.pixels.shape
    there = _frames(content, channels)
    frames, there_height, there_width, _ = there.shape
    with Image.open(io.BytesIO(content)) as image:
        pillow_format = str(image.format)
    if frames > 1:
        scale = there_width // width
        for bounce in (True, False):
            here = _animated(batch, pillow_format, scale, bounce=bounce)
            if here.shape == there.shape:
                yield there, here
        return
    if provenance.count is None:
        if there.shape == (1, height, width, channels):
            # A sheet of one is the image alone, and is encoded as the SDK and the server encode.
            yield there, _frames(encoded(batch.sheet(), pillow_format), channels)
        return
    scales = range(1, _LARGEST_SCALE + 1)
    for scale, columns in itertools.product(scales, range(1, len(batch) + 1)):
        rows = math.ceil(len(batch) / columns)
        if there_height != rows * (height * scale + _GAP) - _GAP:
            continue
        # A margin holds the rows' names; they are no part of the images.
        margin = there_width - (columns * (width * scale + _GAP) - _GAP)
        if margin == 0:
            yield there, _frames(encoded(batch.sheet(columns, scale=scale), pillow_format), channels)
        elif margin > 0:
            here = np.zeros_like(there)
            here[:, :, margin:] = _frames(encoded(batch.sheet(columns, scale=scale), "PNG"), channels)
            here[:, :, :margin] = there[:, :, :margin]
            yield there, here


def _frames(content: bytes, channels: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        mode = "L" if channels == 1 else "RGB"
        frames = [np.asarray(frame.convert(mode)) for frame in ImageSequence.Iterator(image)]
    return np.stack(frames).reshape(len(frames), *frames[0].shape[:2], channels)


def _animated(batch: ImageBatch, pillow_format: str, scale: int, *, bounce: bool) -> NDArray[np.uint8]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"animation.{pillow_format.lower()}"
        batch.gif(path, scale=scale, bounce=bounce)
        return _frames(path.read_bytes(), batch.pixels.shape[3])

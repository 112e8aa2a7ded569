"""`ganserve inspect` and `ganserve reproduce`: where images in files come from, and whether they can be made again."""

import io
import itertools
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from rich.table import Table
from rich.text import Text

from ganserve import Client
from ganserve._cli.connection import Connection, with_connection
from ganserve._cli.data_sets import Archive, Plan
from ganserve._cli.outcome import ExitStatus, outcome
from ganserve._cli.output import STDOUT, encoded, print_json, show
from ganserve._cli.waiting import progress
from ganserve._formats import MODES
from ganserve.errors import InvalidRequestError, ModelNotFoundError, NoProvenanceError
from ganserve.images import ImageBatch
from ganserve.provenance import Provenance, read_provenance

_GAP = 2  # pixels between the images of a sheet
_LARGEST_SCALE = 64
_MOST_SHOWN = 12  # numbers of a list
_MOST_IN_MEMORY = 64 << 20  # bytes of standard input
_ZIP = b"PK\x03\x04"
_NO_SEEDS = "not in the file: latents of the caller's own, or more seeds than it holds"

_Found = TypeVar("_Found")

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE",
        help="PNG, JPEG, WebP, GIF, TIFF, or an .npz of `ganserve stream`; '-' is standard input.",
        allow_dash=True,
    ),
]


@dataclass(frozen=True, slots=True)
class _Contents:
    """The contents of a file: its size, and its provenance."""

    file_format: str
    width: int  # pixels, of the picture or, in an .npz, of an image
    height: int
    frames: int
    provenance: Provenance | Plan
    count: int


def inspect(
    files: Files, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each file.")] = False
) -> None:
    """Print how pictures were made, as recorded in their files. Needs no server. Exit status 1 if a record is missing.

    Example: ganserve inspect sevens.png
    """
    columns = ("model", "version", "images", "seed", "label", "truncation")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("file", *columns):
        table.add_column(column, overflow="fold")

    def tell(file: Path, found: _Contents) -> bool:
        facts = _facts(found)
        if as_json:
            print_json(_described(file, found))
        elif len(files) > 1:
            # In a Text, rich does not interpret brackets of a file name as markup.
            table.add_row(*map(Text, (str(file), *(facts.get(column, "") for column in columns))))
        else:
            moving = f", {found.frames} frames" if found.frames > 1 else ""
            several = f"{found.count} images of " if isinstance(found.provenance, Plan) else ""
            print(f"{file}: {found.file_format}, {several}{found.width}x{found.height}{moving}")
            for name, value in facts.items():
                print(f"{name:<11} {value}")
        return True

    status = _each(files, _contents, tell, as_json=as_json)
    if table.rows:
        show(table)
    if status:
        raise typer.Exit(status)


@with_connection
def reproduce(
    files: Files,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="For an .npz: number of images to compare, from the first on.", show_default="all"),
    ] = None,
    tolerance: Annotated[
        int,
        typer.Option(
            min=0, max=255, help="Levels by which a pixel may differ; use 1 between different kinds of machine."
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each file.")] = False,
    *,
    connection: Connection,
) -> None:
    """Make images again and compare every pixel. The exit status is 0 if all agree, 1 if not.

    For a lossy format, the new images are encoded in that format first. Example: ganserve reproduce a.png
    """
    same: list[bool] = []

    def compare(file: BinaryIO) -> _Comparison:
        found = _contents(file)
        file.seek(0)
        try:
            if isinstance(found.provenance, Plan):
                return _compare_archive(client, Archive(file), found, count)
            return _compare(client, found, file.read())
        except InvalidRequestError as error:
            raise NoProvenanceError(f"the server can't make it: {error.text}", request_id=error.request_id) from error

    def tell(file: Path, compared: _Comparison) -> bool:
        agreement, digest = compared.agreement, compared.found.provenance.digest
        same.append(agreement is not None and agreement.largest <= tolerance)
        if as_json:
            described = _described(file, compared.found)
            figures = None if agreement is None else asdict(agreement)
            facts = {"same": same[-1], "compared": figures, "same_digest": compared.digest == digest}
            print_json({**described, **facts, "provider": compared.provider})
            return same[-1]
        first = f" of the first {compared.images} images" if compared.images < compared.found.count else ""
        print(f"{file}: {_verdict(agreement, tolerance, first)} ({_of(compared.found)}, on {compared.provider})")
        if compared.digest != digest:
            version = compared.found.provenance.version
            print(
                f"the server's version {version} is a different file from the one that made the picture: "
                f"{compared.digest}"
            )
        return same[-1]

    with connection.client() as client:
        status = _each(files, compare, tell, as_json=as_json)
    if len(files) > 1 and not as_json:
        parts = {
            "the same": sum(same),
            "different": len(same) - sum(same),
            "impossible to make again": len(files) - len(same),
        }
        print(f"{len(files)} files: {', '.join(f'{number} {what}' for what, number in parts.items() if number)}")
    if status:
        raise typer.Exit(status)


def _each(
    files: list[Path], look: Callable[[BinaryIO], _Found], tell: Callable[[Path, _Found], bool], *, as_json: bool
) -> ExitStatus:
    """Call `look` for each file and `tell` for its result; report a file's error in a line on standard error.

    Returns:
        The highest exit status of any file.

    Raises:
        GanserveError: an error that concerns all files, such as that the server does not answer.
    """
    worst = ExitStatus.OK
    for file in files:
        try:
            with _opened(file) as opened:
                found = look(opened)
        except (NoProvenanceError, ModelNotFoundError, OSError) as error:
            status, text = outcome(error)
            text = text if text.startswith(str(file)) else f"{file}: {text}"
            print(f"ganserve: {text}", file=sys.stderr)
            if as_json:
                print_json({"picture": str(file), "error": text, "request_id": getattr(error, "request_id", None)})
        else:
            status = ExitStatus.OK if tell(file, found) else ExitStatus.NO
        worst = max(worst, status)
    return worst


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if str(file) != STDOUT:
        with file.open("rb") as opened:
            yield opened
        return
    with tempfile.SpooledTemporaryFile(_MOST_IN_MEMORY) as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        yield copy  # type: ignore[misc]


def _contents(file: BinaryIO) -> _Contents:
    start = file.read(len(_ZIP))
    file.seek(0)
    if start == _ZIP:
        archive = Archive(file)
        return _Contents("NPZ", archive.plan.width, archive.plan.height, 1, archive.plan, archive.count)
    content = file.read()
    provenance = read_provenance(content)
    with Image.open(io.BytesIO(content)) as image:
        frames = getattr(image, "n_frames", 1)
        return _Contents(str(image.format), image.width, image.height, frames, provenance, provenance.count or 1)


def _described(file: Path, found: _Contents) -> dict[str, Any]:
    """Return the content of `--json` for a file."""
    facts = {"format": found.file_format, "width": found.width, "height": found.height, "frames": found.frames}
    return {"picture": str(file), **facts, "images": found.count, "provenance": asdict(found.provenance)}


@dataclass(frozen=True, slots=True)
class _Agreement:
    """How closely two pictures agree."""

    pixels: int
    differing: int
    largest: int  # difference, in levels of 0 to 255

    @classmethod
    def of(cls, here: NDArray[np.uint8], there: NDArray[np.uint8]) -> "_Agreement":
        """Compare two arrays [frames, height, width, channels] of the same shape."""
        difference = np.abs(here.astype(np.int16) - there).max(axis=3)
        return cls(difference.size, int(np.count_nonzero(difference)), int(difference.max()))


def _facts(found: _Contents) -> dict[str, str]:
    made = found.provenance
    facts = {"model": made.model, "version": str(made.version), "digest": made.digest, "images": str(found.count)}
    if isinstance(made, Plan):
        facts["seed"] = f"{made.seed} to {made.seed_of(found.count - 1)}" if found.count > 1 else str(made.seed)
        if made.class_names:
            facts["label"] = "all classes in turn" if made.labels is None else ", ".join(map(str, made.labels))
            facts["label"] += ", in turn" * (made.labels is not None and len(made.labels) > 1)
    else:
        if (way := made.interpolation) is not None:
            steps = "" if len(way.shown) == way.steps else f", shown {_numbers(way.shown)}"
            facts["seed"] = f"from {way.seed_a} to {way.seed_b} by {way.kind} in {way.steps} steps{steps}"
        else:
            seeds = (made.seed,) if made.seeds is None and made.seed is not None else made.seeds
            facts["seed"] = _NO_SEEDS if seeds is None else _numbers(seeds)
        if made.label is not None:
            facts["label"] = _numbers((made.label,) if made.labels is None else made.labels)
    if made.attributes:
        facts["attributes"] = ", ".join(f"{name} {_value(value)}" for name, value in made.attributes.items())
    if made.input_seeds:
        facts["input seeds"] = ", ".join(f"{name} {seed}" for name, seed in made.input_seeds.items())
    return {**facts, "truncation": f"{made.truncation:g}"}


def _value(value: float | tuple[float, ...]) -> str:
    """Format an attribute of one image, or of several."""
    numbers = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"{each:g}" for each in numbers[:_MOST_SHOWN]) + (", …" if len(numbers) > _MOST_SHOWN else "")


def _numbers(each: tuple[int, ...]) -> str:
    """Format a list of numbers: 3; 1 to 16; 4, 8, 9."""
    if len(set(each)) == 1:
        return str(each[0])
    if each == tuple(range(each[0], each[0] + len(each))):
        return f"{each[0]} to {each[-1]}"
    return ", ".join(map(str, each[:_MOST_SHOWN])) + (", …" if len(each) > _MOST_SHOWN else "")


def _of(found: _Contents) -> str:
    facts = _facts(found)
    label = f", label {facts['label']}" if "label" in facts else ""
    return f"{facts['model']} version {facts['version']}, seed {facts['seed']}{label}"


def _verdict(agreement: _Agreement | None, tolerance: int, first: str) -> str:
    if agreement is None:
        return "different: no picture of these images has its size; it was cropped or scaled"
    if not agreement.differing:
        return f"the same: all {agreement.pixels} pixels{first} agree"
    verdict = "the same within the tolerance" if agreement.largest <= tolerance else "different"
    differing = f"{agreement.differing} of {agreement.pixels} pixels{first}"
    return f"{verdict}: {differing} differ, by at most {agreement.largest} levels"


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The result of a comparison, with its inputs."""

    found: _Contents
    agreement: _Agreement | None  # None: nothing has the picture's size
    provider: str
    digest: str
    images: int


def _compare(client: Client, found: _Contents, content: bytes) -> _Comparison:
    """Compare a picture with the new images, in the layout that agrees best."""
    provenance = found.provenance
    assert isinstance(provenance, Provenance)
    best: _Agreement | None = None
    for reading in _readings(client, provenance):
        batch = client.reproduce(reading)
        for there, here in _pictures(batch, provenance, content):
            agreement = _Agreement.of(here, there)
            if best is None or agreement.differing < best.differing:
                best = agreement
            if not best.differing:
                break
        if best is not None and not best.differing:
            break
    return _Comparison(found, best, batch.provider, batch.digest, found.count)


def _compare_archive(client: Client, archive: Archive, found: _Contents, count: int | None) -> _Comparison:
    """Compare the first images of an .npz with new images, as these arrive."""
    count = min(count or archive.count, archive.count)
    sums = _Agreement(0, 0, 0)
    with progress(archive.plan.model, count) as advance:
        for batch in archive.plan.batches(client, range(count)):
            if batch.pixels.shape[1:] != (found.height, found.width, archive.plan.channels):
                return _Comparison(found, None, batch.provider, batch.digest, count)
            more = _Agreement.of(batch.pixels, archive.read(len(batch)))
            sums = _Agreement(
                sums.pixels + more.pixels, sums.differing + more.differing, max(sums.largest, more.largest)
            )
            advance(len(batch))
    return _Comparison(found, sums, batch.provider, batch.digest, count)


def _readings(client: Client, provenance: Provenance) -> Iterator[Provenance]:
    """Yield the possible provenances of a file: a server's large contact sheet has only the first label."""
    label, count, seeds = provenance.label, provenance.count, provenance.seeds
    if label is None or count is None or provenance.labels is not None:
        yield provenance
        return
    # All images may have this label, or the classes may have been taken in turn.
    yield replace(provenance, labels=(label,) * count)
    if seeds is not None and count > 1:
        classes = len(client.model(provenance.model, provenance.version).class_names)
        yield replace(provenance, labels=tuple(seed % classes for seed in seeds))


def _pictures(
    batch: ImageBatch, provenance: Provenance, content: bytes
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield the picture and the new images in its format, for each layout that has the picture's size.

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
            # A sheet of one image is the image itself, encoded as by the SDK and the server.
            yield there, _frames(encoded(batch.sheet(), pillow_format), channels)
        return
    scales = range(1, _LARGEST_SCALE + 1)
    for scale, columns in itertools.product(scales, range(1, len(batch) + 1)):
        rows = math.ceil(len(batch) / columns)
        if there_height != rows * (height * scale + _GAP) - _GAP:
            continue
        # A margin holds the rows' names, which are not part of the images.
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
        frames = [np.asarray(frame.convert(MODES[channels])) for frame in ImageSequence.Iterator(image)]
    return np.stack(frames).reshape(len(frames), *frames[0].shape[:2], channels)


def _animated(batch: ImageBatch, pillow_format: str, scale: int, *, bounce: bool) -> NDArray[np.uint8]:
    file = io.BytesIO()
    batch.gif(file, pillow_format, scale=scale, bounce=bounce)
    return _frames(file.getvalue(), batch.pixels.shape[3])

"""`ganserve generate` and `ganserve interpolate`: write images as a picture, files or an animation, or to a pipe."""

import re
import sys
import tempfile
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ganserve import _formats, _pictures
from ganserve._arguments import Label
from ganserve._cli.connection import Connection, with_connection
from ganserve._cli.output import (
    STDOUT,
    check_is_path,
    check_stdout_takes_bytes,
    encoded,
    print_json,
    write_file,
    write_stdout,
)
from ganserve.images import ImageBatch, gathered, listed

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name, as `ganserve models` lists it.")]
Version = Annotated[int | None, typer.Option(min=1, help="Of the model.", show_default="the newest")]
Truncation = Annotated[float, typer.Option(help="0 to 2; below 1: more typical, less varied images.")]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="A class, by index or name; several, as 7,8 or each with a --label, are taken in turn.",
        show_default="all in turn",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Say what was made as JSON.")]

_COUNT = 16  # images by default
_MOST_PIXELS = 178_956_970  # of a picture: programs that use Pillow, such as `ganserve inspect`, refuse larger ones


@with_connection
def generate(
    model: ModelName,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            callback=check_is_path,
            help="The file to write: one picture of all images; or, with {index}, {seed}, {label}, {model} or "
            "{version} in it, one file an image. Its ending decides the format. '-' is standard output.",
            show_default="MODEL.png, or as --format says",
        ),
    ] = "",
    count: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000, help="How many images; `ganserve stream` makes more.", show_default=str(_COUNT)
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first image.", show_default="drawn by the server")] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="SEED,SEED,...", help="Of all images, where they do not follow one another.")
    ] = None,
    label: Labels = None,
    truncation: Truncation = 1.0,
    version: Version = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Images a row.", show_default="nearly square")] = None,
    scale: Annotated[int, typer.Option(min=1, max=64, help="Enlarge the pixels of the one picture.")] = 2,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"{_formats.in_words(_formats.ENCODED_NAMES).lower()}.",
            show_default="by the ending; png for '-'",
        ),
    ] = None,
    as_json: AsJson = False,
    *,
    connection: Connection,
) -> None:
    """Make images and write them to a file, or to one file each.

    Example: ganserve generate cdcgan-mnist --label 7 --count 16 --seed 1 -o sevens.png
    """
    out = out or f"{model}.{file_format or 'png'}"
    check_out(out, as_json)
    pillow_format = format_of(out, file_format)
    scattered = None if seeds is None else seeds_of(seeds)
    if scattered is not None and (count is not None or seed is not None):
        raise typer.BadParameter(
            "--seeds says how many images there are, and of which seeds; leave --count and --seed out"
        )
    how: Any = {"truncation": truncation, "version": version}
    with connection.client() as client:
        if scattered is not None:
            labels = labels_in_turn(label, len(scattered))
            batch = gathered(client.generate_each(model, scattered, label=labels, **how))
        else:
            count = count or _COUNT
            batch = client.generate(model, count=count, seed=seed, label=labels_in_turn(label, count), **how)
    if "{" in out:
        files = [str(path) for path in batch.save(out)]
    else:
        check_size(batch.sheet(columns).size, scale, pillow_format)
        content = encoded(batch.sheet(columns, scale=scale), pillow_format)
        write_picture(out, content)
        files = [out]
    if pillow_format not in _formats.FORMATS:
        known = _formats.in_words(_formats.FORMATS, "and")
        text = f"{out} does not say how it was made, for {pillow_format} has no place for that; {known} have"
        print(f"ganserve: {text}", file=sys.stderr)
    if as_json:
        print_json({"files": files, **described(batch)})
    elif out != STDOUT:
        print(f"{files[0]}{f' to {files[-1]}' if len(files) > 1 else ''}: {summary(batch)}")


class Kind(StrEnum):
    """How to go from one latent to another."""

    SLERP = "slerp"
    LINEAR = "linear"


@with_connection
def interpolate(
    model: ModelName,
    seed_a: Annotated[int, typer.Argument(metavar="SEED_A", help="Where the walk starts.")],
    seed_b: Annotated[int, typer.Argument(metavar="SEED_B", help="Where it ends.")],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            callback=check_is_path,
            help="The animation to write, .gif or .webp; '-' is standard output.",
            show_default="MODEL-A-B.gif",
        ),
    ] = "",
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Images, both ends included.")] = 16,
    kind: Annotated[Kind, typer.Option(help="Along the sphere that latents lie near, or straight.")] = Kind.SLERP,
    label: Annotated[
        list[str] | None,
        typer.Option(help="The class of all, by index or name; one.", show_default="that of the nearer seed"),
    ] = None,
    truncation: Truncation = 1.0,
    version: Version = None,
    frame_ms: Annotated[int, typer.Option(min=20, max=10_000, help="Milliseconds an image is shown.")] = 80,
    bounce: Annotated[bool, typer.Option(help="Walk back, too, so that the animation has no jump.")] = True,
    scale: Annotated[int, typer.Option(min=1, max=64, help="Enlarge the pixels.")] = 4,
    file_format: Annotated[
        str | None, typer.Option("--format", help="gif or webp.", show_default="by the ending; gif for '-'")
    ] = None,
    as_json: AsJson = False,
    *,
    connection: Connection,
) -> None:
    """Make an animation of the images between those of two seeds.

    Example: ganserve interpolate cdcgan-mnist 1 2 --label 3 --steps 32 -o walk.gif
    """
    out = out or f"{model}-{seed_a}-{seed_b}.{file_format or 'gif'}"
    check_out(out, as_json)
    ending = file_format or ("gif" if out == STDOUT else Path(out).suffix.lower().removeprefix("."))
    if ending.upper() not in _formats.ANIMATED:
        raise typer.BadParameter(f"an animation is {_formats.ANIMATED_EXTENSIONS}, not {file_format or out!r}")
    check_ending(out, ending)
    labels = labels_of(label or [])
    if len(labels) > 1:
        raise typer.BadParameter(f"there are {len(labels)} labels, and an animation has one")
    with connection.client() as client:
        batch = client.interpolate(
            model,
            seed_a,
            seed_b,
            steps,
            kind=kind.value,
            label=labels[0] if labels else None,
            truncation=truncation,
            version=version,
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"walk.{ending}"
        batch.gif(path, frame_ms=frame_ms, bounce=bounce, scale=scale)
        write_picture(out, path.read_bytes())
    if as_json:
        print_json({"files": [out], **described(batch), "seed_a": seed_a, "seed_b": seed_b, "kind": kind.value})
    elif out != STDOUT:
        print(f"{out}: {summary(batch)}, from seed {seed_a} to {seed_b}")


def format_of(out: str, named: str | None) -> str:
    """Return Pillow's name of the format to write.

    Raises:
        CommandLineError: there is no such format, or the file's extension is of no format, or of another one.
    """
    try:
        pillow_format = _pictures.format_of(f".{named}" if named is not None else "-.png" if out == STDOUT else out)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    check_ending(out, pillow_format)
    return pillow_format


def check_ending(out: str, file_format: str) -> None:
    """Reject a file name whose extension does not match the format.

    Raises:
        CommandLineError: the extension is of another format.
    """
    by_ending = file_format
    with suppress(ValueError):  # a name without a picture's extension may have any format
        by_ending = _pictures.format_of(out)
    if by_ending.lower() != file_format.lower():
        raise typer.BadParameter(
            f"--format says {file_format.lower()}, and {out} is the name of a {by_ending.lower()}; give one of them"
        )


def check_size(size: tuple[int, int], scale: int, pillow_format: str) -> None:
    """Reject a picture that, enlarged by `scale`, is too large to be written or read again.

    Raises:
        CommandLineError: the picture is too large.
    """
    width, height = size[0] * scale, size[1] * scale
    known = _formats.FORMATS.get(pillow_format)
    limit = None if known is None else known.longest_side
    too_long = limit is not None and max(width, height) > limit
    if too_long or width * height > _MOST_PIXELS:
        most = f"a {pillow_format} has {limit} a side" if too_long else f"{_MOST_PIXELS} in all"
        raise typer.BadParameter(
            f"the picture would be {width}x{height} pixels, and {most} at most; "
            "give a smaller --scale or --count, or --out '{index}.png' for a file each"
        )


def check_out(out: str, as_json: bool) -> None:
    """Reject an output that cannot be written, before the server is asked."""
    if out == STDOUT and as_json:
        raise typer.BadParameter("--json and -o - both write to standard output; give one of them")
    if out == STDOUT:
        check_stdout_takes_bytes()


def write_picture(out: str, content: bytes) -> None:
    """Write a picture to standard output, or atomically to a file."""
    if out == STDOUT:
        write_stdout(content)
    else:
        write_file(Path(out), content)


def described(batch: ImageBatch) -> dict[str, Any]:
    """Return the content of `--json` for a batch."""
    return {
        "model": batch.model,
        "version": batch.version,
        "digest": batch.digest,
        "provider": batch.provider,
        "truncation": batch.truncation,
        "count": len(batch),
        "seeds": batch.seeds,
        "labels": batch.labels,
        "queue_s": batch.queue_s,
        "compute_s": batch.compute_s,
    }


def summary(batch: ImageBatch) -> str:
    """Describe a batch in one line."""
    made = f"{len(batch)} image{'s' if len(batch) > 1 else ''} of {batch.model} version {batch.version}"
    if not batch.seeds:
        return made
    return f"{made}, seed {listed(batch.seeds)}"


def seeds_of(text: str) -> list[int]:
    """Parse the seeds on the command line."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--seeds is {text!r}; it must be numbers with commas, such as 3,17,99") from error


def labels_in_turn(labels: list[str] | None, count: int) -> Label | list[Label] | None:
    """Return the labels for `count` images: those of `--label`, in turn.

    Raises:
        CommandLineError: there are more labels than images.
    """
    if not labels:
        return None
    known = labels_of(labels)
    if len(known) > count:
        raise typer.BadParameter(f"there are {len(known)} labels for {count} image{'s' * (count > 1)}")
    return known[0] if len(known) == 1 else [known[index % len(known)] for index in range(count)]


def labels_of(texts: list[str]) -> list[Label]:
    """Parse the labels on the command line: names, or indices, which may be several with commas between them."""
    labels: list[Label] = []
    for text in texts:
        listed = re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text)  # only indices: a name may contain a comma
        labels += map(int, text.split(",")) if listed else [text]
    return labels

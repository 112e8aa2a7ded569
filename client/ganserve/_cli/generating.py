"""`ganserve generate` and `ganserve interpolate`: write images as a picture, files or an animation, or to a pipe."""

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from ganserve import _formats, _pictures
from ganserve._arguments import MOST_PIXELS
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
from ganserve._names import matching
from ganserve.images import ImageBatch, gathered, listed
from ganserve.models import Model

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name, as `ganserve models` lists it.")]
Version = Annotated[int | None, typer.Option(min=1, help="Version of the model.", show_default="the newest")]
Truncation = Annotated[
    float, typer.Option(help="Truncation, 0 to 2. Values below 1 give more typical, less varied images.")
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="Class: its name or, if no class has that name, its index, which counts from 0. For several classes in "
        "turn, write 7,8 or repeat --label.",
        show_default="all classes in turn",
    ),
]
InputSeeds = Annotated[
    list[str] | None,
    typer.Option(
        "--input-seed",
        metavar="NAME=SEED",
        help="Seed of a further latent of the model, such as noise. Can be repeated.",
        show_default="as in the model's card",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_Number = TypeVar("_Number", int, float)
_COUNT = 16  # images by default
_MOST_LABELS = 10  # in a line


@with_connection
def generate(
    model: ModelName,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            callback=check_is_path,
            help="File to write: one picture of all images or, if the name contains {index}, {seed}, {label}, "
            "{model} or {version}, one file for each image. The extension selects the format. '-' is "
            "standard output.",
            show_default="MODEL.png, or as in --format",
        ),
    ] = "",
    count: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000, help="Number of images; for more, use `ganserve stream`.", show_default=str(_COUNT)
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first image.", show_default="chosen by the server")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="SEED,SEED,...", help="Seeds of all images, if they are not consecutive.")
    ] = None,
    label: Labels = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Value of an attribute of the model; for several values in turn, write NAME=0,0.5,1. Can be repeated.",
            show_default="as in the model's card",
        ),
    ] = None,
    input_seed: InputSeeds = None,
    truncation: Truncation = 1.0,
    version: Version = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Images per row.", show_default="nearly square")] = None,
    scale: Annotated[
        int, typer.Option(min=1, max=64, help="Factor by which to enlarge the pixels of the picture.")
    ] = 2,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"Format: {_formats.in_words(_formats.ENCODED_NAMES).lower()}.",
            show_default="from the extension; png for '-'",
        ),
    ] = None,
    as_json: AsJson = False,
    *,
    connection: Connection,
) -> None:
    """Make images and write them to one file, or to a file for each image.

    Example: ganserve generate cdcgan-mnist --label 7 --count 16 --seed 1 -o sevens.png
    """
    out = out or f"{model}.{file_format or 'png'}"
    check_out(out, as_json)
    pillow_format = format_of(out, file_format)
    scattered = None if seeds is None else seeds_of(seeds)
    if scattered is not None and (count is not None or seed is not None):
        raise typer.BadParameter(
            "--seeds already sets the number of images and their seeds; leave out --count and --seed"
        )
    count = len(scattered) if scattered is not None else count or _COUNT
    attributes = {name: _in_turn(name, values, count) for name, values in attributes_of(attribute).items()}
    if scattered is not None and any(isinstance(values, list) for values in attributes.values()):
        raise typer.BadParameter("with --seeds, an --attribute has one value for all images")
    how: Any = {"truncation": truncation, "version": version, "attributes": attributes}
    how["input_seeds"] = input_seeds_of(input_seed)
    with connection.client() as client:
        described = client.model(model, version) if label else None
        if described is not None:
            # Indices of classes belong to a version.
            how |= {"label": labels_in_turn(label, count, described), "version": described.version}
        if scattered is not None:
            batch = gathered(client.generate_each(model, scattered, **how))
        else:
            batch = client.generate(model, count=count, seed=seed, **how)
    if "{" in out:
        files = [str(path) for path in batch.save(out)]
    else:
        check_size(batch.sheet(columns).size, scale, pillow_format)
        content = encoded(batch.sheet(columns, scale=scale), pillow_format)
        write_picture(out, content)
        files = [out]
    if pillow_format not in _formats.FORMATS:
        known = _formats.in_words(_formats.FORMATS, "and")
        text = f"{out} does not contain its provenance, because {pillow_format} has no place for it; {known} have one"
        print(f"ganserve: {text}", file=sys.stderr)
    if as_json:
        print_json({"files": files, **facts(batch)})
    elif out != STDOUT:
        print(f"{files[0]}{f' to {files[-1]}' if len(files) > 1 else ''}: {summary(batch, described)}")


class Kind(StrEnum):
    """How to go from one latent to another."""

    SLERP = "slerp"
    LINEAR = "linear"


@with_connection
def interpolate(
    model: ModelName,
    seed_a: Annotated[int, typer.Argument(metavar="SEED_A", help="Seed of the first image.")],
    seed_b: Annotated[int, typer.Argument(metavar="SEED_B", help="Seed of the last image.")],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            callback=check_is_path,
            help="Animation to write, .gif or .webp; '-' is standard output.",
            show_default="MODEL-A-B.gif",
        ),
    ] = "",
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Number of images, including both ends.")] = 16,
    kind: Annotated[
        Kind | None,
        typer.Option(
            help="Path between the latents: along the sphere that they lie near (slerp), or straight (linear).",
            show_default="slerp; linear if the latents are uniform",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Class of all images, as an index or a name.", show_default="the class of the nearer seed"),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Value of an attribute of the model; NAME=0,1 goes from 0 to 1. Can be repeated.",
            show_default="as in the model's card",
        ),
    ] = None,
    input_seed: InputSeeds = None,
    truncation: Truncation = 1.0,
    version: Version = None,
    frame_ms: Annotated[int, typer.Option(min=20, max=10_000, help="Milliseconds to show each image for.")] = 80,
    bounce: Annotated[bool, typer.Option(help="Play forward and back, so that the animation has no jump.")] = True,
    scale: Annotated[int, typer.Option(min=1, max=64, help="Factor by which to enlarge the pixels.")] = 4,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="Format: gif or webp.", show_default="from the extension; gif for '-'"),
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
    attributes = {name: _from_to(name, values, steps) for name, values in attributes_of(attribute).items()}
    with connection.client() as client:
        described = client.model(model, version) if label else None
        labels = labels_of(label, described) if label and described is not None else []
        if len(labels) > 1:
            raise typer.BadParameter(f"there are {len(labels)} labels, but an animation has only one")
        batch = client.interpolate(
            model,
            seed_a,
            seed_b,
            steps,
            kind=None if kind is None else kind.value,
            label=labels[0] if labels else None,
            truncation=truncation,
            attributes=attributes,
            input_seeds=input_seeds_of(input_seed),
            version=version if described is None else described.version,
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"walk.{ending}"
        batch.gif(path, frame_ms=frame_ms, bounce=bounce, scale=scale)
        write_picture(out, path.read_bytes())
    if as_json:
        way = batch.interpolation
        assert way is not None
        print_json({"files": [out], **facts(batch), "seed_a": seed_a, "seed_b": seed_b, "kind": way.kind})
    elif out != STDOUT:
        print(f"{out}: {summary(batch, described)}, from seed {seed_a} to {seed_b}")


def format_of(out: str, named: str | None) -> str:
    """Return Pillow's name of the format to write.

    Raises:
        CommandLineError: there is no such format, or no format has the file's extension, or another one has it.
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
        CommandLineError: the extension belongs to another format.
    """
    by_ending = file_format
    with suppress(ValueError):  # a name without a picture's extension may have any format
        by_ending = _pictures.format_of(out)
    if by_ending.lower() != file_format.lower():
        raise typer.BadParameter(
            f"--format is {file_format.lower()}, but {out} has the extension of a {by_ending.lower()}; give only "
            "one of them"
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
    if too_long or width * height > MOST_PIXELS:
        most = (
            f"a {pillow_format} may have at most {limit} on each side"
            if too_long
            else f"a picture may have at most {MOST_PIXELS} in total"
        )
        raise typer.BadParameter(
            f"the picture would be {width}x{height} pixels, but {most}; give a smaller --scale or --count, or --out "
            "'{index}.png' for one file for each image"
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


def facts(batch: ImageBatch) -> dict[str, Any]:
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
        "attributes": batch.attributes,
        "input_seeds": batch.input_seeds,
        "queue_s": batch.queue_s,
        "compute_s": batch.compute_s,
    }


def summary(batch: ImageBatch, model: Model | None) -> str:
    """Describe a batch in one line; with its labels, if `model` has their names."""
    made = f"{len(batch)} image{'s' if len(batch) > 1 else ''} of {batch.model} version {batch.version}"
    if model is not None and batch.labels:
        made += f", {listed_labels(batch.labels, model)}"
    if not batch.seeds:
        return made
    return f"{made}, seed {listed(batch.seeds)}"


def seeds_of(text: str) -> list[int]:
    """Parse the seeds on the command line."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--seeds is {text!r}; it must be numbers separated by commas, such as 3,17,99"
        ) from error


def attributes_of(texts: list[str] | None) -> dict[str, list[float]]:
    """Parse `--attribute`: the values of each name.

    Raises:
        CommandLineError: a text is not NAME=VALUE, with numbers, or a name occurs twice.
    """
    return {name: _numbers(f"--attribute {name}", text, float) for name, text in _pairs("--attribute", texts)}


def input_seeds_of(texts: list[str] | None) -> dict[str, int]:
    """Parse `--input-seed`: the seed of each name.

    Raises:
        CommandLineError: a text is not NAME=SEED, or a name occurs twice.
    """
    seeds = {name: _numbers(f"--input-seed {name}", text, int) for name, text in _pairs("--input-seed", texts)}
    if several := [name for name, each in seeds.items() if len(each) > 1]:
        raise typer.BadParameter(f"--input-seed {several[0]} has several seeds; give one for all images")
    return {name: each[0] for name, each in seeds.items()}


def _pairs(flag: str, texts: list[str] | None) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{flag} is {text!r}; it must have a name and a value, such as smiling=0.8")
        if name in dict(pairs):
            raise typer.BadParameter(f"{flag} {name} occurs twice; write several values as {name}=0,1")
        pairs.append((name, value))
    return pairs


def _numbers(flag: str, text: str, number: Callable[[str], _Number]) -> list[_Number]:
    try:
        return [number(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{flag} is {text!r}; it must be numbers separated by commas") from error


def _in_turn(name: str, values: list[float], count: int) -> float | list[float]:
    """Return the values of an attribute for `count` images, in turn."""
    if len(values) > count:
        raise typer.BadParameter(f"--attribute {name} has {len(values)} values for {count} image{'s' * (count > 1)}")
    return values[0] if len(values) == 1 else [values[index % len(values)] for index in range(count)]


def _from_to(name: str, values: list[float], steps: int) -> float | list[float]:
    """Return the values of an attribute on the way from its first to its last value."""
    if len(values) > 2:
        raise typer.BadParameter(f"--attribute {name} has {len(values)} values; give one, or the first and the last")
    return values[0] if len(values) == 1 else np.linspace(values[0], values[1], steps).tolist()


def labels_in_turn(texts: list[str] | None, count: int, model: Model) -> int | list[int] | None:
    """Return the labels for `count` images: those of `--label`, in turn.

    Raises:
        CommandLineError: there are more labels than images, or a label is ambiguous.
        InvalidRequestError: the model has no such class.
    """
    if not texts:
        return None
    known = labels_of(texts, model)
    if len(known) > count:
        raise typer.BadParameter(f"there are {len(known)} labels for {count} image{'s' * (count > 1)}")
    return known[0] if len(known) == 1 else [known[index % len(known)] for index in range(count)]


def labels_of(texts: list[str], model: Model) -> list[int]:
    """Return the indices of the classes on the command line: each text is a class, or several with commas between.

    Raises:
        CommandLineError: a label is ambiguous.
        InvalidRequestError: the model has no such class.
    """
    parts: list[str] = []
    for text in texts:
        one = "," not in text or matching(text, model.class_names) is not None  # a name may contain a comma
        parts += [text.strip()] if one else [part.strip() for part in text.split(",")]
    unknown = [part for part in parts if matching(part, model.class_names) is None and not _is_index(part, model)]
    if unknown:
        raise model.no_class(*dict.fromkeys(unknown))
    return [_label(part, model) for part in parts]


def _is_index(text: str, model: Model) -> bool:
    return re.fullmatch("0|[1-9][0-9]*", text) is not None and int(text) < len(model.class_names)


def _label(text: str, model: Model) -> int:
    """Return the index of the class with this name or, if there is none, this index."""
    names = model.class_names
    if matching(text, names) is not None:
        return model.label(text)
    if any(name.strip().isdecimal() for name in names):
        raise typer.BadParameter(
            f"--label {text} is ambiguous: the classes of model {model.name} are called {', '.join(names)}, and none "
            f"is called {text}; give the name of a class (class {text}, counted from 0, is called {names[int(text)]!r})"
        )
    return int(text)


def listed_labels(labels: Sequence[int], model: Model) -> str:
    """Format the labels of images, each class once, with its name: "label 7 (Sneaker)"."""
    names = [
        str(label) if model.class_names[label] == str(label) else f"{label} ({model.class_names[label]})"
        for label in dict.fromkeys(labels)
    ]
    more = ", …" if len(names) > _MOST_LABELS else ""
    return f"label{'s' * (len(names) > 1)} {', '.join(names[:_MOST_LABELS])}{more}"

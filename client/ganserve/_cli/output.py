"""What commands write: text and JSON on standard output, bytes into a pipe, and files that are whole or not there."""

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from PIL import Image
from rich.console import Console, RenderableType

PathT = TypeVar("PathT", str, Path)
STDOUT = "-"


def check_is_path(path: PathT) -> PathT:
    """Refuse a URL, which would become a folder called "s3:"; a callback of options that name a file to write.

    Raises:
        CommandLineError: it is one.
    """
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", str(path)):
        raise typer.BadParameter(
            f"it must be a path of this machine, and {url[1]}:// is none: copy the file afterwards"
        )
    return path


def print_json(value: Any) -> None:
    """Write one JSON document, a line, to standard output."""
    print(json.dumps(value))


def console_on_stdout(piped_width: int = 1000) -> Console:
    """Return how standard output is written to: in colour on a terminal, else plain and of that width."""
    return Console(width=None if sys.stdout and sys.stdout.isatty() else piped_width, highlight=False)


def show(renderable: RenderableType, *, piped_width: int = 1000) -> None:
    """Write a table or the like to standard output."""
    console = console_on_stdout(piped_width)
    # Not by the console itself: where a pipe is closed it would end the program in a way of its own.
    with console.capture() as capture:
        console.print(renderable)
    print("\n".join(line.rstrip() for line in capture.get().split("\n")), end="")


def check_stdout_takes_bytes() -> None:
    """Refuse to fill a terminal with a picture's bytes.

    Raises:
        CommandLineError: standard output is a terminal, or closed.
    """
    if sys.stdout is None or sys.stdout.isatty():
        raise typer.BadParameter("-o - writes the picture's bytes to standard output: send that to a file or a pipe")


def write_stdout(content: bytes) -> None:
    """Write bytes to standard output."""
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file gets its name when all of it is written, else it is removed.

    The path has the same ending. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # /dev/null and other devices are written to as they are.
    device = path.exists() and not path.is_file()
    part = path if device else path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        if not device:
            part.replace(path)
    except BaseException as error:
        if not device:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(part)):
            error.filename = str(path)  # the name that the user gave
        raise


def encoded(image: Image.Image, pillow_format: str) -> bytes:
    """Return the file that the SDK would write for a picture of several images."""
    file = io.BytesIO()
    image.save(file, pillow_format)
    return file.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(content)

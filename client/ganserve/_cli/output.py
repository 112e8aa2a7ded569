"""The output of commands: text and JSON on standard output, bytes to a pipe, and files that are written atomically."""

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
        raise typer.BadParameter(f"it must be a path on this machine, not a {url[1]}:// URL: copy the file afterwards")
    return path


def print_json(value: Any) -> None:
    """Write one JSON document, in one line, to standard output."""
    print(json.dumps(value))


def console_on_stdout(piped_width: int = 1000) -> Console:
    """Return a console for standard output: in colour on a terminal, otherwise plain and `piped_width` wide."""
    return Console(width=None if sys.stdout and sys.stdout.isatty() else piped_width, highlight=False)


def show(renderable: RenderableType, *, piped_width: int = 1000) -> None:
    """Write a renderable, such as a table, to standard output."""
    console = console_on_stdout(piped_width)
    # Not through the console itself, which would end the program in its own way if the pipe is closed.
    with console.capture() as capture:
        console.print(renderable)
    print("\n".join(line.rstrip() for line in capture.get().split("\n")), end="")


def check_stdout_takes_bytes() -> None:
    """Check that standard output can take a picture's bytes.

    Raises:
        CommandLineError: standard output is a terminal, or closed.
    """
    if sys.stdout is None or sys.stdout.isatty():
        raise typer.BadParameter("-o - writes the picture's bytes to standard output: redirect it to a file or a pipe")


def write_stdout(content: bytes) -> None:
    """Write bytes to standard output."""
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On success the file is renamed to `path`; otherwise it is removed.

    The temporary path has the same extension. Creates missing folders.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write to /dev/null and other devices directly.
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
    """Return the content of the file that the SDK writes for a picture of several images."""
    file = io.BytesIO()
    image.save(file, pillow_format)
    return file.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with whole_file(path) as part:
        part.write_bytes(content)

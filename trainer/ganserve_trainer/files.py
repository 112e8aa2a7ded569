"""Writes files atomically: a reader, or a process after a crash, finds either the complete file or none."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, which replaces it on success: a reader finds the old or the new content."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        # The error of a failed write has no file name, and the temporary file's name would mean nothing to the user.
        error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """Make a rename in this folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """Return the user's cache folder for one purpose, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ganserve" / name

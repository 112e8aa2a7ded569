"""Files that are written whole or not at all, whatever ends the process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its place on success: a reader finds the old content or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        # A failed write carries no name, and that of the file beside would mean nothing to anybody.
        error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """Make a rename in this folder last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The user's cache: judges, features, and the states of unfinished evaluations, which a killed one resumes from.

A file that is missing or damaged is computed again; a file that cannot be written is only reported.
"""

import hashlib
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ganserve_trainer.files import cache_folder, replace_atomically

_DIGEST_BYTES = hashlib.sha256().digest_size
_UNFINISHED_KEPT_S = 7 * 24 * 3600


def key(*parts: object) -> str:
    """Return a name for what these parts determine, 32 hexadecimal digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def load(path: Path | None) -> Any:
    """Read what `store` wrote; None if the file is missing or damaged, or there is no path."""
    if path is None:
        return None
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            return None
        return torch.load(io.BytesIO(content[_DIGEST_BYTES:]), map_location="cpu", weights_only=True)
    except Exception:  # zip's and pickle's readers raise anything on a damaged file
        return None


def store(path: Path | None, content: Any) -> None:
    """Write tensors, numbers and texts, and containers of them; a failure is only printed. Nothing without a path."""
    if path is None:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    written = buffer.getbuffer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as file:
            file.write(hashlib.sha256(written).digest())
            file.write(written)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): it will be computed again", file=sys.stderr)


def unfinished(name: str) -> Path:
    """Return the folder for the state of an evaluation, and delete those that nobody resumed for a week."""
    parent = cache_folder("evaluations")
    for other in parent.glob("*"):
        try:
            if time.time() - other.stat().st_mtime > _UNFINISHED_KEPT_S:
                shutil.rmtree(other)
        except OSError:  # another evaluation deletes it, too
            continue
    return parent / name

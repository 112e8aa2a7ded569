"""Finds model files in the repository's folder, and files that were probably meant as models; reads none of them."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ganserve_server.start_errors import StartError

MODEL_FILE_NAME = "model.onnx"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_MAX_REPORTED = 3

Stamp = tuple[int, int, int] | None  # inode, mtime and size, which change with a file's content; None: no file


def look(repository: Path) -> tuple[dict[tuple[str, int], Stamp], set[tuple[str, int]], dict[Path, str]]:
    """Return the repository's versions with their stamps, the versions that have no file yet, and misplaced files."""
    found: dict[tuple[str, int], Stamp] = {}
    awaited: set[tuple[str, int]] = set()
    for name, version, path in find_versions(repository):
        try:
            status = path.stat()
        except OSError:
            if is_awaited(path):
                awaited.add((name, version))
            else:
                found[name, version] = None
        else:
            found[name, version] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found, awaited, dict(find_misplaced(repository))


def find_versions(repository: Path) -> Iterator[tuple[str, int, Path]]:
    """Yield (model, version, file) of every version in the repository, in order; skip other files."""
    for folder in sorted(repository.iterdir()):
        if _NAME.fullmatch(folder.name) and not folder.name.endswith(".tmp") and os.path.isdir(folder):
            for path in _versions_in(folder):
                yield folder.name, int(path.name), path / MODEL_FILE_NAME


def files_of(path: Path) -> list[Path]:
    """Return the model files that a path means: itself, the one of a version's folder, or all of a model's folder."""
    if not os.path.isdir(path):
        return [path]
    inside = [version / MODEL_FILE_NAME for version in _versions_in(path)]
    return inside if inside and not os.path.lexists(path / MODEL_FILE_NAME) else [path / MODEL_FILE_NAME]


def _versions_in(folder: Path) -> list[Path]:
    """Return the versions' folders of a model, in order; none if its folder cannot be read."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # `find_misplaced` yields it
        names = os.listdir(folder)
    return sorted((folder / name for name in names if _VERSION.fullmatch(name)), key=lambda path: int(path.name))


def find_misplaced(repository: Path) -> Iterator[tuple[Path, str]]:
    """Yield paths that `find_versions` skips but the user probably meant as models, in order, each with the reason.

    These are ONNX files in the wrong place, folders that contain one, and folders that cannot be read. Skips names that
    begin with a dot or end in .tmp, and links to a sibling.
    """
    wrong_depth = f"expected {repository}/NAME/VERSION/{MODEL_FILE_NAME}"
    for path in _candidates(repository):
        if _is_onnx(path):
            yield path, wrong_depth
        elif not _NAME.fullmatch(path.name):
            if _has_onnx(path, levels=2):
                rule = "it must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit"
                yield path, f"{path.name!r} is not a model name: {rule}"
        elif os.path.isdir(path):
            try:
                yield from _misplaced_versions(path, wrong_depth)
            except OSError as error:
                yield path, f"cannot be read: {error.strerror}"


def _misplaced_versions(folder: Path, wrong_depth: str) -> Iterator[tuple[Path, str]]:
    for path in _candidates(folder):
        if _is_onnx(path):
            yield path, wrong_depth
        elif _VERSION.fullmatch(path.name):
            continue
        elif _has_onnx(path, levels=1):
            yield (
                path,
                f"{path.name!r} is not a version: it must be a whole number from 1 to 999999999, without leading zeros",
            )
        elif _has_onnx(path, levels=2):
            yield path, wrong_depth


def _candidates(folder: Path) -> list[Path]:
    """List the entries of a folder that may be models, in order."""
    names = sorted(name for name in os.listdir(folder) if not (name.startswith(".") or name.endswith(".tmp")))
    return [folder / name for name in names if not _is_alias(folder / name)]


def _is_alias(path: Path) -> bool:
    """Return whether a path is a link to a sibling, such as `latest`."""
    return path.is_symlink() and os.path.dirname(os.path.realpath(path)) == os.path.realpath(path.parent)


def _has_onnx(folder: Path, levels: int) -> bool:
    """Return whether a folder has an ONNX file, at most `levels` deep; False if it cannot be read."""
    try:
        inside = _candidates(folder)
    except OSError:
        return False
    return any(_is_onnx(path) or (levels > 1 and _has_onnx(path, levels - 1)) for path in inside)


def _is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx" and os.path.isfile(path)


def is_awaited(path: Path) -> bool:
    """Return whether a version's folder has no ONNX file of any name yet, because a copy may be under way."""
    try:
        return not any(_is_onnx(other) for other in _candidates(path.parent)) and not os.path.lexists(path)
    except OSError:
        return False


def require_models(repository: Path) -> None:
    """Check that there is something to load.

    Raises:
        StartError: it is no folder, cannot be listed, or has no version at all.
    """
    try:
        if not repository.is_dir():
            wrong = "is not a folder" if repository.exists() else "does not exist"
            raise StartError(f"the model repository {repository} {wrong}; set --models to a model repository")
        versions = [path for _, _, path in find_versions(repository)]
    except OSError as error:
        raise StartError(f"the model repository {repository} cannot be listed: {error.strerror}") from error
    if any(map(os.path.isfile, versions)):
        return
    missing = ((path, why_missing(path)) for path in versions)
    rejected = [f"{path} ({reason})" for path, reason in itertools.chain(find_misplaced(repository), missing)]
    if len(rejected) > _MAX_REPORTED:
        rejected[_MAX_REPORTED:] = [f"{len(rejected) - _MAX_REPORTED} more"]
    raise StartError(
        f"{repository} has no model that can be served; expected MODELS/NAME/VERSION/model.onnx, "
        "as `ganserve-trainer export` writes it" + (f"; rejected: {', '.join(rejected)}" if rejected else "")
    )


def why_missing(path: Path) -> str:
    """Return the reason why a model file cannot be read, with a hint if there is a misnamed one."""
    hint = ""
    with contextlib.suppress(OSError):
        if others := [other.name for other in _candidates(path.parent) if _is_onnx(other)]:
            hint = f"; rename {others[0]} to {path.name}"
    return f"the file cannot be read: it is missing, or not a regular file{hint}"

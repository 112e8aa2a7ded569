"""Finds model files in the repository's folder, and files that were probably meant as models; reads none of them."""

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ganserve_server.repository.probed import one_line
from ganserve_server.start_errors import StartError

MODEL_FILE_NAME = "model.onnx"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_MAX_REPORTED = 3

Key = tuple[str, int]  # a model and its version
# Inode, mtime, ctime and size, which change with a file's content; None: no file. A copy in place may set the mtime.
Stamp = tuple[int, int, int, int] | None


@dataclasses.dataclass(slots=True)
class Look:
    """What a look at the repository found. A version that is in none of the first three does not exist.

    Attributes:
        found: the versions with their stamps.
        awaited: the versions that have no file yet.
        unreadable: the versions that exist, but whose files cannot be read, each with the reason.
        unreadable_paths: the same files, and models' folders that cannot be read, each with the reason.
        misplaced: the files that were probably meant as models, each with the reason why they are none.
    """

    found: dict[Key, Stamp] = dataclasses.field(default_factory=dict)
    awaited: set[Key] = dataclasses.field(default_factory=set)
    unreadable: dict[Key, str] = dataclasses.field(default_factory=dict)
    unreadable_paths: dict[Path, str] = dataclasses.field(default_factory=dict)
    misplaced: dict[Path, str] = dataclasses.field(default_factory=dict)


def look(repository: Path) -> Look:
    """Look at the names of the repository, and whether its files can be opened.

    Raises:
        OSError: the repository cannot be listed.
    """
    seen = Look()
    for folder in _model_folders(repository):
        try:
            versions = _versions_in(folder)
        except OSError as error:
            if reason := _why_unreadable(error, folder):
                seen.unreadable_paths[folder] = reason
            continue
        for version in versions:
            key, path = (folder.name, int(version.name)), version / MODEL_FILE_NAME
            try:
                seen.found[key] = _stamp(path)
            except OSError as error:
                if reason := _why_unreadable(error, version, path):
                    seen.unreadable[key] = seen.unreadable_paths[path] = reason
                elif is_awaited(path):
                    seen.awaited.add(key)
                else:
                    seen.found[key] = None
    misplaced = find_misplaced(repository)
    seen.misplaced = {path: reason for path, reason in misplaced if path not in seen.unreadable_paths}
    return seen


def _stamp(path: Path) -> Stamp:
    """Return the stamp of a file.

    Raises:
        OSError: it does not exist, or cannot be opened.
    """
    status = path.stat()
    if stat.S_ISREG(status.st_mode):  # opening a pipe would have an effect on its writer
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _why_unreadable(error: OSError, *paths: Path) -> str:
    """Return why something that exists cannot be read; empty if it does not exist.

    Args:
        error: the error of reading it.
        paths: what may be a link that leads nowhere: its target may come back, such as a volume that is not mounted.
    """
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return error.strerror or str(error)
    dangling = (path for path in paths if os.path.islink(path) and not os.path.exists(path))
    return next(
        (f"the link {path.name} leads to {one_line(os.readlink(path))}, which does not exist" for path in dangling), ""
    )


def find_versions(repository: Path) -> Iterator[tuple[str, int, Path]]:
    """Yield (model, version, file) of every version in the repository, in order; skip what cannot be read."""
    for folder in _model_folders(repository):
        versions: list[Path] = []
        with contextlib.suppress(OSError):
            versions = _versions_in(folder)
        for path in versions:
            yield folder.name, int(path.name), path / MODEL_FILE_NAME


def is_model_name(name: str) -> bool:
    """Return whether a folder of this name may be a model."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".tmp")


def is_version(name: str) -> bool:
    """Return whether a folder of this name may be a version."""
    return bool(_VERSION.fullmatch(name))


def _model_folders(repository: Path) -> list[Path]:
    """Return what may be models' folders, in order."""
    return [repository / name for name in sorted(os.listdir(repository)) if is_model_name(name)]


def files_of(path: Path) -> list[Path]:
    """Return the model files that a path means: itself, the one of a version's folder, or all of a model's folder."""
    if not os.path.isdir(path):
        return [path]
    inside: list[Path] = []
    with contextlib.suppress(OSError):  # the path that is returned instead cannot be read either
        inside = [version / MODEL_FILE_NAME for version in _versions_in(path)]
    return inside if inside and not os.path.lexists(path / MODEL_FILE_NAME) else [path / MODEL_FILE_NAME]


def _versions_in(folder: Path) -> list[Path]:
    """Return the versions' folders of a model, in order.

    Raises:
        OSError: its folder cannot be listed.
    """
    return sorted((folder / name for name in os.listdir(folder) if is_version(name)), key=lambda path: int(path.name))


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
        elif is_version(path.name):
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

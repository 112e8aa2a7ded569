"""`ganserve stream`: writes any number of images, to a folder or one .npz; a killed run can be resumed."""

import fcntl
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import typer

from ganserve import Client
from ganserve._cli.connection import Connection, with_connection
from ganserve._cli.data_sets import SEED_LIMIT, Archive, Plan
from ganserve._cli.generating import InputSeeds, Labels, ModelName, Version, attributes_of, input_seeds_of, labels_of
from ganserve._cli.output import check_is_path, print_json, whole_file, write_file
from ganserve._cli.waiting import progress
from ganserve._formats import ENCODED, without_alpha
from ganserve.errors import GanserveError, InvalidRequestError, NoProvenanceError
from ganserve.images import ImageBatch

MANIFEST = ".ganserve.json"  # programs that read image folders skip names that begin with a dot
_FORMATS = {each.extensions[0].removeprefix("."): each for each in ENCODED.values()}
_LOSSLESS, _LOSSY = (
    " or ".join(name for name, each in _FORMATS.items() if each.lossless is lossless) for lossless in (True, False)
)
_COPY_BYTES = 1 << 20


class OtherImagesError(InvalidRequestError):
    """The existing images were made with other settings."""


class _Store(Protocol):
    """Where the images are stored."""

    def missing(self) -> list[range]:
        """Return the missing images."""

    def add(self, first: int, batch: ImageBatch) -> None:
        """Store a batch, whose first image has number `first`."""

    def finish(self) -> None:
        """Complete the store: all images were added."""


class _Folder:
    """One file for each image, in a sub-folder for each class. Files are written atomically, and found by name."""

    def __init__(self, folder: Path, plan: Plan, count: int, ending: str) -> None:
        self._folder, self._plan, self._count, self._ending = folder, plan, count, ending
        self._names = folder_names(plan.class_names)

    def missing(self) -> list[range]:
        there = set()
        for name in self._names or [""]:
            if not (self._folder / name).exists():
                continue  # made with the first image: a class without one would be an error to many programs
            with os.scandir(self._folder / name) as entries:
                for entry in entries:
                    ending = Path(entry.name).suffix
                    if entry.name.endswith(f".part{ending}"):
                        os.unlink(entry)  # what a killed run was writing
                    elif ending != self._ending and ending[1:] in _FORMATS:
                        raise OtherImagesError(f"{self._folder} has {ending} files; resume with --format {ending[1:]}")
                    else:
                        there.add(f"{name}/{entry.name}")
        missing: list[range] = []
        for index in range(self._count):
            if self._name(index) in there:
                continue
            if missing and missing[-1].stop == index:
                missing[-1] = range(missing[-1].start, index + 1)
            else:
                missing.append(range(index, index + 1))
        return missing

    def add(self, first: int, batch: ImageBatch) -> None:
        for index, image in enumerate(batch, start=first):
            with whole_file(self._folder / self._name(index).lstrip("/")) as part:
                image.save(part)

    def finish(self) -> None:
        """Do nothing: every file is complete."""

    def _name(self, index: int) -> str:
        label = self._plan.label_of(index)
        folder = "" if label is None else self._names[label]
        return f"{folder}/{self._plan.seed_of(index):010d}{self._ending}"


class _Archive:
    """One .npz: images [n, h, w, c], labels [n], seeds [n], and their provenance. Raw files until it is complete."""

    def __init__(self, path: Path, folder: Path, plan: Plan, count: int) -> None:
        self._path, self._plan, self._count = path, plan, count
        self._raw = folder / "images.raw"
        self._bytes_each = plan.height * plan.width * plan.channels
        self._raw.touch()

    def missing(self) -> list[range]:
        done = min(self._raw.stat().st_size // self._bytes_each, self._count)
        # A killed run may have left a part of an image.
        os.truncate(self._raw, done * self._bytes_each)
        return [range(done, self._count)] if done < self._count else []

    def add(self, first: int, batch: ImageBatch) -> None:
        with open(self._raw, "ab") as file:
            file.write(batch.pixels.tobytes())

    def finish(self) -> None:
        numbers = range(self._count)
        seeds = np.array([self._plan.seed_of(index) for index in numbers], np.uint32)
        part = self._raw.with_name("whole.npz")
        shape = (self._count, self._plan.height, self._plan.width, self._plan.channels)
        with zipfile.ZipFile(part, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as member, open(self._raw, "rb") as raw:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(raw, member, _COPY_BYTES)
            arrays = {"seeds": seeds, "provenance": np.array(self._plan.to_json())}
            if self._plan.class_names:
                arrays["labels"] = np.array([self._plan.label_of(index) for index in numbers], np.int64)
                arrays["class_names"] = np.array(self._plan.class_names)
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(part, self._path)
        shutil.rmtree(self._raw.parent)


@with_connection
def stream(
    model: ModelName,
    count: Annotated[int, typer.Option(min=1, max=SEED_LIMIT, help="Number of images.")],
    to: Annotated[
        Path,
        typer.Option(
            callback=check_is_path, help="Folder, with a sub-folder for each class, or a file that ends in .npz."
        ),
    ],
    seed: Annotated[
        int | None, typer.Option(min=0, max=SEED_LIMIT - 1, help="Seed of the first image.", show_default="random")
    ] = None,
    label: Labels = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Value of an attribute of the model, for all images. Can be repeated.",
            show_default="as in the model's card",
        ),
    ] = None,
    input_seed: InputSeeds = None,
    truncation: Annotated[
        float | None,
        typer.Option(
            help="Truncation, 0 to 2. Values below 1 give more typical, less varied images.", show_default="1.0"
        ),
    ] = None,
    version: Version = None,
    file_format: Annotated[
        str, typer.Option("--format", help=f"Format of the files in a folder: {_LOSSLESS}, or lossy {_LOSSY}.")
    ] = "png",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    *,
    connection: Connection,
) -> None:
    """Make a data set: any number of images, in a folder or one .npz. Repeat the command to resume.

    Example: ganserve stream cdcgan-mnist --count 60000 --seed 1 --to digits
    """
    if file_format not in _FORMATS:
        raise typer.BadParameter(f"--format is {file_format!r}; it must be {_LOSSLESS}, or {_LOSSY}")
    archive = to.suffix.lower() == ".npz"
    if not archive and to.exists() and not to.is_dir():
        raise typer.BadParameter(f"--to {to} is a file; it must be a folder, or end in .npz")
    folder = to.with_name(to.name + ".partial") if archive else to
    with connection.client() as client, _only_one(folder):
        before, there = _before(to, folder, archive)
        further = (attributes_of(attribute), input_seeds_of(input_seed))
        plan = _plan(client, model, version, seed, label, truncation, *further, before, to)
        if not archive and (why := without_alpha(_FORMATS[file_format].name, plan.channels, ENCODED)):
            raise typer.BadParameter(f"--format is {file_format!r}: {why}")
        if there:
            if there != count:
                raise OtherImagesError(f"{to} already has {there} images; for {count} images, give another --to")
            shutil.rmtree(folder)  # a run that was killed at the end may have left it
            made = 0
        else:
            write_file(folder / MANIFEST, plan.to_json().encode())
            store = _Archive(to, folder, plan, count) if archive else _Folder(to, plan, count, f".{file_format}")
            made = _make(client, plan, store, count, to)
    if as_json:
        print_json({"to": str(to), "made": made, "count": count, **asdict(plan)})
    else:
        there_already = f"; {count - made} already existed" if made < count else ""
        last = plan.seed_of(count - 1)
        print(f"{to}: {count} images of {plan.model} version {plan.version}, seed {plan.seed} to {last}{there_already}")


def _make(client: Client, plan: Plan, store: _Store, count: int, to: Path) -> int:
    """Make the missing images; return their number."""
    missing = store.missing()
    made = sum(map(len, missing))
    try:
        with progress(plan.model, count, count - made) as advance:
            for images in missing:
                at = images.start
                for batch in plan.batches(client, images):
                    if batch.digest != plan.digest:
                        raise GanserveError(f"version {plan.version} of {plan.model} changed on the server")
                    store.add(at, batch)
                    at += len(batch)
                    advance(len(batch))
        store.finish()
    except (GanserveError, OSError, KeyboardInterrupt) as error:
        with suppress(OSError):
            kept = count - sum(map(len, store.missing()))
            # The server would refuse an invalid request again.
            on = "" if isinstance(error, InvalidRequestError) else "; the same command resumes from there"
            error.add_note(f"{kept} of {count} images are complete in {to}{on}")
        raise
    return made


def _before(to: Path, folder: Path, archive: bool) -> tuple[Plan, int] | tuple[None, int]:
    """Return the plan of an earlier run to the same place, and the number of images in a complete archive, or 0."""
    manifest = folder / MANIFEST
    if archive and to.exists():
        try:
            with to.open("rb") as file:
                whole = Archive(file)
                return whole.plan, whole.count
        except NoProvenanceError:
            raise OtherImagesError(f"{to} exists, but `ganserve stream` did not write it; give another --to") from None
    if manifest.exists():
        try:
            return Plan.from_json(manifest.read_text()), 0
        except (NoProvenanceError, UnicodeDecodeError):
            raise OtherImagesError(
                f"{manifest} exists, but `ganserve stream` did not write it; give another --to"
            ) from None
    if any(folder.iterdir()):
        raise OtherImagesError(f"{folder} has other files in it; give an empty or a new folder as --to")
    return None, 0


def _plan(
    client: Client,
    model: str,
    version: int | None,
    seed: int | None,
    label: list[str] | None,
    truncation: float | None,
    attributes: dict[str, list[float]],
    input_seeds: dict[str, int],
    before: Plan | None,
    to: Path,
) -> Plan:
    """Return the plan. Options that are not given are taken from the earlier run, if there was one."""
    if before is not None:
        version = before.version if version is None else version
        seed = before.seed if seed is None else seed
        truncation = before.truncation if truncation is None else truncation
    if several := [name for name, values in attributes.items() if len(values) > 1]:
        raise typer.BadParameter(f"--attribute {several[0]} has several values; give one for all images")
    described = client.model(model, version)
    labels = None if not label else tuple(labels_of(label, described))
    plan = Plan(
        model=described.name,
        version=described.version,
        digest=described.digest,
        seed=secrets.randbelow(SEED_LIMIT) if seed is None else seed,
        labels=before.labels if before is not None and labels is None else labels,
        truncation=1.0 if truncation is None else truncation,
        class_names=described.class_names,
        height=described.height,
        width=described.width,
        channels=described.channels,
        attributes={name: values[0] for name, values in attributes.items()} or (before.attributes if before else {}),
        input_seeds=input_seeds or (before.input_seeds if before else {}),
    )
    if before is not None and plan != before:
        now, then = asdict(plan), asdict(before)
        differences = ", ".join(
            f"{name} {_shown(then[name])}, not {_shown(now[name])}" for name in now if now[name] != then[name]
        )
        raise OtherImagesError(
            f"{to} was started with {differences}; resume with the same options, or give another --to"
        )
    return plan


def _shown(value: object) -> str:
    if value is None:
        return "all classes in turn"
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def folder_names(class_names: tuple[str, ...]) -> list[str]:
    """Return a folder name for each class: the class name without forbidden characters ("T-shirt/top")."""
    names: list[str] = []
    for index, class_name in enumerate(class_names):
        name = "".join(each if each.isprintable() and each not in '/\\:*?"<>|' else "-" for each in class_name)
        name = name.strip(" .")[:100] or f"class-{index}"
        names.append(f"{name}-{index}" if name.casefold() in {each.casefold() for each in names} else name)
    return names


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second run from writing to the same place. The system releases the lock, however this run ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise GanserveError(f"another `ganserve stream` is writing to {folder}") from None
    finally:
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()  # only if it is empty, because the run wrote nothing

"""Decides which images train and which are kept for testing, and which class each has. It decodes nothing.

Folders called train, val, valid, validation, test or testing (in any case) are parts of the data. Without them, a hash
of an image's path decides, so that adding images moves no other image to another part. What may mean two things is
refused, with the settings that say which is meant.
"""

import hashlib
import os
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ganserve_trainer.data.reading import Reading
from ganserve_trainer.data.sources import Item, Listing, is_image_name, list_items, open_source, part_of
from ganserve_trainer.errors import TrainerError

_SPLIT = 0.9
# Folders that hold all images of a part, as YOLO's and Tiny ImageNet's do, and are no classes.
_HOLDERS = ("images", "image", "imgs", "img", "jpegimages", "jpegs", "pngs")
_ASK = (
    "say which is meant by --train-folder and --test-folder, or have all images split by --split 0.8, or train on all "
    "of them by --train-on-all"
)


@dataclass(frozen=True, slots=True)
class Placed:
    """An item with its class ("": none) and its part."""

    item: Item
    class_name: str
    train: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All items of a data set that are used, sorted by name."""

    files: tuple[Placed, ...]
    class_names: tuple[str, ...]  # in natural order: 2 before 10
    how: str  # how the parts were found
    notes: tuple[str, ...]  # what else the user should know


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key that orders numbers in names by value: 0, 1, 2, 10."""
    pieces = [piece for piece in re.split(r"(\d+)", name) if piece]
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces], name


def plan(path: Path, listing: Listing, reading: Reading, stack: ExitStack, scratch: Path) -> Plan:
    """Assign the items of a source to the two parts and to classes.

    Args:
        path: the source, for messages.
        listing: its content.
        reading: what the settings say.
        stack: closes the files of a test folder elsewhere.
        scratch: as for `list_items`.

    Raises:
        TrainerError: the folders may mean several things, a class has too few images, or the parts have no class in
            common.
    """
    rooted = [(item, tuple(item.name.split("/"))) for item in listing.items]
    folders = [tuple(folder.split("/")) for folder in listing.folders]
    notes = list(listing.notes)
    tree = _Tree(path, rooted, folders, listing.labelled)
    if reading.train_folder or reading.test_folder:
        placed, how = _by_settings(tree, reading, stack, scratch, notes)
    else:
        placed, how = _by_names(tree, reading, notes)
    class_names = sorted({name for _, name, _ in placed if name} | tree.empty_classes, key=natural)
    if not listing.labelled and len(class_names) == 1 and class_names[0].lower() in _HOLDERS:
        class_names = []
        placed = [(item, "", train) for item, _, train in placed]
    files = sorted(
        (Placed(*each) for each in _split(path, placed, reading, listing.labelled)), key=lambda file: file.item.name
    )
    return Plan(tuple(files), tuple(class_names), how, tuple(notes))


_Undecided = tuple[Item, str, bool | None]  # item, class, whether it trains (None: the hash decides)


class _Tree:
    """The items of a source by their folders."""

    def __init__(
        self, path: Path, items: list[tuple[Item, tuple[str, ...]]], folders: list[tuple[str, ...]], labelled: bool
    ) -> None:
        self.path, self.items, self.folders, self.labelled = path, items, folders, labelled
        self.empty_classes: set[str] = set()

    def below(self, prefix: tuple[str, ...]) -> list[tuple[Item, tuple[str, ...]]]:
        """Return the items in a folder, with their paths in it."""
        depth = len(prefix)
        return [(item, parts[depth:]) for item, parts in self.items if parts[:depth] == prefix and len(parts) > depth]

    def images(self, prefix: tuple[str, ...]) -> tuple[Counter[str], Counter[str], int]:
        """Count the images in the sub-folders of a folder, those of them deeper than that, and those in itself."""
        all_of: Counter[str] = Counter()
        deep: Counter[str] = Counter()
        loose = 0
        for item, parts in self.below(prefix):
            if is_image_name(item.name):
                if len(parts) == 1:
                    loose += 1
                else:
                    all_of[parts[0]] += 1
                    deep[parts[0]] += len(parts) > 2
        return all_of, deep, loose

    def with_classes(self, prefix: tuple[str, ...], train: bool | None) -> list[_Undecided]:
        """Return the items in a folder with their classes: its sub-folders, or what the source says."""
        found: list[_Undecided] = []
        for item, parts in self.below(prefix):
            name = parts[0] if len(parts) > 1 else ""
            found.append((item, (item.class_name or "") if self.labelled else name, train))
        if not self.labelled:
            depth = len(prefix)
            self.empty_classes |= {
                folder[depth] for folder in self.folders if folder[:depth] == prefix and len(folder) > depth
            }
        return found


def _by_names(tree: _Tree, reading: Reading, notes: list[str]) -> tuple[list[_Undecided], str]:
    """Find the parts by what the source says, or by the names of folders."""
    apart = reading.split is None and not reading.train_on_all
    if any(item.part for item, _ in tree.items):
        return _by_own_parts(tree, apart, reading, notes)
    prefix: tuple[str, ...] = ()
    while True:
        images, deep, loose = tree.images(prefix)
        roles = {name: role for name in images if (role := part_of(name))}
        shown = "/".join((str(tree.path), *prefix))
        if len(images) == 1 and not loose:
            (name,) = images
            if roles.get(name) == "train":
                notes.append(f"{shown} has only {name}/, so its images are split")
                return tree.with_classes((*prefix, name), None), _described(reading)
            if name in roles:
                raise TrainerError(f"{shown} has {name}/, but no folder of training images: {_ASK}")
            if deep[name] == images[name] and not tree.labelled:
                prefix = (*prefix, name)  # a folder around all others
                continue
        break
    if both := [pair for role in set(roles.values()) if len(pair := [n for n in roles if roles[n] == role]) > 1]:
        raise TrainerError(f"{shown} has {' and '.join(f'{name}/' for name in sorted(both[0]))}: {_ASK}")
    others = sorted(images.keys() - roles)
    by_role = {role: name for name, role in roles.items()}
    if "train" in by_role and len(by_role) > 1:
        return _by_folders(tree, prefix, by_role, others, apart, reading, notes)
    nested = [name for name in roles if deep[name]]
    if roles and (not others or nested or len(roles) > 1):
        names = ", ".join(f"{name}/" for name in sorted(roles))
        beside = f" beside {', '.join(f'{name}/' for name in others[:5])}" if others else ""
        raise TrainerError(f"{shown} has {names}{beside}, which may be parts or classes: {_ASK}")
    if inner := _parts_in_classes(tree, prefix, images, loose):
        placed = []
        for item, parts in tree.below(prefix):
            role = inner.get(parts[1].lower()) if len(parts) > 2 else None
            placed.append((item, parts[0], (role == "train") if apart else None))
        return placed, f"{' and '.join(sorted(inner))} in each class" if apart else _described(reading)
    return tree.with_classes(prefix, None), _described(reading)


def _by_own_parts(tree: _Tree, apart: bool, reading: Reading, notes: list[str]) -> tuple[list[_Undecided], str]:
    """Take the parts that the source itself names: splits of parquet files, of shards, or of a column."""
    counts = Counter(item.part or "train" for item, _ in tree.items)
    if not counts["train"]:
        raise TrainerError(f"{tree.path} has the parts {', '.join(sorted(counts))}, but no training part: {_ASK}")
    test = "test" if counts["test"] else "val" if counts["val"] else ""
    if not apart or not test:
        return [(item, item.class_name or "", None) for item, _ in tree.items], _described(reading)
    if test == "test" and counts["val"]:
        notes.append(f"the {counts['val']:,} images of the validation part are not used")
    placed: list[_Undecided] = []
    for item, _ in tree.items:
        part = item.part or "train"
        if part in ("train", test):
            placed.append((item, item.class_name or "", part == "train"))
    return placed, f"the parts train and {test}"


def _by_folders(
    tree: _Tree,
    prefix: tuple[str, ...],
    by_role: dict[str, str],
    others: list[str],
    apart: bool,
    reading: Reading,
    notes: list[str],
) -> tuple[list[_Undecided], str]:
    parts = {role: _inner(tree, (*prefix, name)) for role, name in by_role.items()}
    if others:
        notes.append(f"{', '.join(f'{name}/' for name in others[:5])} beside {by_role['train']}/ is not used")
    if not apart:
        placed = [each for folder in parts.values() for each in tree.with_classes(folder, None)]
        return placed, _described(reading)
    test = "test" if "test" in parts else "val"
    if len(parts) == 3:
        classes = {role: {name for _, name, _ in tree.with_classes(folder, None)} for role, folder in parts.items()}
        # ImageNet's test images have no labels.
        test = "val" if classes["test"] <= {""} < classes["train"] | {""} and classes["val"] - {""} else "test"
        unused = by_role["test" if test == "val" else "val"]
        notes.append(
            f"{unused}/ is not used; to test on it, add --train-folder {by_role['train']} --test-folder {unused}"
        )
        tree.empty_classes.clear()
    training, testing = tree.with_classes(parts["train"], True), tree.with_classes(parts[test], False)
    _check_common(tree, by_role["train"], training, by_role[test], testing, notes)
    return training + testing, f"{by_role['train']}/ and {by_role[test]}/"


def _inner(tree: _Tree, folder: tuple[str, ...]) -> tuple[str, ...]:
    """Return the folder in a part that holds all of its images, such as train/train/ or train/images/."""
    images, _, loose = tree.images(folder)
    if len(images) == 1 and not loose:
        (name,) = images
        if name.lower() in _HOLDERS or (part_of(name) and part_of(name) == part_of(folder[-1])):
            return (*folder, name)
    return folder


def _check_common(
    tree: _Tree, train: str, training: list[_Undecided], test: str, testing: list[_Undecided], notes: list[str]
) -> None:
    here, there = (
        {name for item, name, _ in part if name and is_image_name(item.name)} for part in (training, testing)
    )
    if bool(here) != bool(there) or (here and not here & there):
        few, found = [", ".join(sorted(names, key=natural)[:3]) or "no classes" for names in (here, there)]
        raise TrainerError(
            f"{tree.path}: {train}/ and {test}/ have no class in common ({few}, and {found}): give both the same "
            f"sub-folders, or leave {test}/ out with --train-folder {train}"
        )
    for folder, missing in ((train, there - here), (test, here - there)):
        if missing:
            names = ", ".join(sorted(missing, key=natural)[:10])
            notes.append(f"{folder}/ has no image of {names}")


def _parts_in_classes(tree: _Tree, prefix: tuple[str, ...], images: Counter[str], loose: int) -> dict[str, str] | None:
    """Return the folders in classes that are parts, with what they mean: CLASS/train/1.jpg and CLASS/test/2.jpg."""
    if loose or tree.labelled or not images:
        return None
    seen: dict[str, str] = {}
    for item, parts in tree.below(prefix):
        if is_image_name(item.name):
            role = part_of(parts[1]) if len(parts) > 2 else None
            if role is None:
                return None
            seen[parts[1].lower()] = role
    return seen if sorted(seen.values()) in (["test", "train"], ["train", "val"]) else None


def _by_settings(
    tree: _Tree, reading: Reading, stack: ExitStack, scratch: Path, notes: list[str]
) -> tuple[list[_Undecided], str]:
    """Take the folders that the settings name."""
    train, test = (_parts_of(name) for name in (reading.train_folder, reading.test_folder))
    if train and not tree.below(train):
        raise TrainerError(f"--train-folder {reading.train_folder}: {tree.path} has no such folder with files in it")
    testing: list[_Undecided] = []
    if test:
        testing = tree.with_classes(_inner(tree, test), False)
        if not testing:
            testing = _elsewhere(tree, reading, stack, scratch)
    if train:
        training = tree.with_classes(_inner(tree, train), True if test else None)
    else:
        others = [each for each in tree.items if each[1][: len(test)] != test]
        folders = [folder for folder in tree.folders if folder[: len(test)] != test]
        rest = _Tree(tree.path, others, folders, tree.labelled)
        pooled, _ = _by_names(rest, Reading(train_on_all=True), notes)
        training = [(item, name, True) for item, name, _ in pooled]
        tree.empty_classes |= rest.empty_classes
    if test:
        _check_common(tree, reading.train_folder or str(tree.path), training, reading.test_folder, testing, notes)
        return training + testing, f"{reading.train_folder or 'all others'} and {reading.test_folder}"
    return training, _described(reading)


def _elsewhere(tree: _Tree, reading: Reading, stack: ExitStack, scratch: Path) -> list[_Undecided]:
    path = Path(reading.test_folder).expanduser()
    if not path.exists():
        raise TrainerError(
            f"--test-folder {reading.test_folder}: {tree.path} has no such folder with files in it, and there is no "
            "such path"
        )
    listing = list_items(open_source(path), stack, scratch)
    items = [(item, tuple(item.name.split("/"))) for item in listing.items]
    other = _Tree(path, items, [tuple(folder.split("/")) for folder in listing.folders], listing.labelled)
    pooled, _ = _by_names(other, Reading(train_on_all=True), [])
    tree.empty_classes |= other.empty_classes
    return [(replace(item, name=f"{path}/{item.name}"), name, False) for item, name, _ in pooled]


def _parts_of(folder: str) -> tuple[str, ...]:
    return tuple(part for part in folder.split("/") if part not in ("", "."))


def _described(reading: Reading) -> str:
    if reading.train_on_all:
        return "all images train"
    return f"about {1 - (reading.split or _SPLIT):.0%} are kept for testing, by a hash of each name"


def _split(path: Path, placed: list[_Undecided], reading: Reading, labelled: bool) -> list[tuple[Item, str, bool]]:
    """Decide for the items without a part by a hash of their names, with both parts of every class not empty."""
    if reading.train_on_all:
        return [(item, name, train is not False) for item, name, train in placed]
    decided = [(item, name, train) for item, name, train in placed if train is not None]
    undecided = [each for each in placed if each[2] is None]
    share = round(1 - (reading.split or _SPLIT), 9)
    # The decimal digits of the hash from the last on: with one image in ten for testing, its last digit decides.
    chances = {item.name: float(f"0.{str(_hash(item.name))[::-1]}") for item, _, _ in undecided}
    by_class: dict[str, list[Item]] = {}
    for item, name, _ in undecided:
        if is_image_name(item.name):
            by_class.setdefault(name, []).append(item)
    if len(by_class) > 1 and (loose := by_class.pop("", None)) and not labelled:
        by_class = {"": [*loose, *(item for items in by_class.values() for item in items)]}
    moved: dict[str, bool] = {}
    for name, items in by_class.items():
        items.sort(key=lambda item: chances[item.name])
        if len(items) == 1:
            whose = f"the class {name} has" if name else "it has"
            raise TrainerError(
                f"{path}: {whose} one image, {items[0].name}, and needs two, to train on and to test on: add images, "
                "or add --train-on-all"
            )
        if chances[items[0].name] >= share:
            moved[items[0].name] = False
        if chances[items[-1].name] < share:
            moved[items[-1].name] = True
    return decided + [(item, name, moved.get(item.name, chances[item.name] >= share)) for item, name, _ in undecided]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")

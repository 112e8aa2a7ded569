"""Trains all combinations of a few values of a few settings, and compares the results in a table.

A result is stored in the folder of its run, with a key of all that it depends on, and is used again only if the key is
the same.
"""

import dataclasses
import difflib
import hashlib
import itertools
import json
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ganserve_trainer.errors import CollapsedError, DivergedError, TrainerError
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.report.history import History
from ganserve_trainer.settings import Settings, free_on_resume, versions
from ganserve_trainer.train.checkpoints import FORMAT, checkpoint_files, load_checkpoint
from ganserve_trainer.train.loop import resolved
from ganserve_trainer.train.monitoring import MODE_COLLAPSE, WARM_UP_IMAGES

RESULTS_FILE_NAME = "results.json"
TABLE_FILE_NAME = "results.md"
_RESULT_FILE_NAME = "sweep.json"  # of one run, in its folder
_LONGEST_NAME = 200  # characters; file systems allow 255

Watch = Callable[[int, dict[str, float]], None]  # images seen, metrics; may end the run by an exception
TrainOne = Callable[[Settings, Path, Watch], None]
MeasureOne = Callable[[Path], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Range:
    """The values from `low` to `high`, both included; `log` if their logarithms are equally likely."""

    low: float
    high: float
    log: bool


# Settings that are rates or weights, whose order of magnitude is what a search looks for.
_BY_MAGNITUDE = (
    "learning_rate",
    "discriminator_learning_rate",
    "r1",
    "gradient_penalty",
    "weight_clip",
    "feature_matching",
    "ema_half_life_images",
)


def parse_axis(text: str, *, ranges: bool = False) -> tuple[str, list[Any] | Range]:
    """Parse one axis, `setting=value,value,…` or, if `ranges` are allowed, also `setting=low..high`.

    Raises:
        TrainerError: the text does not have this form, the setting is unknown, or a value is not of the setting's type.
    """
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    kinds = {field.name: field.type for field in dataclasses.fields(Settings)}
    if not equals or not values:
        raise TrainerError(
            f"{text!r} is not an axis of a sweep; write a setting and its values, such as loss=hinge,minimax"
        )
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        raise TrainerError(f"{text!r}: there is no setting {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    low, dots, high = values.partition("..")
    if not dots:
        return name, [_value(name, kinds[name], value.strip()) for value in values.split(",")]
    if not ranges:
        raise TrainerError(f"{text!r} is a range; search it with --search tpe, or list values: {name}=value,value")
    ends = [_value(name, kinds[name], end.strip()) for end in (low, high)]
    if any(isinstance(end, str | bool) for end in ends) or ends[0] >= ends[1]:
        raise TrainerError(f"{text!r} is not a range; write two numbers, the smaller one first: {name}=low..high")
    return name, Range(ends[0], ends[1], name in _BY_MAGNITUDE and ends[0] > 0)


def _value(name: str, kind: Any, text: str) -> Any:
    kinds = typing.get_args(kind) or (kind,)
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError as error:
                raise TrainerError(f"{name}={text}: {text!r} is not of type {number.__name__}") from error
    return text


def combinations(axes: Sequence[tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """Return every combination of the axes' values, the last axis changing fastest."""
    names = [name for name, _ in axes]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]


@dataclass(frozen=True, slots=True)
class Runner:
    """Trains and measures the runs of a sweep in its folder, each once."""

    out: Path
    digest_of: Callable[[Settings], str]  # the digest of the training data
    train_one: TrainOne  # trains a run in a folder, or resumes the run there
    measure_one: MeasureOne  # measures the run in a folder
    measurement: tuple[int, ...]  # what its figures depend on: the number of images, and the judge's recipe

    def folders(self, values: dict[str, Any], settings: Settings) -> tuple[Path, Path]:
        """Return the folder of a run, and the one to use instead if the run there is longer already.

        The name has the values and a digest of the settings and the data, without those settings that may change when a
        run is resumed.
        """
        settings = resolved(settings)
        free = free_on_resume(settings)
        fixed = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
        named = ",".join(f"{key}={value}" for key, value in values.items()).replace("/", "_")[:_LONGEST_NAME]
        folder = self.out / f"{named},{digest([fixed, self.digest_of(settings)])[:8]}"
        return folder, folder.with_name(f"{folder.name},images={settings.images},minutes={settings.minutes:g}")

    def run(self, values: dict[str, Any], settings: Settings, watch: Watch = lambda *_: None) -> dict[str, Any]:
        """Return the figures of a run; train or measure it only if its stored figures are not of exactly this run.

        Raises:
            TrainerError: it cannot be trained.
        """
        folder, other = self.folders(values, settings)
        key = digest([dataclasses.asdict(resolved(settings)), self.digest_of(settings), *self.method()])
        for place in (folder, other):
            if (figures := _stored(place / _RESULT_FILE_NAME, key)) is not None:
                return {"folder": place.name, **figures}
        if _is_longer(folder, settings):
            folder = other
        figures = self._figures(settings, folder, watch)
        with replace_atomically(folder / _RESULT_FILE_NAME) as file:
            file.write(json.dumps({"key": key, "figures": figures}, indent=2).encode())
        return {"folder": folder.name, **figures}

    def method(self) -> list[Any]:
        """Return what figures depend on besides a run's settings and data."""
        return [*self.measurement, versions()["ganserve"], FORMAT]

    def _figures(self, settings: Settings, folder: Path, watch: Watch) -> dict[str, Any]:
        diverged = False
        try:
            self.train_one(settings, folder, watch)
        except (DivergedError, CollapsedError) as error:
            if not checkpoint_files(folder):
                raise
            diverged = isinstance(error, DivergedError)
        checkpoint = load_checkpoint(folder)
        return {
            "images": checkpoint.images_seen,
            "minutes": round(checkpoint.elapsed_s / 60, 2),
            "images_per_s": round(checkpoint.images_seen / max(checkpoint.elapsed_s, 1e-9)),
            **{name: round(value, 4) for name, value in self.measure_one(folder).items()},
            "diversity": round(checkpoint.history.points[-1].diversity, 3),
            "outcome": "diverged" if diverged else outcome(checkpoint.history),
        }


def sweep(
    runner: Runner, axes: Sequence[tuple[str, list[Any]]], settings_of: Callable[[dict[str, Any]], Settings]
) -> str:
    """Train and measure every combination; return the table, which is also written to the folder, and as JSON.

    Complete runs are not trained or measured again, so the same call resumes a stopped sweep. If the settings reject a
    combination, or its run diverges, its row in the table says so, and the sweep continues.

    Args:
        runner: trains and measures a run.
        axes: settings and their values.
        settings_of: returns the settings of a combination.

    Raises:
        TrainerError: no combination could be trained, or a value is rejected in all of its combinations.
    """
    chosen = combinations(axes)
    refuse_hopeless_values(chosen, settings_of)
    rows: list[dict[str, Any]] = []
    for index, values in enumerate(chosen):
        name = ", ".join(f"{key}={value}" for key, value in values.items())
        print(f"{index + 1} of {len(chosen)}: {name}", file=sys.stderr, flush=True)
        row: dict[str, Any] = dict(values)
        try:
            row |= runner.run(values, settings_of(values))
        except TrainerError as error:
            row["outcome"] = str(error).splitlines()[0]
        rows.append(row)
        write_results(rows, runner.out)
    if not any("images" in row for row in rows):
        raise TrainerError(
            f"none of the {len(rows)} runs could be trained; the reasons are in {runner.out / TABLE_FILE_NAME}"
        )
    return table(rows)


def write_results(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the rows as a table and as JSON, by the names of their folders."""
    out.mkdir(parents=True, exist_ok=True)
    finished = {row["folder"]: row for row in rows if "images" in row}
    with replace_atomically(out / RESULTS_FILE_NAME) as file:
        file.write(json.dumps(finished, indent=2).encode())
    with replace_atomically(out / TABLE_FILE_NAME) as file:
        file.write(table(rows).encode())


def refuse_hopeless_values(chosen: Sequence[dict[str, Any]], settings_of: Callable[[dict[str, Any]], Settings]) -> None:
    """Raise a TrainerError before any training if the settings reject a value in all of its combinations."""
    reasons: dict[tuple[str, Any], TrainerError] = {}
    possible: set[tuple[str, Any]] = set()
    for values in chosen:
        try:
            settings_of(values)
        except TrainerError as error:
            reasons = dict.fromkeys(values.items(), error) | reasons
        else:
            possible |= values.items()
    for value, reason in reasons.items():
        if value not in possible:
            raise reason


def digest(content: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_longer(folder: Path, settings: Settings) -> bool:
    """Return whether a run has gone beyond the length that the settings want; it was not ended by this length."""
    if not checkpoint_files(folder):
        return False
    checkpoint = load_checkpoint(folder)
    before = checkpoint.settings
    ended_by_it = (before.images, before.minutes) == (settings.images, settings.minutes)
    return not ended_by_it and settings.are_fulfilled(checkpoint.images_seen, checkpoint.elapsed_s)


def _stored(path: Path, key: str) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        return dict(content["figures"]) if content["key"] == key else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def outcome(history: History) -> str:
    """Summarise a run by its alarms. If it was too short for the mode collapse alarm, it is "too early to tell"."""
    names = {alarm.name for alarm in history.alarms}
    if MODE_COLLAPSE in names:
        return "collapsed"
    early = not history.points or history.points[-1].images_seen < WARM_UP_IMAGES
    return "; ".join(sorted(names)) or ("too early to tell" if early else "no alarm")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; its columns are the keys, in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "folder"))
    if "outcome" in columns:
        columns.append(columns.pop(columns.index("outcome")))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")

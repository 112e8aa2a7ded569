"""Trains all combinations of a few values of a few settings, and compares the results in a table."""

import dataclasses
import difflib
import itertools
import json
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.report.history import History
from ganserve_trainer.settings import Settings
from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint
from ganserve_trainer.train.monitoring import MODE_COLLAPSE, WARM_UP_IMAGES

RESULTS_FILE_NAME = "results.json"
TABLE_FILE_NAME = "results.md"

TrainOne = Callable[[Settings, Path], None]
MeasureOne = Callable[[Path], dict[str, float]]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Parse one axis, `setting=value,value,…`.

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
    return name, [_value(name, kinds[name], value.strip()) for value in values.split(",")]


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


def sweep(
    out: Path,
    axes: Sequence[tuple[str, list[Any]]],
    settings_of: Callable[[dict[str, Any]], Settings],
    train_one: TrainOne,
    measure_one: MeasureOne,
) -> str:
    """Train and measure every combination; return the table, which is also written to `out`, with all results as JSON.

    Complete runs are not trained or measured again, so the same call resumes a stopped sweep. If the settings reject a
    combination, or its run diverges, its row in the table says so, and the sweep continues.

    Args:
        out: the folder for `results.json`, `results.md`, and a folder for each run, named after its values.
        axes: settings and their values.
        settings_of: returns the settings of a combination.
        train_one: trains a run in a folder, or resumes the run there.
        measure_one: measures the run in a folder.

    Raises:
        TrainerError: no combination could be trained, or a value is rejected in all of its combinations.
    """
    chosen = combinations(axes)
    _refuse_hopeless_values(chosen, settings_of)
    rows: list[dict[str, Any]] = []
    known = _known(out / RESULTS_FILE_NAME)
    for index, values in enumerate(chosen):
        name = ",".join(f"{key}={value}" for key, value in values.items()).replace("/", "_")
        print(f"{index + 1} of {len(chosen)}: {name}", file=sys.stderr, flush=True)
        row: dict[str, Any] = dict(values)
        folder = out / name
        try:
            settings = settings_of(values)
            row |= known.get(name, {}) or _one(settings, folder, train_one, measure_one)
        except TrainerError as error:
            row["outcome"] = str(error).splitlines()[0]
        rows.append(row)
        known[name] = {key: value for key, value in row.items() if key not in values}
        finished = {key: value for key, value in known.items() if "images" in value}
        with replace_atomically(out / RESULTS_FILE_NAME) as file:
            file.write(json.dumps(finished, indent=2).encode())
        with replace_atomically(out / TABLE_FILE_NAME) as file:
            file.write(table(rows).encode())
    if not any("images" in row for row in rows):
        raise TrainerError(f"none of the {len(rows)} runs could be trained; the reasons are in {out / TABLE_FILE_NAME}")
    return table(rows)


def _refuse_hopeless_values(
    chosen: Sequence[dict[str, Any]], settings_of: Callable[[dict[str, Any]], Settings]
) -> None:
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


def _known(path: Path) -> dict[str, dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _one(settings: Settings, folder: Path, train_one: TrainOne, measure_one: MeasureOne) -> dict[str, Any]:
    collapse = ""
    try:
        train_one(settings, folder)
    except TrainerError as error:
        if not checkpoint_files(folder):
            raise
        collapse = str(error)  # stopped by the alarm, or diverged after a valid checkpoint
    checkpoint = load_checkpoint(folder)
    return {
        "images": checkpoint.images_seen,
        "minutes": round(checkpoint.elapsed_s / 60, 2),
        "images_per_s": round(checkpoint.images_seen / max(checkpoint.elapsed_s, 1e-9)),
        **{name: round(value, 4) for name, value in measure_one(folder).items()},
        "diversity": round(checkpoint.history.points[-1].diversity, 3),
        "outcome": "diverged" if "finite" in collapse else outcome(checkpoint.history),
    }


def outcome(history: History) -> str:
    """Summarise a run by its alarms. If it was too short for the mode collapse alarm, it is "too early to tell"."""
    names = {alarm.name for alarm in history.alarms}
    if MODE_COLLAPSE in names:
        return "collapsed"
    early = not history.points or history.points[-1].images_seen < WARM_UP_IMAGES
    return "; ".join(sorted(names)) or ("too early to tell" if early else "no alarm")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; its columns are the keys, in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if "outcome" in columns:
        columns.append(columns.pop(columns.index("outcome")))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")

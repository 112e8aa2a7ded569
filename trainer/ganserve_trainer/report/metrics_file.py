"""Writes a run's history as `metrics.jsonl`: one JSON object a line, for pandas, jq and other programs."""

import json
import math
from pathlib import Path
from typing import Any

from ganserve_trainer.files import replace_atomically
from ganserve_trainer.report.history import Alarm, History, Measurement, Modes, Point

FILE_NAME = "metrics.jsonl"

_Entry = Point | Modes | Alarm | Measurement


class MetricsFile:
    """Appends to the file as the run goes on. Values that are not finite are null, which JSON has instead."""

    def __init__(self, path: Path, history: History) -> None:
        """Write the history so far: of a resumed run it is its checkpoint's, so that later lines of the file go."""
        self._path = path
        entries: list[_Entry] = [*history.points, *history.modes, *history.alarms, *history.measurements]
        entries.sort(
            key=lambda entry: entry.images_seen
        )  # which keeps points, modes, alarms and measurements in this order
        with replace_atomically(path) as file:
            file.write("".join(map(_line, entries)).encode())

    def add(self, entry: _Entry) -> None:
        """Append the next entry."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def _line(entry: _Entry) -> str:
    values = {"kind": type(entry).__name__.lower(), **entry._asdict()}
    return json.dumps(_finite(values), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

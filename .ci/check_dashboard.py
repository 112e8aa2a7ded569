"""Check that the dashboard has no field that Grafana's own types lack. Grafana itself is not there to show it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from lost(value, theirs.get(key), f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(one, other, f"{path}[{place}]")
    elif ours != theirs:
        yield f"{path}: {ours!r} became {theirs!r}"


plugins.register_default_plugins()
ours = json.loads(Path("deploy/grafana/dashboards/ganserve.json").read_text())
theirs = json.loads(JSONEncoder().encode(Dashboard.from_json(ours)))
if found := list(lost(ours, theirs)):
    sys.exit("Grafana's types do not know:\n" + "\n".join(found))

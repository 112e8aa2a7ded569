"""Sends a run's history to experiment trackers: TensorBoard, Weights & Biases, MLflow.

TensorBoard's events are files of the run. The other trackers may be on a network, so a thread of their own talks to
them: one that is slow or fails is reported in one line, and the training goes on without it.
"""

import importlib.util
import json
import math
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.files import replace_atomically
from ganserve_trainer.report.events import TensorBoardWriter, scalars_of, scalars_of_modes
from ganserve_trainer.report.history import Alarm, Measurement, Modes, Point

IDS_FILE_NAME = "trackers.json"  # the run's identifiers in the trackers, with which a resumed run continues
_WAITING_ENTRIES = 1000
_CLOSE_TIMEOUT_S = 60


class _Tracker(Protocol):
    """A run in a tracker."""

    id: str

    def scalars(self, values: dict[str, float], images_seen: int) -> None: ...
    def alarm(self, alarm: Alarm) -> None: ...
    def sheet(self, path: Path, images_seen: int) -> None: ...
    def close(self) -> None: ...


class _Wandb:
    """A run in Weights & Biases, of the project in WANDB_PROJECT; WANDB_MODE=offline writes files only."""

    def __init__(self, out: Path, config: dict[str, Any], known_id: str | None) -> None:
        import wandb

        self._wandb = wandb
        self.id = known_id or uuid.uuid4().hex[:12]
        project = os.environ.get("WANDB_PROJECT", "ganserve")
        self._run = wandb.init(project=project, name=out.name, id=self.id, resume="allow", dir=str(out), config=config)
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")

    def scalars(self, values: dict[str, float], images_seen: int) -> None:
        self._run.log({**values, "images_seen": images_seen})

    def alarm(self, alarm: Alarm) -> None:
        self._run.log({f"alarms/{alarm.name}": alarm.message, "images_seen": alarm.images_seen})
        self._run.alert(title=alarm.name, text=alarm.message)

    def sheet(self, path: Path, images_seen: int) -> None:
        self._run.log({"samples": self._wandb.Image(str(path)), "images_seen": images_seen})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run in MLflow, on the server in MLFLOW_TRACKING_URI, in the experiment in MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, out: Path, config: dict[str, Any], known_id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        if known_id is not None:
            self.id = known_id
            self._client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ganserve")
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self.id = self._client.create_run(experiment, run_name=out.name).info.run_id
        self._client.log_batch(self.id, params=[Param(key, str(value)) for key, value in config.items()])

    def scalars(self, values: dict[str, float], images_seen: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, images_seen) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def alarm(self, alarm: Alarm) -> None:
        self._client.log_text(self.id, alarm.message, f"alarms/{alarm.images_seen:012d} {alarm.name}.txt")

    def sheet(self, path: Path, images_seen: int) -> None:
        self._client.log_artifact(self.id, str(path), "samples")

    def close(self) -> None:
        self._client.set_terminated(self.id)


_TRACKERS: dict[str, Callable[[Path, dict[str, Any], str | None], _Tracker]] = {"wandb": _Wandb, "mlflow": _MLflow}


class _InBackground:
    """Talks to a tracker in a thread of its own, and gives up at its first failure."""

    def __init__(self, name: str, out: Path, config: dict[str, Any]) -> None:
        if importlib.util.find_spec(name) is None:
            raise TrainerError(f"log {name} needs the package {name}: install 'ganserve[{name}]', or leave it out")
        self._name, self._out, self._config = name, out, config
        self._entries: queue.Queue[Callable[[_Tracker], None] | None] = queue.Queue(_WAITING_ENTRIES)
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def send(self, entry: Callable[[_Tracker], None] | None) -> None:
        """Send an entry, or None to end; an entry that has no place is the tracker's end."""
        if self._failed.is_set():
            return
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            self._fail(f"does not keep up: {_WAITING_ENTRIES} entries wait")

    def close(self) -> None:
        """Send what waits, and end."""
        self.send(None)
        if not self._failed.is_set():
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                self._fail(f"has not taken the last entries within {_CLOSE_TIMEOUT_S} s")

    def _work(self) -> None:
        try:
            path = self._out / IDS_FILE_NAME
            known = json.loads(path.read_text()) if path.exists() else {}
            tracker = _TRACKERS[self._name](self._out, self._config, known.get(self._name))
            with _IDS_LOCK:
                known = json.loads(path.read_text()) if path.exists() else {}
                with replace_atomically(path) as file:
                    file.write(json.dumps(known | {self._name: tracker.id}).encode())
            while (entry := self._entries.get()) is not None and not self._failed.is_set():
                entry(tracker)
            tracker.close()
        except Exception as error:  # clients raise anything where a network fails
            self._fail(
                f"has failed: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
            )

    def _fail(self, what: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            print(f"{self._name} {what}; the training goes on without it", file=sys.stderr, flush=True)


_IDS_LOCK = threading.Lock()


class Trackers:
    """All trackers of a run. Leaving the `with` statement sends them the last entries."""

    def __init__(self, names: tuple[str, ...], out: Path, config: dict[str, Any], *, resume_at: int | None) -> None:
        """Open the trackers.

        Raises:
            TrainerError: the package of a tracker is not installed.
        """
        self._board = TensorBoardWriter(out / "tensorboard", resume_at=resume_at) if "tensorboard" in names else None
        self._others = [_InBackground(name, out, config) for name in names if name in _TRACKERS]

    def point(self, point: Point) -> None:
        """Send the next values of the curves."""
        if self._board is not None:
            self._board.point(point)
        self._scalars(scalars_of(point), point.images_seen)

    def measurement(self, measurement: Measurement) -> None:
        """Send metrics."""
        if self._board is not None:
            self._board.measurement(measurement)
        self._scalars(
            {f"metrics/{name}": value for name, value in measurement.metrics.items()}, measurement.images_seen
        )

    def modes(self, modes: Modes) -> None:
        """Send the share of the least frequent group, coverage and the distance to the training images."""
        if self._board is not None:
            self._board.modes(modes)
        self._scalars(scalars_of_modes(modes), modes.images_seen)

    def alarm(self, alarm: Alarm) -> None:
        """Send an alarm."""
        if self._board is not None:
            self._board.alarm(alarm)
        for other in self._others:
            other.send(lambda tracker: tracker.alarm(alarm))

    def sheet(self, path: Path, images_seen: int) -> None:
        """Send a contact sheet."""
        if self._board is not None:
            self._board.sheet(path, images_seen)
        for other in self._others:
            other.send(lambda tracker: tracker.sheet(path, images_seen))

    def flush(self) -> None:
        """Write TensorBoard's pending events. Called before each checkpoint, so that a killed run has no gap."""
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        for other in self._others:
            other.close()

    def _scalars(self, values: dict[str, float], images_seen: int) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for other in self._others:
            other.send(lambda tracker: tracker.scalars(finite, images_seen))

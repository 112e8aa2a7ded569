"""Trackers by their own clients: wandb offline, and MLflow's store of files."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image
from tests.programs import run

from ganserve_trainer.errors import TrainerError
from ganserve_trainer.report import trackers
from ganserve_trainer.report.history import Alarm, Measurement, Point
from ganserve_trainer.report.trackers import Trackers
from ganserve_trainer.settings import from_preset

SMALL = ["--preset", "mlp", "--width", "4", "--batch-size", "16", "--precision", "fp32"]


class Recorder:
    """A tracker that keeps what it gets, and fails at an alarm."""

    def __init__(self, out: Path, config: dict[str, object], known_id: str | None) -> None:
        self.id = known_id or "first"
        self.got: list[object] = [config["preset"]]
        RECORDERS.append(self)

    def scalars(self, values: dict[str, float], images_seen: int) -> None:
        self.got.append((images_seen, values))

    def alarm(self, alarm: Alarm) -> None:
        raise ConnectionError("the network\nis down")

    def sheet(self, path: Path, images_seen: int) -> None:
        self.got.append((images_seen, path.name))

    def close(self) -> None:
        self.got.append("closed")


RECORDERS: list[Recorder] = []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    RECORDERS.clear()
    monkeypatch.setattr(trackers, "_TRACKERS", {"wandb": Recorder})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    return RECORDERS


def test_a_tracker_gets_everything_and_a_resumed_run_continues_its_run(
    tmp_path: Path, recorded: list[Recorder]
) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "sheet.png")
    for resume_at in (None, 40):
        with Trackers(("wandb",), tmp_path, {"preset": "mlp"}, resume_at=resume_at) as all_trackers:
            all_trackers.point(Point(20, 1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, float("nan")))
            all_trackers.measurement(Measurement(20, 1.0, {"fid": 2.0}))
            all_trackers.sheet(tmp_path / "sheet.png", 20)
    first, second = recorded
    assert first.got[0] == "mlp"
    seen, values = first.got[1]
    assert (seen, values["loss/generator"], "diversity" in values) == (20, 0.2, False)
    assert first.got[2:] == [(20, {"metrics/fid": 2.0}), (20, "sheet.png"), "closed"]
    assert first.id == second.id == "first"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "first"}


def test_a_tracker_that_fails_is_one_line(
    tmp_path: Path, recorded: list[Recorder], capfd: pytest.CaptureFixture[str]
) -> None:
    with Trackers(("wandb",), tmp_path, {"preset": "mlp"}, resume_at=None) as all_trackers:
        all_trackers.alarm(Alarm(20, "mode collapse", ""))
        all_trackers.point(Point(40, *[1.0] * 8))
    assert capfd.readouterr().err == "wandb has failed: the network; the training goes on without it\n"


def test_a_tracker_that_hangs_does_not_hold_up_the_training(
    tmp_path: Path, recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recorder, "sheet", lambda *_: time.sleep(3600))
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT_S", 0.1)
    with Trackers(("wandb",), tmp_path, {"preset": "mlp"}, resume_at=None) as all_trackers:
        all_trackers.sheet(tmp_path / "sheet.png", 20)
        for _ in range(2000):
            all_trackers.point(Point(40, *[1.0] * 8))
    assert capfd.readouterr().err == "wandb does not keep up: 1000 entries wait; the training goes on without it\n"


def test_unknown_and_missing_trackers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainerError, match="choose from tensorboard, wandb, mlflow"):
        from_preset("mlp", {"log": "tensorboard,comet"})
    assert from_preset("mlp", {"log": "none"}).trackers() == ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrainerError, match=r"install 'ganserve\[mlflow\]'"):
        Trackers(("mlflow",), tmp_path, {}, resume_at=None)


def trained(out: Path, data_root: Path, *arguments: str, **environment: str) -> str:
    done = run(
        "ganserve-trainer", "train", "--out", out, "--data-root", data_root, *arguments, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    assert "goes on without it" not in done.stderr
    return str(done.stderr)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed (extra 'mlflow')")
def test_mlflow_gets_one_run_of_a_resumed_run(data_root: Path, tmp_path: Path) -> None:
    place = {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/store", "MLFLOW_ALLOW_FILE_STORE": "true"}
    trained(tmp_path / "run", data_root, *SMALL, "--images", "640", "--log", "mlflow", **place)
    trained(tmp_path / "run", data_root, "--resume", "--images", "1280", **place)
    identifier = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    ((folder),) = (tmp_path / "store").glob(f"*/{identifier}")
    assert len(list(folder.parent.glob("*/metrics"))) == 1
    steps = [line.split()[2] for line in (folder / "metrics" / "loss" / "generator").read_text().splitlines()]
    assert steps == ["320", "640", "960", "1280"]
    assert (folder / "params" / "learning_rate").read_text() == "0.001"
    sheets = {path.name for path in (folder / "artifacts" / "samples").iterdir()}
    assert sheets == {f"{images:012d}.png" for images in (0, 640, 1280)}
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed (extra 'wandb')")
def test_wandb_offline_gets_one_run_of_a_resumed_run(data_root: Path, tmp_path: Path) -> None:
    place = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    trained(tmp_path / "run", data_root, *SMALL, "--images", "640", "--log", "tensorboard,wandb", **place)
    trained(tmp_path / "run", data_root, "--resume", "--images", "1280", **place)
    identifier = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    files = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identifier}/*.wandb"))
    assert len(files) == 2
    assert all(b"loss/generator" in file.read_bytes() for file in files)
    assert (tmp_path / "run" / "tensorboard").exists()

"""Searches with Optuna: on a made-up FID where only the search matters, and by real processes."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.programs import TIMEOUT_S, Program, ended, installed

from ganserve_trainer.cli import main
from ganserve_trainer.errors import TrainerError
from ganserve_trainer.evaluation import judge
from ganserve_trainer.settings import Settings, from_preset
from ganserve_trainer.train.checkpoints import load_checkpoint
from ganserve_trainer.train.sweep import Range, Runner, Watch, parse_axis

optuna = pytest.importorskip("optuna", reason="optuna is not installed; it is part of the extra 'search'")
from ganserve_trainer.train.search import search  # noqa: E402

AXES = [("learning_rate", Range(1e-5, 1e-1, True)), ("loss", ["hinge", "minimax"])]
Begun = list[tuple[float, str]]


def test_ranges_are_read_with_their_scale() -> None:
    assert parse_axis("learning-rate=1e-4..1e-2", ranges=True) == ("learning_rate", Range(1e-4, 1e-2, True))
    assert parse_axis("width=8..32", ranges=True) == ("width", Range(8, 32, False))
    assert parse_axis("r1=0..1", ranges=True) == ("r1", Range(0.0, 1.0, False))
    assert parse_axis("loss=hinge,minimax", ranges=True) == ("loss", ["hinge", "minimax"])
    with pytest.raises(TrainerError, match="--search tpe"):
        parse_axis("width=8..32")
    for text in ("width=32..8", "loss=a..b", "width=8..", "width=8..x"):
        with pytest.raises(TrainerError, match=r"not a range|type int"):
            parse_axis(text, ranges=True)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    """Replace training by a FID that is lowest at a learning rate of 0.001 with hinge; collect what is trained."""
    begun: Begun = []

    def figures(_runner: Runner, settings: Settings, folder: Path, watch: Watch) -> dict[str, Any]:
        begun.append((settings.learning_rate, settings.loss))
        fid = 1 + abs(math.log10(settings.learning_rate) + 3) + (settings.loss != "hinge")
        for images_seen in (100, 200):
            watch(images_seen, {"fid": fid + 100 / images_seen})
        folder.mkdir(parents=True, exist_ok=True)
        return {"images": settings.images, "fid": fid, "outcome": "no alarm"}

    monkeypatch.setattr(Runner, "_figures", figures)
    return begun


def searched(out: Path, trials: int, *, pruner: str = "none", **changes: object) -> list[list[str]]:
    def settings_of(values: dict[str, Any]) -> Settings:
        return from_preset("mlp", {"precision": "fp32", **changes, **values})

    def never(*_: object) -> Any:
        raise AssertionError

    runner = Runner(out, lambda _: "sha256:data", never, never, (50,))
    lines = search(runner, AXES, settings_of, trials=trials, pruner=pruner).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_a_search_finds_good_settings_and_repeats_itself(tmp_path: Path, begun: Begun) -> None:
    rows = searched(tmp_path / "one", 25)
    assert rows[0] == ["trial", "learning_rate", "loss", "images", "fid", "outcome"]
    assert len(rows) == 27
    best = rows[2]
    assert best[2] == "hinge"
    assert 2e-4 < float(best[1]) < 5e-3
    first = list(begun)
    # The same seed, in two calls: the second call goes on, and does not repeat the samples of the first.
    begun.clear()
    searched(tmp_path / "two", 12)
    assert searched(tmp_path / "two", 25) == rows
    assert begun == first
    searched(tmp_path / "two", 25)
    assert begun == first
    begun.clear()
    searched(tmp_path / "other", 3, seed=1)
    assert begun != first[:3]


def test_a_changed_search_is_another_study(tmp_path: Path, begun: Begun) -> None:
    searched(tmp_path, 3)
    searched(tmp_path, 3, images=64)
    assert len(begun) == 6
    assert begun[:3] == begun[3:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["images"] for row in results.values()] == [64] * 3


def test_hopeless_trials_are_pruned(tmp_path: Path, begun: Begun) -> None:
    rows = searched(tmp_path, 25, pruner="median")
    pruned = [row for row in rows if row[-1].startswith("pruned: FID")]
    assert 3 <= len(pruned) <= 20
    # They have no figures, and come after the trials that have.
    assert rows[-len(pruned) :] == pruned
    assert all(row[3] == row[4] == "" for row in pruned)


@pytest.mark.slow  # trains ten runs by two processes
def test_a_search_of_which_a_process_is_killed_loses_nothing(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(judge, "_LEAST_STEPS", 2)
    monkeypatch.setattr(judge, "_EPOCHS", 0)
    often = ["--checkpoint-every-images", "64", "--sample-every-images", "1000000", "--evaluate-every-images", "1600"]
    small = ["--preset", "mlp", "--width", "4", "--batch-size", "16", "--images", "3200", "--measured-images", "50"]
    command = ["sweep", "--search", "tpe", "--vary", "learning_rate=1e-5..1e-2", "--data-root", str(data_root)]
    command += ["--out", str(tmp_path / "sweep"), *small, *often]
    # The first trial, which also trains the judge that the processes then find in the cache.
    monkeypatch.setattr(sys, "argv", ["ganserve-trainer", *command, "--trials", "1"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code, capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["pytest"])

    def start() -> "Program":
        return Program([installed("ganserve-trainer"), *command, "--trials", "5"], stderr=subprocess.PIPE, text=True)

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def unfinished() -> list[Path]:
        return [
            path.parent
            for path in (tmp_path / "sweep").glob("*/checkpoints")
            if not (path.parent / "sweep.json").exists()
        ]

    with ended(start()) as killed:
        wait_for(lambda: bool(unfinished()))
        (lost,) = unfinished()
        with ended(start()) as other:
            wait_for(lambda: len(unfinished()) == 2 or (lost / "sweep.json").exists())
            assert not (lost / "sweep.json").exists(), "the trial ended before its process was killed"
            killed.kill()
            seen = load_checkpoint(lost).images_seen
            _, text = other.communicate(timeout=TIMEOUT_S)
            assert other.returncode == 0, text
    assert "trial 1 has lost its process" in text
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert len(results) == 5
    assert {row["images"] for row in results.values()} == {3200}
    # The killed trial's run went on from its checkpoint, in its folder; no run was trained twice.
    assert lost.name in results
    assert 0 < seen < 3200
    assert f"from {seen:,} images on" in text
    assert len(list((tmp_path / "sweep").glob("*/checkpoints"))) == 5

"""A run that is asked to save or to end, whose terminal is gone, or that saves by the clock, loses nothing."""

import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import torch
from tests.programs import TIMEOUT_S, Program, ended, installed

from ganserve_trainer.data.datasets import load_dataset
from ganserve_trainer.settings import from_preset
from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint
from ganserve_trainer.train.loop import train
from ganserve_trainer.train.stopping import caught_signals

NEVER = 10**9


def command(data_root: Path, out: Path, images: int) -> list[str]:
    tiny = ["--preset", "mlp", "--width", "4", "--batch-size", "16", "--precision", "fp32", "--images", str(images)]
    rarely = ["--sample-every-images", str(NEVER), "--checkpoint-every-images", str(NEVER)]
    folders = ["--out", str(out), "--data-root", str(data_root)]
    return [installed("ganserve-trainer"), "train", *folders, *tiny, *rarely]


def wait_for(path: Path, pattern: str, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not list(path.glob(pattern)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dropped_terminal_loses_no_work(data_root: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with ended(Program(command(data_root, tmp_path, NEVER), stdout=theirs, stderr=theirs)) as process:
        os.close(theirs)
        wait_for(tmp_path, "samples/000000000000.png", process)
        process.send_signal(signal.SIGUSR1)
        wait_for(tmp_path, "checkpoints/*.pt", process)
        (asked_for,) = checkpoint_files(tmp_path)
        os.close(ours)  # what it prints now fails with EIO
        for _ in range(2):  # one from the kernel, one from the shell
            process.send_signal(signal.SIGHUP)
        assert process.wait(TIMEOUT_S) == 130
    assert load_checkpoint(tmp_path).images_seen > int(asked_for.stem) > 0


def test_a_closed_pipe_does_not_end_a_run(data_root: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with ended(Program(command(data_root, tmp_path, 640), stdout=writing, stderr=writing)) as process:
        os.close(writing)
        assert process.wait(TIMEOUT_S) == 0
    assert load_checkpoint(tmp_path).images_seen == 640


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught_signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.stop.is_set()
        with caught_signals() as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert asked.save.is_set()
            assert not asked.stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_saving_by_the_clock_does_not_change_the_weights(data_root: Path, tmp_path: Path) -> None:
    small = {"width": 4, "batch_size": 16, "images": 960, "precision": "fp32", "keep": 99}
    rarely = {"sample_every_images": NEVER, "checkpoint_every_images": NEVER}
    without = {"sample_every_minutes": 0.0, "checkpoint_every_minutes": 0.0}
    at_once = {"sample_every_minutes": 1e-6, "checkpoint_every_minutes": 1e-6}
    dataset = load_dataset("mnist", data_root, train=True)
    runs = {}
    for name, clock in {"whole": without, "often": at_once}.items():
        settings = from_preset("mlp", small | rarely | clock)
        assert train(settings, dataset, tmp_path / name, resume=False, report=lambda *_: None)
        runs[name] = load_checkpoint(tmp_path / name)
    assert [path.stem for path in checkpoint_files(tmp_path / "whole")] == ["000000000960"]
    newest, *older = checkpoint_files(tmp_path / "often")
    assert older
    assert len(list((tmp_path / "often" / "samples").iterdir())) > 2
    for path in (newest, *older[:-1]):
        path.unlink()
    assert load_checkpoint(tmp_path / "often").images_seen < 960
    train(settings, dataset, tmp_path / "often", resume=True, report=lambda *_: None)
    runs["resumed"] = load_checkpoint(tmp_path / "often")
    for other in (runs["often"], runs["resumed"]):
        assert all(torch.equal(other.generator[name], weight) for name, weight in runs["whole"].generator.items())
        assert [each.images_seen for each in other.history.points] == [
            each.images_seen for each in runs["whole"].history.points
        ]

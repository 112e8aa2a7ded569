"""Real processes: several that train one run over Gloo, and some that are killed at any moment."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tests.programs import TIMEOUT_S, Program, ended, installed, run

from ganserve_trainer.train.checkpoints import checkpoint_files, load_checkpoint

# Without momentum Adam's first steps are the gradients' signs, which rounding turns where a gradient is nearly zero.
ADAM = ["--learning-rate", "2e-4", "--beta1", "0.5", "--beta2", "0.999"]
SMALL = ["--width", "8", "--precision", "fp32", "--images", "512", "--sample-every-images", "256", *ADAM]
MLP = ("--preset", "mlp", "--r1", "1", "--r1-every-steps", "2")

TINY = ["--preset", "cdcgan", "--width", "4", "--batch-size", "16", "--precision", "fp32"]
LONGEST_START_S = 0.6
LONGEST_LIFE_S = 0.2


def settings(data_root: Path, out: Path, batch_size: int, *arguments: str) -> list[str]:
    command = ["train", "--out", out, "--data-root", data_root, *SMALL, *arguments, "--batch-size", batch_size]
    return [str(part) for part in command]


def train(
    command: list[str], processes: int, *, second: list[str] | None = None
) -> list["subprocess.CompletedProcess[str]"]:
    """Start processes with the environment of torchrun's, which also keeps the store by which they find each other.

    The second process may have other arguments.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with ExitStack() as stack:
        started = []
        for rank in range(processes):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            given = second if second is not None and rank == 1 else command
            program = Program([installed("ganserve-trainer"), *given], env=os.environ | place | numbers, **pipes)
            started.append(stack.enter_context(ended(program)))
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in started]
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def torchrun(command: list[str], processes: int) -> "subprocess.CompletedProcess[str]":
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "ganserve_trainer"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *command], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )


def assert_same_training(alone: Path, together: Path) -> None:
    one, two = load_checkpoint(alone), load_checkpoint(together)
    assert [point.images_seen for point in one.history.points] == [256, 512]
    for mine, theirs in zip(one.history.points, two.history.points, strict=True):
        assert theirs.images_seen == mine.images_seen
        for name in ("discriminator_loss", "generator_loss", "real_accuracy", "diversity"):
            assert getattr(theirs, name) == pytest.approx(getattr(mine, name), rel=2e-4), name
    for name, weight in one.ema.items():
        assert torch.allclose(weight.float(), two.ema[name].float(), atol=1e-3), name
    # Written once: the same files.
    assert sorted(path.name for path in together.rglob("*.p*")) == sorted(path.name for path in alone.rglob("*.p*"))


def test_two_processes_of_64_train_as_one_of_128(data_root: Path, tmp_path: Path) -> None:
    (alone,) = train(settings(data_root, tmp_path / "alone", 128, *MLP), 1)
    assert alone.returncode == 0, alone.stderr
    first, second = train(settings(data_root, tmp_path / "together", 64, *MLP), 2)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert_same_training(tmp_path / "alone", tmp_path / "together")
    assert (first.stdout + second.stdout).count("next: ganserve-trainer export") == 1
    assert "Warning" not in first.stderr + second.stderr


def test_an_error_in_all_processes_is_told(data_root: Path, tmp_path: Path) -> None:
    for done in train(settings(data_root, tmp_path, 300, "--preset", "mlp"), 2):
        assert done.returncode == 2
        assert "400 images, fewer than a batch of 600; use --batch-size 200 or fewer" in done.stderr


def test_processes_that_would_train_other_runs_are_refused(data_root: Path, tmp_path: Path) -> None:
    other_data = tmp_path / "data"
    shutil.copytree(data_root / "MNIST", other_data / "MNIST")
    images = next((other_data / "MNIST" / "raw").glob("train-images*"))
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.chmod(0o644)
    images.write_bytes(content)
    out = tmp_path / "run"
    command = settings(data_root, out, 64, *MLP)

    def refused(second: list[str], first: list[str]) -> str:
        results = train(first, 2, second=second)
        assert [done.returncode for done in results] == [2, 2], results[0].stderr + results[1].stderr
        assert socket.gethostname() in results[0].stderr
        return results[0].stderr

    text = refused(settings(other_data, out, 64, *MLP), command)
    assert "process 1 on" in text
    assert "has other data than process 0 on" in text
    assert "has other learning_rate than" in refused([*command, "--learning-rate", "0.1"], command)
    assert not (out / "checkpoints").exists()
    (alone,) = train([*settings(data_root, out, 64, *MLP), "--images", "128"], 1)
    assert alone.returncode == 0, alone.stderr
    # The second machine has no such folder, or one of a run that is behind.
    resume = ["train", "--resume", "--data-root", str(data_root), "--images", "256"]
    text = refused([*resume, "--out", str(tmp_path / "elsewhere")], [*resume, "--out", str(out)])
    assert "process 1 on" in text
    assert "there is no run in" in text
    (behind,) = train([*settings(data_root, tmp_path / "behind", 64, *MLP), "--images", "64"], 1)
    assert behind.returncode == 0, behind.stderr
    text = refused([*resume, "--out", str(tmp_path / "behind")], [*resume, "--out", str(out)])
    assert "has other checkpoint than" in text
    assert "checkpoint: of 128 images, sha256:" in text


@pytest.mark.parametrize(("kills", "images"), [(2, 1_280), pytest.param(20, 6_400, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    kills: int, images: int, data_root: Path, tmp_path: Path
) -> None:
    moments = random.Random(0)
    often = ["--checkpoint-every-images", "16", "--sample-every-images", str(images), "--images", str(images)]

    def command(out: str) -> list[str]:
        folders = ["--out", str(tmp_path / out), "--data-root", str(data_root)]
        return ["train", "--resume", *folders, *TINY, *often]

    reached = set()
    for number in range(kills):
        seen = checkpoint_files(tmp_path / "killed")
        with Program([installed("ganserve-trainer"), *command("killed")], stderr=subprocess.DEVNULL) as process:
            # Every other one is killed while it starts and reads its checkpoint, the others while they train and write.
            if number % 2:
                time.sleep(moments.uniform(0, LONGEST_START_S))
            else:
                while process.poll() is None and checkpoint_files(tmp_path / "killed") == seen:
                    time.sleep(0.005)
                time.sleep(moments.uniform(0, LONGEST_LIFE_S))
            assert process.poll() is None, "the run ended before it was killed"
            process.kill()
        reached |= {path.name for path in checkpoint_files(tmp_path / "killed")}
    assert len(reached) >= kills / 2
    for out in ("killed", "whole"):
        done = run("ganserve-trainer", *command(out))
        assert done.returncode == 0, done.stderr
    killed_run, whole = load_checkpoint(tmp_path / "killed"), load_checkpoint(tmp_path / "whole")
    assert killed_run.images_seen == whole.images_seen == images
    for part in ("generator", "discriminator", "ema"):
        mine, theirs = getattr(killed_run, part), getattr(whole, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), part
    # Its history is that of one run too, but for the clock.
    assert [point._replace(elapsed_s=0) for point in killed_run.history.points] == [
        point._replace(elapsed_s=0) for point in whole.history.points
    ]
    # What was being written when the process died is cleared away.
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [MLP, ("--preset", "cdcgan")])
def test_torchrun_starts_the_processes(data_root: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (alone,) = train(settings(data_root, tmp_path / "alone", 128, *arguments), 1)
    assert alone.returncode == 0, alone.stderr
    together = torchrun(settings(data_root, tmp_path / "together", 64, *arguments), 2)
    assert together.returncode == 0, together.stderr
    assert_same_training(tmp_path / "alone", tmp_path / "together")
    assert together.stdout.count("next: ganserve-trainer export") == 1
    assert "Warning" not in together.stderr


@pytest.mark.slow
def test_torchrun_tells_an_error_in_all_processes(data_root: Path, tmp_path: Path) -> None:
    done = torchrun(settings(data_root, tmp_path, 300, "--preset", "mlp"), 2)
    assert done.returncode != 0
    assert "400 images, fewer than a batch of 600; use --batch-size 200 or fewer" in done.stderr

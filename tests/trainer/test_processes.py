"""Two real processes over Gloo, started by torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.programs import run

from ganserve_trainer.train.checkpoints import load_checkpoint

# Without momentum Adam's first steps are the gradients' signs, which rounding turns where a gradient is nearly zero.
ADAM = ["--learning-rate", "2e-4", "--beta1", "0.5", "--beta2", "0.999"]
SMALL = ["--width", "8", "--precision", "fp32", "--images", "1280", "--sample-every-images", "640", *ADAM]


def train(
    data_root: Path, out: Path, processes: int, batch_size: int, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    command = ["train", "--out", out, "--data-root", data_root, *SMALL, *arguments, "--batch-size", str(batch_size)]
    if processes == 1:
        return run("ganserve-trainer", *command)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "ganserve_trainer"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *command], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(
    "arguments", [("--preset", "cdcgan"), ("--preset", "mlp", "--r1", "1", "--r1-every-steps", "2")]
)
def test_two_processes_of_64_train_as_one_of_128(data_root: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    alone = train(data_root, tmp_path / "alone", 1, 128, *arguments)
    together = train(data_root, tmp_path / "together", 2, 64, *arguments)
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    one, two = load_checkpoint(tmp_path / "alone"), load_checkpoint(tmp_path / "together")
    assert [point.images_seen for point in one.history.points] == [640, 1280]
    for mine, theirs in zip(one.history.points, two.history.points, strict=True):
        assert theirs.images_seen == mine.images_seen
        for name in ("discriminator_loss", "generator_loss", "real_accuracy", "diversity"):
            assert getattr(theirs, name) == pytest.approx(getattr(mine, name), rel=2e-4), name
    for name, weight in one.ema.items():
        assert torch.allclose(weight.float(), two.ema[name].float(), atol=1e-3), name
    # Written once: the same files, and one line of advice.
    assert sorted(path.name for path in (tmp_path / "together").rglob("*.p*")) == sorted(
        path.name for path in (tmp_path / "alone").rglob("*.p*")
    )
    assert together.stdout.count("next: ganserve-trainer export") == 1
    assert "Warning" not in together.stderr


def test_an_error_in_all_processes_is_told(data_root: Path, tmp_path: Path) -> None:
    done = train(data_root, tmp_path, 2, 300, "--preset", "mlp")
    assert done.returncode != 0
    assert "400 images, fewer than a batch of 600; use --batch-size 200 or fewer" in done.stderr

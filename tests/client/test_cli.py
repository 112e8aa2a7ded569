import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tests.conftest import RunningServer

from ganserve import Client


def ganserve(*arguments: str | Path, address: str) -> "subprocess.CompletedProcess[str]":
    command = [Path(sys.executable).with_name("ganserve"), *arguments, "--address", address]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_generate_writes_one_picture_of_all(server: RunningServer, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sevens.png"
    arguments = ("generate", "cdcgan-mnist", "--label", "7", "--count", "16", "--seed", "1", "--out", out)
    done = ganserve(*arguments, "--scale", "1", address=server.address)
    assert done.returncode == 0, done.stderr
    assert "16 images of cdcgan-mnist version 1, seed 1 to 16" in done.stdout
    wanted = client.generate("cdcgan-mnist", count=16, seed=1, label=7).sheet()
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(wanted))


def test_generate_writes_a_file_an_image(server: RunningServer, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "{label}-{seed}.png"
    done = ganserve("generate", "cdcgan-mnist", "--count", "3", "--seed", "8", "-o", out, address=server.address)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-10.png", "8-8.png", "9-9.png"]
    with Image.open(tmp_path / "9-9.png") as image:
        assert json.loads(image.info["ganserve"])["digest"] == client.model("cdcgan-mnist").digest
        assert np.array_equal(np.asarray(image), client.generate("cdcgan-mnist", seed=9).pixels[0, :, :, 0])


def test_models_lists_them_all(server: RunningServer, client: Client) -> None:
    done = ganserve("models", address=server.address)
    assert done.returncode == 0, done.stderr
    assert all(model.name in done.stdout for model in client.models())


def test_errors_are_one_line(server: RunningServer, tmp_path: Path) -> None:
    attempts: list[tuple[list[str | Path], str]] = [
        (["generate", "nothing"], "there is no model 'nothing'"),
        (["generate", "cdcgan-mnist", "--label", "eleven"], "no class 'eleven'"),
        (["generate", "mlp-mnist", "--out", tmp_path / "{what}.png"], "{seed}"),
        (["generate", "mlp-mnist", "--out", tmp_path / "file.nonsense"], "nonsense"),
        (["generate", "mlp-mnist", "--out", "/proc/nowhere.png"], "nowhere"),
    ]
    for arguments, text in attempts:
        done = ganserve(*arguments, address=server.address)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("ganserve: ")
        assert text in done.stderr
        assert done.stderr.count("\n") == 1
    unreachable = ganserve("models", address="127.0.0.1:1")
    assert unreachable.returncode == 1
    assert "no answer from 127.0.0.1:1" in unreachable.stderr

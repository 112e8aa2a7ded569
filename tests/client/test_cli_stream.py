import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.client.program import TIMEOUT_S, command, environment, ganserve, read_terminal
from tests.conftest import RunningServer
from tests.programs import Program, ended

from ganserve import Client, read_provenance


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def kill_when(path: Path, arguments: list[str]) -> None:
    """Start a command and kill it as soon as there is a file in a folder, or anything in a file."""
    with ended(Program(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)) as process:
        while not (any(path.rglob("[0-9]*.png")) if path.suffix != ".raw" else path.exists() and path.stat().st_size):
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL


def test_stream_writes_a_folder_with_a_sub_folder_a_class(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    out = tmp_path / "clothes"
    arguments = ("stream", "cdcgan-fashion-mnist", "--count", "600", "--seed", "4294967290", "--to", out)
    done = ganserve(*arguments, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "600 images of cdcgan-fashion-mnist version 1, seed 4294967290 to 593" in done.stdout
    names = client.model("cdcgan-fashion-mnist").class_names
    folders = [path for path in out.iterdir() if path.is_dir()]
    assert {path.name for path in folders} == {name.replace("/", "-") for name in names}
    batch = client.generate("cdcgan-fashion-mnist", count=600, seed=4294967290)
    assert len(list(out.rglob("*.png"))) == 600
    for image in (batch[0], batch[7], batch[599]):
        assert image.label is not None
        path = out / names[image.label].replace("/", "-") / f"{image.seed:010d}.png"
        assert np.array_equal(pixels_of(path), image.pixels[:, :, 0])
        assert read_provenance(path) == image.provenance


def test_an_unconditional_model_has_no_sub_folders(server: RunningServer, tmp_path: Path) -> None:
    arguments = ("stream", "mlp-mnist", "--count", "3", "--seed", "1", "--format", "webp", "--to", tmp_path / "out")
    assert ganserve(*arguments, address=server.address).returncode == 0
    assert sorted(contents(tmp_path / "out")) == [
        ".ganserve.json",
        "0000000001.webp",
        "0000000002.webp",
        "0000000003.webp",
    ]


def test_a_stream_that_was_killed_makes_only_what_is_missing(server: RunningServer, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["stream", "cdcgan-mnist", "--count", "2000", "--seed", "3", "--to"]
    kill_when(killed, command(*arguments, killed, address=server.address))
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("[0-9]*.png")}
    assert 0 < len(before) < 2000
    # What the kill may have caught at work, and one that was lost since.
    lost = min(before)
    lost.unlink()
    (lost.parent / ".0000000001.77.part.png").write_bytes(b"half")
    done = ganserve(*arguments, killed, "--json", address=server.address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["made"] == 2000 - len(before) + 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != lost)
    assert ganserve(*arguments, whole, address=server.address).returncode == 0
    assert contents(killed) == contents(whole)


def test_an_archive_that_was_killed_goes_on_and_is_there_only_when_it_is_whole(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    out = tmp_path / "digits.npz"
    raw = tmp_path / "digits.npz.partial" / "images.raw"
    labels = ("--label", "3", "--label", "8")
    arguments = ["stream", "cdcgan-mnist", "--count", "10001", "--seed", "9", *labels, "--to", out]
    kill_when(raw, command(*arguments, address=server.address))
    assert not out.exists()
    with open(raw, "ab") as file:
        file.write(b"a part of an image")
    there = raw.stat().st_size // 784
    done = ganserve("stream", "cdcgan-mnist", "--count", "10001", "--to", out, "--json", address=server.address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["made"] == 10001 - there
    with np.load(out) as arrays:
        assert arrays["images"].shape == (10001, 28, 28, 1)
        assert arrays["seeds"].tolist() == list(range(9, 10010))
        assert arrays["labels"][:4].tolist() == [3, 8, 3, 8]
        for index in (0, there - 1, there, 10000):
            label = int(arrays["labels"][index])
            wanted = client.generate("cdcgan-mnist", seed=9 + index, label=label)
            assert np.array_equal(arrays["images"][index], wanted.pixels[0])
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]
    again = ganserve(*arguments, "--json", address=server.address)
    assert json.loads(again.stdout)["made"] == 0


def test_a_folder_grows_with_its_count(server: RunningServer, tmp_path: Path) -> None:
    arguments = ("stream", "mlp-mnist", "--to", tmp_path / "out", "--count")
    assert ganserve(*arguments, "4", address=server.address).returncode == 0
    done = ganserve(*arguments, "6", "--json", address=server.address)
    made = json.loads(done.stdout)
    assert made["made"] == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


def test_a_folder_goes_on_in_its_format(server: RunningServer, tmp_path: Path) -> None:
    arguments = ("stream", "cdcgan-mnist", "--seed", "1", "--to", tmp_path / "out", "--count")
    assert ganserve(*arguments, "4", "--format", "webp", address=server.address).returncode == 0
    before = contents(tmp_path)
    done = ganserve(*arguments, "6", address=server.address)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has .webp files; resume with --format webp" in done.stderr
    assert contents(tmp_path) == before
    done = ganserve(*arguments, "6", "--format", "webp", address=server.address)
    assert (done.returncode, len(contents(tmp_path))) == (0, len(before) + 2)


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_other_images_are_not_mixed_in(server: RunningServer, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    arguments = ("stream", "cdcgan-mnist", "--count", "4", "--seed", "1", "--to", out)
    assert ganserve(*arguments, address=server.address).returncode == 0
    before = contents(tmp_path)
    for other, text in (
        (("--seed", "2"), "seed 1, not 2"),
        (("--truncation", "0.5"), "truncation 1.0, not 0.5"),
        (("--label", "3"), "labels all classes in turn, not 3"),
    ):
        done = ganserve(*arguments, *other, address=server.address)
        assert done.returncode == 2
        assert text in done.stderr
    done = ganserve("stream", "mlp-mnist", "--count", "4", "--to", out, address=server.address)
    assert done.returncode == 2
    assert contents(tmp_path) == before


def test_a_folder_with_other_files_is_left_alone(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    arguments = ("stream", "mlp-mnist", "--count", "4", "--to")
    done = ganserve(*arguments, tmp_path, address=server.address)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "other files" in done.stderr
    (tmp_path / "mine.npz").write_bytes(b"")
    assert ganserve(*arguments, tmp_path / "mine.npz", address=server.address).returncode == 2
    assert contents(tmp_path) == {"letter.txt": b"dear", "mine.npz": b""}


def test_nothing_is_left_of_what_the_server_refused(server: RunningServer, tmp_path: Path) -> None:
    done = ganserve("stream", "nothing", "--count", "4", "--to", tmp_path / "out", address=server.address)
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_the_server_will_never_take_does_not_say_that_it_goes_on(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start_server("--max-images-per-stream", "50")
    done = ganserve("stream", "mlp-mnist", "--count", "60", "--to", tmp_path / "out", address=server.address)
    assert done.returncode == 2
    assert "a stream may ask for 1 to 50 images here; 0 of 60 images" in done.stderr
    assert "the same command" not in done.stderr


def test_two_runs_do_not_write_to_one_folder(server: RunningServer, tmp_path: Path) -> None:
    arguments = ("stream", "mlp-mnist", "--count", "2000", "--to", tmp_path / "out")
    with ended(Program(command(*arguments, address=server.address), stdout=subprocess.PIPE)) as first:
        while not any(tmp_path.rglob("*.png")):
            assert first.poll() is None
        first.send_signal(signal.SIGSTOP)
        second = ganserve(*arguments, address=server.address)
        first.send_signal(signal.SIGCONT)
        assert first.wait(TIMEOUT_S) == 0
    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert "another `ganserve stream`" in second.stderr


def test_progress_is_shown_on_a_terminal_and_not_in_a_pipe(server: RunningServer, tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    arguments = command("stream", "mlp-mnist", "--count", "300", "--to", tmp_path / "out", address=server.address)
    with ended(Program(arguments, stdout=subprocess.PIPE, stderr=terminal, text=True)) as process:
        os.close(terminal)
        shown = read_terminal(controller)
        out, _ = process.communicate(timeout=TIMEOUT_S)
    assert b"300/300" in shown
    assert out.count("\n") == 1


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_a_stream_that_fails_says_what_is_kept_and_the_same_command_goes_on(
    start_server: Callable[..., RunningServer], tmp_path: Path, name: str
) -> None:
    server = start_server()
    out = tmp_path / name
    arguments = ("stream", "cdcgan-mnist", "--count", "3000", "--to", out)
    started = out / "7" if name == "out" else tmp_path / "out.npz.partial" / "images.raw"
    hasty = command(*arguments, "--timeout", "5", address=server.address)
    with ended(Program(hasty, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) as process:
        while not (started.exists() and (started.is_dir() or started.stat().st_size)):
            assert process.poll() is None, process.communicate()
        server.process.send_signal(signal.SIGSTOP)
        _, err = process.communicate(timeout=TIMEOUT_S)
        server.process.send_signal(signal.SIGCONT)
    assert process.returncode == 3
    kept = rf"; (\d+) of 3000 images [^;]* {out}; the same command resumes from there"
    found = re.search(kept + r"( \(request id \w+\))?\n$", err)
    assert found, err
    done = ganserve(*arguments, "--json", address=server.address)
    assert json.loads(done.stdout)["made"] == 3000 - int(found[1])


def test_a_stream_that_is_interrupted_says_what_is_kept(server: RunningServer, tmp_path: Path) -> None:
    arguments = command("stream", "mlp-mnist", "--count", "100000", "--to", tmp_path / "out", address=server.address)
    with ended(Program(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) as process:
        while not any(tmp_path.rglob("*.png")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert re.fullmatch(r"ganserve: interrupted; \d+ of 100000 images [^;]*; .*\n", err)


def test_a_stream_waits_for_its_server_and_says_so_once(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start_server()
    controller, terminal = os.openpty()
    out = tmp_path / "out"
    arguments = command("stream", "cdcgan-mnist", "--count", "3000", "--to", out, address=server.address)
    with ended(Program(arguments, stdout=subprocess.PIPE, stderr=terminal, env=environment(COLUMNS="140"))) as process:
        os.close(terminal)
        while not any(out.rglob("[0-9]*.png")):
            assert process.poll() is None
        server.process.kill()
        server.process.wait()  # it listens until all of its threads have ended
        shown = b""
        while b"trying again for up to" not in shown:
            shown += os.read(controller, 1 << 16)
        start_server("--address", server.address)
        shown = read_terminal(controller)
        assert process.wait(TIMEOUT_S) == 0
    assert b"3000/3000" in shown
    assert b"trying" not in shown.rpartition(b"3000/3000")[2]
    assert len(list(out.rglob("*.png"))) == 3000

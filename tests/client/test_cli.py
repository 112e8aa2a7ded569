import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.client.program import TIMEOUT_S, command, environment, ganserve, ganserve_here, read_terminal
from tests.client.servers import abort_overloaded, serving
from tests.conftest import RunningServer
from tests.programs import Program, ended

import ganserve as sdk
from ganserve import Client, _formats, read_provenance
from ganserve._cli import app
from ganserve._cli.outcome import EXIT_STATUSES
from ganserve.v1 import generation_pb2 as pb


@contextmanager
def silent_server() -> Iterator[str]:
    """Give the address of a port that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_generate_writes_one_picture_of_all(server: RunningServer, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sevens.png"
    arguments = ("generate", "cdcgan-mnist", "--label", "7", "--count", "16", "--seed", "1", "--out", out)
    done = ganserve(*arguments, "--scale", "1", address=server.address)
    assert done.returncode == 0, done.stderr
    assert "16 images of cdcgan-mnist version 1, label 7, seed 1 to 16" in done.stdout
    wanted = client.generate("cdcgan-mnist", count=16, seed=1, label=7).sheet()
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(wanted))
    assert [path.name for path in out.parent.iterdir()] == ["sevens.png"]


def test_generate_writes_a_file_an_image(server: RunningServer, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "{label}-{seed}.png"
    done = ganserve("generate", "cdcgan-mnist", "--count", "3", "--seed", "8", "-o", out, address=server.address)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-10.png", "8-8.png", "9-9.png"]
    with Image.open(tmp_path / "9-9.png") as image:
        assert json.loads(image.info["ganserve"])["digest"] == client.model("cdcgan-mnist").digest
        assert np.array_equal(np.asarray(image), client.generate("cdcgan-mnist", seed=9).pixels[0, :, :, 0])


def test_generate_takes_seeds_that_do_not_follow_one_another(
    server: RunningServer, client: Client, tmp_path: Path
) -> None:
    out = tmp_path / "some.png"
    arguments = ("generate", "cdcgan-mnist", "--seeds", "17,3,99", "--label", "1", "--label", "2", "--out", out)
    done = ganserve(*arguments, address=server.address)
    assert done.returncode == 0, done.stderr
    assert "3 images of cdcgan-mnist version 1, labels 1, 2, seed 17, 3, 99" in done.stdout
    assert (read_provenance(out).seeds, read_provenance(out).labels) == ((17, 3, 99), (1, 2, 1))
    assert ganserve("reproduce", out, address=server.address).returncode == 0


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_sheet_says_how_it_was_made_and_several_labels_are_taken_in_turn(
    server: RunningServer, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"clothes.{ending}"
    labels = ("--label", "Sneaker", "--label", "Bag")
    done = ganserve(
        "generate", "cdcgan-fashion-mnist", *labels, "--count", "5", "--seed", "3", "-o", out, address=server.address
    )
    assert done.returncode == 0, done.stderr
    provenance = read_provenance(out)
    assert (provenance.seeds, provenance.labels) == ((3, 4, 5, 6, 7), (7, 8, 7, 8, 7))


@pytest.mark.parametrize("name", ["digits.bmp", "{seed}.bmp"])
def test_a_picture_that_cannot_say_how_it_was_made_is_told(server: RunningServer, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    done = ganserve("generate", "mlp-mnist", "--count", "2", "-o", out, address=server.address)
    assert done.returncode == 0
    assert re.search(r"bmp does not contain its provenance, .* PNG, .* and TIFF have", done.stderr)


def test_every_other_picture_says_how_it_was_made(server: RunningServer, tmp_path: Path) -> None:
    for ending in (*_formats.EXTENSIONS, ".jfif", ".apng"):
        for name in ("digits", "{seed}"):
            out = tmp_path / f"{name}{ending}"
            arguments = ("generate", "mlp-mnist", "--count", "1", "--seed", "5", "-o", out)
            done = ganserve_here(*arguments, address=server.address)
            assert (done.returncode, done.stderr) == (0, "")
            assert read_provenance(str(out).format(seed=5)).seed == 5


@pytest.mark.parametrize(("arguments", "pillow_format"), [((), "PNG"), (("--format", "webp"), "WEBP")])
def test_generate_writes_a_picture_into_a_pipe(
    server: RunningServer, client: Client, arguments: tuple[str, ...], pillow_format: str
) -> None:
    done = ganserve("generate", "mlp-mnist", "--seed", "1", "-o", "-", *arguments, address=server.address, text=False)
    assert (done.returncode, done.stderr) == (0, b"")
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert image.format == pillow_format
        wanted = client.generate("mlp-mnist", count=16, seed=1).sheet(scale=2)
        assert np.array_equal(np.asarray(image.convert("L")), np.asarray(wanted))


def test_generate_says_what_it_made_as_json(server: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "{index}.webp"
    done = ganserve("generate", "mlp-mnist", "--count", "2", "-o", out, "--json", address=server.address)
    made = json.loads(done.stdout)
    assert made["files"] == [str(tmp_path / "0.webp"), str(tmp_path / "1.webp")]
    assert [read_provenance(file).seed for file in made["files"]] == made["seeds"]


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_interpolate_walks_from_seed_to_seed(
    server: RunningServer, client: Client, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"walk.{ending}"
    arguments = ("interpolate", "cdcgan-mnist", "1", "2", "--label", "3", "--steps", "5", "--scale", "1", "-o", out)
    done = ganserve(*arguments, address=server.address)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as walk:
        assert walk.n_frames == 8  # there and back, each end once
        for frame, seed in ((0, 1), (4, 2)):
            walk.seek(frame)
            wanted = client.generate("cdcgan-mnist", seed=seed, label=3).pixels[0, :, :, 0]
            assert np.array_equal(np.asarray(walk.convert("L")), wanted)
    piped = ganserve(*arguments[:-1], "-", "--format", ending, address=server.address, text=False)
    assert piped.stdout == out.read_bytes()


def test_models_lists_them_all_with_their_quality(server: RunningServer, client: Client) -> None:
    done = ganserve("models", address=server.address)
    assert done.returncode == 0, done.stderr
    for model in client.models():
        line = next(line for line in done.stdout.splitlines() if line.startswith(model.name))
        fid = next(metric.value for metric in model.metrics if metric.name == "fid")
        assert f"{fid:.4g}" in line
        assert all(name in line for name in model.class_names)
    listed = json.loads(ganserve("models", "--json", address=server.address).stdout)
    assert [model["name"] for model in listed] == [model.name for model in client.models()]


def test_models_shows_a_card_and_draws_its_golden_images(server: RunningServer, client: Client) -> None:
    done = ganserve("models", "cdcgan-mnist", address=server.address)
    assert done.returncode == 0, done.stderr
    model = client.model("cdcgan-mnist")
    assert model.digest in done.stdout
    assert all(metric.name in done.stdout for metric in model.metrics)
    assert "seed 9, 9" in done.stdout
    assert "\x1b" not in done.stdout  # no colours in a pipe
    # The pixels of the golden image of seed 0, two rows a character, from the darkest to the brightest.
    drawn = [line[:28].rstrip() for line in done.stdout.splitlines()]
    golden = client.generate("cdcgan-mnist", seed=0).pixels[0, :, :, 0].astype(float)
    shades = np.rint((golden[::2] + golden[1::2]) / 2 / 255 * 4).astype(int)
    wanted = ["".join(" ░▒▓█"[level] for level in row).rstrip() for row in shades]
    at = drawn.index(next(line for line in wanted if line))
    assert [line for line in wanted if line] == drawn[at : at + sum(map(bool, wanted))]
    card = json.loads(ganserve("models", "cdcgan-mnist", "--json", address=server.address).stdout)["card"]
    assert card == json.loads(json.dumps(model.card))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_gets_fewer_columns_of_the_table_but_whole_figures(
    server: RunningServer, client: Client, width: int
) -> None:
    controller, terminal = os.openpty()
    environ = environment(TERM="xterm", COLUMNS=str(width))
    with ended(Program(command("models", address=server.address), stdout=terminal, env=environ)) as process:
        os.close(terminal)
        lines = re.sub(r"\x1b\[[\d;]*m", "", read_terminal(controller).decode()).splitlines()
        assert process.wait(TIMEOUT_S) == 0
    assert max(map(len, lines)) <= width
    assert ("classes" in lines[0]) == (width == 120)
    for model in client.models():
        fid = next(metric.value for metric in model.metrics if metric.name == "fid")
        assert any(line.startswith(f"{model.name} ") and f" {fid:.4g} " in line for line in lines)


def test_a_card_in_a_terminal_has_colours(server: RunningServer) -> None:
    controller, terminal = os.openpty()
    environ = environment(TERM="xterm-256color", COLORTERM="truecolor", COLUMNS="100")
    arguments = command("models", "cdcgan-mnist", address=server.address)
    with ended(Program(arguments, stdout=terminal, stderr=subprocess.PIPE, env=environ)) as process:
        os.close(terminal)
        shown = read_terminal(controller)
        assert process.wait(TIMEOUT_S) == 0
    text = shown.decode()
    assert "▀" in text
    assert "\x1b[38;2;255;255;255" in text or "\x1b[38;2;254;254;254" in text


def test_a_card_as_a_page_needs_no_other_file(server: RunningServer, client: Client, tmp_path: Path) -> None:
    page = tmp_path / "card.html"
    done = ganserve("models", "cdcgan-fashion-mnist", "--html", page, address=server.address)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(client.model("cdcgan-fashion-mnist").card["goldenImages"])
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "T-shirt/top" in text


def test_health_says_whether_it_serves(
    server: RunningServer, start_server: Callable[..., RunningServer], client: Client
) -> None:
    for name in ((), ("cdcgan-mnist",)):
        done = ganserve("health", *name, address=server.address)
        assert (done.returncode, done.stdout) == (0, "SERVING\n")
    draining = start_server("--drain-delay-s", "60")
    draining.process.terminate()
    draining.wait_for("draining")
    done = ganserve("health", address=draining.address)
    assert (done.returncode, done.stdout) == (1, "NOT SERVING\n")
    assert json.loads(ganserve("health", "--json", address=draining.address).stdout)["serving"] is False
    assert ganserve("health", address="127.0.0.1:1").returncode == 3
    assert ganserve("health", "nothing", address=server.address).returncode == 1


def test_health_waits_for_a_server(start_server: Callable[..., RunningServer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        waiting = command("health", "mlp-mnist", "--wait", "60", address=address)
        with ended(Program(waiting, stdout=subprocess.PIPE, text=True)) as process:
            connection, _ = listening.accept()  # it has asked, and gets no answer
            connection.close()
            listening.close()
            start_server("--address", address)
            out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (0, "SERVING\n")
    done = ganserve("health", "--wait", "0.2", address="127.0.0.1:1")
    assert (done.returncode, done.stdout) == (3, "")


def test_what_is_waited_for_in_vain_has_the_exit_status_of_what_is_so(
    server: RunningServer, start_server: Callable[..., RunningServer]
) -> None:
    draining = start_server("--drain-delay-s", "60")
    draining.process.terminate()
    draining.wait_for("draining")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    attempts: list[tuple[tuple[str, ...], str, int]] = [
        (("cdcgan-mnist", "--version", "9"), server.address, 1),
        (("nothing",), server.address, 1),
        ((), draining.address, 1),
        (("--every-address",), draining.address, 1),
        (("--every-address",), f"{server.address},{nobody}", 1),
        (("--every-address",), nobody, 3),
        (("cdcgan-mnist", "--version", "9"), nobody, 3),
        ((), nobody, 3),
    ]
    for arguments, address, status in attempts:
        done = ganserve("health", *arguments, "--wait", "1", address=address)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), (arguments, done.stderr)
        assert "was not ready within 1 s" in done.stderr
        assert address.split(",")[-1] in done.stderr


def test_an_error_names_the_server_and_the_request_as_the_servers_log_does(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[tokens]]\nname = "a"\nsha256 = "' + "0" * 64 + '"\nroles = ["generate"]\n')
    guarded = start_server("--tokens-file", tokens)
    for arguments in (("models",), ("health", "cdcgan-mnist", "--version", "1", "--every-address")):
        done = ganserve(*arguments, "--token", "wrong", address=guarded.address)
        request_id = guarded.wait_for("call")["request_id"]
        assert done.returncode == 1
        assert f"the server at {guarded.address} refused the call" in done.stderr
        assert done.stderr.endswith(f" (request id {request_id})\n")
    done = ganserve("models", "nothing", "--token", "wrong", address="127.0.0.1:1")
    assert "request id" not in done.stderr  # nobody gave one


def test_errors_in_json_have_the_request_id(server: RunningServer, tmp_path: Path) -> None:
    done = ganserve("health", "cdcgan-mnist", "--version", "9", "--json", address=server.address)
    (replica,) = json.loads(done.stdout)["replicas"]
    assert re.fullmatch(r"\w{32}", replica["request_id"])
    picture = tmp_path / "picture.png"
    ganserve("generate", "mlp-mnist", "-o", picture, address=server.address)
    content = Image.open(picture)
    origin = json.loads(content.info["ganserve"])
    noted = PngInfo()
    noted.add_text("ganserve", json.dumps({**origin, "version": 9}))
    content.save(picture, pnginfo=noted)
    done = ganserve("reproduce", picture, "--json", address=server.address)
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert "no version 9" in told["error"]
    assert told["request_id"] in done.stderr


def test_errors_are_one_line_and_have_their_exit_status(server: RunningServer, tmp_path: Path) -> None:
    locked = tmp_path / "file"
    locked.touch()
    attempts: list[tuple[list[str | Path], int, str]] = [
        (["generate", "nothing"], 1, "there is no model 'nothing'"),
        (["health", "nothing"], 1, "no model of this name: it has cdcgan-fashion-mnist, cdcgan-mnist, dcgan-mnist"),
        (["generate", "mlp-mnist", "--version", "7"], 1, "no version 7"),
        (["generate", "cdcgan-mnist", "--label", "eleven"], 2, "no class 'eleven'"),
        (["generate", "cdcgan-fashion-mnist", "--label", "Bag,11"], 2, "has no class '11'"),
        (["generate", "mlp-mnist", "--truncation", "3"], 2, "truncation"),
        (["generate", "mlp-mnist", "--seed", "-1"], 2, "seed is -1"),
        (["generate", "mlp-mnist", "--count", "20000000"], 2, "count"),
        (["generate", "mlp-mnist", "--seeds", "3,4294967296"], 2, "seed is 4294967296"),
        (["generate", "mlp-mnist", "--seeds", "3,"], 2, "3,17,99"),
        (["generate", "mlp-mnist", "--seeds", "3", "--count", "1"], 2, "--count and --seed"),
        (["generate", "mlp-mnist", "--seeds", "3", "--seed", "0"], 2, "--count and --seed"),
        (["interpolate", "mlp-mnist", "1", "4294967296"], 2, "seed_b is 4294967296"),
        (["stream", "cdcgan-mnist", "--count", "1", "--to", tmp_path / "x", "--label", "ten"], 2, "no class 'ten'"),
        (["stream", "mlp-mnist", "--count", "1", "--to", locked], 2, "must be a folder, or end in .npz"),
        (["generate", "mlp-mnist", "--out", tmp_path / "{what}.png"], 2, "{seed}"),
        (["generate", "mlp-mnist", "--out", tmp_path / "file.nonsense"], 2, ".png, .jpg"),
        (["generate", "mlp-mnist", "--format", "nonsense"], 2, ".png, .jpg"),
        (["generate", "mlp-mnist", "--out", "-", "--json"], 2, "standard output"),
        (["generate", "mlp-mnist", "--lable", "1"], 2, "--label"),
        (["generate"], 2, "argument"),
        (["generate", "mlp-mnist", "--count", "0"], 2, "count"),
        (["modles"], 2, "modles"),
        (["bench", "mlp-mnist", "--rate", "1", "--concurrency", "1"], 2, "--rate"),
        (["interpolate", "mlp-mnist", "1", "2", "-o", "walk.png"], 2, ".gif"),
        (["models", "--html", "card.html"], 2, "MODEL"),
        (["generate", "mlp-mnist", "--count", "1000", "--scale", "64"], 2, "would be 61312x61312 pixels"),
        (["generate", "mlp-mnist", "--count", "600", "--columns", "1", "-o", "x.webp", "--scale", "1"], 2, "WEBP"),
        (["generate", "mlp-mnist", "--out", "/proc/nowhere.png"], 4, "nowhere"),
        (["generate", "mlp-mnist", "--out", "/dev/full", "--format", "png"], 4, "/dev/full: No space left"),
        (["generate", "mlp-mnist", "--out", locked / "x.png"], 4, "file"),
        (["inspect", tmp_path / "nothing.png"], 4, "No such file"),
        (["models", "--ca-file", tmp_path / "nothing.pem"], 2, "nothing.pem"),
        (["generate", "mlp-mnist", "--format", "jpeg", "-o", tmp_path / "a.png"], 2, "--format is jpeg"),
        (["generate", "mlp-mnist", "--format", "bmp", "-o", tmp_path / "{seed}.png"], 2, "--format is bmp"),
        (["interpolate", "mlp-mnist", "1", "2", "--format", "webp", "-o", "a.gif"], 2, "--format is webp"),
        (["interpolate", "cdcgan-mnist", "1", "2", "--label", "1", "--label", "2"], 2, "there are 2 labels"),
        (["generate", "cdcgan-mnist", "--count", "2", "--label", "1,2,3"], 2, "there are 3 labels for 2 images"),
        (["generate", "cdcgan-mnist", "--seeds", "5", "--label", "1,2"], 2, "there are 2 labels for 1 image"),
        (["bench", "cdcgan-mnist", "--label", "1", "--label", "2"], 2, "there are 2 labels for 1 image"),
        (["generate", "cdcgan-mnist", "--label", "-1"], 2, "has no class '-1'"),
        (["generate", "cdcgan-mnist", "--label", "3,17"], 2, "has no class '17'"),
    ]
    for arguments, status, text in attempts:
        done = ganserve_here(*arguments, address=None if arguments[0] in ("inspect", "modles") else server.address)
        assert (done.returncode, done.stdout) == (status, ""), arguments
        assert done.stderr.startswith("ganserve: ")
        assert text in done.stderr
        assert done.stderr.count("\n") == 1
    unreachable = ganserve("models", address="127.0.0.1:1")
    assert unreachable.returncode == 3
    assert "no answer from 127.0.0.1:1" in unreachable.stderr
    with silent_server() as address:
        late = ganserve("models", "--timeout", "0.3", address=address)
    assert (late.returncode, late.stderr.count("\n")) == (3, 1)


def test_several_labels_may_come_with_commas_and_be_any_number(server: RunningServer, tmp_path: Path) -> None:
    def made(*arguments: str | Path) -> list[int]:
        done = ganserve(*arguments, "--out", tmp_path / "a.png", "--json", address=server.address)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout)["labels"])

    generate = ("generate", "cdcgan-mnist", "--seed", "1", "--scale", "1")
    assert made(*generate, "--count", "5", "--label", "7,8", "--label", "1") == [7, 8, 1, 7, 8]
    assert made(*generate, "--count", "1500", "--label", "7, 8") == [7, 8] * 750


def test_a_file_without_a_name_has_the_formats_ending(server: RunningServer, tmp_path: Path) -> None:
    for arguments, name in (
        (("generate", "mlp-mnist", "--format", "bmp"), "mlp-mnist.bmp"),
        (("interpolate", "mlp-mnist", "1", "2", "--format", "webp"), "mlp-mnist-1-2.webp"),
    ):
        done = ganserve(*arguments, address=server.address, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / name) as image:
            assert image.format == name.rpartition(".")[2].upper()


@pytest.mark.parametrize(
    ("arguments", "status", "meant"),
    [
        (("generate", "cdcgan-mnits"), 1, "'cdcgan-mnist'"),
        (("models", "mlp"), 1, "'mlp-mnist'"),
        (("health", "mpl-mnist"), 1, "'mlp-mnist'"),
        (("health", "mpl-mnist", "--wait", "0.5"), 1, "'mlp-mnist'"),
        (("generate", "cdcgan-fashion-mnist", "--label", "sneeker"), 2, "'Sneaker'"),
        (("generate", "cdcgan-fashion-mnist", "--label", "Bags", "--label", "dres"), 2, "'Bag' and 'Dress'"),
        (("bench", "cdcgan-fashion-mnist", "--label", "dres"), 2, "'Dress'"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(
    server: RunningServer, arguments: tuple[str, ...], status: int, meant: str
) -> None:
    done = ganserve(*arguments, address=server.address)
    assert done.returncode == status
    assert re.search(rf"; did you mean {re.escape(meant)}\?( \(request id \w+\))?\n$", done.stderr)


def test_the_port_of_the_metrics_is_told_from_a_server_that_is_not_there(server: RunningServer) -> None:
    for arguments in (("models",), ("health",), ("health", "--wait", "0.5")):
        done = ganserve(*arguments, address=server.metrics_address)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1)
        assert f"{server.metrics_address} answers, but not as gRPC does" in done.stderr
        assert "is it the port of the server's metrics" in done.stderr


def test_what_grpc_logs_stays_out_and_advice_names_flags(server: RunningServer) -> None:
    done = ganserve("models", "--tls", address=server.address)
    assert done.returncode == 1
    told = done.stderr
    assert told.startswith(f"ganserve: the server at {server.address} does not speak TLS; ")
    assert "--no-tls (GANSERVE_TLS=0)" in told
    assert told.count("\n") == 1
    asking, chatty = command("models", "--tls", address=server.address), environment(GRPC_VERBOSITY="INFO")
    verbose = subprocess.run(asking, capture_output=True, text=True, check=False, env=chatty)
    assert "ssl_transport_security" in verbose.stderr
    assert verbose.stderr.endswith(told)
    importing = [sys.executable, "-c", "import os, ganserve; print(os.environ.get('GRPC_VERBOSITY'))"]
    assert subprocess.run(importing, capture_output=True, text=True, check=True, env=environment()).stdout == "None\n"


@contextmanager
def overloaded_server(retry_after_s: float) -> Iterator[str]:
    """Send the first call away for so long, answer the second."""

    def behave(number: int, request: Any, context: Any) -> pb.ListModelsResponse:
        if number == 0:
            abort_overloaded(context, retry_after_s)
        return pb.ListModelsResponse()

    with serving(behave) as (address, _):
        yield address


def test_a_pipe_gets_one_line_where_a_server_is_waited_for_any_longer() -> None:
    with overloaded_server(3.0) as address:
        done = ganserve("models", address=address)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("ganserve: the queue is full; trying again for up to ")
    with overloaded_server(0.2) as address:
        done = ganserve("models", address=address)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_shows_what_is_waited_for_and_takes_it_away() -> None:
    with overloaded_server(0.2) as address:
        controller, terminal = os.openpty()
        arguments = command("models", address=address)
        with ended(
            Program(arguments, stdout=subprocess.PIPE, stderr=terminal, env=environment(TERM="xterm", COLUMNS="45"))
        ) as process:
            os.close(terminal)
            shown = read_terminal(controller)
            process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "the queue is full; trying again for up to …".encode() in shown  # in one line
    assert shown.endswith(b"\x1b[2K")  # the last line is erased


def test_a_terminal_is_as_before_when_an_error_is_told() -> None:
    controller, terminal = os.openpty()
    with ended(
        Program(
            command("models", address="127.0.0.1:1"),
            stdout=subprocess.PIPE,
            stderr=terminal,
            env=environment(TERM="xterm"),
        )
    ) as process:
        os.close(terminal)
        shown = read_terminal(controller)
        process.communicate(timeout=TIMEOUT_S)
    before, _, error = shown.partition(b"ganserve: ")
    assert b"no answer from 127.0.0.1:1 (connection refused); trying again for up to 3 s" in before
    assert before.endswith(b"\x1b[2K")  # the line is erased
    assert before.rindex(b"\x1b[?25h") > before.rindex(b"\x1b[?25l")  # the cursor is shown
    assert error.count(b"\n") == 1


def test_health_tells_a_pipe_once_that_it_waits() -> None:
    done = ganserve("health", "--wait", "5.5", address="127.0.0.1:1")
    assert done.returncode == 3
    waiting, error = done.stderr.splitlines()
    assert (
        "127.0.0.1:1 is not ready: no answer from 127.0.0.1:1 (connection refused); asking again for up to" in waiting
    )
    assert "was not ready within 5.5 s: no answer from 127.0.0.1:1 (connection refused); is ganserve-server" in error


def test_a_closed_pipe_and_a_full_disk_end_a_command_quietly(server: RunningServer) -> None:
    for arguments in (("models", "cdcgan-mnist", "--json"), ("generate", "mlp-mnist", "-o", "-"), ("models",)):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb") as closed:
            done = ganserve(*arguments, address=server.address, stdout=closed)
        assert (done.returncode, done.stderr) == (141, ""), arguments
        with open("/dev/full", "wb") as full:
            done = ganserve(*arguments, address=server.address, stdout=full)
        assert (done.returncode, done.stderr) == (4, "ganserve: No space left on device\n"), arguments


def test_ctrl_c_ends_a_command_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        waiting = command("models", address=f"127.0.0.1:{listening.getsockname()[1]}")
        with ended(Program(waiting, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) as process:
            connection, _ = listening.accept()  # it is in its call
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=TIMEOUT_S)
            connection.close()
    assert (process.returncode, out, err) == (130, "", "ganserve: interrupted\n")


def test_where_the_server_is_can_come_from_the_environment(server: RunningServer) -> None:
    done = ganserve("health", env=environment(GANSERVE_ADDRESS=server.address))
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
    done = ganserve("health", env=environment(GANSERVE_ADDRESS=server.address, GANSERVE_TLS="1"))
    assert done.returncode != 0


def test_help_has_an_example_and_the_exit_statuses() -> None:
    assert ganserve("--version").stdout == f"ganserve {sdk.__version__}\n"
    names = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    assert {"generate", "playground"} <= set(names)
    assert ganserve("bench", "-h").stdout == ganserve("bench", "--help").stdout
    for name in names:
        shown = ganserve(name, "--help", env=environment(COLUMNS="200")).stdout
        assert f"Example: ganserve {name}" in shown
        assert "130 stopped by Ctrl-C" in shown
    page = (Path(__file__).parents[2] / "docs" / "reference" / "exit-statuses.md").read_text()
    for status, meaning in EXIT_STATUSES.items():
        assert f"| {status:d} | {meaning} |" in page
    bare = ganserve()
    assert bare.returncode == 2
    assert all(f" {name} " in bare.stdout for name in names)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "mlp-mnist", "-o", "s3://bucket/digit.png"),
        ("interpolate", "mlp-mnist", "1", "2", "-o", "s3://bucket/walk.gif"),
        ("stream", "mlp-mnist", "--count", "2", "--to", "s3://bucket/digits"),
    ],
)
def test_a_url_is_no_file_to_write(arguments: tuple[str, ...], server: RunningServer, tmp_path: Path) -> None:
    done = ganserve(*arguments, address=server.address, cwd=tmp_path, env=environment(COLUMNS="200"))
    assert done.returncode == 2
    assert "s3:// URL" in done.stderr
    assert not list(tmp_path.iterdir())

import io
import json
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.client.program import environment, ganserve
from tests.conftest import RunningServer

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc


@pytest.fixture
def picture(client: Client, tmp_path: Path) -> Path:
    """A PNG of one image."""
    return client.generate("cdcgan-mnist", seed=5, label=7)[0].save(tmp_path / "seven.png")


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("layout", [(), ("--columns", "3", "--scale", "3")])
def test_a_picture_can_be_made_again(
    server: RunningServer, tmp_path: Path, ending: str, layout: tuple[str, ...]
) -> None:
    out = tmp_path / f"a.{ending}"
    made = ("--count", "7", "--label", "Bag", "--label", "Dress", "--truncation", "0.7", *layout)
    assert ganserve("generate", "cdcgan-fashion-mnist", *made, "-o", out, address=server.address).returncode == 0
    done = ganserve("reproduce", out, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the same: all" in done.stdout


def save_sheet_with_names(client: Client, path: Path) -> None:
    client.contact_sheet("cdcgan-fashion-mnist", columns=3, seed=2).save(path)


def save_unlike_seeds(client: Client, path: Path) -> None:
    client.generate("cdcgan-mnist", count=9, seed=3)[::2].sheet().save(path)


def save_more_than_a_request(client: Client, path: Path) -> None:
    client.generate("cdcgan-mnist", count=1100, seed=3).sheet().save(path)


def save_grey_animation(client: Client, path: Path) -> None:
    client.generate("mlp-mnist", count=5, seed=4).gif(path, scale=2, bounce=False)


def save_file_of_the_server(encoding: "pb.Encoding", layout: "pb.Layout", label: int | None) -> Callable[..., None]:
    def save(client: Client, path: Path) -> None:
        request = pb.GenerateImagesRequest(model="cdcgan-mnist", count=6, seed=8, encoding=encoding, layout=layout)
        request.labels.extend([] if label is None else [label])
        with grpc.insecure_channel(client.address) as channel:
            path.write_bytes(pb_grpc.GenerationServiceStub(channel).GenerateImages(request).files[-1])

    return save


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_sheet_with_names, "names.png"),
        (save_unlike_seeds, "seeds.png"),
        (save_more_than_a_request, "many.png"),
        (save_grey_animation, "walk.gif"),
        (save_grey_animation, "walk.webp"),
        (save_file_of_the_server(pb.ENCODING_JPEG, pb.LAYOUT_ONE_EACH, None), "one.jpg"),
        (save_file_of_the_server(pb.ENCODING_PNG, pb.LAYOUT_CONTACT_SHEET, None), "classes.png"),
        (save_file_of_the_server(pb.ENCODING_WEBP, pb.LAYOUT_CONTACT_SHEET, 3), "threes.webp"),
    ],
)
def test_what_the_sdk_and_the_server_write_can_be_made_again(
    server: RunningServer, client: Client, tmp_path: Path, save: Callable[..., None], name: str
) -> None:
    save(client, tmp_path / name)
    done = ganserve("reproduce", tmp_path / name, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the same: all" in done.stdout


def changed(picture: Path, *, by: int = 0, size: int = 28, **provenance: str | int) -> None:
    """Write the picture with one pixel so many levels off, of another size, or with another provenance."""
    with Image.open(picture) as image:
        pixels, text = np.array(image), json.loads(image.info["ganserve"])
    pixels[3, 4] = (int(pixels[3, 4]) + by) % 256
    info = PngInfo()
    info.add_text("ganserve", json.dumps({**text, **provenance}))
    Image.fromarray(pixels).resize((size, size)).save(picture, pnginfo=info)


def test_a_pixel_that_is_not_the_same_is_found(server: RunningServer, picture: Path) -> None:
    assert ganserve("reproduce", picture, address=server.address).returncode == 0
    changed(picture, by=1)
    done = ganserve("reproduce", picture, address=server.address)
    assert done.returncode == 1
    assert "different: 1 of 784 pixels differ, by 1 levels at most" in done.stdout
    done = ganserve("reproduce", picture, "--json", address=server.address)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["same"], told["compared"]) == (False, {"pixels": 784, "differing": 1, "largest": 1})
    assert ganserve("reproduce", picture, "--tolerance", "1", address=server.address).returncode == 0
    with picture.open("rb") as file:
        assert ganserve("reproduce", "-", stdin=file, address=server.address).returncode == 1


def test_a_picture_of_another_seed_or_size_is_not_the_same(server: RunningServer, picture: Path) -> None:
    changed(picture, seed=6)
    assert "different: " in ganserve("reproduce", picture, address=server.address).stdout
    changed(picture, seed=5, size=30)
    done = ganserve("reproduce", picture, address=server.address)
    assert done.returncode == 1
    assert "cut or scaled" in done.stdout


def test_another_file_under_the_same_version_is_told(server: RunningServer, picture: Path) -> None:
    changed(picture, digest="sha256:" + 64 * "0")
    done = ganserve("reproduce", picture, address=server.address)
    assert done.returncode == 0
    assert "is another file" in done.stdout


def test_what_cannot_be_made_again_is_said_in_a_line(server: RunningServer, client: Client, tmp_path: Path) -> None:
    plain, own, gone = tmp_path / "plain.png", tmp_path / "own.png", tmp_path / "gone.png"
    Image.new("L", (28, 28)).save(plain)
    client.generate("mlp-mnist", latents=np.zeros((1, client.model("mlp-mnist").latent_dim)))[0].save(own)
    client.generate("mlp-mnist")[0].save(gone)
    changed(gone, version=7)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path, told in ((plain, "doesn't say how it was made"), (own, "latents"), (gone, "version"), (text, "image")):
        done = ganserve("reproduce", path, address=server.address)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert told in done.stderr


def test_inspect_reads_a_picture_without_a_server(picture: Path) -> None:
    elsewhere = environment(GANSERVE_ADDRESS="127.0.0.1:1")
    done = ganserve("inspect", picture, env=elsewhere)
    assert done.returncode == 0
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert (facts["model"], facts["seed"], facts["label"]) == ("cdcgan-mnist", "5", "7")
    with picture.open("rb") as file:
        told = json.loads(ganserve("inspect", "-", "--json", env=elsewhere, stdin=file).stdout)
    assert (told["format"], told["width"], told["provenance"]["seed"]) == ("PNG", 28, 5)
    empty = io.BytesIO()
    Image.new("L", (28, 28)).save(empty, "PNG")
    picture.write_bytes(empty.getvalue())
    assert ganserve("inspect", picture, env=elsewhere).returncode == 1

"""The command line with a model whose images have alpha: files, their provenance, and formats that cannot hold them."""

import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from tests.client.program import ganserve
from tests.conftest import RunningServer, run_server
from tests.picture_models import picture, save_picture_model

from ganserve import Client, read_provenance
from ganserve._cli.cards import _drawn
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

SIZE = (6, 5, 4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("models")
    save_picture_model(folder, "alpha", *SIZE)
    with run_server("--models", folder, "--workers", "1") as running:
        yield running


def is_made_again(path: Path, server: RunningServer) -> bool:
    done = ganserve("reproduce", path, address=server.address)
    assert not done.stderr
    return done.returncode == 0


def change_alpha(path: Path) -> None:
    """Make an opaque pixel of a file translucent."""
    with Image.open(path) as image:
        exif, pixels = image.getexif(), np.array(image)
    row, column = np.argwhere(pixels[..., 3] == 255)[0]
    pixels[row, column, 3] = 254
    Image.fromarray(pixels).save(path, "WEBP", lossless=True, exact=True, exif=exif)


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
@pytest.mark.parametrize("name", ["sheet", "{seed}"])
def test_a_picture_with_alpha_can_be_made_again(server: RunningServer, tmp_path: Path, name: str, ending: str) -> None:
    out = tmp_path / f"{name}.{ending}"
    done = ganserve("generate", "alpha", "--count", "3", "--seed", "7", "-o", out, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    path = Path(str(out).format(seed=8))
    assert read_provenance(path).seed == (7 if name == "sheet" else 8)
    with Image.open(path) as image:
        wanted = picture(7, *SIZE).repeat(2, 0).repeat(2, 1) if name == "sheet" else picture(8, *SIZE)
        assert np.array_equal(np.asarray(image)[: len(wanted), : wanted.shape[1]], wanted)
    assert is_made_again(path, server)


@pytest.mark.parametrize("layout", ["LAYOUT_ONE_EACH", "LAYOUT_CONTACT_SHEET"])
def test_a_servers_file_can_be_made_again_and_a_change_of_alpha_is_seen(
    server: RunningServer, tmp_path: Path, layout: str
) -> None:
    path = tmp_path / "a.webp"
    request = pb.GenerateImagesRequest(model="alpha", count=3, seed=1, encoding="ENCODING_WEBP", layout=layout)
    with grpc.insecure_channel(server.address) as channel:
        path.write_bytes(pb_grpc.GenerationServiceStub(channel).GenerateImages(request).files[0])
    assert is_made_again(path, server)
    change_alpha(path)
    assert not is_made_again(path, server)


def test_an_animation_with_alpha_can_be_made_again(server: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "walk.webp"
    assert ganserve("interpolate", "alpha", "1", "2", "-o", out, address=server.address).returncode == 0
    assert is_made_again(out, server)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "alpha", "-o", "a.jpg"),
        ("generate", "alpha", "-o", "{seed}.gif"),
        ("interpolate", "alpha", "1", "2"),
        ("stream", "alpha", "--count", "3", "--to", "folder", "--format", "jpg"),
    ],
)
def test_a_format_without_alpha_is_refused(server: RunningServer, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = ganserve(*arguments, address=server.address, cwd=tmp_path)
    assert done.returncode == 2
    assert "no alpha channel" in done.stderr
    assert "WEBP" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("to", ["folder", "images.npz"])
def test_a_data_set_with_alpha_is_written(server: RunningServer, tmp_path: Path, to: str) -> None:
    done = ganserve("stream", "alpha", "--count", "3", "--seed", "7", "--to", tmp_path / to, address=server.address)
    assert (done.returncode, done.stderr) == (0, "")
    if to == "folder":
        images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / to).glob("*.png"))]
    else:
        images = list(np.load(tmp_path / to)["images"])
        assert is_made_again(tmp_path / to, server)
    assert np.array_equal(images, [picture(seed, *SIZE) for seed in (7, 8, 9)])


def test_a_notebook_shows_alpha(server: RunningServer) -> None:
    with Client(server.address) as client:
        shown = client.generate("alpha", seed=7)[0]._repr_png_()
    with Image.open(io.BytesIO(shown)) as image:
        assert image.mode == "RGBA"


def test_models_are_listed_with_alpha(server: RunningServer) -> None:
    assert "5x6 colour and alpha" in ganserve("models", address=server.address).stdout


def test_a_terminal_shows_transparent_pixels_black() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[[200, 100, 50, 0], [200, 100, 50, 255]]], np.uint8)).save(file, "PNG")
    assert _drawn(file.getvalue())._pixels[0].tolist() == [[0, 0, 0], [200, 100, 50]]  # type: ignore[union-attr]

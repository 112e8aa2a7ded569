"""Model cards: their golden images, and what a gRPC client with its default limits gets of cards that are large."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image
from tests.conftest import run_server
from tests.model_files import model_of_picture

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.compute.model import ModelVersion
from ganserve_server.repository.verify import CARD_KEY, ModelRejected, load_version

PICTURE = np.fromfunction(lambda row, column, _: (7 * row + 3 * column) % 256, (130, 70, 1)).astype(np.uint8)
NOISE = np.random.RandomState(0).randint(0, 256, (512, 512, 3), np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(golden: pb.GoldenImage) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(golden.png)))


def golden_file(path: Path, picture: NDArray[np.uint8], golden: bytes, *, count: int = 1, exact: bool = False) -> Path:
    """Write a model that makes this picture, with a card that has this PNG; `exact`: and the picture's digest."""
    height, width, channels = picture.shape
    digest = f"sha256:{hashlib.sha256(picture.tobytes()).hexdigest()}" if exact else ""
    images = [pb.GoldenImage(seed=seed, digest=digest, png=golden) for seed in range(count)]
    card = pb.ModelCard(latent_dim=4, height=height, width=width, channels=channels, golden_images=images)
    card.training.images_seen = 7
    card.training.configuration["preset"] = "pggan"
    return card_file(path, picture, card)


def card_file(path: Path, picture: NDArray[np.uint8], card: pb.ModelCard) -> Path:
    model = model_of_picture(picture)
    model.metadata_props.add(key=CARD_KEY, value=json_format.MessageToJson(card))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def load(path: Path) -> ModelVersion:
    return load_version("name", 1, path, max_model_mib=16, provider="cpu", threads=1)


def brighter(pixels: NDArray[np.uint8], by: int) -> NDArray[np.uint8]:
    """Change one value, of the first pixel of the last row, by so many grey levels."""
    changed = pixels.copy()
    changed[-1, 0, 0] += by
    return changed


def test_a_golden_image_of_130x70_shows_every_third_pixel(tmp_path: Path) -> None:
    """A whole picture, as files of before thumbnails have it, becomes one when the file is loaded."""
    (golden,) = load(golden_file(tmp_path / "model.onnx", PICTURE, png(PICTURE))).card.golden_images
    shown = pixels_of(golden)
    assert shown.shape == (44, 24)
    assert shown[0].tolist()[:4] == [0, 9, 18, 27]
    assert shown[:4, 0].tolist() == [0, 21, 42, 63]
    assert shown[43, 23] == (7 * 129 + 3 * 69) % 256 == 86


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [
        (64, 64, (64, 64)),
        (65, 64, (22, 22)),  # every third: every second would do, but 2 is even
        (192, 20, (64, 7)),
        (193, 20, (39, 4)),  # every fifth
        (1, 700, (1, 64)),  # every eleventh
    ],
)
def test_the_longer_side_decides_how_many_pixels_a_golden_image_shows(
    height: int, width: int, shown: tuple[int, int], tmp_path: Path
) -> None:
    picture = np.random.RandomState(1).randint(0, 256, (height, width, 3), np.uint8)
    (golden,) = load(golden_file(tmp_path / "model.onnx", picture, png(picture))).card.golden_images
    assert pixels_of(golden).shape == (*shown, 3)


@pytest.mark.parametrize("whole", [True, False])
def test_a_golden_image_may_differ_by_one_grey_level(whole: bool, tmp_path: Path) -> None:
    wanted = PICTURE if whole else PICTURE[::3, ::3]
    (golden,) = load(golden_file(tmp_path / "model.onnx", PICTURE, png(brighter(wanted, 1)))).card.golden_images
    assert np.array_equal(pixels_of(golden), brighter(PICTURE[::3, ::3], 1)[..., 0])  # the file's, not the server's
    with pytest.raises(ModelRejected, match="golden image of seed 0 differs by up to 2 grey levels"):
        load(golden_file(tmp_path / "model.onnx", PICTURE, png(brighter(wanted, 2))))


def test_a_whole_golden_image_is_compared_whole(tmp_path: Path) -> None:
    changed = PICTURE.copy()
    changed[-1, 1, 0] += 2  # which no thumbnail shows
    with pytest.raises(ModelRejected, match="2 grey levels"):
        load(golden_file(tmp_path / "model.onnx", PICTURE, png(changed)))


def test_a_golden_image_of_the_right_digest_is_right_whatever_its_png_is(tmp_path: Path) -> None:
    (golden,) = load(golden_file(tmp_path / "model.onnx", PICTURE, b"x" * (1 << 21), exact=True)).card.golden_images
    assert np.array_equal(pixels_of(golden), PICTURE[::3, ::3, 0])


@pytest.mark.parametrize("size", [(24, 44), (60, 129), (3000, 3000)])
def test_a_golden_image_of_another_size_is_rejected_before_it_is_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    height, width = size
    cut = png(np.zeros((height, width, 1), np.uint8))[:60]  # its header is whole; decoding fails
    with pytest.raises(ModelRejected, match=rf"{width}x{height} pixels; it must have 24x44 .* or 70x130$"):
        load(golden_file(tmp_path / "model.onnx", PICTURE, cut))


def test_the_golden_images_of_a_card_are_few(tmp_path: Path) -> None:
    good = golden_file(tmp_path / "model.onnx", PICTURE, png(PICTURE[::3, ::3]), count=64)
    assert len(load(good).card.golden_images) == 64
    with pytest.raises(ModelRejected, match="65 golden_images; at most 64"):
        load(golden_file(tmp_path / "model.onnx", PICTURE, png(PICTURE[::3, ::3]), count=65))


def card_of_bytes(size: int) -> pb.ModelCard:
    card = pb.ModelCard(latent_dim=4, height=2, width=2, channels=1, dataset="x" * size)
    card.dataset = card.dataset[card.ByteSize() - size :]
    assert card.ByteSize() == size
    return card


def test_a_card_has_a_mebibyte_at_most(tmp_path: Path) -> None:
    dot = np.zeros((2, 2, 1), np.uint8)
    load(card_file(tmp_path / "model.onnx", dot, card_of_bytes(1 << 20)))
    with pytest.raises(ModelRejected, match=r"1,048,577 bytes; at most 1,048,576 .* shorten class_names"):
        load(card_file(tmp_path / "model.onnx", dot, card_of_bytes((1 << 20) + 1)))


PICTURES, TEXTS = [f"pictures-{number}" for number in range(6)], [f"texts-{number}" for number in range(4)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve models of 512 pixels: "old" with whole golden images; and models with texts of 900,000 bytes."""
    models = tmp_path_factory.mktemp("models")
    golden_file(models / "old" / "1" / "model.onnx", NOISE, png(NOISE), count=10)
    for name in PICTURES:
        golden_file(models / name / "1" / "model.onnx", NOISE, png(NOISE[::9, ::9]), count=64)
    for name in TEXTS:
        card_file(models / name / "1" / "model.onnx", np.zeros((2, 2, 1), np.uint8), card_of_bytes(900_000))
    with run_server("--workers=1", "--models", models) as running:
        yield running.address


def test_a_clients_default_limit_is_enough_to_list_models(address: str) -> None:
    """With their golden images, the six cards of `PICTURES` have more than 4 MiB; the ones of `TEXTS` 3.6 MB."""
    with grpc.insecure_channel(address) as channel:
        service = pb_grpc.GenerationServiceStub(channel)
        first = service.ListModels(pb.ListModelsRequest())
        second = service.ListModels(pb.ListModelsRequest(page_token=first.next_page_token))
    assert [model.name for model in first.models] == ["old", *PICTURES, *TEXTS[:3]]
    assert [model.name for model in second.models] == TEXTS[3:]
    assert second.next_page_token == ""
    training = pb.Training(images_seen=7)
    listed = pb.ModelCard(latent_dim=4, height=512, width=512, channels=3, training=training)
    assert [model.card for model in first.models[:7]] == [listed] * 7
    assert not first.models[7].card.HasField("training")


@pytest.mark.parametrize(("name", "count"), [("old", 10), (PICTURES[0], 64), (TEXTS[0], 0)])
def test_a_clients_default_limit_is_enough_for_any_model(address: str, name: str, count: int) -> None:
    with grpc.insecure_channel(address) as channel:
        answer = pb_grpc.GenerationServiceStub(channel).GetModel(pb.GetModelRequest(model=name))
    assert answer.ByteSize() < 1 << 20
    card = answer.model.card
    assert len(card.golden_images) == count
    assert all(np.array_equal(pixels_of(golden), NOISE[::9, ::9]) for golden in card.golden_images)
    assert dict(card.training.configuration) == ({"preset": "pggan"} if count else {})


def test_the_sdk_reads_all_pages(address: str) -> None:
    with Client(address) as client:
        assert [model.name for model in client.models()] == ["old", *PICTURES, *TEXTS]

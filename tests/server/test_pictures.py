"""Images of the sizes and channels that models of photographs have: alpha, and messages of a bounded size."""

import asyncio
import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from tests.conftest import RunningServer, run_server
from tests.picture_models import picture, save_picture_model
from tests.server.test_http2 import memory_kib
from tests.wire import INITIAL_WINDOW_SIZE, STREAM, Peer, granted, head, request

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.compute.model import ModelVersion
from ganserve_server.observe.metrics import Metrics
from ganserve_server.repository.table import ModelTable
from ganserve_server.repository.verify import CARD_KEY, ModelRejected, load_version
from ganserve_server.services.generation import GenerationServicer
from ganserve_server.services.messages import images_limit, parse
from ganserve_server.settings import ServerSettings

SIZES = {"alpha": (6, 5, 4), "photo": (256, 256, 3), "icon": (64, 64, 4)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("models")
    for name, size in SIZES.items():
        save_picture_model(folder, name, *size)
    with run_server("--models", folder, "--workers", "1") as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[pb_grpc.GenerationServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def pictures(model: str, seeds: range) -> np.ndarray:
    return np.stack([picture(seed, *SIZES[model]) for seed in seeds])


def opened(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        assert image.mode == "RGBA"
        return np.asarray(image)


def identity(file: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(file)) as image:
        return dict(json.loads(image.info["ganserve"] if image.format == "PNG" else image.getexif()[0x010E]))


def test_a_raw_image_with_alpha_has_four_channels(stub: pb_grpc.GenerationServiceStub) -> None:
    response = stub.GenerateImages(pb.GenerateImagesRequest(model="alpha", count=3, seed=5))
    assert (response.count, response.height, response.width, response.channels) == (3, 6, 5, 4)
    wanted = pictures("alpha", range(5, 8))
    assert response.pixels == wanted.tobytes()
    assert set(wanted[..., 3].flat) >= {0, 255}
    assert wanted[wanted[..., 3] == 0].any()  # transparent pixels have a colour
    assert stub.GetModel(pb.GetModelRequest(model="alpha")).model.card.channels == 4


@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_a_file_keeps_alpha_and_the_colour_of_transparent_pixels(
    encoding: str, stub: pb_grpc.GenerationServiceStub
) -> None:
    request = pb.GenerateImagesRequest(model="alpha", count=3, seed=5, encoding=f"ENCODING_{encoding}")
    files = stub.GenerateImages(request).files
    assert np.array_equal([opened(file) for file in files], pictures("alpha", range(5, 8)))
    assert identity(files[2])["seed"] == 7


@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_a_contact_sheet_of_images_with_alpha_is_transparent_between_them(
    encoding: str, stub: pb_grpc.GenerationServiceStub
) -> None:
    request = pb.GenerateImagesRequest(
        model="alpha", count=3, seed=5, encoding=f"ENCODING_{encoding}", layout="LAYOUT_CONTACT_SHEET"
    )
    (file,) = stub.GenerateImages(request).files
    wanted = np.zeros((6 + 2 + 6, 5 + 2 + 5, 4), np.uint8)
    wanted[:6, :5], wanted[:6, 7:], wanted[8:, :5] = pictures("alpha", range(5, 8))
    assert np.array_equal(opened(file), wanted)


@pytest.mark.parametrize("layout", ["LAYOUT_ONE_EACH", "LAYOUT_CONTACT_SHEET"])
def test_a_jpeg_of_images_with_alpha_is_refused(layout: str, stub: pb_grpc.GenerationServiceStub) -> None:
    request = pb.GenerateImagesRequest(model="alpha", encoding="ENCODING_JPEG", layout=layout)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateImages(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "PNG or WEBP" in caught.value.details()
    trailers = dict(caught.value.trailing_metadata())
    (detail,) = [
        found
        for part in status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
        if part.Unpack(found := error_details_pb2.BadRequest())
    ]
    assert detail.field_violations[0].field == "encoding"
    assert stub.GenerateImages(pb.GenerateImagesRequest(model="photo", encoding="ENCODING_JPEG")).files


def test_the_open_inference_protocol_has_alpha(server: RunningServer) -> None:
    with triton.InferenceServerClient(server.address) as client:
        seed = triton.InferInput("seed", [2], "UINT32")
        seed.set_data_from_numpy(np.array([5, 6], np.uint32))
        made = client.infer("alpha", [seed]).as_numpy("image")
        (output,) = client.get_model_metadata("alpha").outputs
    assert np.array_equal(made, pictures("alpha", range(5, 7)))
    assert list(output.shape) == [-1, 6, 5, 4]


def test_what_streams_make_before_it_is_read_is_bounded(tmp_path: Path) -> None:
    """100 streams of 128 icons, in messages of 64 of them, 1 MiB.

    All first messages wait in a pool. Until they have 16 MiB, a stream also makes its second message: 16 streams do.
    """
    save_picture_model(tmp_path, "icon", 64, 64, 4)
    made = 'ganserve_images_total{model="icon",version="1"}'
    generate = pb.GenerateImagesRequest(model="icon", count=128, seed=1)
    asked = pb.StreamImagesRequest(generate=generate).SerializeToString()
    with run_server("--models", tmp_path, "--workers", "1", "--max-queue-images", "100000") as server:
        with Peer(server.address, {INITIAL_WINDOW_SIZE: 1 << 24}) as peer:
            granted(peer, 0, 1 << 24)
            assert peer.call(request(64, "icon")).status == 0
            before = memory_kib(server)
        with Peer(server.address, {INITIAL_WINDOW_SIZE: 0}) as deaf, Peer(server.address) as other:
            for _ in range(100):
                deaf.start(asked, head(STREAM))
            while (images := server.scrape()[made]) < 64 + 100 * 64 + 16 * 64:
                assert server.process.poll() is None
            for _ in range(3):  # turns of the queue, in which more would be made
                assert other.call(request(1, "icon")).status == 0
            assert (images, server.scrape()[made] - images) == (64 + 100 * 64 + 16 * 64, 3)
            assert memory_kib(server) - before < 200_000  # 116 MiB, and 30 for everything else


def load(path: Path) -> ModelVersion:
    return load_version("name", 1, path, max_model_mib=64, provider="cpu", threads=1)


def with_golden_image(path: Path, pixels: np.ndarray) -> Path:
    """Add the image of seed 3 to a model's card, with the digest of no image: the PNG decides."""
    model, file = onnx.load(path), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    card = json_format.Parse(model.metadata_props[0].value, pb.ModelCard())
    card.golden_images.add(seed=3, digest=f"sha256:{hashlib.sha256().hexdigest()}", png=file.getvalue())
    del model.metadata_props[:]
    model.metadata_props.add(key=CARD_KEY, value=json_format.MessageToJson(card))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("levels", "fits"), [(1, True), (2, False)])
def test_a_golden_image_is_compared_in_its_alpha_too(levels: int, fits: bool, tmp_path: Path) -> None:
    pixels = picture(3, 6, 5, 4)
    pixels[0, 0, 3] += levels
    path = with_golden_image(save_picture_model(tmp_path, "alpha", 6, 5, 4), pixels)
    with contextlib.nullcontext() if fits else pytest.raises(ModelRejected, match="differs by up to 2 grey levels"):
        assert load(path).card.channels == 4


@pytest.mark.parametrize(
    ("size", "reason"),
    [((6, 5, 2), "1, 3 or 4 channels"), ((4097, 1, 1), "4097x1 .* 4096"), ((1, 4097, 1), "1x4097 .* 4096")],
)
def test_images_of_two_channels_or_more_than_4096_pixels_on_a_side_are_rejected(
    size: tuple[int, int, int], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelRejected, match=reason):
        load(save_picture_model(tmp_path, "wrong", *size))


@pytest.mark.parametrize("size", [(4096, 1, 1), (1, 4096, 4)])
def test_images_of_4096_pixels_on_a_side_are_served(size: tuple[int, int, int], tmp_path: Path) -> None:
    assert load(save_picture_model(tmp_path, "large", *size)).pixel_bytes == 4096 * size[2]


@pytest.mark.parametrize(
    ("pixel_bytes", "images"),
    [
        (28 * 28, 1024),
        (256 * 256 * 3, 341),  # 64 MiB / 192 KiB = 341.3
        (1024 * 1024 * 3, 21),
        (1024 * 1024 * 4, 16),
        (4096 * 4096 * 4, 1),
        (4097 * 4096 * 4, 1),
    ],
)
def test_an_answer_has_at_most_64_mebibytes_of_pixels_or_one_image(pixel_bytes: int, images: int) -> None:
    assert images_limit(cast(ModelVersion, SimpleNamespace(pixel_bytes=pixel_bytes)), 1024) == images


@pytest.mark.parametrize("encoding", ["RAW", "PNG"])
def test_a_stream_of_large_images_fits_the_messages_of_any_client(
    encoding: str, stub: pb_grpc.GenerationServiceStub
) -> None:
    """64 images, a batch, would have 12 MiB; gRPC's clients accept 4 MiB."""
    generate = pb.GenerateImagesRequest(model="photo", count=64, seed=1, encoding=f"ENCODING_{encoding}")
    chunks = [message.chunk for message in stub.StreamImages(pb.StreamImagesRequest(generate=generate))]
    assert [seed for chunk in chunks for seed in chunk.seeds] == list(range(1, 65))
    assert all(chunk.count <= 20 for chunk in chunks)


@pytest.mark.parametrize("encoding", ["PNG", "WEBP"])
def test_files_that_several_threads_encode_are_in_order(encoding: str, stub: pb_grpc.GenerationServiceStub) -> None:
    """An icon has 16 KiB: a thread encodes four at once."""
    request = pb.GenerateImagesRequest(model="icon", count=18, seed=1, encoding=f"ENCODING_{encoding}")
    files = stub.GenerateImages(request).files
    assert np.array_equal([opened(file) for file in files], pictures("icon", range(1, 19)))
    assert [identity(file)["seed"] for file in files] == list(range(1, 19))


async def test_a_call_with_one_image_is_encoded_among_those_of_a_large_call(tmp_path: Path) -> None:
    """With one thread: the large call has at most two pieces in its queue, of nine."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    model = load(save_picture_model(tmp_path, "icon", 64, 64, 4))
    servicer = GenerationServicer(ModelTable(), ServerSettings(threads=2), Metrics())
    ended: list[int] = []

    async def encode(count: int) -> None:
        message = pb.GenerateImagesRequest(model="icon", count=count, seed=1, encoding="ENCODING_PNG")
        request = parse(message, model, max_images=100, max_values=100)
        call: Any = SimpleNamespace(encode_s=0.0)
        answer = await servicer.encoded(
            request, request.draw(0, count), pictures("icon", range(1, 1 + count)), b"", call
        )
        assert len(pb.GenerateImagesResponse.FromString(answer).files) == count
        ended.append(count)

    await asyncio.gather(encode(36), encode(1))
    assert ended == [1, 36]

"""GenerationService on the wire: the determinism contract, the encodings, and bad input of each kind."""

import io
import json
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.conftest import RunningServer

from ganserve._formats import ENCODED, ENCODED_NAMES, FORMATS
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import InvalidRequest
from ganserve_server.services.messages import parse

Start = Callable[..., RunningServer]
MODELS = ("cdcgan-fashion-mnist", "cdcgan-mnist", "dcgan-mnist", "mlp-mnist")


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[pb_grpc.GenerationServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def pixels(response: pb.GenerateImagesResponse) -> np.ndarray:
    shape = (response.count, response.height, response.width, response.channels)
    return np.frombuffer(response.pixels, np.uint8).reshape(shape)


def make(stub: pb_grpc.GenerationServiceStub, **fields: Any) -> np.ndarray:
    return pixels(stub.GenerateImages(pb.GenerateImagesRequest(**fields), timeout=60))


@pytest.mark.parametrize("model", MODELS)
def test_an_image_has_the_same_bytes_however_it_was_made(
    model: str, stub: pb_grpc.GenerationServiceStub, start_server: Start
) -> None:
    wanted = make(stub, model=model, count=1000, seed=100)
    assert len(np.unique(wanted.reshape(1000, -1), axis=0)) > 900
    for index in (0, 1, 63, 64, 500, 999):
        assert np.array_equal(make(stub, model=model, seed=100 + index)[0], wanted[index]), f"alone: image {index}"
    assert np.array_equal(make(stub, model=model, count=64, seed=130), wanted[30:94])
    stream = stub.StreamImages(pb.StreamImagesRequest(generate={"model": model, "count": 1000, "seed": 100}))
    assert np.array_equal(np.concatenate([pixels(message.chunk) for message in stream]), wanted)
    # All at once, so that callers share batches.
    calls = [
        stub.GenerateImages.future(pb.GenerateImagesRequest(model=model, seed=100 + i, count=3)) for i in range(99)
    ]
    for index, call in enumerate(calls):
        assert np.array_equal(pixels(call.result()), wanted[index : index + 3]), f"among others: image {index}"
    other = start_server("--threads", "1", "--max-batch-size", "7")
    with grpc.insecure_channel(other.address) as channel:
        second = pb_grpc.GenerationServiceStub(channel)
        assert np.array_equal(make(second, model=model, count=1000, seed=100), wanted)


def test_without_labels_the_classes_take_turns(stub: pb_grpc.GenerationServiceStub) -> None:
    response = stub.GenerateImages(pb.GenerateImagesRequest(model="cdcgan-mnist", count=12, seed=2**32 - 3))
    assert list(response.labels) == [seed % 10 for seed in response.seeds]
    alone = make(stub, model="cdcgan-mnist", seed=response.seeds[5], labels=[response.labels[5]])
    assert np.array_equal(alone[0], pixels(response)[5])


@pytest.mark.parametrize("encoding", ENCODED_NAMES)
def test_an_encoded_image_shows_the_pixels_and_says_how_to_make_it_again(
    encoding: str, stub: pb_grpc.GenerationServiceStub
) -> None:
    fields: dict[str, Any] = {"model": "cdcgan-mnist", "count": 6, "seed": 5, "truncation": 0.5}
    response = stub.GenerateImages(pb.GenerateImagesRequest(encoding=f"ENCODING_{encoding}", **fields))
    assert len(response.files) == 6
    assert not response.pixels
    for index, (file, wanted) in enumerate(zip(response.files, make(stub, **fields), strict=True)):
        with Image.open(io.BytesIO(file)) as image:
            assert image.format == encoding
            difference = np.abs(np.asarray(image.convert("L")).astype(int) - wanted[:, :, 0])
            text = image.info["ganserve"] if encoding == "PNG" else image.getexif()[0x010E]
        assert not difference.any() if FORMATS[encoding].lossless else difference.mean() < 8
        identity = json.loads(text)
        assert identity == {
            "model": "cdcgan-mnist",
            "version": 1,
            "digest": response.digest,
            "seed": 5 + index,
            "label": 5 + index if index < 5 else 0,
            "truncation": 0.5,
        }


def test_an_encoding_that_the_table_of_formats_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that was only in the enum once gave WebP files under the new name."""
    table = {f"ENCODING_{each.name}": number for number, each in ENCODED.items()}
    assert dict(pb.Encoding.items()) == {"ENCODING_UNSPECIFIED": 0, "ENCODING_RAW": 1, **table}
    monkeypatch.delitem(ENCODED, pb.ENCODING_WEBP)
    model = cast(ModelVersion, SimpleNamespace(classes=0))
    with pytest.raises(InvalidRequest) as caught:
        parse(pb.GenerateImagesRequest(encoding=pb.ENCODING_WEBP), model, max_images=1, max_values=1)
    assert caught.value.field == "encoding"


def test_negative_zero_is_zero(stub: pb_grpc.GenerationServiceStub) -> None:
    for truncation in (-0.0, 0.0, -0.0):
        response = stub.GenerateImages(pb.GenerateImagesRequest(model="mlp-mnist", seed=1, truncation=truncation))
        assert math.copysign(1, response.truncation) == 1


def test_the_identity_can_be_left_out(stub: pb_grpc.GenerationServiceStub) -> None:
    request = pb.GenerateImagesRequest(model="mlp-mnist", encoding="ENCODING_PNG", omit_identity=True)
    with Image.open(io.BytesIO(stub.GenerateImages(request).files[0])) as image:
        assert "ganserve" not in image.info


def test_a_contact_sheet_is_one_picture_of_all(stub: pb_grpc.GenerationServiceStub) -> None:
    fields: dict[str, Any] = {"model": "mlp-mnist", "count": 5, "seed": 3}
    request = pb.GenerateImagesRequest(encoding="ENCODING_PNG", layout="LAYOUT_CONTACT_SHEET", **fields)
    (file,) = stub.GenerateImages(request).files
    sheet = np.asarray(Image.open(io.BytesIO(file)))
    assert sheet.shape == (2 * 28 + 2, 3 * 28 + 2 * 2)
    assert np.array_equal(sheet[30:, 30:58], make(stub, **fields)[4, :, :, 0])


LATENT_DIM = 64
BAD_REQUESTS: dict[str, tuple[dict[str, Any], grpc.StatusCode, str | None, str]] = {
    "no model": ({}, grpc.StatusCode.NOT_FOUND, None, "cdcgan-mnist"),
    "unknown model": ({"model": "../etc"}, grpc.StatusCode.NOT_FOUND, None, "cdcgan-mnist"),
    "unknown version": ({"version": 99}, grpc.StatusCode.NOT_FOUND, None, "it has 1"),
    "no images": ({"count": 0}, grpc.StatusCode.INVALID_ARGUMENT, "count", "for 1 to 10"),
    "too many images": ({"count": 1025}, grpc.StatusCode.INVALID_ARGUMENT, "count", "1 to 1024"),
    "negative truncation": ({"truncation": -0.1}, grpc.StatusCode.INVALID_ARGUMENT, "truncation", "0 to 2"),
    "huge truncation": ({"truncation": 2.5}, grpc.StatusCode.INVALID_ARGUMENT, "truncation", "0 to 2"),
    "truncation NaN": ({"truncation": math.nan}, grpc.StatusCode.INVALID_ARGUMENT, "truncation", "0 to 2"),
    "label too high": ({"labels": [10]}, grpc.StatusCode.INVALID_ARGUMENT, "labels", "0 to 9"),
    "too few labels": ({"count": 3, "labels": [1, 2]}, grpc.StatusCode.INVALID_ARGUMENT, "labels", "for each image"),
    "unknown class": ({"label_names": ["cat"]}, grpc.StatusCode.INVALID_ARGUMENT, "label_names", "0, 1, 2"),
    "a class without a name": (
        {"label_names": [""]},
        grpc.StatusCode.INVALID_ARGUMENT,
        "label_names",
        "no class ''",
    ),
    "two kinds of label": (
        {"labels": [1], "label_names": ["1"]},
        grpc.StatusCode.INVALID_ARGUMENT,
        "label_names",
        "not both",
    ),
    "label without classes": (
        {"model": "mlp-mnist", "labels": [1]},
        grpc.StatusCode.INVALID_ARGUMENT,
        "labels",
        "unconditional",
    ),
    "latents that overflow": (
        {"latents": {"values": [3e38] * LATENT_DIM}, "labels": [1], "truncation": 2.0},
        grpc.StatusCode.INVALID_ARGUMENT,
        "latents",
        "scaling by truncation",
    ),
    "a million labels": (
        {"count": 5, "labels": [1] * 1_000_000},
        grpc.StatusCode.INVALID_ARGUMENT,
        "labels",
        "at most 1024",
    ),
    "more latents than images allowed": (
        {"latents": {"values": [0] * (1025 * LATENT_DIM)}},
        grpc.StatusCode.INVALID_ARGUMENT,
        "latents",
        "1024 latents",
    ),
    "a very long name": ({"model": "x" * 20_000}, grpc.StatusCode.NOT_FOUND, None, "…"),
    "a long name of no ASCII": ({"label_names": ["ü" * 20_000]}, grpc.StatusCode.INVALID_ARGUMENT, "label_names", "…"),
    "no latents": ({"latents": {}}, grpc.StatusCode.INVALID_ARGUMENT, "latents", "multiple of 64"),
    "latents cut short": ({"latents": {"values": [0] * 65}}, grpc.StatusCode.INVALID_ARGUMENT, "latents", "65"),
    "latents NaN": (
        {"latents": {"values": [math.nan] * LATENT_DIM}, "labels": [1]},
        grpc.StatusCode.INVALID_ARGUMENT,
        "latents",
        "finite",
    ),
    "latents without labels": (
        {"latents": {"values": [0] * LATENT_DIM}},
        grpc.StatusCode.INVALID_ARGUMENT,
        "labels",
        "need labels",
    ),
    "latents and another count": (
        {"latents": {"values": [0] * LATENT_DIM}, "labels": [1], "count": 2},
        grpc.StatusCode.INVALID_ARGUMENT,
        "count",
        "1 latents",
    ),
    "unknown encoding": ({"encoding": 77}, grpc.StatusCode.INVALID_ARGUMENT, "encoding", "RAW, PNG"),
    "unknown layout": ({"layout": 77}, grpc.StatusCode.INVALID_ARGUMENT, "layout", "CONTACT_SHEET"),
    "sheet of raw": ({"layout": "LAYOUT_CONTACT_SHEET"}, grpc.StatusCode.INVALID_ARGUMENT, "layout", "PNG"),
}


def _call(stub: pb_grpc.GenerationServiceStub, request: pb.GenerateImagesRequest, *, streamed: bool) -> None:
    if streamed:
        list(stub.StreamImages(pb.StreamImagesRequest(generate=request), timeout=60))
    else:
        stub.GenerateImages(request, timeout=60)


@pytest.mark.parametrize("kind", BAD_REQUESTS)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_input_gets_its_status_and_names_field_and_limit(
    kind: str, streamed: bool, stub: pb_grpc.GenerationServiceStub
) -> None:
    fields, code, field, text = BAD_REQUESTS[kind]
    request = pb.GenerateImagesRequest(**({"model": "cdcgan-mnist"} | fields if kind != "no model" else fields))
    with pytest.raises(grpc.RpcError) as caught:
        _call(stub, request, streamed=streamed and "too many" not in kind)
    error: Any = caught.value
    assert error.code() is code
    assert text in error.details()
    trailer = dict(error.trailing_metadata())
    assert trailer["x-request-id"]
    details = status_pb2.Status.FromString(trailer["grpc-status-details-bin"])
    assert (details.code, details.message) == (code.value[0], error.details())
    info = error_details_pb2.ErrorInfo.FromString(details.details[-1].value)
    assert (info.domain, info.reason.isupper()) == ("ganserve", True)
    if field is not None:
        violations = error_details_pb2.BadRequest.FromString(details.details[0].value).field_violations
        assert [violation.field for violation in violations] == [field]


def test_a_stream_has_no_contact_sheet(stub: pb_grpc.GenerationServiceStub) -> None:
    fields = {"model": "mlp-mnist", "layout": "LAYOUT_CONTACT_SHEET", "encoding": "ENCODING_PNG"}
    with pytest.raises(grpc.RpcError, match="GenerateImages"):
        list(stub.StreamImages(pb.StreamImagesRequest(generate=fields)))


def test_the_request_id_comes_back(stub: pb_grpc.GenerationServiceStub) -> None:
    _, call = stub.GenerateImages.with_call(
        pb.GenerateImagesRequest(model="mlp-mnist"), metadata=(("x-request-id", "mine"),)
    )
    assert dict(call.trailing_metadata())["x-request-id"] == "mine"
    _, call = stub.GenerateImages.with_call(
        pb.GenerateImagesRequest(model="mlp-mnist"), metadata=(("x-request-id", "too long " * 20),)
    )
    assert " " not in dict(call.trailing_metadata())["x-request-id"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_hostile_bytes_never_reach_internal(content: bytes, server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/ganserve.v1.GenerationService/GenerateImages")
        error = call.future(content, timeout=10).exception()
    codes = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert error is None or error.code() in codes, error

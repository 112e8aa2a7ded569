"""The Open Inference Protocol, by Triton's own client: the same images as GenerationService's, and each error."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.descriptor import FieldDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import RunningServer
from tritonclient.grpc import service_pb2 as triton_pb
from tritonclient.grpc import service_pb2_grpc as triton_pb_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.inputs import Inputs
from ganserve_server.errors import InvalidRequest, ModelNotFound
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.queueing.jobs import Made
from ganserve_server.repository.table import ModelTable
from ganserve_server.repository.verify import load_version
from ganserve_server.services.administration import RepositoryServicer
from ganserve_server.services.health import HealthServicer
from ganserve_server.services.open_inference import SERVICE, InferenceServicer, _draw
from ganserve_server.settings import BUNDLED_MODELS, ServerSettings
from ganserve_server.transport.grpc_server import GrpcServer
from ganserve_server.transport.limits import Limits

Start = Callable[..., RunningServer]
MODELS = ("cdcgan-fashion-mnist", "cdcgan-mnist", "dcgan-mnist", "mlp-mnist")
LATENT_DIM = 64  # of cdcgan-mnist
LATENTS = np.random.RandomState(7).standard_normal((300, LATENT_DIM)).astype(np.float32)
LABELS = np.arange(300) % 10


@pytest.fixture(scope="module")
def infer_client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[triton_pb_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield triton_pb_grpc.GRPCInferenceServiceStub(channel)


def tensors(library: Any = triton, **arrays: np.ndarray) -> list[triton.InferInput]:
    inputs = []
    for name, array in arrays.items():
        inputs.append(library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def test_triton_knows_the_same_field_numbers() -> None:
    """Every message and method of ours is in the published definition, as it is there."""

    def fields(message: Any) -> dict[str, tuple[int, int, bool]]:
        return {
            field.name: (field.number, field.type, field.label == FieldDescriptor.LABEL_REPEATED)
            for field in message.fields
        }

    def compare(ours: Any, theirs: Any) -> None:
        assert fields(ours) == fields(theirs), ours.full_name
        for nested in ours.nested_types:
            compare(nested, theirs.nested_types_by_name[nested.name])

    ours = grpc_service_pb2.DESCRIPTOR
    assert len(ours.message_types_by_name) > 18
    for name, message in ours.message_types_by_name.items():
        compare(message, triton_pb.DESCRIPTOR.message_types_by_name[name])
    published = triton_pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert published.full_name == SERVICE
    for method in ours.services_by_name["GRPCInferenceService"].methods:
        theirs = published.methods_by_name[method.name]
        assert (method.client_streaming, method.server_streaming) == (theirs.client_streaming, theirs.server_streaming)
        assert (method.input_type.full_name, method.output_type.full_name) == (
            theirs.input_type.full_name,
            theirs.output_type.full_name,
        )


def test_the_server_is_live_and_ready_and_says_what_it_is(infer_client: triton.InferenceServerClient) -> None:
    assert infer_client.is_server_live()
    assert infer_client.is_server_ready()
    metadata = infer_client.get_server_metadata()
    assert metadata.name == "ganserve"
    assert metadata.version
    assert "model_repository" in metadata.extensions


def test_a_server_that_drains_is_live_but_not_ready(start_server: Start) -> None:
    server = start_server("--drain-delay-s", "60")
    with triton.InferenceServerClient(server.address) as connected:
        assert connected.is_server_ready()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        assert connected.is_server_live()
        assert not connected.is_server_ready()


def test_a_model_is_ready_if_it_is_served(infer_client: triton.InferenceServerClient) -> None:
    assert infer_client.is_model_ready("mlp-mnist")
    assert infer_client.is_model_ready("mlp-mnist", "1")
    assert not infer_client.is_model_ready("mlp-mnist", "2")
    assert not infer_client.is_model_ready("nobody")


@pytest.mark.parametrize("name", MODELS)
def test_the_metadata_of_a_model_fit_what_it_takes_and_makes(
    name: str, infer_client: triton.InferenceServerClient, client: Client
) -> None:
    card = client.model(name)
    metadata = infer_client.get_model_metadata(name, "1")
    assert (metadata.name, list(metadata.versions), metadata.platform) == (name, ["1"], "onnxruntime_onnx")
    inputs = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs}
    wanted: dict[str, Any] = {"latent": ("FP32", [-1, card.latent_dim])}
    if card.class_names:
        wanted["label"] = ("INT64", [-1])
    assert inputs == wanted
    outputs = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.outputs}
    assert outputs == {"image": ("UINT8", [-1, card.height, card.width, card.channels])}


def test_the_index_lists_every_version(infer_client: triton.InferenceServerClient) -> None:
    index = infer_client.get_model_repository_index().models
    assert [(model.name, model.version, model.state) for model in index] == [(name, "1", "READY") for name in MODELS]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 5, 300])
def test_the_same_latents_give_the_same_bytes_by_both_services(
    name: str, count: int, infer_client: triton.InferenceServerClient, client: Client
) -> None:
    model = client.model(name)
    latents = np.random.RandomState(count).standard_normal((count, model.latent_dim)).astype(np.float32)
    given: dict[str, np.ndarray] = {"latent": latents}
    if model.class_names:
        given["label"] = LABELS[:count]
    result = infer_client.infer(name, tensors(**given), outputs=[triton.InferRequestedOutput("image")])
    made = result.as_numpy("image")
    labels = LABELS[:count].tolist() if model.class_names else None
    assert made.dtype == np.uint8
    assert np.array_equal(made, client.generate(name, latents=latents, label=labels).pixels)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.uint64, np.int64])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_each_seed_gives_the_image_of_that_seed(
    dtype: Any, shape: tuple[int, ...], infer_client: triton.InferenceServerClient, client: Client
) -> None:
    seeds = np.array([5, 99, 2**31 - 1], dtype)  # neither consecutive nor in need of a sign
    made = infer_client.infer("cdcgan-mnist", tensors(seed=seeds.reshape(shape))).as_numpy("image")
    for seed, pixels in zip(seeds.tolist(), made, strict=True):
        assert np.array_equal(pixels, client.generate("cdcgan-mnist", seed=seed).pixels[0])
    labelled = tensors(seed=seeds.reshape(shape), label=np.array([4, 0, 9]).reshape(shape))
    made = infer_client.infer("cdcgan-mnist", labelled).as_numpy("image")
    for seed, label, pixels in zip(seeds.tolist(), (4, 0, 9), made, strict=True):
        assert np.array_equal(pixels, client.generate("cdcgan-mnist", seed=seed, label=label).pixels[0])


def test_one_label_serves_all_images(infer_client: triton.InferenceServerClient, client: Client) -> None:
    inputs = tensors(seed=np.arange(4, dtype=np.uint32), label=np.array([3]))
    made = infer_client.infer("cdcgan-mnist", inputs).as_numpy("image")
    assert np.array_equal(made, client.generate("cdcgan-mnist", count=4, seed=0, label=3).pixels)


@pytest.mark.parametrize("truncation", ["0.5", "1", 0, 2])
def test_truncation_scales_the_latents(
    truncation: str | int, infer_client: triton.InferenceServerClient, client: Client
) -> None:
    wanted = client.generate("mlp-mnist", count=2, seed=3, truncation=float(truncation)).pixels
    seeds = tensors(seed=np.array([3, 4], np.uint32))
    made = infer_client.infer("mlp-mnist", seeds, parameters={"truncation": truncation}).as_numpy("image")
    assert np.array_equal(made, wanted)
    latents = np.stack([np.random.RandomState(seed).standard_normal(100) for seed in (3, 4)]).astype(np.float32)
    made = infer_client.infer("mlp-mnist", tensors(latent=latents), parameters={"truncation": truncation})
    assert np.array_equal(made.as_numpy("image"), wanted)


def test_typed_contents_are_read_like_raw_ones(stub: triton_pb_grpc.GRPCInferenceServiceStub, client: Client) -> None:
    latent = {"name": "latent", "datatype": "FP32", "shape": (3, LATENT_DIM)}
    label = {"name": "label", "datatype": "INT64", "shape": (3,), "contents": {"int64_contents": [1, 2, 3]}}
    request = triton_pb.ModelInferRequest(
        model_name="cdcgan-mnist",
        parameters={"truncation": triton_pb.InferParameter(double_param=0.7)},
        inputs=[label, latent | {"contents": {"fp32_contents": LATENTS[:3].ravel()}}],
    )
    wanted = client.generate("cdcgan-mnist", latents=LATENTS[:3], label=[1, 2, 3], truncation=0.7).pixels
    response = stub.ModelInfer(request)
    assert response.raw_output_contents == [wanted.tobytes()]
    assert not response.outputs[0].HasField("contents")
    for datatype, field in (("UINT32", "uint"), ("INT32", "int"), ("UINT64", "uint64"), ("INT64", "int64")):
        seed = {"name": "seed", "datatype": datatype, "shape": (2,), "contents": {f"{field}_contents": [8, 6]}}
        made = stub.ModelInfer(triton_pb.ModelInferRequest(model_name="mlp-mnist", inputs=[seed])).raw_output_contents
        assert made[0][784:] == client.generate("mlp-mnist", seed=6).pixels.tobytes()


def test_an_answer_says_what_it_is_of(infer_client: triton.InferenceServerClient) -> None:
    seed = tensors(seed=np.array([1], np.uint32))
    for version in ("", "1"):
        result = infer_client.infer("mlp-mnist", seed, model_version=version, request_id="mine").get_response()
        assert (result.model_name, result.model_version, result.id) == ("mlp-mnist", "1", "mine")


async def test_the_client_for_asyncio_gets_them_too(server: RunningServer, client: Client) -> None:
    async with triton_aio.InferenceServerClient(server.address) as connected:
        assert await connected.is_server_ready()
        calls = [
            connected.infer("cdcgan-mnist", tensors(triton_aio, seed=np.array([seed], np.uint32))) for seed in range(40)
        ]
        made = [result.as_numpy("image") for result in await asyncio.gather(*calls)]
        with pytest.raises(InferenceServerException, match="there is no model"):
            await connected.infer("nobody", tensors(triton_aio, seed=np.array([1], np.uint32)))
    assert np.array_equal(np.concatenate(made), client.generate("cdcgan-mnist", count=40, seed=0).pixels)


SEED = {"seed": np.array([1, 2], np.uint32)}
LATENT = {"latent": LATENTS[:2]}
LABEL = {"label": np.array([1, 2])}
NOT_FINITE = np.where(np.arange(LATENT_DIM) == 3, np.nan, LATENTS[:2]).astype(np.float32)
INVALID, NOT_FOUND = "INVALID_ARGUMENT", "NOT_FOUND"
BAD_REQUESTS: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str, str]] = {
    "unknown model": (SEED, {"model_name": "nobody"}, NOT_FOUND, "there is no model 'nobody'"),
    "unknown version": (SEED, {"model_version": "7"}, NOT_FOUND, "it has 1"),
    "version that is no number": (SEED, {"model_version": "one"}, INVALID, "must be a number, or empty"),
    "version of other digits": (SEED, {"model_version": "١"}, INVALID, "must be a number, or empty"),
    "no inputs": ({}, {}, INVALID, "either the input seed or latent"),
    "labels alone": (LABEL, {}, INVALID, "either the input seed or latent"),
    "seeds and latents": (SEED | LATENT | LABEL, {}, INVALID, "either the input seed or latent"),
    "latents without labels": (LATENT, {}, INVALID, "2 images need .* the input label"),
    "unknown input": (SEED | {"noise": LATENTS[:2]}, {}, INVALID, "no input 'noise'; it has latent and label and seed"),
    "latents of another model": (LATENT, {"model_name": "mlp-mnist"}, INVALID, r"\[2, 64\]; .* takes \[n, 100\]"),
    "latents without a batch": ({"latent": LATENTS[0]} | LABEL, {}, INVALID, r"\[64\]; .* takes \[n, 64\]"),
    "latents that are images": ({"latent": LATENTS[:2, None]} | LABEL, {}, INVALID, r"takes \[n, 64\]"),
    "latents of doubles": ({"latent": LATENTS[:2].astype(float)} | LABEL, {}, INVALID, "'FP64'; it must be FP32"),
    "latents that are not finite": ({"latent": NOT_FINITE} | LABEL, {}, INVALID, "latent has values that are not fin"),
    "latents that overflow": (
        {"latent": np.full((2, LATENT_DIM), 3e38, np.float32)} | LABEL,
        {"parameters": {"truncation": 2}},
        INVALID,
        "latent has values that are not fin",
    ),
    "too many latents": (
        {"latent": np.zeros((1025, LATENT_DIM), np.float32), "label": np.array([1])},
        {},
        INVALID,
        "1025 images; one call may ask for 1 to 1024",
    ),
    "too many seeds": ({"seed": np.arange(1025, dtype=np.uint32)}, {}, INVALID, "1 to 1024 images"),
    "no images": ({"seed": np.zeros(0, np.uint32)}, {}, INVALID, "seed is for 0 images"),
    "a negative seed": ({"seed": np.array([0, -1])}, {}, INVALID, "from 0 to 4294967295"),
    "a large seed": ({"seed": np.array([2**32], np.uint64)}, {}, INVALID, "from 0 to 4294967295"),
    "a fraction of a seed": ({"seed": np.array([0.5], np.float32)}, {}, INVALID, "UINT32 or INT32 or UINT64 or INT64"),
    "two seeds an image": ({"seed": np.zeros((1, 2), np.uint32)}, {}, INVALID, r"takes \[n\] or \[n, 1\]"),
    "label too high": (SEED | {"label": np.array([1, 10])}, {}, INVALID, "no label 10; .* has 0 to 9"),
    "negative label": (SEED | {"label": np.array([-1, 9])}, {}, INVALID, "no label -1; .* has 0 to 9"),
    "labels of 32 bits": (SEED | {"label": np.array([1, 2], np.int32)}, {}, INVALID, "'INT32'; it must be INT64"),
    "too many labels": (SEED | {"label": np.array([1, 2, 3])}, {}, INVALID, "3 values for 2 images"),
    "label without classes": (SEED | LABEL, {"model_name": "mlp-mnist"}, INVALID, "takes no labels"),
    "unknown output": (
        SEED,
        {"outputs": [triton.InferRequestedOutput("picture")]},
        INVALID,
        "no output 'picture'; .* image",
    ),
    "classification": (
        SEED,
        {"outputs": [triton.InferRequestedOutput("image", class_count=3)]},
        INVALID,
        "image has parameter 'classification'",
    ),
    "huge truncation": (SEED, {"parameters": {"truncation": 3}}, INVALID, "must be from 0 to 2"),
    "truncation NaN": (SEED, {"parameters": {"truncation": "nan"}}, INVALID, "must be from 0 to 2"),
    "truncation that is no number": (SEED, {"parameters": {"truncation": "half"}}, INVALID, "'half'; it must be a nu"),
    "truncation yes": (SEED, {"parameters": {"truncation": True}}, INVALID, "True; it must be a number"),
    "unknown parameter": (
        SEED,
        {"parameters": {"truncate": "half"}},
        INVALID,
        "no parameter 'truncate'; .* priority, timeout and truncation",
    ),
    "a sequence": (SEED, {"sequence_id": 5}, INVALID, "no parameter 'sequence_end'"),
    "negative timeout": (SEED, {"timeout": -1}, INVALID, "microseconds"),
    "no time at all": (SEED, {"timeout": 1}, "DEADLINE_EXCEEDED", "deadline"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_gets_its_status_and_names_tensor_and_limit(
    kind: str, infer_client: triton.InferenceServerClient
) -> None:
    inputs, options, code, text = BAD_REQUESTS[kind]
    with pytest.raises(InferenceServerException, match=text) as caught:
        infer_client.infer(**({"model_name": "cdcgan-mnist", "inputs": tensors(**inputs)} | options))
    assert caught.value.status() == f"StatusCode.{code}"


def test_shared_memory_is_refused(infer_client: triton.InferenceServerClient) -> None:
    tensor = triton.InferInput("seed", [2], "UINT32")
    tensor.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match=r"seed has parameter 'shared_memory.*not use shared memory"):
        infer_client.infer("mlp-mnist", [tensor])


BAD_MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "content cut short": ({"raw_input_contents": [b"1234567"]}, "7 bytes of content; its shape [2] of UINT32 needs 8"),
    "no content": ({}, "0 bytes of content"),
    "more contents than inputs": ({"raw_input_contents": [b"12345678", b""]}, "2 raw contents for 1 inputs"),
    "an input twice": ({"inputs": [{"name": "seed", "datatype": "UINT32", "shape": (0,)}] * 2}, "seed occurs twice"),
    "two kinds of content": (
        {
            "raw_input_contents": [b"12345678"],
            "inputs": [{"name": "seed", "datatype": "UINT32", "shape": (2,), "contents": {"uint_contents": [1, 2]}}],
        },
        "send only one of them",
    ),
    "a negative shape": ({"inputs": [{"name": "seed", "datatype": "UINT32", "shape": (-1,)}]}, "seed has shape [-1]"),
    "a long shape": (
        {"raw_input_contents": [b"1234"], "inputs": [{"name": "seed", "datatype": "UINT32", "shape": [1] * 99}]},
        "takes [n] or [n, 1]",
    ),
    "an empty parameter": ({"parameters": {"truncation": triton_pb.InferParameter()}}, "None; it must be a number"),
    "too many inputs": ({"inputs": [{"name": "seed"}] * 17}, "the request has 17 inputs; it may have at most 16"),
    "too many outputs": ({"outputs": [{"name": "image"}] * 4}, "the request has 4 outputs; it may have at most 3"),
    "too many parameters": (
        {"parameters": {str(number): triton_pb.InferParameter(int64_param=1) for number in range(17)}},
        "the request has 17 parameters; it may have at most 16",
    ),
    "a long id": ({"id": "é" * 513}, "the id has 1026 bytes; it may have at most 1024"),
    "thousands of outputs": ({"outputs": [{}] * 100_000}, "has 200030 bytes and more than 256 fields"),
    "thousands of parameters of an input": (
        {
            "inputs": [
                {"name": "seed", "parameters": {str(number): triton_pb.InferParameter() for number in range(5000)}}
            ]
        },
        "more than 256 fields",
    ),
    "thousands of texts": (
        {"inputs": [{"name": "seed", "contents": {"bytes_contents": [b""] * 10_000}}]},
        "more than 256 fields",
    ),
    "thousands of packed numbers": (
        {"inputs": [{"name": "seed", "contents": {"int64_contents": [1] * 40_000}}]},
        "40029 bytes outside raw_input_contents and fp32_contents; at most 36864 are allowed",
    ),
    "more seeds than images": (
        {
            "inputs": [
                {"name": "seed", "datatype": "UINT32", "shape": [1025], "contents": {"uint_contents": [1] * 1025}}
            ]
        },
        "seed is for 1025 images; one call may ask for 1 to 1024 images here",
    ),
    "more labels than images": (
        {
            "model_name": "cdcgan-mnist",
            "inputs": [
                {"name": "label", "datatype": "INT64", "shape": [2000], "contents": {"int64_contents": [1] * 2000}}
            ],
        },
        "label is for 2000 images",
    ),
}


@pytest.mark.parametrize("kind", BAD_MESSAGES)
def test_a_message_that_contradicts_itself_is_refused(kind: str, stub: triton_pb_grpc.GRPCInferenceServiceStub) -> None:
    fields, text = BAD_MESSAGES[kind]
    request = triton_pb.ModelInferRequest(
        **{"model_name": "mlp-mnist", "inputs": [{"name": "seed", "datatype": "UINT32", "shape": (2,)}], **fields}
    )
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in error.details()


@pytest.mark.parametrize("size", [3, 100_000_000])
def test_numbers_are_counted_before_they_are_converted(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: Any) -> None:
        raise AssertionError("they are converted")

    monkeypatch.setattr(np, "array", convert)
    request = grpc_service_pb2.ModelInferRequest(model_name="mlp-mnist")
    request.inputs.add(
        name="seed",
        datatype="INT64",
        shape=[size],
        contents=grpc_service_pb2.InferTensorContents(int64_contents=[1, 2]),
    )
    model: Any = SimpleNamespace(name="mlp-mnist", inputs=Inputs.of(pb.ModelCard(latent_dim=100)))
    with pytest.raises(InvalidRequest):
        _draw(request, model, 1024, 1.0)


def test_as_many_latents_as_a_request_may_have_are_read_as_numbers_too(
    stub: triton_pb_grpc.GRPCInferenceServiceStub,
) -> None:
    latents = np.random.RandomState(8).standard_normal((1024, LATENT_DIM)).astype("<f4")
    latent = {"name": "latent", "datatype": "FP32", "shape": latents.shape}
    label = {"name": "label", "datatype": "INT64", "shape": (1024,)}
    labels = np.arange(1024, dtype="<i8") % 10
    raw = triton_pb.ModelInferRequest(
        model_name="cdcgan-mnist",
        inputs=[latent, label],
        raw_input_contents=[latents.tobytes(), labels.tobytes()],
    )
    # Beside them is what no other reader looks at: numbers of another type, and a field that is unknown.
    contents = triton_pb.InferTensorContents(fp32_contents=latents.ravel(), fp64_contents=[1.0], int_contents=[1])
    contents.MergeFromString(b"\x78\x01")
    typed = triton_pb.ModelInferRequest(
        model_name="cdcgan-mnist",
        inputs=[latent | {"contents": contents}, label | {"contents": {"int64_contents": labels}}],
    )
    assert stub.ModelInfer(typed).raw_output_contents == stub.ModelInfer(raw).raw_output_contents


BROKEN = {
    "a field that is cut off": (b"\x3a\xff\xff\x7f" + bytes(20_000), "ends within a field"),
    "a number that is cut off": (b"\x3a\xa0\x9c\x01" + bytes(20_000) + b"\x08\xff", "a varint without an end"),
    "a number without end": (b"\xff" * 20_000, "a varint without an end"),
    "a group": (b"\x7b" * 20_000, "has a protobuf group"),
    "thousands of unknown fields": (b"\x78\x01" * 10_000, "more than 256 fields"),
    "fixed numbers": (b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x3a\xff", "a varint without an end"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_large_message_that_is_none_is_refused(kind: str, server: RunningServer) -> None:
    content, text = BROKEN[kind]
    if len(content) < 20_000:
        content = b"\x3a\xa0\x9c\x01" + bytes(20_000) + content
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError, match=text) as caught:
        channel.unary_unary(f"/{SERVICE}/ModelInfer")(content)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_other_methods_take_small_messages_only(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{SERVICE}/RepositoryModelLoad")
        with pytest.raises(grpc.RpcError, match=r"has 20000 bytes; .* at most 16384") as caught:
            call(b"\x1a\x00" * 10_000)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


TENSORS = st.builds(
    triton_pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["latent", "seed", "label"]),
    datatype=st.sampled_from(["FP32", "UINT32", "INT64", "UINT64", "INT32", "BYTES"]),
    shape=st.lists(st.sampled_from([-(2**63), -1, 0, 1, 2, LATENT_DIM, 2**63 - 1]), max_size=3),
    contents=st.none() | st.builds(triton_pb.InferTensorContents, int64_contents=st.lists(st.integers(-1, 10))),
)
REQUESTS = st.builds(
    triton_pb.ModelInferRequest,
    model_name=st.sampled_from(["cdcgan-mnist", "mlp-mnist"]),
    inputs=st.lists(TENSORS, max_size=3),
    raw_input_contents=st.lists(st.sampled_from([b"", bytes(4), bytes(8), bytes(16), bytes(4 * LATENT_DIM)])),
).map(lambda request: request.SerializeToString())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100) | REQUESTS)
def test_hostile_requests_never_reach_internal(content: bytes, server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        error = call.future(content, timeout=10).exception()
    codes = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert error is None or error.code() in codes, error


@pytest.mark.parametrize("call", ["load_model", "unload_model"])
def test_models_are_not_changed_by_calls(call: str, infer_client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="repository") as caught:
        getattr(infer_client, call)("mlp-mnist")
    assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
    assert infer_client.is_model_ready("mlp-mnist")


class RecordingAdministration:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    async def load(self, name: str) -> None:
        if name == "nobody":
            raise ModelNotFound("there is no folder nobody")
        self.calls.append(("load", name))

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))


@asynccontextmanager
async def serving(servicer: InferenceServicer | RepositoryServicer) -> AsyncIterator[triton_aio.InferenceServerClient]:
    """Serve one servicer from this process, which has Triton's definitions of the protocol too."""
    server = GrpcServer(
        on_finished=lambda *_: None,
        on_refused=lambda *_: None,
        on_internal_error=lambda *_: None,
        limits=Limits(),
    )
    servicer.add_to(server)
    listening = socket.create_server(("127.0.0.1", 0))
    server.start([listening])
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{listening.getsockname()[1]}") as connected:
        yield connected
    await server.drain(10)


async def test_where_callers_may_they_load_and_unload_models() -> None:
    administration = RecordingAdministration()
    async with serving(RepositoryServicer(administration)) as connected:
        await connected.load_model("digits")
        await connected.unload_model("digits")
        assert administration.calls == [("load", "digits"), ("unload", "digits")]
        with pytest.raises(InferenceServerException, match="no folder nobody"):
            await connected.load_model("nobody")
        with pytest.raises(InferenceServerException, match="no parameter 'config'"):
            await connected.load_model("digits", config="{}")
        assert len(administration.calls) == 2


async def test_priority_says_what_may_wait() -> None:
    model = load_version(
        "mlp-mnist",
        1,
        BUNDLED_MODELS / "mlp-mnist" / "1" / "model.onnx",
        max_model_mib=64,
        provider="cpu",
        threads=1,
    )
    bulk: list[bool] = []

    def submit(draw: Any, done: Callable[[Made], None], **options: Any) -> SimpleNamespace:
        bulk.append(options["bulk"])
        done(Made(model.engine.run([draw]), 0.0, 0.0))
        return SimpleNamespace(cancel=lambda: None)

    table = ModelTable()
    table.put(SimpleNamespace(model=model, submit=submit))  # type: ignore[arg-type]
    async with serving(InferenceServicer(table, ServerSettings(), HealthServicer())) as connected:
        for priority in (0, 1, 2):
            await connected.infer("mlp-mnist", tensors(triton_aio, seed=np.array([1], np.uint32)), priority=priority)
    assert bulk == [False, False, True]


def test_calls_are_counted(start_server: Start) -> None:
    server = start_server()
    with triton.InferenceServerClient(server.address) as connected:
        connected.infer("mlp-mnist", tensors(seed=np.array([1], np.uint32)))
        with pytest.raises(InferenceServerException):
            connected.infer("nobody", tensors(seed=np.array([1], np.uint32)))
    with urlopen(f"http://{server.metrics_address}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    assert 'ganserve_requests_total{code="OK",method="ModelInfer",model="mlp-mnist",version="1"} 1.0' in lines
    assert 'ganserve_requests_total{code="NOT_FOUND",method="ModelInfer",model="other",version=""} 1.0' in lines


def test_reflection_and_health_know_the_service(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "ganserve.v1.GenerationService", "grpc.health.v1.Health"} <= set(database.get_services())
        for name, module in ((SERVICE, grpc_service_pb2), ("ganserve.v1.GenerationService", pb)):
            assert database.FindFileContainingSymbol(name).name == module.DESCRIPTOR.name


TOGETHER = """
import asyncio, logging
{imports}
import numpy as np

async def main():
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    log = ganserve_server.processes.log_writer.LogWriter()

    class Listener(logging.Handler):
        def emit(self, record):
            if record.getMessage() == "serving":
                address.set_result(record.address)

    logging.getLogger().addHandler(Listener())
    logging.getLogger().setLevel(logging.INFO)
    settings = ganserve_server.settings.ServerSettings(address="127.0.0.1:0", metrics_address="off")
    state = ganserve_server.repository.state_folder.StateFolder(settings)
    prober = ganserve_server.repository.prober.Prober(settings)
    serve, reload = ganserve_server.processes.app.serve, asyncio.Event()
    server = asyncio.create_task(serve(settings, stop, reload, log, state, prober))
    await asyncio.wait([server, address], return_when=asyncio.FIRST_COMPLETED)
    seed = tritonclient.grpc.aio.InferInput("seed", [1], "UINT32")
    seed.set_data_from_numpy(np.array([3], np.uint32))
    async with tritonclient.grpc.aio.InferenceServerClient(address.result()) as one:
        made = (await one.infer("mlp-mnist", [seed])).as_numpy("image")
    async with ganserve.AsyncClient(address.result()) as other:
        assert ((await other.generate("mlp-mnist", seed=3)).pixels == made).all()
    stop.set()
    await server
    print("together")

asyncio.run(main())
"""


@pytest.mark.parametrize("order", [1, -1])
def test_one_program_can_be_server_and_both_clients(order: int, tmp_path: Path) -> None:
    modules = (
        "ganserve",
        "ganserve_server.processes.app, ganserve_server.processes.log_writer, ganserve_server.repository.prober, "
        "ganserve_server.repository.state_folder, ganserve_server.settings",
        "tritonclient.grpc.aio",
    )
    program = tmp_path / "together.py"
    program.write_text(TOGETHER.format(imports="\n".join(f"import {names}" for names in modules[::order])))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "together\n", done.stderr

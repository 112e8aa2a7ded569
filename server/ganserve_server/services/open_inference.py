"""The Open Inference Protocol of Triton and KServe: their clients get the same images as GenerationService's.

Limits, checks and batches are the same; only the encoding of tensors differs.
"""

import importlib.metadata
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf import message_factory
from numpy.typing import NDArray

from ganserve_server.compute.engine import Draw
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import InvalidRequest, PermissionDenied, ServingError
from ganserve_server.inference import grpc_service_pb2 as pb
from ganserve_server.observe.metrics import OTHER
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import Made
from ganserve_server.repository.table import ModelTable
from ganserve_server.services.administration import refuse_repository_name
from ganserve_server.services.health import SERVING, HealthServicer
from ganserve_server.services.messages import check_labels, check_truncation, images_limit, labels_of, scaled
from ganserve_server.services.request_stream import RequestStream, StreamedRequest
from ganserve_server.services.wire import embedded, tag, varint
from ganserve_server.settings import ServerSettings
from ganserve_server.transport.interface import Call, Method, RequestSink, Server, read_message

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE = _DESCRIPTOR.full_name
_EXTENSIONS = ("model_repository", "parameters", "schedule_policy")
_PLATFORM = "onnxruntime_onnx"
_OUTPUT = "image"
_VERSION = re.compile(r"[0-9]{1,9}")
_RAW_TAG = tag(pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER)
_RESPONSE_TAG = tag(pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER)
_FINAL = {"triton_final_response": pb.InferParameter(bool_param=True)}  # in streams: each request has one response
_EMPTY_FINAL = "triton_enable_empty_final_response"  # has no effect, because the only response is the last
_MAX_SEED = 2**32 - 1
# For each input: the datatypes it may have, each with NumPy's type and the field of InferTensorContents.
_FLOATS = {"FP32": ("<f4", "fp32_contents")}
_LABELS = {"INT64": ("<i8", "int64_contents")}
_SEEDS = {
    "UINT32": ("<u4", "uint_contents"),
    "INT32": ("<i4", "int_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "INT64": ("<i8", "int64_contents"),
}
_INPUTS = {"latent": _FLOATS, "seed": _SEEDS, "label": _LABELS}
_NOT_HERE = (
    "models are not loaded or unloaded by calls to this address, but to the server's --admin-address; "
    "or add a version to the repository's folder, or remove it"
)


class InferenceServicer:
    """The service, over the queues of all models.

    Args:
        models: the served ones.
        settings: the server's.
        health_servicer: says whether the server is ready.
    """

    def __init__(self, models: ModelTable, settings: ServerSettings, health_servicer: HealthServicer) -> None:
        self._models = models
        self._settings = settings
        self._health = health_servicer

    def add_to(self, server: Server) -> None:
        """Answer the service's calls."""
        ours = {
            "ModelInfer": Method(start=self._model_infer, counts_images=True),
            "ModelStreamInfer": Method(open=self._model_stream_infer, counts_images=True),
        }
        for name, method in ours.items():
            server.add_method(f"/{SERVICE}/{name}", method)
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                getattr(self, method.name),
                request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
                response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
            )
            for method in _DESCRIPTOR.methods
            if method.name not in ours
        }
        server.add_registered_method_handlers(SERVICE, handlers)

    def _model_infer(self, call: Call, content: bytes) -> None:
        """Make all images, then answer. Without a task, which costs as much as an image of a small model."""
        request = read_message(pb.ModelInferRequest.FromString, content)
        batcher, draw, options = self.check(request, call)

        def done(made: Made | ServingError) -> None:
            if isinstance(made, ServingError):
                call.fail(made)
            else:
                call.reply(_respond(request, batcher.model, made))

        deadline = _earlier(call.deadline, options.deadline)
        call.work = job = batcher.submit(
            draw, done, fairness_key=call.fairness_key, deadline=deadline, bulk=options.bulk
        )
        call.on_cancel = job.cancel

    def _model_stream_infer(self, call: Call) -> RequestSink:
        """Answer each request of a stream, in order."""
        return _InferStream(self, call).sink

    def check(self, request: pb.ModelInferRequest, call: Call) -> "tuple[Batcher, Draw, _Options]":
        """Find the model, and check the request and the rate of its caller.

        Raises:
            ServingError: it cannot be answered.
        """
        batcher = self._find(request.model_name, request.model_version, call)
        options = _options(request)
        limit = images_limit(batcher.model, self._settings.max_images_per_request)
        draw = _draw(request, batcher.model, limit, options.truncation)
        if call.caller is not None:
            call.caller.take(draw.count)
        return batcher, draw, options

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Call) -> pb.ServerLiveResponse:  # noqa: N802
        """Answer true: a dead server does not answer."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Call) -> pb.ServerReadyResponse:  # noqa: N802
        """Answer as gRPC health does for the server."""
        return pb.ServerReadyResponse(ready=self._health.status("") == SERVING)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Call) -> pb.ModelReadyResponse:  # noqa: N802
        """Answer whether a version is served."""
        self._name(request.name, context)
        version = _version(request.version)
        served = self._models.batchers()
        ready = request.name in self._models if version is None else (request.name, version) in served
        return pb.ModelReadyResponse(ready=ready)

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Call
    ) -> pb.ServerMetadataResponse:
        """Describe the server."""
        version = importlib.metadata.version("ganserve")
        return pb.ServerMetadataResponse(name="ganserve", version=version, extensions=_EXTENSIONS)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Call
    ) -> pb.ModelMetadataResponse:
        """Describe the tensors of a version's file, without `seed`: some clients fill every input that is listed."""
        card = self._find(request.name, request.version, context).model.card
        inputs: list[dict[str, Any]] = [{"name": "latent", "datatype": "FP32", "shape": (-1, card.latent_dim)}]
        if card.class_names:
            inputs.append({"name": "label", "datatype": "INT64", "shape": (-1,)})
        image = {"name": _OUTPUT, "datatype": "UINT8", "shape": (-1, card.height, card.width, card.channels)}
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(number) for number in self._models.versions(request.name)],
            platform=_PLATFORM,
            inputs=inputs,
            outputs=[image],
        )

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: Call
    ) -> pb.RepositoryIndexResponse:
        """List every version that is served."""
        refuse_repository_name(request.repository_name)
        return pb.RepositoryIndexResponse(
            models=[
                {"name": name, "version": str(number), "state": "READY"}
                for name, number in sorted(self._models.batchers())
            ]
        )

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: Call
    ) -> pb.RepositoryModelLoadResponse:
        """Refuse: `RepositoryServicer` loads models."""
        self._name(request.model_name, context)
        raise PermissionDenied(_NOT_HERE)

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: Call
    ) -> pb.RepositoryModelUnloadResponse:
        """Refuse: `RepositoryServicer` unloads models."""
        self._name(request.model_name, context)
        raise PermissionDenied(_NOT_HERE)

    def _name(self, model: str, call: Call) -> None:
        call.model = model if model in self._models else OTHER

    def _find(self, model: str, version: str, call: Call) -> Batcher:
        self._name(model, call)
        batcher = self._models.find(model, _version(version))
        call.version = batcher.model.version
        return batcher


class _InferStream(RequestStream):
    """One call of ModelStreamInfer."""

    __slots__ = ("_servicer",)

    def __init__(self, servicer: InferenceServicer, call: Call) -> None:
        super().__init__(call)
        self._servicer = servicer

    def take(self, content: bytes) -> StreamedRequest:
        """Read, check and queue a request."""
        streamed, request = StreamedRequest(), pb.ModelInferRequest()
        try:
            request = read_message(pb.ModelInferRequest.FromString, content)
            batcher, draw, options = self._servicer.check(request, self._call)

            def done(made: Made | ServingError) -> None:
                if isinstance(made, ServingError):
                    streamed.answer = _stream_error(request, made)
                else:
                    streamed.answer = embedded(_RESPONSE_TAG, _respond(request, batcher.model, made, _FINAL))

            deadline = _earlier(self._call.deadline, options.deadline)
            self.submit([streamed], batcher, draw, done, deadline=deadline, bulk=options.bulk)
            streamed.pixel_bytes = draw.count * batcher.model.pixel_bytes
        except ServingError as error:
            streamed.answer = _stream_error(request, error)
        return streamed


def _stream_error(request: pb.ModelInferRequest, error: ServingError) -> bytes:
    response = pb.ModelInferResponse(id=request.id, parameters=_FINAL)  # the id says which request failed
    return pb.ModelStreamInferResponse(error_message=str(error), infer_response=response).SerializeToString()


@dataclass(frozen=True, slots=True)
class _Options:
    truncation: float = 1.0
    deadline: float | None = None  # by time.monotonic
    bulk: bool = False


_NO_OPTIONS = _Options()


def _options(request: pb.ModelInferRequest) -> _Options:
    """Read the parameters of a request."""
    if not request.parameters:
        return _NO_OPTIONS
    if unknown := sorted(set(request.parameters) - {"priority", "timeout", "truncation", _EMPTY_FINAL}):
        raise InvalidRequest(
            "parameters", f"there is no parameter {unknown[0]!r}; there are priority, timeout and truncation"
        )
    numbers = {name: _number(name, one) for name, one in request.parameters.items() if name != _EMPTY_FINAL}
    truncation, timeout_us = numbers.get("truncation", 1.0), numbers.get("timeout", 0.0)
    check_truncation(truncation)
    if not 0 <= timeout_us < math.inf:
        raise InvalidRequest("timeout", f"timeout is {timeout_us:g}; it must be in microseconds, or 0 for none")
    deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else None
    return _Options(truncation, deadline, bulk=numbers.get("priority", 0.0) > 1)


def _earlier(deadline: float | None, other: float | None) -> float | None:
    return min((one for one in (deadline, other) if one is not None), default=None)


def _number(name: str, parameter: pb.InferParameter) -> float:
    """Read a number or its text, which Triton's older clients send for fractions."""
    kind = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, kind) if kind else None
    if not isinstance(value, bool) and value is not None:
        try:
            return float(value)
        except ValueError:
            pass
    raise InvalidRequest(name, f"parameter {name} is {value!r}; it must be a number")


def _draw(request: pb.ModelInferRequest, model: ModelVersion, limit: int, truncation: float) -> Draw:
    """Check every tensor against the model and the limits; return the images to make."""
    for output in request.outputs:
        if output.name != _OUTPUT:
            raise InvalidRequest("outputs", f"there is no output {output.name!r}; there is {_OUTPUT}")
        _check_no_parameters(output.name, output.parameters)
    tensors = _tensors(request, model)
    latents, seeds, labels = tensors.get("latent"), tensors.get("seed"), tensors.get("label")
    given = seeds if latents is None else latents
    if given is None or (latents is not None and seeds is not None):
        raise InvalidRequest("inputs", f"model {model.name} takes one of the inputs latent and seed")
    count = len(given)
    if not 1 <= count <= limit:
        name = "seed" if latents is None else "latent"
        raise InvalidRequest(name, f"{name} is for {count} images; one call may ask for 1 to {limit} images here")
    if latents is not None:
        latents = scaled(latents, truncation, "latent")
        if labels is None and model.classes:
            raise InvalidRequest("label", f"model {model.name} is conditional: latents need the input label")
    if seeds is not None:
        if seeds.min() < 0 or seeds.max() > _MAX_SEED:
            raise InvalidRequest("seed", f"seed has values that are not from 0 to {_MAX_SEED}")
        seeds = seeds.astype(np.uint32)
    if labels is not None:
        check_labels(labels, model, count, "label")
        labels = labels.repeat(count) if len(labels) == 1 else labels
    elif seeds is not None and model.classes:
        labels = labels_of(seeds, model)
    return Draw(count, seeds, latents, labels, truncation)


def _tensors(request: pb.ModelInferRequest, model: ModelVersion) -> dict[str, NDArray[Any]]:
    """Read the inputs: latent [n, latent_dim], seed and label [n]."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            "raw_input_contents",
            f"there are {len(raw)} raw contents for {len(request.inputs)} inputs; send one for each, or none",
        )
    tensors: dict[str, NDArray[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in _INPUTS:
            raise InvalidRequest("inputs", f"there is no input {name!r}; there are {', '.join(_INPUTS)}")
        if name in tensors:
            raise InvalidRequest("inputs", f"the input {name} is there twice")
        _check_no_parameters(name, tensor.parameters)
        if tensor.datatype not in _INPUTS[name]:
            raise InvalidRequest(
                name, f"{name} has datatype {tensor.datatype!r}; it must be {' or '.join(_INPUTS[name])}"
            )
        kind, field = _INPUTS[name][tensor.datatype]
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(name, f"{name} has contents, but the request has raw_input_contents; send one of them")
        _check_shape(name, tensor.shape, model)
        item = np.dtype(kind).itemsize
        content = raw[index] if raw else np.array(getattr(tensor.contents, field), kind).tobytes()
        if len(content) != (size := math.prod(tensor.shape)) * item:
            raise InvalidRequest(
                name,
                f"{name} has {len(content)} bytes of content; its shape {list(tensor.shape)} of {tensor.datatype} "
                f"takes {size * item}",
            )
        values: NDArray[Any] = np.frombuffer(content, kind)
        tensors[name] = values.reshape(-1, model.card.latent_dim) if name == "latent" else values
    return tensors


def _check_shape(name: str, shape: Sequence[int], model: ModelVersion) -> None:
    """Check a shape, apart from the number of images."""
    width, count_alone = (model.card.latent_dim, False) if name == "latent" else (1, True)
    fits = (len(shape) == 2 and shape[1] == width) or (len(shape) == 1 and count_alone)
    if not fits or shape[0] < 0:
        wanted = "[n] or [n, 1]" if count_alone else f"[n, {width}]"
        raise InvalidRequest(name, f"{name} has shape {list(shape)}; model {model.name} takes {wanted}")


def _check_no_parameters(name: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    if parameters:
        raise InvalidRequest(
            name,
            f"{name} has parameter {min(parameters)!r}; tensors have none here: no shared memory is read or written, "
            "send the values in the message",
        )


def _version(text: str) -> int | None:
    if not text:
        return None
    if not _VERSION.fullmatch(text):
        raise InvalidRequest(
            "model_version", f"the version is {text!r}; it must be a number, or empty for the newest one"
        )
    return int(text)


def _respond(
    request: pb.ModelInferRequest,
    model: ModelVersion,
    made: Made,
    parameters: Mapping[str, pb.InferParameter] | None = None,
) -> bytes:
    """Return a serialised ModelInferResponse; the pixels are copied once."""
    response = pb.ModelInferResponse(
        model_name=model.name,
        model_version=str(model.version),
        id=request.id,
        parameters=parameters,
        outputs=[{"name": _OUTPUT, "datatype": "UINT8", "shape": made.pixels.shape}],
    )
    pixels = made.pixels.tobytes()
    return b"".join((response.SerializeToString(), _RAW_TAG, varint(len(pixels)), pixels))

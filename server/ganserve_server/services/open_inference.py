"""The Open Inference Protocol of Triton and KServe: its clients get the same images as those of GenerationService.

Limits, checks and batches are the same; only the encoding of tensors differs.
"""

import importlib.metadata
import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf import message_factory
from numpy.typing import NDArray

from ganserve_server.compute.inputs import ATTRIBUTES, LABEL, Draw, ModelInput
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import (
    InvalidRequest,
    MalformedMessage,
    MessageTooLarge,
    PermissionDenied,
    ServingError,
)
from ganserve_server.inference import grpc_service_pb2 as pb
from ganserve_server.observe.metrics import OTHER
from ganserve_server.queueing.batcher import Batcher
from ganserve_server.queueing.jobs import Made
from ganserve_server.repository.table import ModelTable
from ganserve_server.services.administration import refuse_repository_name
from ganserve_server.services.health import SERVING, HealthServicer
from ganserve_server.services.messages import check_attribute, check_labels, check_truncation, images_limit, scaled
from ganserve_server.services.request_stream import RequestStream, StreamedRequest
from ganserve_server.services.wire import FIXED32, FIXED64, LENGTH_DELIMITED, VARINT, embedded, tag, varint
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
# For each of NumPy's types: the protocol's datatype, NumPy's name of it, and the field of InferTensorContents.
_DATATYPES = {
    np.dtype(np.float32): {"FP32": ("<f4", "fp32_contents")},
    np.dtype(np.int64): {"INT64": ("<i8", "int64_contents")},
}
_SEED = ModelInput("seed", np.dtype(np.uint32))
_SEEDS = {
    "UINT32": ("<u4", "uint_contents"),
    "INT32": ("<i4", "int_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "INT64": ("<i8", "int64_contents"),
}
# The most of each that a request may have, so that no request blocks the event loop for long.
_MAX_INPUTS, _MAX_OUTPUTS, _MAX_PARAMETERS, _MAX_ID_BYTES = 16, 3, 16, 1024
_SHOWN = 8  # numbers of a shape in an error
# protobuf takes up to 2 µs for two bytes of a message. Messages up to this size are parsed at once; larger ones are
# scanned first.
_FREELY_PARSED_BYTES = 16 << 10
_BYTES_PER_IMAGE = 20  # a seed and a label, each a varint
_MAX_SCANNED_FIELDS = 256
_MAX_VARINT_BYTES = 10
# The fields that the scan descends into, by field number, with their known subfields; None: protobuf only copies the
# content of the field.
_Fields = Mapping[int, "_Fields | None"]
_SCANNED: _Fields = {
    pb.ModelInferRequest.INPUTS_FIELD_NUMBER: {
        pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER: {
            pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER: None
        }
    },
    pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER: None,
}
_NOT_HERE = (
    "calls to this address cannot load or unload models; call the server's --admin-address, or add or remove a "
    "version in the repository's folder"
)


class InferenceServicer:
    """The service, over the queues of all models.

    Args:
        models: the served models.
        settings: the server's settings.
        health_servicer: reports whether the server is ready.
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
                request_deserializer=_bounded(message_factory.GetMessageClass(method.input_type).FromString),
                response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
            )
            for method in _DESCRIPTOR.methods
            if method.name not in ours
        }
        server.add_registered_method_handlers(SERVICE, handlers)

    def _model_infer(self, call: Call, content: bytes) -> None:
        """Make all images, then answer. Uses no task, which would cost as much as an image of a small model."""
        request = self.read(content)
        batcher, draw, options = self.check(request, call)
        request_id = request.id  # so that `done` does not keep the request, whose tensors may have megabytes

        def done(made: Made | ServingError) -> None:
            if isinstance(made, ServingError):
                call.fail(made)
            else:
                call.reply(_respond(request_id, batcher.model, made))

        deadline = _earlier(call.deadline, options.deadline)
        call.work = job = batcher.submit(
            draw, done, fairness_key=call.fairness_key, deadline=deadline, bulk=options.bulk
        )
        call.on_cancel = job.cancel

    def _model_stream_infer(self, call: Call) -> RequestSink:
        """Answer each request of a stream, in order."""
        return _InferStream(self, call).sink

    def read(self, content: bytes) -> pb.ModelInferRequest:
        """Read a request, unless that would take long.

        Raises:
            ServingError: it is not a request, or has too many parts or bytes.
        """
        if len(content) > _FREELY_PARSED_BYTES:
            _scan(content, _FREELY_PARSED_BYTES + _BYTES_PER_IMAGE * self._settings.max_images_per_request)
        return read_message(pb.ModelInferRequest.FromString, content)

    def check(self, request: pb.ModelInferRequest, call: Call) -> "tuple[Batcher, Draw, _Options]":
        """Find the model, and check the request and the rate of its caller.

        Raises:
            ServingError: it cannot be answered.
        """
        batcher = self._find(request.model_name, request.model_version, call)
        _check_counts(request)
        options = _options(request, batcher.model)
        limit = images_limit(batcher.model, self._settings.max_images_per_request)
        draw = _draw(request, batcher.model, limit, options.truncation)
        if call.caller is not None:
            call.caller.take(draw.count)
        return batcher, draw, options

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Call) -> pb.ServerLiveResponse:  # noqa: N802
        """Answer true: a server that is not live does not answer."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Call) -> pb.ServerReadyResponse:  # noqa: N802
        """Answer with the server's status in gRPC health."""
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
        """Describe the tensors of a version's file. Omits `seed`, because some clients fill every listed input."""
        model = self._find(request.name, request.version, context).model
        card = model.card
        inputs = [
            {"name": each.name, "datatype": next(iter(_DATATYPES[each.dtype])), "shape": (-1, *each.shape)}
            for each in model.inputs
        ]
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
        streamed, request_id = StreamedRequest(), ""
        try:
            request = self._servicer.read(content)
            request_id = request.id
            batcher, draw, options = self._servicer.check(request, self._call)

            def done(made: Made | ServingError) -> None:
                if isinstance(made, ServingError):
                    streamed.answer = _stream_error(request_id, made)
                else:
                    streamed.answer = embedded(_RESPONSE_TAG, _respond(request_id, batcher.model, made, _FINAL))

            deadline = _earlier(self._call.deadline, options.deadline)
            self.submit([streamed], batcher, draw, done, deadline=deadline, bulk=options.bulk)
            streamed.pixel_bytes = draw.count * batcher.model.pixel_bytes
        except ServingError as error:
            streamed.answer = _stream_error(request_id, error)
        return streamed


def _stream_error(request_id: str, error: ServingError) -> bytes:
    if len(request_id.encode()) > _MAX_ID_BYTES:
        request_id = ""
    response = pb.ModelInferResponse(id=request_id, parameters=_FINAL)  # the id says which request failed
    return pb.ModelStreamInferResponse(error_message=str(error), infer_response=response).SerializeToString()


def _bounded(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a function that reads only messages that are small enough for protobuf to read quickly."""

    def read_small(content: bytes) -> Any:
        if len(content) > _FREELY_PARSED_BYTES:
            raise MessageTooLarge(
                f"the request has {len(content)} bytes; a request of this method may have at most "
                f"{_FREELY_PARSED_BYTES}"
            )
        return read(content)

    return read_small


def _scan(content: bytes, most_bytes: int) -> None:
    """Check that protobuf does not take long to read a large ModelInferRequest: that it has few small parts.

    Args:
        content: the serialised request.
        most_bytes: the most bytes outside the contents of raw_input_contents and fp32_contents.

    Raises:
        ServingError: the request has more bytes, or more fields than are scanned, or is malformed.
    """
    found, copied_bytes = 0, 0
    parts = [(0, len(content), _SCANNED)]
    while parts:
        position, end, known = parts.pop()
        while position < end:
            found += 1
            if found > _MAX_SCANNED_FIELDS:
                raise InvalidRequest(
                    "inputs",
                    f"the request has {len(content)} bytes and more than {_MAX_SCANNED_FIELDS} fields, but only a "
                    f"request of up to {_FREELY_PARSED_BYTES} bytes may have that many; send numbers in "
                    "raw_input_contents, or packed",
                )
            key, position = _read_varint(content, position)
            number, kind = key >> 3, key & 7
            size = 0
            if kind == LENGTH_DELIMITED:
                size, position = _read_varint(content, position)
                if number in known:
                    inner = known[number]
                    if inner is None:
                        copied_bytes += size
                    else:
                        parts.append((position, position + size, inner))
            elif kind == VARINT:
                _, position = _read_varint(content, position)
            elif kind in (FIXED64, FIXED32):
                size = 8 if kind == FIXED64 else 4
            else:
                raise MalformedMessage("the request has a protobuf group, which no message of this method has")
            position += size
            if position > end:
                raise MalformedMessage("the request ends within a field")
    if (rest := len(content) - copied_bytes) > most_bytes:
        raise InvalidRequest(
            "inputs",
            f"the request has {rest} bytes outside raw_input_contents and fp32_contents; at most {most_bytes} are "
            "allowed here",
        )


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    """Read a varint; return it and the position after it."""
    value = 0
    for index, byte in enumerate(content[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise MalformedMessage("the request has a varint without an end")


def _check_counts(request: pb.ModelInferRequest) -> None:
    """Check how many parts a request has, before any loop over them."""
    if (count := len(request.inputs)) > _MAX_INPUTS:
        raise _too_many("inputs", count, _MAX_INPUTS)
    if (count := len(request.outputs)) > _MAX_OUTPUTS:
        raise _too_many("outputs", count, _MAX_OUTPUTS)
    if (count := len(request.parameters)) > _MAX_PARAMETERS:
        raise _too_many("parameters", count, _MAX_PARAMETERS)
    if (size := len(request.id.encode())) > _MAX_ID_BYTES:
        raise InvalidRequest("id", f"the id has {size} bytes; it may have at most {_MAX_ID_BYTES}")


def _too_many(field: str, count: int, most: int) -> InvalidRequest:
    return InvalidRequest(field, f"the request has {count} {field}; it may have at most {most}")


@dataclass(frozen=True, slots=True)
class _Options:
    truncation: float = 1.0
    deadline: float | None = None  # by time.monotonic
    bulk: bool = False


_NO_OPTIONS = _Options()


def _options(request: pb.ModelInferRequest, model: ModelVersion) -> _Options:
    """Read the parameters of a request."""
    if not request.parameters:
        return _NO_OPTIONS
    if unknown := sorted(set(request.parameters) - {"priority", "timeout", "truncation", _EMPTY_FINAL}):
        raise InvalidRequest(
            "parameters", f"there is no parameter {unknown[0]!r}; the parameters are priority, timeout and truncation"
        )
    numbers = {name: _number(name, one) for name, one in request.parameters.items() if name != _EMPTY_FINAL}
    truncation, timeout_us = numbers.get("truncation", 1.0), numbers.get("timeout", 0.0)
    check_truncation(truncation, model)
    if not 0 <= timeout_us < math.inf:
        raise InvalidRequest("timeout", f"timeout is {timeout_us:g}; it must be in microseconds, or 0 for none")
    deadline = time.monotonic() + timeout_us / 1e6 if timeout_us else None
    return _Options(truncation, deadline, bulk=numbers.get("priority", 0.0) > 1)


def _earlier(deadline: float | None, other: float | None) -> float | None:
    return min((one for one in (deadline, other) if one is not None), default=None)


def _number(name: str, parameter: pb.InferParameter) -> float:
    """Read a number, or a number as text, which older Triton clients send for fractions."""
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
            raise InvalidRequest("outputs", f"there is no output {output.name!r}; the only output is {_OUTPUT}")
        _check_no_parameters(output.name, output.parameters)
    tensors = _tensors(request, model, limit)
    seeds = tensors.pop(_SEED.name, None)
    drawn = [each.name for each in model.inputs if each.follows]
    if (seeds is None) != all(name in tensors for name in drawn) or (seeds is not None and tensors.keys() & drawn):
        raise InvalidRequest("inputs", f"model {model.name} takes either the input seed or {' and '.join(drawn)}")
    needed = {each.name for each in model.inputs if each.of_seeds is not None and each.name != ATTRIBUTES}
    first = drawn[0] if seeds is None else _SEED.name
    count = len(tensors[first] if seeds is None else seeds)
    if not count:
        raise _wrong_count(first, count, limit)
    if seeds is not None:
        if seeds.min() < 0 or seeds.max() > _MAX_SEED:
            raise InvalidRequest("seed", f"seed has values that are not from 0 to {_MAX_SEED}")
        seeds = seeds.astype(np.uint32)
    for each in model.inputs:
        name = each.name
        if each.drawn and name in tensors:
            tensors[name] = scaled(tensors[name], truncation if each.follows else 1.0, name, model)
        if name == LABEL and name in tensors:
            check_labels(tensors[name], model, count, name)
            tensors[name] = tensors[name].repeat(count) if len(tensors[name]) == 1 else tensors[name]
        elif (name in tensors or (seeds is None and name in needed)) and (given := len(tensors.get(name, ()))) != count:
            raise InvalidRequest(
                name, f"{count} images need a value of the input {name} for each image; it has values for {given}"
            )
    columns = tensors.get(ATTRIBUTES, np.empty((0, 0))).T
    for attribute, column in zip(model.inputs.attributes.values(), columns, strict=False):
        check_attribute(column, attribute)
    model.inputs.complete(tensors, seeds if seeds is not None else np.zeros(count, np.uint32))
    return Draw(count, seeds, tensors, truncation)


def _wrong_count(name: str, count: int, limit: int) -> InvalidRequest:
    return InvalidRequest(name, f"{name} is for {count} images; one call may ask for 1 to {limit} images here")


def _tensors(request: pb.ModelInferRequest, model: ModelVersion, limit: int) -> dict[str, NDArray[Any]]:
    """Read the inputs by name: [n, ...] with n up to the limit, and `seed` [n]."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            "raw_input_contents",
            f"there are {len(raw)} raw contents for {len(request.inputs)} inputs; send one for each, or none",
        )
    known = {each.name: each for each in (*model.inputs, _SEED)}
    tensors: dict[str, NDArray[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name == LABEL not in known:
            raise InvalidRequest(name, f"model {model.name} is unconditional: it takes no labels")
        if name not in known:
            raise InvalidRequest("inputs", f"model {model.name} has no input {name!r}; it has {' and '.join(known)}")
        if name in tensors:
            raise InvalidRequest("inputs", f"the input {name} occurs twice")
        _check_no_parameters(name, tensor.parameters)
        datatypes = _SEEDS if name == _SEED.name else _DATATYPES[known[name].dtype]
        if tensor.datatype not in datatypes:
            raise InvalidRequest(name, f"{name} has datatype {tensor.datatype!r}; it must be {' or '.join(datatypes)}")
        kind, field = datatypes[tensor.datatype]
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(
                name, f"{name} has contents, but the request has raw_input_contents; send only one of them"
            )
        _check_shape(known[name], tensor.shape, model)
        if tensor.shape[0] > limit:
            raise _wrong_count(name, tensor.shape[0], limit)
        item = np.dtype(kind).itemsize
        # Check the size first: converting millions of numbers takes hundreds of milliseconds.
        content = raw[index] if raw else b""
        given = len(content) if raw else len(getattr(tensor.contents, field)) * item
        if given != (size := math.prod(tensor.shape)) * item:
            raise InvalidRequest(
                name,
                f"{name} has {given} bytes of content; its shape {list(tensor.shape)} of {tensor.datatype} needs "
                f"{size * item}",
            )
        values: NDArray[Any] = np.frombuffer(content if raw else _content(tensor.contents, field, kind), kind)
        tensors[name] = values.reshape(-1, *known[name].shape)
    return tensors


def _content(contents: pb.InferTensorContents, field: str, kind: str) -> bytes:
    """Return the numbers of a field, little-endian."""
    numbers = getattr(contents, field)
    if field != "fp32_contents" or not numbers:
        return np.array(numbers, kind).tobytes()
    # NumPy would convert a million numbers one by one, in 200 ms. Instead, serialise a message with only this field: it
    # ends with the packed numbers.
    size = len(numbers) * np.dtype(kind).itemsize
    for other, _ in contents.ListFields():
        if other.name != field:
            contents.ClearField(other.name)
    contents.DiscardUnknownFields()  # type: ignore[attr-defined]
    return contents.SerializeToString()[-size:]


def _check_shape(wanted: ModelInput, shape: Sequence[int], model: ModelVersion) -> None:
    """Check a shape except for the number of images."""
    each = tuple(shape[1:])
    if shape and shape[0] >= 0 and (each == wanted.shape or (each == (1,) and not wanted.shape)):
        return
    takes = f"[n, {', '.join(map(str, wanted.shape))}]" if wanted.shape else "[n] or [n, 1]"
    given = str(list(shape[:_SHOWN])) if len(shape) <= _SHOWN else f"of {len(shape)} dimensions"
    raise InvalidRequest(wanted.name, f"{wanted.name} has shape {given}; model {model.name} takes {takes}")


def _check_no_parameters(name: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    if parameters:
        one = min(itertools.islice(parameters, _MAX_PARAMETERS))
        raise InvalidRequest(
            name,
            f"{name} has parameter {one!r}; this server takes no parameters of tensors: it does not use shared "
            "memory, so send the values in the message",
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
    request_id: str,
    model: ModelVersion,
    made: Made,
    parameters: Mapping[str, pb.InferParameter] | None = None,
) -> bytes:
    """Return a serialised ModelInferResponse; the pixels are copied once."""
    response = pb.ModelInferResponse(
        model_name=model.name,
        model_version=str(model.version),
        id=request_id,
        parameters=parameters,
        outputs=[{"name": _OUTPUT, "datatype": "UINT8", "shape": made.pixels.shape}],
    )
    pixels: Any = np.ascontiguousarray(made.pixels)  # a buffer: `tobytes` would copy the pixels a second time
    return b"".join((response.SerializeToString(), _RAW_TAG, varint(pixels.nbytes), pixels))

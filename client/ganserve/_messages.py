"""Converts between the SDK's values and protobuf messages.

Only this module imports the generated code of ganserve.v1 and of gRPC's health service: all other modules pass messages
on without reading them. (`_statuses` reads google.rpc's error details.)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import numpy as np
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import ArrayLike, NDArray

from ganserve._arguments import (
    Attributes,
    Labels,
    attribute_values,
    invalid,
    items_of,
    label_list,
    label_value,
    latent_rows,
    model_name,
    uint32,
)
from ganserve._names import did_you_mean, matching
from ganserve.errors import GanserveError, ModelNotFoundError, ServerError
from ganserve.images import ImageBatch
from ganserve.models import Attribute, Model, QualityMetric, Truncation
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

_MOST_VALUES_PER_CALL = 1024  # labels or latents: the default limit of a server
_TRUNCATIONS: dict[int, Truncation] = {pb.TRUNCATION_EFFECT_INPUT: "input", pb.TRUNCATION_EFFECT_NONE: "none"}
_GENERATE_EACH = f"/{pb.DESCRIPTOR.services_by_name['GenerationService'].full_name}/GenerateEach"


class Stubs:
    """The methods of the services that the SDK calls, on one channel."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        service = pb_grpc.GenerationServiceStub(channel)
        self.generate_images = service.GenerateImages
        self.stream_images = service.StreamImages
        # Without a serializer: EachRequests serializes its requests.
        self.generate_each = channel.stream_stream(
            _GENERATE_EACH, response_deserializer=pb.GenerateEachResponse.FromString
        )
        self.list_models = service.ListModels
        self.get_model = service.GetModel
        self.health = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]


# Requests.


def images_request(
    model: str,
    *,
    count: SupportsIndex | None,
    seed: SupportsIndex | None,
    latents: ArrayLike | None,
    label: Labels | None,
    truncation: SupportsFloat,
    version: SupportsIndex | None,
    attributes: Attributes | None = None,
    input_seeds: Mapping[str, SupportsIndex] | None = None,
) -> pb.GenerateImagesRequest:
    """Build the request of `Client.generate`.

    Raises:
        InvalidRequestError: a message cannot hold an argument. The server checks what the model accepts.
    """
    if seed is not None and latents is not None:
        raise invalid("seed", "give a seed or latents, not both")
    try:
        if isinstance(truncation, bool | str):
            raise TypeError
        request = pb.GenerateImagesRequest(model=model_name(model), truncation=float(truncation))
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid("truncation", f"truncation is {truncation!r}; it must be a number from 0 to 2") from error
    if count is not None:
        request.count = uint32("count", count, least=1)
    if version is not None:
        request.version = uint32("version", version)
    if seed is not None:
        request.seed = uint32("seed", seed)
    if latents is not None:
        rows = latent_rows(latents)
        if count not in (None, len(rows)):
            raise invalid("count", f"count is {count}, but there are {len(rows)} latents; leave count out")
        request.latents.values.extend(rows.ravel().tolist())
        request.count = len(rows)
    given = {}  # how many values each argument has
    if label is not None:
        labels = [label_value(item) for item in label_list(label)]
        names = [item for item in labels if isinstance(item, str)]
        if not labels or 0 < len(names) < len(labels):
            mixed = "; this list mixes indices and names: write them all as one or the other" if labels else ""
            raise invalid("label", f"label is one index or name, or a list with one for each image{mixed}")
        request.label_names.extend(names)
        request.labels.extend(item for item in labels if not isinstance(item, str))
        given["label"] = len(labels)
    for name, values in items_of("attributes", attributes):
        numbers = attribute_values(name, values)
        request.inputs.attributes.add(name=name, values=numbers)
        given[f"attributes[{name!r}]"] = len(numbers)
    for name, number in items_of("input_seeds", input_seeds):
        request.inputs.seeds[name] = uint32(f"input_seeds[{name!r}]", number)
    if given and not request.HasField("count"):
        request.count = max(given.values())
    for argument, values in given.items():
        if values not in (1, request.count):
            text = f"{argument} has {values} values for {request.count} images; give one, or one for each image"
            raise invalid(argument.partition("[")[0], text)
    return request


def models_request() -> pb.ListModelsRequest:
    """Build the request for the first page of `Client.models`."""
    return pb.ListModelsRequest()


def next_models_request(response: pb.ListModelsResponse) -> pb.ListModelsRequest | None:
    """Build the request for the page after an answer; None if this was the last one."""
    return pb.ListModelsRequest(page_token=token) if (token := response.next_page_token) else None


def model_request(name: str | None, version: SupportsIndex | None) -> pb.GetModelRequest:
    """Build the request of `Client.model`.

    Raises:
        InvalidRequestError: a message cannot hold an argument.
    """
    return pb.GetModelRequest(model=model_name(name), version=None if version is None else uint32("version", version))


def health_request(model: str | None) -> health_pb2.HealthCheckRequest:
    """Build the request for a model's health, or for the server's if `model` is None.

    Raises:
        InvalidRequestError: a message cannot hold the model's name.
    """
    return health_pb2.HealthCheckRequest(service="" if model is None else model_name(model))


# Answers.


def to_batch(response: pb.GenerateImagesResponse, count: int) -> ImageBatch:
    """Convert an answer with raw pixels.

    Args:
        response: the answer.
        count: the number of images that it must have.

    Raises:
        ServerError: the answer does not match the request.
    """
    shape = (response.count, response.height, response.width, response.channels)
    pixels: NDArray[np.uint8] = np.frombuffer(response.pixels, np.uint8)
    if pixels.size != shape[0] * shape[1] * shape[2] * shape[3] or not pixels.size:
        raise ServerError(f"the server's answer has {pixels.size} bytes of pixels, but its shape is {shape}")
    if response.encoding > pb.ENCODING_RAW:
        raise ServerError(f"the server's answer is in encoding {response.encoding}; this client asked for raw pixels")
    # The slice [:] reads a repeated field in one step, an iteration number by number.
    seeds, labels = tuple(response.seeds[:]) or None, tuple(response.labels[:]) or None
    if shape[0] != count or (seeds and len(seeds) != count) or (labels and len(labels) != count):
        found = f"{shape[0]} images, {len(seeds or ())} seeds and {len(labels or ())} labels"
        raise ServerError(f"the server's answer has {found}, but {count} images were requested")
    attributes = input_seeds = None
    if response.HasField("inputs"):
        attributes = {each.name: _one_or_each(each.values, count) for each in response.inputs.attributes}
        input_seeds = dict(response.inputs.seeds)
    queued, computed = response.queue_time, response.compute_time
    return ImageBatch(
        pixels=pixels.reshape(shape),
        seeds=seeds,
        labels=labels,
        model=response.model,
        version=response.version,
        digest=response.digest,
        provider=response.provider,
        truncation=response.truncation,
        queue_s=queued.seconds + queued.nanos / 1e9,
        compute_s=computed.seconds + computed.nanos / 1e9,
        attributes=attributes,
        input_seeds=input_seeds,
    )


def _one_or_each(values: Sequence[float], count: int) -> float | tuple[float, ...]:
    if len(values) not in (1, count):
        raise ServerError(f"the server's answer has {len(values)} values of an attribute for {count} images")
    return values[0] if len(values) == 1 else tuple(values)


def to_models(response: pb.ListModelsResponse) -> list[Model]:
    """Convert the descriptions of a page of models."""
    return [_model(model) for model in response.models]


def to_model(response: pb.GetModelResponse) -> Model:
    """Convert the description of one model."""
    return _model(response.model)


def _model(message: pb.Model) -> Model:
    card = message.card
    return Model(
        name=message.name,
        version=message.version,
        versions=tuple(message.versions),
        digest=message.digest,
        provider=message.provider,
        architecture=card.architecture,
        dataset=card.dataset,
        latent_dim=card.latent_dim,
        height=card.height,
        width=card.width,
        channels=card.channels,
        class_names=tuple(card.class_names),
        attributes=_attributes(card),
        further_latents=tuple(each.name for each in card.inputs[1:] if each.HasField("latent")),
        distribution=_distribution(card),
        truncation=_TRUNCATIONS.get(message.truncation, "latent"),
        metrics=tuple(_metric(metric) for metric in card.metrics),
        card=json_format.MessageToDict(card),
    )


def _metric(metric: pb.QualityMetric) -> QualityMetric:
    error = metric.standard_error if metric.HasField("standard_error") else None
    return QualityMetric(metric.name, metric.value, metric.method, error)


def _attributes(card: pb.ModelCard) -> tuple[Attribute, ...]:
    listed = (one for each in card.inputs for one in each.attributes.attributes)
    return tuple(
        Attribute(
            each.name,
            each.minimum,
            each.maximum if each.minimum or each.maximum else 1.0,
            each.default_value,
            each.binary,
        )
        for each in listed
    )


def _distribution(card: pb.ModelCard) -> str:
    number = card.inputs[0].latent.distribution if card.inputs else pb.DISTRIBUTION_UNSPECIFIED
    try:
        name = pb.Distribution.Name(number or pb.DISTRIBUTION_NORMAL)
    except ValueError:  # a newer server's
        return f"number {number}"
    return name.removeprefix("DISTRIBUTION_").lower()


def is_serving(answer: health_pb2.HealthCheckResponse) -> bool:
    """Return whether the server, or the model, is serving. Any status other than SERVING counts as not serving."""
    return answer.status == health_pb2.HealthCheckResponse.SERVING


# StreamImages.


def image_count(request: pb.GenerateImagesRequest) -> int:
    """Return how many images a request asks for."""
    return request.count if request.HasField("count") else 1


def first_seed(request: pb.GenerateImagesRequest) -> int | None:
    """Return the seed of a request's first image; None if the server draws it, or if there are latents."""
    return request.seed if request.HasField("seed") else None


def images_per_stream(request: pb.GenerateImagesRequest) -> int:
    """Return how many images of a request one stream may ask for: fewer than all if each has its own values."""
    limited = request.HasField("latents") or _values_per_image(request)
    return _MOST_VALUES_PER_CALL if limited else image_count(request)


def stream_request(
    request: pb.GenerateImagesRequest, start: int, stop: int, version: int | None, seed: int | None
) -> pb.StreamImagesRequest:
    """Build the request of a stream for a part of the images of `request`.

    Args:
        request: the request for all images.
        start: the first image of the part.
        stop: the image after the last one.
        version: the version of the model, if an earlier part has fixed it.
        seed: the seed of the part's first image, if it is known.
    """
    part = pb.GenerateImagesRequest()
    part.CopyFrom(request)
    count = image_count(request)
    if version is not None:
        part.version = version
    if seed is not None:
        part.seed = seed
    if start or stop < count:
        part.count = stop - start
        if part.HasField("latents"):
            dim = len(part.latents.values) // count
            part.latents.values[:] = part.latents.values[start * dim : stop * dim]
        for values in _values_per_image(part):
            values[:] = values[start:stop]
    return pb.StreamImagesRequest(generate=part)


def to_chunk(response: pb.StreamImagesResponse, start: int, stop: int) -> ImageBatch:
    """Convert the next images of a stream, which has brought the images before `start` and must bring those to `stop`.

    Raises:
        ServerError: the answer is empty, has more images than are missing, or is inconsistent.
    """
    chunk = response.chunk
    if not 1 <= chunk.count <= stop - start:
        raise ServerError(f"the server sends {chunk.count} images after {start} of {stop}; it must send the rest")
    return to_batch(chunk, chunk.count)


def _values_per_image(request: pb.GenerateImagesRequest) -> list[Any]:
    """Return the fields for labels and attributes that have a value for each image."""
    attributes = (each.values for each in request.inputs.attributes)
    fields: tuple[Any, ...] = (request.labels, request.label_names, *attributes)
    return [field for field in fields if len(field) > 1]


# GenerateEach.


class EachRequests:
    """The requests of GenerateEach. Requests with equal labels differ only in the seed, and share one message.

    Args:
        common: the fields that all images share.
    """

    def __init__(self, common: pb.GenerateImagesRequest) -> None:
        self.common = common
        self._of_labels: dict[int | str | None, pb.GenerateEachRequest] = {}
        self._spellings: dict[int | str | None, int | str] = {}  # class names as the model spells them

    def serialized(self, seed: int, label: int | str | None) -> bytes:
        """Return the request for one image."""
        request = self._of_labels.get(label) or self._with_label(label)
        request.generate.seed = seed
        return request.SerializeToString()

    def with_label(self, label: int | str | None) -> pb.GenerateImagesRequest:
        """Return the request for an image with this label."""
        return (self._of_labels.get(label) or self._with_label(label)).generate

    def _with_label(self, label: int | str | None) -> pb.GenerateEachRequest:
        request = self._of_labels[label] = pb.GenerateEachRequest(generate=self.common)
        spelling = self._spellings.get(label, label)
        if isinstance(spelling, str):
            request.generate.label_names.append(spelling)
        elif spelling is not None:
            request.generate.labels.append(spelling)
        return request

    def fix_version(self, version: int) -> None:
        """Use this version of the model in all later requests."""
        self.common.version = version
        self._of_labels.clear()

    def correct(self, label: int | str | None, request: pb.GenerateImagesRequest) -> None:
        """Spell a label as `request` does in all later requests."""
        self._spellings[label] = request.label_names[0]
        self._of_labels.pop(label)


class EachError(NamedTuple):
    """Why the server did not make one image."""

    code: int
    reason: str
    text: str


def to_each(answer: pb.GenerateEachResponse) -> ImageBatch | EachError:
    """Convert the answer for one image.

    Raises:
        ServerError: the answer does not have one image.
    """
    if answer.HasField("error"):
        return EachError(answer.error.code, answer.error.reason, answer.error.message)
    return to_batch(answer.response, 1)


# Corrections of refused requests.


def explain_missing_label(error: GanserveError, request: Any) -> None:
    """Reword the server's text on latents without labels: it names the fields of the message, not the argument."""
    if getattr(error, "field", None) != "label" or not isinstance(request, pb.GenerateImagesRequest):
        return
    if request.HasField("latents") and not (request.labels or request.label_names):
        text = f"model {request.model} is conditional: latents need a label, one for all or a list with one for each"
        error.args = (text,)


def question_about(error: GanserveError, request: Any) -> tuple[str, Any] | None:
    """Return the method and the request of a call whose answer can explain the error; None if no call can."""
    if isinstance(error, ModelNotFoundError):
        # The errors of other methods list the models already. A further call would shift the round robin of replicas.
        return ("list_models", models_request()) if isinstance(request, health_pb2.HealthCheckRequest) else None
    field = getattr(error, "field", None)
    if field not in ("label", "latents", "count") or not isinstance(request, pb.GenerateImagesRequest):
        return None
    given = request.label_names if field == "label" else request.HasField("latents")
    return ("get_model", pb.GetModelRequest(model=request.model, version=request.version or None)) if given else None


def correct(error: GanserveError, request: Any, answer: pb.ListModelsResponse | pb.GetModelResponse) -> Any:
    """Return the request with the model's spelling of its labels; the caller must correct any other error.

    Args:
        error: the server's error.
        request: the request that the server refused.
        answer: the answer to the call of `question_about`.

    Raises:
        GanserveError: the error, whose text now says what the caller probably meant.
    """
    if isinstance(answer, pb.ListModelsResponse):
        name, known = request.service, [model.name for model in answer.models]
        if name and known and name not in known and not answer.next_page_token:
            error.add_text(f": it has {', '.join(known)}{did_you_mean([name], known)}")
            error.advice = ""
        raise error
    card = answer.model.card
    if getattr(error, "field", None) == "label":
        given, known = list(request.label_names), list(card.class_names)
        meant = [match for name in given if (match := matching(name, known)) is not None]
        if len(meant) < len(given) or meant == given:
            error.add_text(did_you_mean(given, known))
            raise error
        corrected = pb.GenerateImagesRequest()
        corrected.CopyFrom(request)
        corrected.label_names[:] = meant
        return corrected
    shape = [request.count, len(request.latents.values) // request.count]
    if shape[1] != card.latent_dim:
        error.args = (f"latents is {shape}; model {request.model} takes [count, {card.latent_dim}]",)
    raise error

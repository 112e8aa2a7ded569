"""Between the SDK's types and the wire's messages: the only place of the SDK that knows both."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import json_format
from grpc_health.v1 import health_pb2
from numpy.typing import ArrayLike, NDArray

from ganserve.errors import InvalidRequestError, ServerError
from ganserve.images import ImageBatch
from ganserve.models import Model, QualityMetric
from ganserve.v1 import generation_pb2 as pb

Label = int | str

_UINT32_LIMIT = 1 << 32


def to_request(
    model: str,
    *,
    count: int | None,
    seed: int | None,
    latents: ArrayLike | None,
    label: Label | Sequence[Label] | None,
    truncation: float,
    version: int | None,
) -> pb.GenerateImagesRequest:
    """Write the message.

    Raises:
        InvalidRequestError: an argument cannot be written; whether the model takes it is the server's to judge.
    """
    if seed is not None and latents is not None:
        raise _invalid("seed", "give a seed or latents, not both")
    try:
        request = pb.GenerateImagesRequest(model=_name(model), truncation=truncation)
    except (TypeError, ValueError) as error:
        raise _invalid("truncation", f"truncation is {truncation!r}; it must be a number from 0 to 2") from error
    if count is not None:
        request.count = _uint32("count", count)
    if version is not None:
        request.version = _uint32("version", version)
    if seed is not None:
        request.seed = _uint32("seed", seed)
    if latents is not None:
        try:
            if np.iscomplexobj(latents):
                raise TypeError("they are complex")
            rows = np.atleast_2d(np.asarray(latents, np.float32))
        except (TypeError, ValueError) as error:
            raise _invalid("latents", f"latents is an array of numbers, [count, latent_dim]: {error}") from error
        request.latents.values.extend(rows.ravel().tolist())
        request.count = len(rows) if count is None else request.count
    if label is not None:
        labels = _labels(label)
        names = [item for item in labels if isinstance(item, str)]
        if not labels or 0 < len(names) < len(labels):
            raise _invalid(
                "label", "label is one index or name, or a list with one for each image: all indices or all names"
            )
        try:
            request.label_names.extend(names)
        except ValueError as error:  # half of a surrogate pair is no text
            raise _invalid("label", f"label is {label!a}; it must be an index, or a name of a class") from error
        if not names:
            request.labels.extend(_uint32("label", item) for item in labels)
        if count is None and latents is None:
            request.count = len(labels)
    return request


def to_model_request(name: str | None, version: int | None) -> pb.GetModelRequest:
    """Write the message.

    Raises:
        InvalidRequestError: an argument cannot be written.
    """
    return pb.GetModelRequest(model=_name(name), version=None if version is None else _uint32("version", version))


def _name(model: Any) -> str:
    try:
        model.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise _invalid("model", f"model is {model!a}; it must be a name, as models() lists them") from error
    return str(model)


def _labels(label: Any) -> list[Any]:
    alone = isinstance(label, str) or not hasattr(label, "__len__")
    return [label] if alone or getattr(label, "ndim", 1) == 0 else list(label)


def _uint32(field: str, value: Any) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < _UINT32_LIMIT:
        raise _invalid(field, f"{field} is {value!r}; it must be an integer from 0 to {_UINT32_LIMIT - 1}")
    return number


def _invalid(field: str, text: str) -> InvalidRequestError:
    error = InvalidRequestError(text)
    error.field = field
    return error


def to_batch(response: pb.GenerateImagesResponse, count: int) -> ImageBatch:
    """Read a RAW answer.

    Args:
        response: the answer.
        count: how many images it must have.

    Raises:
        ServerError: the answer is not what was asked for.
    """
    shape = (response.count, response.height, response.width, response.channels)
    pixels: NDArray[np.uint8] = np.frombuffer(response.pixels, np.uint8)
    if pixels.size != math.prod(shape) or not pixels.size:
        raise ServerError(f"the server's answer has {pixels.size} bytes of pixels, but says it is {shape}")
    if response.encoding > pb.ENCODING_RAW:
        raise ServerError(f"the server's answer is in encoding {response.encoding}; this client asked for raw pixels")
    seeds, labels = tuple(response.seeds) or None, tuple(response.labels) or None
    for what, number in (("images", shape[0]), ("seeds", len(seeds or ())), ("labels", len(labels or ()))):
        if number != count and (number or what == "images"):
            raise ServerError(f"the server's answer has {number} {what}, for {count} images")
    return ImageBatch(
        pixels=pixels.reshape(shape),
        seeds=seeds,
        labels=labels,
        model=response.model,
        version=response.version,
        digest=response.digest,
        provider=response.provider,
        truncation=response.truncation,
        queue_s=response.queue_time.seconds + response.queue_time.nanos / 1e9,
        compute_s=response.compute_time.seconds + response.compute_time.nanos / 1e9,
    )


class StreamProgress:
    """What a stream has brought of a request, so that the rest can be asked of another server."""

    def __init__(self, request: pb.GenerateImagesRequest) -> None:
        self._request = request
        self._wanted = request.count if request.HasField("count") else 1
        self._done = 0
        self._first: ImageBatch | None = None

    @property
    def complete(self) -> bool:
        """Whether all images are there."""
        return self._done == self._wanted

    def take(self, chunk: pb.GenerateImagesResponse) -> ImageBatch:
        """Read the next images.

        Raises:
            ServerError: they are not the next ones, or not by the model of those before.
        """
        if not 1 <= chunk.count <= self._wanted - self._done:
            raise ServerError(
                f"the server sends {chunk.count} images after {self._done} of {self._wanted}; it must send the rest"
            )
        batch = to_batch(chunk, chunk.count)
        first = self._first = self._first or batch
        if (batch.version, batch.digest) != (first.version, first.digest):
            raise ServerError(
                f"the images after the first {self._done} are of version {batch.version} ({batch.digest}), those "
                f"before of version {first.version} ({first.digest}); ask again for all"
            )
        seed = self._next_seed()
        if seed is not None and (batch.seeds is None or batch.seeds[0] != seed):
            raise ServerError(f"the server's images after the first {self._done} are not of seed {seed}")
        self._done += len(batch)
        return batch

    def end(self) -> None:
        """Check that nothing is missing.

        Raises:
            ServerError: it is, and the server thinks that all is well.
        """
        if not self.complete:
            raise ServerError(f"the server ended the stream after {self._done} of {self._wanted} images")

    def rest(self) -> pb.StreamImagesRequest:
        """Ask for what is missing: of the same version, and of the seeds that follow."""
        request = pb.GenerateImagesRequest()
        request.CopyFrom(self._request)
        if self._first is not None:
            done = self._done
            request.version = self._first.version
            request.count = self._wanted - done
            if (seed := self._next_seed()) is not None:
                request.seed = seed
            elif request.HasField("latents"):
                del request.latents.values[: len(request.latents.values) // self._wanted * done]
            for each in (request.labels, request.label_names):
                if len(each) > 1:
                    del each[:done]
        return pb.StreamImagesRequest(generate=request)

    def _next_seed(self) -> int | None:
        if self._request.HasField("seed"):
            seed = self._request.seed
        elif self._first is not None and self._first.seeds is not None:
            seed = self._first.seeds[0]
        else:
            return None
        return (seed + self._done) % _UINT32_LIMIT


def to_health(answer: health_pb2.HealthCheckResponse) -> bool:
    """Say whether the server, or the model, is serving. A status that this SDK does not know is not."""
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def to_health_request(model: str | None) -> health_pb2.HealthCheckRequest:
    """Ask for a model's health, or for the server's.

    Raises:
        InvalidRequestError: the model is no name.
    """
    return health_pb2.HealthCheckRequest(service="" if model is None else _name(model))


def to_model(message: pb.Model) -> Model:
    """Read a model's description."""
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
        metrics=tuple(QualityMetric(metric.name, metric.value, metric.method) for metric in card.metrics),
        card=json_format.MessageToDict(card),
    )

"""Between the SDK's types and the wire's messages: the only place of the SDK that knows both."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import json_format
from grpc_health.v1 import health_pb2
from numpy.typing import ArrayLike, NDArray

from ganserve.errors import GanserveError, InvalidRequestError, ModelNotFoundError, ServerError
from ganserve.images import ImageBatch
from ganserve.latents import uint32
from ganserve.models import Model, QualityMetric
from ganserve.names import did_you_mean, matching
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
        request.count = uint32("count", count)
    if version is not None:
        request.version = uint32("version", version)
    if seed is not None:
        request.seed = uint32("seed", seed)
    if latents is not None:
        rows = _latents(latents)
        if count not in (None, len(rows)):
            raise _invalid("count", f"count is {count}, but there are {len(rows)} latents; leave count out")
        request.latents.values.extend(rows.ravel().tolist())
        request.count = len(rows)
    if label is not None:
        labels = _labels(label)
        names = [item for item in labels if isinstance(item, str)]
        if not labels or 0 < len(names) < len(labels):
            mixed = "; this list mixes indices and names: write them all as one or the other" if labels else ""
            raise _invalid("label", f"label is one index or name, or a list with one for each image{mixed}")
        try:
            request.label_names.extend(names)
        except ValueError as error:  # half of a surrogate pair is no text
            raise _invalid("label", f"label is {label!a}; it must be an index, or a name of a class") from error
        if not names:
            request.labels.extend(uint32("label", item) for item in labels)
        if count is None and latents is None:
            request.count = len(labels)
    return request


def to_model_request(name: str | None, version: int | None) -> pb.GetModelRequest:
    """Write the message.

    Raises:
        InvalidRequestError: an argument cannot be written.
    """
    return pb.GetModelRequest(model=_name(name), version=None if version is None else uint32("version", version))


def _name(model: Any) -> str:
    try:
        model.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise _invalid("model", f"model is {model!a}; it must be a name, as models() lists them") from error
    return str(model)


def _latents(given: ArrayLike) -> NDArray[np.float32]:
    """Return one latent or several as [count, latent_dim]."""
    try:
        if np.iscomplexobj(given):
            raise TypeError
        rows = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise _invalid("latents", "latents is no array of numbers; it must be [count, latent_dim]") from error
    if rows.ndim not in (1, 2) or not rows.size:
        raise _invalid("latents", f"latents is {list(rows.shape)}; it must be [count, latent_dim]")
    return np.atleast_2d(rows)


def _labels(label: Any) -> list[Any]:
    alone = isinstance(label, str) or not hasattr(label, "__len__")
    return [label] if alone or getattr(label, "ndim", 1) == 0 else list(label)


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
    if pixels.size != shape[0] * shape[1] * shape[2] * shape[3] or not pixels.size:
        raise ServerError(f"the server's answer has {pixels.size} bytes of pixels, but says it is {shape}")
    if response.encoding > pb.ENCODING_RAW:
        raise ServerError(f"the server's answer is in encoding {response.encoding}; this client asked for raw pixels")
    # A list of all is read in one step, a repeated field number by number.
    seeds, labels = tuple(response.seeds[:]) or None, tuple(response.labels[:]) or None
    if shape[0] != count or (seeds and len(seeds) != count) or (labels and len(labels) != count):
        told = f"{shape[0]} images, {len(seeds or ())} seeds and {len(labels or ())} labels"
        raise ServerError(f"the server's answer has {told}, for {count} images")
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
    )


def question_about(error: GanserveError, request: Any) -> pb.ListModelsRequest | pb.GetModelRequest | None:
    """Return what to ask the server, to learn what a request that it refused probably meant; None if nothing."""
    if isinstance(error, ModelNotFoundError):
        # Other calls' errors say it themselves; to ask would take another replica's turn, call for call.
        return pb.ListModelsRequest() if isinstance(request, health_pb2.HealthCheckRequest) else None
    about = {"label_names": "label_names", "latents": "latents", "count": "latents"}.get(
        getattr(error, "field", "") or ""
    )
    if about is None or not isinstance(request, pb.GenerateImagesRequest):
        return None
    given = request.HasField("latents") if about == "latents" else request.label_names
    return pb.GetModelRequest(model=request.model, version=request.version or None) if given else None


def correct(error: GanserveError, request: Any, answer: pb.ListModelsResponse | pb.GetModelResponse) -> Any:
    """Return the request as it was meant, which has other label names; all else is for the caller to put right.

    Raises:
        GanserveError: the error; its text says what was probably meant.
    """
    if isinstance(answer, pb.ListModelsResponse):
        name = request.service if isinstance(request, health_pb2.HealthCheckRequest) else request.model
        error.add_text(did_you_mean([name], [model.name for model in answer.models]))
        raise error
    card = answer.model.card
    if getattr(error, "field", None) == "label_names":
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


class StreamProgress:
    """What a stream has brought of a request, so that the rest can be asked of another server."""

    def __init__(self, request: pb.GenerateImagesRequest) -> None:
        self.request = request
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
        request.CopyFrom(self.request)
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
        if self.request.HasField("seed"):
            seed = self.request.seed
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

"""Between the SDK's types and the wire's messages: the only place of the SDK that knows both."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import json_format
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
    if not isinstance(model, str):
        raise _invalid("model", f"model is {model!r}; it must be a name, as models() lists them")
    try:
        request = pb.GenerateImagesRequest(model=model, truncation=truncation)
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
            rows = np.atleast_2d(np.asarray(latents, np.float32))
        except (TypeError, ValueError) as error:
            raise _invalid("latents", f"latents is an array of numbers, [count, latent_dim]: {error}") from error
        request.latents.values.extend(rows.ravel().tolist())
        request.count = len(rows) if count is None else request.count
    if label is not None:
        labels = [label] if isinstance(label, str) or np.ndim(label) == 0 else list(label)  # type: ignore[arg-type]
        names = [item for item in labels if isinstance(item, str)]
        if not labels or 0 < len(names) < len(labels):
            raise _invalid(
                "label", "label is one index or name, or a list with one for each image: all indices or all names"
            )
        request.label_names.extend(names)
        if not names:
            request.labels.extend(_uint32("label", item) for item in labels)
        if count is None and latents is None:
            request.count = len(labels)
    return request


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


def to_batch(response: pb.GenerateImagesResponse) -> ImageBatch:
    """Read a RAW answer.

    Raises:
        ServerError: the answer's size is not what it says.
    """
    shape = (response.count, response.height, response.width, response.channels)
    pixels: NDArray[np.uint8] = np.frombuffer(response.pixels, np.uint8)
    if pixels.size != np.prod(shape):
        raise ServerError(f"the server's answer has {pixels.size} bytes of pixels, but says it is {shape}")
    return ImageBatch(
        pixels=pixels.reshape(shape),
        seeds=tuple(response.seeds) or None,
        labels=tuple(response.labels) or None,
        model=response.model,
        version=response.version,
        digest=response.digest,
        provider=response.provider,
        truncation=response.truncation,
        queue_s=response.queue_time.ToNanoseconds() / 1e9,
        compute_s=response.compute_time.ToNanoseconds() / 1e9,
    )


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

"""GenerationService's messages: from a message to a checked request, and from pixels back to a response."""

import functools
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganserve._formats import ENCODED, ENCODED_NAMES, in_words
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.inputs import LABEL, LATENT, Draw
from ganserve_server.compute.model import ModelVersion
from ganserve_server.errors import InvalidRequest
from ganserve_server.queueing.jobs import Made
from ganserve_server.services.formats import Identity, contact_sheet, encode, sheet_size
from ganserve_server.services.wire import tag, varint

MAX_TRUNCATION = 2.0
_MAX_PIXEL_BYTES = 256 << 20
_PIXELS_TAG = tag(pb.GenerateImagesResponse.PIXELS_FIELD_NUMBER)
_SEEDS = 2**32
_MAX_SHEET_LABELS = 4096  # in a contact sheet's metadata: a JPEG holds 64 KiB
# Reading these from protobuf costs more than the rest of a check.
_LAYOUTS, _PRIORITIES = (frozenset(kind.values()) for kind in (pb.Layout, pb.Priority))


@dataclass(slots=True)  # not frozen, which would double the time to create one
class GenerationRequest:
    """A checked request. `draw` makes one chunk at a time: all seeds of a long stream would fill the memory."""

    model: ModelVersion
    count: int
    first_seed: int | None
    latents: NDArray[np.float32] | None  # [count, latent_dim], truncation applied; None: drawn from the seeds
    labels: NDArray[np.int64] | None  # [1] for all images, or [count]; None: derived from the seeds
    truncation: float
    encoding: pb.Encoding
    sheet: bool
    omit_identity: bool
    bulk: bool

    def draw(self, start: int, stop: int) -> Draw:
        """Return the draw for images `start` to `stop` (exclusive)."""
        seeds = None
        inputs: dict[str, NDArray[Any]] = {}
        if self.first_seed is not None:
            first = self.first_seed + start
            if first + stop - start <= _SEEDS:
                seeds = np.arange(first, first + stop - start, dtype=np.uint32)
            else:
                seeds = (np.arange(first, first + stop - start, dtype=np.uint64) % _SEEDS).astype(np.uint32)
        if self.labels is not None:
            inputs[LABEL] = self.labels.repeat(stop - start) if len(self.labels) == 1 else self.labels[start:stop]
        if self.latents is not None:
            inputs[LATENT] = self.latents[start:stop]
        if seeds is not None:
            self.model.inputs.complete(inputs, seeds)
        return Draw(stop - start, seeds, inputs, self.truncation)


def parse(
    message: pb.GenerateImagesRequest, model: ModelVersion, max_images: int, max_values: int
) -> GenerationRequest:
    """Check every field against the model and the limits.

    Args:
        message: the request.
        model: the model that answers the request.
        max_images: the most images that the request may ask for.
        max_values: the most labels or latents that the request may have.

    Raises:
        InvalidRequest: a field is wrong.
    """
    # Adding 0.0 turns -0.0 into 0.0. The two are equal keys of the cache of `_common_piece`, but protobuf serialises
    # them differently: a cached piece would appear in the wrong response.
    truncation = message.truncation + 0.0 if message.HasField("truncation") else 1.0
    check_truncation(truncation)
    # Each access to a field costs a tenth of the rest of a check, so each is read once.
    labels_given, names_given = len(message.labels), len(message.label_names)
    if labels_given > max_values or names_given > max_values:
        field, given = ("labels", labels_given) if labels_given > max_values else ("label_names", names_given)
        raise InvalidRequest(field, f"there are {given} {field}; a request may have at most {max_values}")
    latents = _latents(message, model, truncation, max_values) if message.HasField("latents") else None
    # A stream may have more images than a message may have labels.
    call = "a stream" if max_images > max_values else "a call without a stream"
    brought = (0 if latents is None else len(latents)) or labels_given or names_given
    count = message.count if message.HasField("count") else brought or 1
    if not 1 <= count <= max_images:
        raise InvalidRequest("count", f"count is {count}; {call} may ask for 1 to {max_images} images here")
    if latents is not None and count != len(latents):
        raise InvalidRequest("count", f"count is {count}, but there are {len(latents)} latents; leave count out")
    labels = _labels(message, model, count) if labels_given or names_given else None
    first_seed = None
    if latents is None:
        first_seed = message.seed if message.HasField("seed") else secrets.randbits(32)
    elif labels is None and model.classes:
        raise InvalidRequest("labels", f"model {model.name} is conditional: latents need labels (or label_names)")
    if message.priority not in _PRIORITIES:
        raise InvalidRequest(
            "priority", f"priority {message.priority} is unknown; this server knows INTERACTIVE and BULK"
        )
    encoding, sheet = _encoding(message)
    if sheet:
        _check_sheet(encoding, model, count)
    return GenerationRequest(
        model,
        count,
        first_seed,
        latents,
        labels,
        truncation,
        encoding,
        sheet,
        message.omit_identity,
        bulk=message.priority == pb.PRIORITY_BULK,
    )


def draw_of(requests: list[GenerationRequest]) -> Draw:
    """Build one Draw from one request, or from several single-image, seeded requests that differ only in label."""
    first = requests[0]
    if len(requests) == 1:
        return first.draw(0, first.count)
    seeds = np.array([request.first_seed for request in requests], np.uint32)
    inputs: dict[str, NDArray[Any]] = {}
    first.model.inputs.complete(inputs, seeds)
    for index, request in enumerate(requests):
        if request.labels is not None:
            inputs[LABEL][index] = request.labels[0]
    return Draw(len(requests), seeds, inputs, first.truncation)


def images_limit(model: ModelVersion, most: int) -> int:
    """Return the most images of a model in one response: `most`, the setting, or fewer if the images are large.

    A protobuf message may have 2 GiB, but a server should stay far below: 256 MiB of pixels.
    """
    return max(1, min(most, _MAX_PIXEL_BYTES // max(1, model.pixel_bytes)))


def check_truncation(truncation: float) -> None:
    """Raise InvalidRequest unless truncation is in range."""
    if not 0 <= truncation <= MAX_TRUNCATION:
        raise InvalidRequest("truncation", f"truncation is {truncation:g}; it must be from 0 to {MAX_TRUNCATION:g}")


def scaled(latents: NDArray[np.float32], truncation: float, field: str) -> NDArray[np.float32]:
    """Return latents times truncation; raise InvalidRequest if any is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        latents = latents * np.float32(truncation)
    if not np.isfinite(latents).all():
        raise InvalidRequest(
            field, f"{field} has values that are not finite, or not finite after scaling by truncation"
        )
    return latents


def check_labels(labels: NDArray[np.int64], model: ModelVersion, count: int, field: str) -> None:
    """Raise InvalidRequest unless there is one label for all images or one for each, and the model has each class."""
    if not model.classes:
        raise InvalidRequest(field, f"model {model.name} is unconditional: it takes no labels")
    if len(labels) not in (1, count):
        raise InvalidRequest(
            field, f"{field} has {len(labels)} values for {count} images; give one, or one for each image"
        )
    wrong = labels.min() if labels.min() < 0 else labels.max()
    if not 0 <= wrong < model.classes:
        raise InvalidRequest(field, f"there is no label {wrong}; model {model.name} has 0 to {model.classes - 1}")


def _latents(
    message: pb.GenerateImagesRequest, model: ModelVersion, truncation: float, max_values: int
) -> NDArray[np.float32]:
    latent_dim = model.card.latent_dim
    if len(message.latents.values) > max_values * latent_dim:
        raise InvalidRequest("latents", f"there are more than {max_values} latents, the limit of a request")
    values = np.array(message.latents.values, np.float32)
    if values.size == 0 or values.size % latent_dim:
        raise InvalidRequest(
            "latents",
            f"latents has {values.size} values; model {model.name} takes a multiple of {latent_dim}, 1 or more",
        )
    return scaled(values, truncation, "latents").reshape(-1, latent_dim)


def _labels(message: pb.GenerateImagesRequest, model: ModelVersion, count: int) -> NDArray[np.int64]:
    """Return the labels of the request: one, or one for each image."""
    names = list(model.card.class_names)
    field = "label_names" if message.label_names else "labels"
    if message.labels and message.label_names:
        raise InvalidRequest("label_names", "give labels or label_names, not both")
    if message.label_names and names:
        index = {name: label for label, name in enumerate(names)}
        unknown = next((name for name in message.label_names if name not in index), None)
        if unknown is not None:
            raise InvalidRequest(field, f"model {model.name} has no class {unknown!r}; it has {', '.join(names)}")
        if len(index) < len(names):
            twice = next((name for name in message.label_names if names.count(name) > 1), None)
            if twice is not None:
                having = ", ".join(str(label) for label, name in enumerate(names) if name == twice)
                raise InvalidRequest(field, f"model {model.name} has several classes {twice!r}: give a label: {having}")
        labels = np.array([index[name] for name in message.label_names], np.int64)
    else:
        labels = np.array(message.labels, np.int64)
    check_labels(labels, model, count, field)
    return labels


def _encoding(message: pb.GenerateImagesRequest) -> tuple[pb.Encoding, bool]:
    encoding = message.encoding or pb.ENCODING_RAW
    if encoding != pb.ENCODING_RAW and encoding not in ENCODED:
        known = in_words(ENCODED_NAMES, "and")
        raise InvalidRequest("encoding", f"encoding {encoding} is unknown; this server knows RAW, {known}")
    if message.layout not in _LAYOUTS:
        raise InvalidRequest(
            "layout", f"layout {message.layout} is unknown; this server knows ONE_EACH and CONTACT_SHEET"
        )
    sheet = message.layout == pb.LAYOUT_CONTACT_SHEET
    if sheet and encoding == pb.ENCODING_RAW:
        raise InvalidRequest("layout", f"a contact sheet needs an encoding: {in_words(ENCODED_NAMES)}")
    return encoding, sheet


def _check_sheet(encoding: pb.Encoding, model: ModelVersion, count: int) -> None:
    height, width = sheet_size(count, model.card.height, model.card.width)
    image_format = ENCODED[encoding]
    if max(height, width) > image_format.longest_side:
        raise InvalidRequest(
            "layout",
            f"the contact sheet of {count} images would be {height}x{width} pixels; a {image_format.name} may have at "
            f"most {image_format.longest_side} on each side",
        )


def describe(model: ModelVersion, versions: list[int]) -> pb.Model:
    """Describe a model version; `versions` are all served versions of the model."""
    described = pb.Model(
        name=model.name,
        version=model.version,
        versions=versions,
        digest=model.digest,
        provider=model.engine.provider,
    )
    # As an argument of `pb.Model`, a card of 1 MiB with 100,000 classes would take 5 ms instead of 1 ms.
    described.card.CopyFrom(model.card)
    return described


def shortened(model: pb.Model) -> pb.Model:
    """Leave out of a description what ListModels does not answer; return it."""
    model.card.ClearField("golden_images")
    if model.card.HasField("training"):
        model.card.training.ClearField("configuration")
    return model


def times(made: Made) -> bytes:
    """Serialise the times of a draw, as a piece of the GenerateImagesResponses for its images."""
    response = pb.GenerateImagesResponse()
    for duration, seconds in ((response.queue_time, made.queue_s), (response.compute_time, made.compute_s)):
        duration.seconds, duration.nanos = divmod(round(seconds * 1e9), 10**9)
    return response.SerializeToString()


def respond(request: GenerationRequest, draw: Draw, pixels: NDArray[np.uint8], took: bytes) -> bytes:
    """Return a serialised GenerateImagesResponse with the images, as pixels or as files.

    The response is concatenated from pieces, which protobuf reads as one message. The piece that all responses of a
    version share is serialised once, and the pixels are copied once.

    Args:
        request: the request.
        draw: the draw of the images.
        pixels: the images, [count, height, width, channels].
        took: the result of `times`.
    """
    model = request.model
    common = _common_piece(draw.count, draw.truncation, request.encoding)
    response = pb.GenerateImagesResponse(
        seeds=None if draw.seeds is None else draw.seeds.tolist(),
        labels=None if (labels := draw.labels) is None else labels.tolist(),
    )
    if request.encoding == pb.ENCODING_RAW:
        raw = pixels.tobytes()
        return b"".join((model.answer, took, common, response.SerializeToString(), _PIXELS_TAG, varint(len(raw)), raw))
    if request.sheet:
        identity: Identity | None = None
        if not request.omit_identity:
            identity = {**_identity(model, draw, 0), "count": draw.count}
            if labels is not None and draw.count <= _MAX_SHEET_LABELS:
                identity["labels"] = labels.tolist()
        response.files.append(encode(contact_sheet(pixels), request.encoding, identity))
    else:
        for index, pixels_of_one in enumerate(pixels):
            identity = None if request.omit_identity else _identity(model, draw, index)
            response.files.append(encode(pixels_of_one, request.encoding, identity))
    return model.answer + took + common + response.SerializeToString()


@functools.lru_cache(256)
def _common_piece(count: int, truncation: float, encoding: pb.Encoding) -> bytes:
    """Serialise the piece of a GenerateImagesResponse that is identical for most requests."""
    return pb.GenerateImagesResponse(count=count, truncation=truncation, encoding=encoding).SerializeToString()


def _identity(model: ModelVersion, draw: Draw, index: int) -> Identity:
    return {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "seed": None if draw.seeds is None else int(draw.seeds[index]),
        "label": None if draw.labels is None else int(draw.labels[index]),
        "truncation": draw.truncation,
    }

"""Reads one model file, and rejects it if it breaks a rule.

A file is untrusted input. The rules:

- its size is limited;
- onnx's checker accepts it;
- it has only standard operators, of which none draws random numbers, and contains all its weights;
- it has a model card of limited size, and its inputs and its output match the card;
- it makes the same images each time, and in a batch images that differ by at most one grey level (`compute.batching`
  then removes the difference);
- its golden images differ by at most one grey level.
"""

import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import json_format
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from ganserve._cards import MAX_CARD_BYTES, MAX_GOLDEN_IMAGES, png, thumbnail
from ganserve._formats import LARGEST_SIDE, MODES
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.batching import BatchLimits, batching_of, has_loops
from ganserve_server.compute.engine import Engine, Provider, SessionRefused
from ganserve_server.compute.gpu import GpuOptions
from ganserve_server.compute.inputs import Inputs
from ganserve_server.compute.model import ModelVersion
from ganserve_server.repository.scan import why_missing
from ganserve_server.spelling import nearest

_log = logging.getLogger(__name__)

CARD_KEY = "ganserve.model_card"
_MAX_REPORTED_KEYS = 3
_AMONG = 3  # images that are made alone and in one batch, or fewer if a batch may not have so many
_STANDARD_DOMAINS = {"", "ai.onnx"}
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
_NEWLINE = "\n"


class ModelRejected(Exception):  # noqa: N818
    """A model file breaks a rule; the text, one line, names the rule."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))  # onnxruntime's and protobuf's reasons have several lines


def load_version(
    name: str,
    version: int,
    path: Path,
    *,
    max_model_mib: int,
    provider: Provider,
    threads: int,
    limits: BatchLimits = BatchLimits(),  # noqa: B008
    gpu: GpuOptions = GpuOptions(),  # noqa: B008
) -> ModelVersion:
    """Read one version, check it against the rules, and warm it up.

    Raises:
        ModelRejected: a rule is broken.
        ProviderUnavailable: the required provider is missing.
    """
    content = _read(path, max_model_mib)
    model = _check_graph(content)
    card, unknown_keys = _parse_card(_card_text(model))
    batching, exact_with_threads = batching_of(model)
    loops = has_loops(model)
    del model  # its weights
    try:
        _check_card(card)
        threads = threads if exact_with_threads else 1
        engine = Engine(
            content, _inputs(card), provider, threads, batching=batching, loops=loops, limits=limits, gpu=gpu
        )
        _check_signature(engine)
        _check_images(engine, card)
        _check_card_size(card)
    except SessionRefused as error:
        raise ModelRejected(str(error)) from error
    except ModelRejected as error:
        if unknown_keys:
            raise ModelRejected(f"{error}; {unknown_keys}") from error
        raise
    if unknown_keys:
        _log.warning("the model card has unknown keys", extra={"path": str(path), "reason": unknown_keys})
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    answer = pb.GenerateImagesResponse(
        model=name,
        version=version,
        digest=digest,
        provider=engine.provider,
        height=card.height,
        width=card.width,
        channels=card.channels,
    )
    return ModelVersion(name, version, digest, card, engine, answer.SerializeToString())


def _read(path: Path, max_model_mib: int) -> bytes:
    try:
        if not path.is_file():
            raise ModelRejected(why_missing(path))
        with path.open("rb") as file:
            content = file.read((max_model_mib << 20) + 1)
        if not content:
            raise ModelRejected("the file is empty")
        if len(content) > max_model_mib << 20:
            raise ModelRejected(f"the file has more than {max_model_mib} MiB, the limit set by --max-model-mib")
        return content
    except OSError as error:
        raise ModelRejected(f"the file cannot be read: {error.strerror}") from error


def _check_graph(content: bytes) -> onnx.ModelProto:
    """Check everything that can be checked without running the model; return it."""
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError has another name in each implementation
        raise ModelRejected("the file is not ONNX, or is truncated") from error
    parts = list(_parts(model))
    domains = {part.domain for part in parts if isinstance(part, onnx.NodeProto)}
    if custom := domains - _STANDARD_DOMAINS:
        raise ModelRejected(
            f"only standard ONNX operators are allowed; this model uses the domain {sorted(custom)[0]!r}"
        )
    tensors = (part for part in parts if isinstance(part, onnx.TensorProto))
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
        raise ModelRejected("the weights must be inside the file; this model refers to other files (external data)")
    try:
        onnx.checker.check_model(content)  # not the model, which would be serialised again
    except Exception as error:  # ValidationError, and UnicodeDecodeError on a damaged file's text
        raise ModelRejected(f"onnx's checker rejects the file: {str(error).partition(_NEWLINE)[0]}") from error
    _check_random(parts)
    return model


def _check_random(parts: list[Message]) -> None:
    """Reject operators that draw random numbers, by name: running the model does not find small noise."""
    nodes = [part for part in parts if isinstance(part, onnx.NodeProto)]
    if drawing := [node.op_type for node in nodes if node.op_type in _RANDOM]:
        raise ModelRejected(
            f"the operator {drawing[0]} draws random numbers, so no image can be made again: make the noise a constant "
            "(in torch, a buffer), or take it from further values of the latent"
        )
    modes = {node.input[2] for node in nodes if node.op_type == "Dropout" and len(node.input) > 2} - {""}
    if modes and modes - _always_false(parts):
        raise ModelRejected(
            "the operator Dropout is in training mode and draws random numbers, so no image can be made again: export "
            "the model in evaluation mode; if the dropout stays on by design, multiply by a constant mask instead"
        )


def _always_false(parts: list[Message]) -> set[str]:
    """Return the names whose value is a constant false in each graph and function that has them."""
    false, others = set[str](), set[str]()
    for part in parts:
        if isinstance(part, onnx.TensorProto):  # a graph's constant, or one in an attribute
            (false if _is_false(part) else others).add(part.name)
        elif isinstance(part, onnx.NodeProto):
            constant = part.op_type == "Constant" and all(_is_false(attribute.t) for attribute in part.attribute)
            (false if constant else others).update(part.output)
        elif isinstance(part, onnx.GraphProto):
            others.update({value.name for value in part.input} - {tensor.name for tensor in part.initializer})
        elif isinstance(part, onnx.FunctionProto):
            others.update(part.input)
    return false - others


def _is_false(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.BOOL and not any(tensor.raw_data) and not any(tensor.int32_data)


def _card_text(model: onnx.ModelProto) -> str:
    """Return the card's JSON."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if CARD_KEY not in properties:
        raise ModelRejected(f"the file has no model card: metadata_props[{CARD_KEY!r}] is missing")
    return properties[CARD_KEY]


def _parse_card(text: str) -> tuple[pb.ModelCard, str]:
    """Return the card, and a text about unknown keys, which come from a newer trainer or are misspelt."""
    try:
        card = json_format.Parse(text, pb.ModelCard(), ignore_unknown_fields=True)
        keys = json.loads(text).keys()
    except Exception as error:  # ParseError, and others for the text of a damaged file
        raise ModelRejected(f"the model card is not the JSON of a ganserve.v1.ModelCard: {error}") from error
    known = {field.json_name: field.name for field in pb.ModelCard.DESCRIPTOR.fields}
    unknown = sorted(keys - known.keys() - set(known.values()))
    text = "; ".join(
        f"{key!r} is not a key of a model card{nearest(key, known)}" for key in unknown[:_MAX_REPORTED_KEYS]
    )
    return card, text


def _check_card(card: pb.ModelCard) -> None:
    if not card.latent_dim and card.inputs and (shape := card.inputs[0].latent.shape):
        card.latent_dim = min(math.prod(shape), 2**32 - 1)
    if not (card.latent_dim and card.height and card.width and card.channels in MODES):
        raise ModelRejected("the model card must give latent_dim, height and width above 0, and 1, 3 or 4 channels")
    if max(card.height, card.width) > LARGEST_SIDE:
        raise ModelRejected(
            f"according to its card, the model makes images of {card.height}x{card.width} pixels; at most "
            f"{LARGEST_SIDE} on each side are allowed: export the model with smaller images"
        )
    if (count := len(card.golden_images)) > MAX_GOLDEN_IMAGES:
        raise ModelRejected(
            f"the model card has {count} golden_images; at most {MAX_GOLDEN_IMAGES} are allowed: the server makes each"
        )


def _check_card_size(card: pb.ModelCard) -> None:
    """Check the size of the card, whose golden images are thumbnails by now."""
    if (size := card.ByteSize()) > MAX_CARD_BYTES:
        raise ModelRejected(
            f"the model card has {size:,} bytes; at most {MAX_CARD_BYTES:,} are allowed, because clients read it in "
            "one message: shorten class_names, metrics or training.configuration"
        )


def _inputs(card: pb.ModelCard) -> Inputs:
    try:
        return Inputs.of(card)
    except ValueError as error:
        raise ModelRejected(str(error)) from error


def _parts(message: Message) -> Iterator[Message]:
    """Yield a message and all messages inside it, at any depth."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _parts(part)


def _check_signature(engine: Engine) -> None:
    if wrong := engine.inputs.mismatch(engine.input_types):
        raise ModelRejected(wrong)
    if list(engine.output_types) != ["image"] or engine.output_types["image"][0] != "tensor(uint8)":
        raise ModelRejected(
            f"the model must have one output, image, tensor(uint8); it has {engine.output_types}: export it with this "
            "output only; several pictures of a latent may be side by side in one image"
        )


def _check_images(engine: Engine, card: pb.ModelCard) -> None:
    """Run the model: its images must be the same each time, and match the golden images. This warms it up, too.

    Afterwards, each golden image in the card is a thumbnail, also where the file has the whole image.
    """
    shape = (card.height, card.width, card.channels)
    probes = list(card.golden_images) or [pb.GoldenImage(seed=0)]
    try:
        golden_draw = engine.inputs.golden(probes)
    except ValueError as error:
        raise ModelRejected(str(error)) from error
    try:
        engine.warm_up(shape)
        # One at a time: an image may need a gigabyte while it is made.
        made = np.concatenate([engine.run([golden_draw.part(index, index + 1)]) for index in range(len(probes))])
        count = min(_AMONG, engine.largest_batch)
        alone, again, among = _made_thrice(engine, count)
        if alone.shape == (count, *shape) and _truncation_does_nothing(engine, alone):
            engine.inputs.truncation = pb.TRUNCATION_EFFECT_NONE
        engine.measure()
    except Exception as error:  # onnxruntime's exceptions have no common root
        raise ModelRejected(f"the model fails when it runs: {error}") from error
    for images, number in ((made, len(probes)), (alone, count), (again, 1), (among, count)):
        if images.shape != (number, *shape):
            raise ModelRejected(
                f"according to its card, the model makes {number} images of {shape} in a batch of {number}; it made "
                f"{images.shape}"
            )
    if not np.array_equal(alone[:1], again):
        raise ModelRejected("the same latent gives a different image each time: the model must not draw random numbers")
    if (difference := _difference(alone, among)) > 1:
        raise ModelRejected(
            f"an image differs by up to {difference} grey levels if it is made in a batch with others; it must depend "
            "only on its own latent and label: do not compute means over the batch, as BatchNorm does in training "
            "mode"
        )
    # Rounding errors that `batching_of` does not know.
    while engine.on_cpu and not np.array_equal(alone, among) and (stricter := engine.batching.stricter) is not None:
        engine.batching = stricter
        alone, _, among = _made_thrice(engine, count)
    for golden, pixels in zip(card.golden_images, made, strict=False):
        wanted = pixels
        if f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}" != golden.digest:
            wanted = _decoded(golden, pixels)
            difference = _difference(pixels if wanted.shape == pixels.shape else thumbnail(pixels), wanted)
            if difference > 1:
                raise ModelRejected(
                    f"the golden image of seed {golden.seed} differs by up to {difference} grey levels; 1 is allowed"
                )
        golden.png = png(thumbnail(wanted))


def _made_thrice(engine: Engine, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Make some images alone, the first of them again, and all in one batch: [n, height, width, channels] each."""
    batch = engine.inputs.probes(np.arange(count, dtype=np.uint32))
    alone = [engine.run([batch.part(index, index + 1)]) for index in range(count)]
    return np.concatenate(alone), engine.run([batch.part(0, 1)]), engine.run([batch])


def _truncation_does_nothing(engine: Engine, alone: NDArray[np.uint8]) -> bool:
    """Return whether truncated latents give the same images as `alone`, within the error of rounding."""
    if engine.inputs.truncation != pb.TRUNCATION_EFFECT_LATENT:
        return False
    draw = engine.inputs.probes(np.arange(len(alone), dtype=np.uint32), truncation=0.5)
    parts = (draw.part(index, index + 1) for index in range(len(alone)))
    return all(_difference(engine.run([part]), whole) <= 1 for part, whole in zip(parts, alone, strict=True))


def _difference(pixels: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> int:
    """Return the largest difference, in grey levels."""
    return int(np.abs(pixels.astype(np.int16) - wanted).max())


def _decoded(golden: pb.GoldenImage, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pixels of a golden image: of the whole image or of its thumbnail, for a model that makes `pixels`."""
    sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (thumbnail(pixels), pixels)]
    try:
        with PngImageFile(io.BytesIO(golden.png)) as image:
            # Before it is decoded: a PNG of a few KiB can have the pixels of gigabytes.
            if (size := f"{image.width}x{image.height}") not in sizes:
                raise ModelRejected(
                    f"the golden image of seed {golden.seed} is a PNG of {size} pixels; it must have "
                    f"{' (a thumbnail) or '.join(dict.fromkeys(sizes))}"
                )
            wanted = np.asarray(image.convert(MODES[pixels.shape[2]]))
            return wanted.reshape(*wanted.shape[:2], pixels.shape[2])
    except (OSError, ValueError, SyntaxError) as error:
        raise ModelRejected(f"the golden image of seed {golden.seed} is not a PNG: {error}") from error

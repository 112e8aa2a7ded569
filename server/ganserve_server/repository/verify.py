"""Reads one model file, and rejects it if it breaks a rule.

A file is untrusted input. The rules:

- its size is limited;
- onnx's checker accepts it;
- it has only standard operators, of which none draws random numbers, and contains all its weights;
- it has a model card of limited size, and its inputs and its output match the card;
- it makes the same images each time, and in a batch images that differ by at most one grey level (`compute.batching`
  then removes the difference);
- its golden images differ by at most one grey level;
- an image takes at most half of the time that a batch may take.

`examine` finds all that is wrong with a file: the functions of the rules yield a text for each problem. The server's
probe calls it. `load_version` raises the texts.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from ganserve._cards import MAX_CARD_BYTES, MAX_GOLDEN_IMAGES, png, thumbnail
from ganserve._formats import LARGEST_SIDE, MODES
from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.batching import BatchLimits, Decision, Shapes, batching_of, has_loops, nodes_in
from ganserve_server.compute.engine import Engine, Provider, SessionRefused
from ganserve_server.compute.gpu import GpuOptions
from ganserve_server.compute.inputs import Draw, Inputs, TensorType, input_problems
from ganserve_server.compute.model import ModelVersion
from ganserve_server.compute.watchdog import RunTooLong
from ganserve_server.repository.probed import one_line
from ganserve_server.repository.scan import why_missing
from ganserve_server.spelling import nearest

_log = logging.getLogger(__name__)

CARD_KEY = "ganserve.model_card"
# In the log, of one file; `ganserve-server check` reports all.
_MAX_REPORTED, _MAX_CHARACTERS = 3, 500
_MAX_NODES = 50_000  # the largest published generators have a tenth
_MAX_CARD_TEXT = 32 << 20  # characters; golden images may be whole images, which are not kept
_MAX_DEPTH = 32  # of objects and lists in a card's JSON; a card has 6
_AMONG = 3  # images that are made alone and in one batch, or fewer if a batch may not have so many
_STANDARD_DOMAINS = {"", "ai.onnx"}
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
_NEWLINE = "\n"
# What onnxruntime's errors say before the reason: a code, and a place in its source with the signature of a function.
_OF_ONNXRUNTIME = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\)(?: const)? "
)
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')  # of JSON, and texts, which may contain brackets
_KINDS = {
    FieldDescriptor.CPPTYPE_UINT32: "a whole number from 0 to 4294967295",
    FieldDescriptor.CPPTYPE_STRING: "a text",
}
# Checks that are not made.
_GRAPH, _CARD, _INPUTS = "operators and weights", "the model card", "whether the inputs are those of the model card"
_OUTPUT, _RUN, _GOLDEN = "the output", "whether the model runs", "golden images"
_SAME = "whether an image is the same each time, and in a batch"

Signature = dict[str, TensorType]  # by name, in the order of the file


class ModelRejected(Exception):  # noqa: N818
    """A model file breaks rules; the text, one line, names them."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(one_line(reason) for reason in reasons))


class ModelUnreadable(ModelRejected):
    """A model file cannot be read now; it may be readable later without a change."""


@dataclasses.dataclass(slots=True)
class Examination:
    """What the checks of one file found."""

    problems: list[str] = dataclasses.field(default_factory=list)  # the server serves the file if there are none
    unreadable: bool = False  # the problem is that the file cannot be read now
    unknown_keys: list[str] = dataclasses.field(default_factory=list)  # of the card: of a newer trainer, or misspelt
    unchecked: list[str] = dataclasses.field(default_factory=list)  # because of the problems
    size_bytes: int = 0
    digest: str = ""
    card: pb.ModelCard | None = None
    inputs: Signature = dataclasses.field(default_factory=dict)
    outputs: Signature = dataclasses.field(default_factory=dict)
    batches: Decision | None = None
    engine: Engine | None = None
    batch_difference: int = 0  # grey levels between an image alone and in a batch, as the engine computes it
    exact_golden_images: int = 0  # whose bytes are the same

    @property
    def reasons(self) -> list[str]:
        """What is wrong, short enough for a log."""
        texts = self.problems[:_MAX_REPORTED]
        if more := len(self.problems) - len(texts):
            texts.append(f"`ganserve-server check FILE` reports {more} more")
        return [one_line(text, _MAX_CHARACTERS) for text in texts + self.unknown_keys[:_MAX_REPORTED]]


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
        ModelUnreadable: the file cannot be read.
        ProviderUnavailable: the required provider is missing.
    """
    found = examine(path, max_model_mib=max_model_mib, provider=provider, threads=threads, limits=limits, gpu=gpu)
    if found.problems or found.card is None or found.engine is None:
        raise (ModelUnreadable if found.unreadable else ModelRejected)(*found.reasons)
    if found.unknown_keys:
        _log.warning(
            "the model card has unknown keys",
            extra={"path": str(path), "reason": "; ".join(found.reasons)},
        )
    return ModelVersion.of(name, version, found.digest, found.card, found.engine)


def examine(
    path: Path,
    *,
    max_model_mib: int,
    provider: Provider,
    threads: int,
    limits: BatchLimits = BatchLimits(),  # noqa: B008
    gpu: GpuOptions = GpuOptions(),  # noqa: B008
) -> Examination:
    """Check a file against all rules, as far as its problems allow; a model without problems is warmed up.

    Raises:
        ProviderUnavailable: the required provider is missing.
    """
    found = Examination()
    try:
        content = _read(path, max_model_mib)
        found.size_bytes, found.digest = len(content), f"sha256:{hashlib.sha256(content).hexdigest()}"
        model = _parsed(content)
    except ModelRejected as error:
        found.problems.append(str(error))
        found.unreadable = isinstance(error, ModelUnreadable)
        found.unchecked += [_GRAPH, _CARD, _INPUTS, _OUTPUT, _RUN, _SAME, _GOLDEN]
        return found
    found.problems += _graph_problems(model, content)
    inputs = _examine_card(model, found)
    found.inputs, found.outputs = _signature(model)
    if inputs:
        found.problems += inputs.mismatches(found.inputs)
    else:
        found.unchecked.append(_INPUTS)
    found.problems += _output_problems(found.outputs, found.card, runs=not found.problems)
    golden = list(_golden_problems(found.card)) if found.card else []
    if not found.problems and inputs and found.card:
        found.batches, loops, shapes = batching_of(model), has_loops(model), Shapes(model)
        del model  # its weights
        threads = 1 if found.batches.one_thread_operator else threads
        try:
            batching = found.batches.batching
            found.engine = Engine(
                content, inputs, provider, threads, batching=batching, loops=loops, limits=limits, gpu=gpu
            )
        except SessionRefused as error:
            found.problems.append(_without_place(error))
    if found.engine and found.card:
        _examine_images(found.engine, found.card, found, () if golden else found.card.golden_images, shapes)
        if not found.problems:
            found.problems += _time_problems(found.engine.seconds_for(1), limits.seconds)
        if not found.problems:
            found.problems += _card_size_problems(found.card)
    else:
        found.unchecked += [_RUN, _SAME]
    if golden or not found.engine:
        found.unchecked.append(_GOLDEN)
    if found.card and not found.card.golden_images:
        found.unchecked = [each for each in found.unchecked if each != _GOLDEN]
    found.problems += golden
    return found


def _read(path: Path, max_model_mib: int) -> bytes:
    try:
        if not path.is_file():
            raise ModelRejected(why_missing(path))
        with path.open("rb") as file:
            if not (size_bytes := os.fstat(file.fileno()).st_size):  # reading one of /proc may never end
                raise ModelRejected("the file is empty")
            # Not up to the limit: Python allocates as much as may be read.
            content = file.read(min(size_bytes, max_model_mib << 20) + 1)
        if len(content) > max_model_mib << 20:
            raise ModelRejected(f"the file has more than {max_model_mib} MiB, the limit set by --max-model-mib")
        return content
    except OSError as error:
        raise ModelUnreadable(f"the file cannot be read: {error.strerror}") from error


def _parsed(content: bytes) -> onnx.ModelProto:
    try:
        return onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError has another name in each implementation
        raise ModelRejected("the file is not ONNX, or is truncated") from error


def _graph_problems(model: onnx.ModelProto, content: bytes) -> Iterator[str]:
    """Yield what is wrong with the graph, without running it and without the card."""
    if next(itertools.islice(nodes_in(model), _MAX_NODES, None), None):
        yield (
            f"the graph has more than {_MAX_NODES:,} nodes, the limit: export the model without unrolled loops, or as "
            "several models"
        )
        return
    parts = list(_parts(model))
    nodes = [part for part in parts if isinstance(part, onnx.NodeProto)]
    if custom := {f"{node.op_type} of {node.domain}" for node in nodes if node.domain not in _STANDARD_DOMAINS}:
        yield (
            f"only standard ONNX operators are allowed; this model uses {_listed(sorted(custom))}: export it without "
            "optimisations for one runtime, and without operators of your own"
        )
    yield from _random_problems(parts)
    tensors = (part for part in parts if isinstance(part, onnx.TensorProto))
    external = [tensor.name for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        yield (
            f"the weights must be inside the file; {_listed(external)} are in other files (external data): save the "
            "model in one file, for example with onnx.save(onnx.load(FILE), NEW_FILE)"
        )
        return  # the checker would look for them
    opsets = [each.version for each in model.opset_import if each.domain in _STANDARD_DOMAINS]
    for name, version, known in (
        ("IR version", model.ir_version, onnx.IR_VERSION),
        ("opset", max(opsets, default=0), onnx.defs.onnx_opset_version()),
    ):
        if version > known:
            yield f"the file has {name} {version}; this server knows at most {known}: export it with a lower one"
            return  # the checker would say the same
    try:
        onnx.checker.check_model(content)  # not the model, which would be serialised again
    except Exception as error:  # ValidationError, and UnicodeDecodeError on a damaged file's text
        yield f"onnx's checker rejects the file: {str(error).partition(_NEWLINE)[0]}"


def _random_problems(parts: list[Message]) -> Iterator[str]:
    """Yield which operators draw random numbers, by name: running the model does not find small noise."""
    nodes = [part for part in parts if isinstance(part, onnx.NodeProto)]
    for drawing in sorted({node.op_type for node in nodes} & _RANDOM):
        yield (
            f"the operator {drawing} draws random numbers, so no image can be made again: make the noise a constant "
            "(in torch, a buffer), or take it from further values of the latent"
        )
    modes = {node.input[2] for node in nodes if node.op_type == "Dropout" and len(node.input) > 2} - {""}
    if modes and modes - _always_false(parts):
        yield (
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


def _examine_card(model: onnx.ModelProto, found: Examination) -> Inputs | None:
    """Read the card; return the inputs that it describes, or None if it describes none that are possible."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if CARD_KEY not in properties:
        found.problems.append(
            f"the file has no model card: metadata_props[{CARD_KEY!r}] is missing; add the JSON of one, such as "
            '{"latentDim": 32, "height": 16, "width": 16, "channels": 3}'
        )
        found.unchecked.append(_CARD)
        return None
    text = properties[CARD_KEY]
    if isinstance(text, str) and (too_large := _text_problem(text)):  # bytes are not text at all: protobuf says so
        found.problems.append(too_large)
        found.unchecked.append(_CARD)
        return None
    try:
        card = json_format.Parse(text, pb.ModelCard(), ignore_unknown_fields=True)
        fields = json.loads(text)
        found.unknown_keys = list(_unknown_keys(fields, pb.ModelCard.DESCRIPTOR))
        for each in fields.get("inputs") or ():  # images depend on them, so here nothing may be unknown
            json_format.ParseDict(each, pb.ModelInput())
    except Exception as error:  # ParseError, and others for the text of a damaged file
        reasons = list(_wrong_values(text)) or [str(error)]
        found.problems += [f"the model card is not the JSON of a ganserve.v1.ModelCard: {each}" for each in reasons]
        found.unchecked.append("the rest of the model card")
        return None
    found.card = card
    if not card.latent_dim and card.inputs and (shape := card.inputs[0].latent.shape):
        card.latent_dim = min(math.prod(shape), 2**32 - 1)
    found.problems += _card_problems(card)
    wrong = list(input_problems(card))
    found.problems += wrong
    return Inputs.of(card) if card.latent_dim and not wrong else None


def _text_problem(text: str) -> str:
    """Return why the text of a card is not even parsed; empty: it is."""
    if len(text) > _MAX_CARD_TEXT:
        return (
            f"the model card has {len(text):,} characters; at most {_MAX_CARD_TEXT:,} are allowed: remove golden "
            "images, or what training.configuration does not need"
        )
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "[{" else -1 if bracket in "]}" else 0
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        return f"the JSON of the model card is {deepest:,} levels deep; at most {_MAX_DEPTH} are allowed"
    return ""


def _wrong_values(text: str) -> Iterator[str]:
    """Yield what is wrong with the value of each key of a card's JSON."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError):
        return
    fields = pb.ModelCard.DESCRIPTOR.fields
    known = {field.json_name: field for field in fields} | {field.name: field for field in fields}
    if not isinstance(card, dict):
        yield 'it must be an object, {"latentDim": …}'
        return
    for key, value in card.items():
        try:
            json_format.ParseDict({key: value}, pb.ModelCard(), ignore_unknown_fields=True)
        except Exception as error:
            single = isinstance(getattr(pb.ModelCard(), known[key].name), int | str)
            kind = _KINDS.get(known[key].cpp_type) if single else None
            yield f"{key} is {json.dumps(value)}; it must be {kind}" if kind else str(error)


def _unknown_keys(card: dict[str, Any], kind: Descriptor, place: str = "") -> Iterator[str]:
    """Yield a text for each key that a message does not have, at any depth."""
    known = {field.json_name: field for field in kind.fields}
    by_name = known | {field.name: field for field in kind.fields}
    for key, value in sorted(card.items()):
        of_key = by_name.get(key)
        if of_key is None:
            yield f"{place + key!r} is not a key of a model card{nearest(key, known)}"
        elif of_key.message_type and not of_key.message_type.GetOptions().map_entry:
            for index, each in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(each, dict):
                    inner = f"{key}[{index}]" if isinstance(value, list) else key
                    yield from _unknown_keys(each, of_key.message_type, f"{place}{inner}.")


def _card_problems(card: pb.ModelCard) -> Iterator[str]:
    """Yield what is wrong with the sizes in a card."""
    if missing := [name for name in ("latent_dim", "height", "width") if not getattr(card, name)]:
        yield f"the model card must give {', '.join(missing)}, above 0"
    if card.channels not in MODES:
        yield f"the model card gives {card.channels} channels; an image must have 1, 3 or 4 channels"
    if max(card.height, card.width) > LARGEST_SIDE:
        yield (
            f"according to its card, the model makes images of {card.height}x{card.width} pixels; at most "
            f"{LARGEST_SIDE} on each side are allowed: export the model with smaller images"
        )


def _golden_problems(card: pb.ModelCard) -> Iterator[str]:
    """Yield why the golden images of a card cannot be made."""
    if (count := len(card.golden_images)) > MAX_GOLDEN_IMAGES:
        yield (
            f"the model card has {count} golden_images; at most {MAX_GOLDEN_IMAGES} are allowed: the server makes each"
        )
    classes = len(card.class_names)
    if wrong := [golden.label for golden in card.golden_images if classes and golden.label >= classes]:
        yield f"a golden image has label {max(wrong)}; the card names {classes} classes, from 0 on"


def _card_size_problems(card: pb.ModelCard) -> Iterator[str]:
    """Yield whether the card is too large; its golden images must be thumbnails by now."""
    if (size := card.ByteSize()) > MAX_CARD_BYTES:
        yield (
            f"the model card has {size:,} bytes; at most {MAX_CARD_BYTES:,} are allowed, because clients read it in "
            "one message: shorten class_names, metrics or training.configuration"
        )


def _parts(message: Message) -> Iterator[Message]:
    """Yield a message and all messages inside it, at any depth."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _parts(part)


def _signature(model: onnx.ModelProto) -> tuple[Signature, Signature]:
    """Return the inputs and the outputs of a model."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    return _types(inputs), _types(graph.output)


def _types(values: Iterable[onnx.ValueInfoProto]) -> Signature:
    return {value.name: _type(value.type.tensor_type) for value in values}


def _type(tensor: onnx.TypeProto.Tensor) -> TensorType:
    names = {"float": "float32", "double": "float64"}
    kinds = {number: names.get(name.lower(), name.lower()) for name, number in onnx.TensorProto.DataType.items()}
    # Some exporters write -1 for a dynamic dimension, and onnxruntime reads it so.
    shape = [
        each.dim_value if each.HasField("dim_value") and each.dim_value >= 0 else each.dim_param or "?"
        for each in tensor.shape.dim
    ]
    return TensorType(kinds.get(tensor.elem_type, "unknown"), tuple(shape))


def _output_problems(outputs: Signature, card: pb.ModelCard | None, *, runs: bool) -> Iterator[str]:
    """Yield what is wrong with the outputs.

    Args:
        outputs: the outputs of the file.
        card: the model card, if there is one.
        runs: whether the model will run, which shows the real shape; the file's may be wrong.
    """
    if list(outputs) != ["image"]:
        runs = False
    if len(outputs) != 1:
        yield (
            f"the model has {len(outputs)} outputs ({_listed(list(outputs)) or 'none'}); it must have one, image: "
            "export it with this output only; several pictures of a latent may be side by side in one image"
        )
    elif "image" not in outputs:
        yield f"the output of the model is called {next(iter(outputs))!r}; its name must be 'image': rename it"
    output = outputs.get("image") or next(iter(outputs.values()), None)
    if output is None:
        return
    known = card is not None and not list(_card_problems(card))
    sizes = (card.height, card.width, card.channels) if card and known else (0, 0, 0)
    wanted = TensorType("uint8", ("N", *sizes) if known else ("N", "height", "width", "channels"))
    todo = []
    if output.dtype != wanted.dtype:
        todo.append("inside the model, map the values to 0 to 255, round, clip and cast them to uint8")
    fixed = known and all(isinstance(size, int) for size in output.shape[1:])
    if fixed and (todo or not runs) and output.shape[1:] != sizes:
        todo.append(_how_to_fit(output.shape[1:], sizes))
    if todo:
        yield f"the output is {output}; according to the model card it must be {wanted}: {'; '.join(todo)}"


def _how_to_fit(made: Sequence[int | str], wanted: tuple[int, int, int]) -> str:
    """Return what to do about images of a wrong shape."""
    height, width, channels = wanted
    if tuple(made) == (channels, height, width):
        return "transpose it by (0, 2, 3, 1) inside the model, so that the channels are the last dimension"
    if len(made) == 3 and made[2] in MODES:
        return f"if the model is right, its card has height {made[0]}, width {made[1]} and channels {made[2]}"
    return "an image must have the dimensions height, width and channels, in this order, as the card gives them"


def _time_problems(image_s: float, limit_s: float) -> Iterator[str]:
    """Yield whether an image takes so long that batches would be ended."""
    if image_s > limit_s / 2:
        yield (
            f"an image takes {image_s:.2g} s on this machine; with --batch-timeout-s {limit_s:g} it may take "
            f"{limit_s / 2:g} s, because it takes longer while others are made: set --batch-timeout-s {3 * image_s:.2g}"
        )


def _examine_images(
    engine: Engine,
    card: pb.ModelCard,
    found: Examination,
    golden_images: Collection[pb.GoldenImage],
    shapes: Shapes | None = None,
) -> None:
    """Run the model: its images must be the same each time, and match the golden images. This warms it up, too."""
    try:
        for problem in _image_problems(engine, card, found, golden_images):
            found.problems.append(problem)
        if not found.problems:
            engine.measure(shapes)
    except RunTooLong as error:
        found.problems.append(f"the model makes an image too slowly, or never: {error}; see --batch-timeout-s")
        found.unchecked += [_SAME, _GOLDEN]
    except Exception as error:  # onnxruntime's exceptions have no common root
        found.problems.append(f"the model fails when it runs: {_without_place(error)}")
        found.unchecked += [_SAME, _GOLDEN]


def problems_of_images(engine: Engine, card: pb.ModelCard) -> list[str]:
    """Warm up and time an engine; return what is wrong with its images."""
    found = Examination()
    _examine_images(engine, card, found, card.golden_images)
    return [one_line(problem, _MAX_CHARACTERS) for problem in found.problems]


def _image_problems(
    engine: Engine, card: pb.ModelCard, found: Examination, golden_images: Collection[pb.GoldenImage]
) -> Iterator[str]:
    """Yield what is wrong with the images.

    Afterwards, each golden image in the card is a thumbnail, also where the file has the whole image.
    """
    shape = (card.height, card.width, card.channels)
    probes = list(golden_images) or [pb.GoldenImage(seed=0)]
    golden_draw = engine.inputs.golden(probes)
    engine.warm_up(shape)
    # One at a time: an image may need a gigabyte while it is made.
    made = np.concatenate([engine.run([golden_draw.part(index, index + 1)]) for index in range(len(probes))])
    if len(made) != len(probes) or made.shape[1:] != shape:
        yield (
            f"the model makes more than one image of a latent, or none: {len(made)} of {len(probes)}"
            if len(made) != len(probes)
            else f"the model makes images of {_size(made.shape[1:])}; according to the model card they must be "
            f"{_size(shape)}: {_how_to_fit(made.shape[1:], shape)}"
        )
        found.unchecked += [_SAME, _GOLDEN]
        return
    # With other attributes for each, and truncation if it is an input: these could make an image depend on others, too.
    truncation = 0.5 if engine.inputs.truncation == pb.TRUNCATION_EFFECT_INPUT else 1.0
    batch = engine.inputs.varied(min(_AMONG, engine.largest_batch), truncation)
    alone, again = _alone(engine, batch), engine.run([batch.part(0, 1)])
    if not np.array_equal(alone[:1], again):
        yield "the same latent gives a different image each time: the model must not draw random numbers"
        found.unchecked += ["whether an image is the same in a batch", _GOLDEN]
        return
    yield from _batch_problems(engine, batch, alone, found)
    if _truncation_does_nothing(engine, alone):
        engine.inputs.truncation = pb.TRUNCATION_EFFECT_NONE
    for golden, pixels in zip(golden_images, made, strict=False):
        wanted = pixels
        if f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}" == golden.digest:
            found.exact_golden_images += 1
        else:
            try:
                wanted = _decoded(golden, pixels)
            except ModelRejected as error:
                yield str(error)
                continue
            difference = _difference(pixels if wanted.shape == pixels.shape else thumbnail(pixels), wanted)
            if difference > 1:
                yield (
                    f"the golden image of seed {golden.seed} differs by up to {difference} grey levels; 1 is allowed: "
                    "the card must have images of these weights, so export the model again"
                )
        golden.png = png(thumbnail(wanted))


def _batch_problems(engine: Engine, batch: Draw, alone: NDArray[np.uint8], found: Examination) -> Iterator[str]:
    """Yield why images depend on their batch; make the engine compute batches so that they do not, if possible."""
    try:
        among = engine.run([batch])
    except RunTooLong:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common root
        yield (
            f"the model makes one image, but fails when it runs on {batch.count} at once: {_without_place(error)}: the "
            "number of images must not be a constant in the graph, such as the 1 in a Reshape to [1, …]; use -1"
        )
        return
    if among.shape != alone.shape:
        yield (
            f"of {batch.count} latents in one batch, the model makes {len(among)} images of "
            f"{_size(among.shape[1:])}; it must make {len(alone)} of {_size(alone.shape[1:])}: no operator may mix or "
            "drop images"
        )
        return
    if (difference := _difference(alone, among)) > 1:
        yield (
            f"an image differs by up to {difference} grey levels if it is made in a batch with others; it must depend "
            "only on its own latent and label: do not compute means over the batch, as BatchNorm does in training "
            "mode"
        )
        return
    # Rounding errors that `batching_of` does not know.
    while engine.on_cpu and not np.array_equal(alone, among) and (stricter := engine.batching.stricter) is not None:
        engine.batching = stricter
        alone, among = _alone(engine, batch), engine.run([batch])
    found.batch_difference = _difference(alone, among)


def _alone(engine: Engine, batch: Draw) -> NDArray[np.uint8]:
    """Make the images of a batch one at a time: [n, height, width, channels]."""
    return np.concatenate([engine.run([batch.part(index, index + 1)]) for index in range(batch.count)])


def _truncation_does_nothing(engine: Engine, alone: NDArray[np.uint8]) -> bool:
    """Return whether truncated latents give the same images as `alone`, within the error of rounding."""
    if engine.inputs.truncation != pb.TRUNCATION_EFFECT_LATENT:
        return False
    draw = engine.inputs.varied(len(alone), truncation=0.1)
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


def _without_place(error: Exception) -> str:
    """Return the text of an exception of onnxruntime without the place in its source."""
    return _OF_ONNXRUNTIME.sub("", one_line(str(error)))


def _size(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _listed(names: Sequence[str]) -> str:
    """Name the first few."""
    more = len(names) - _MAX_REPORTED
    return ", ".join(names[:_MAX_REPORTED]) + (f" and {more} more" if more > 0 else "")

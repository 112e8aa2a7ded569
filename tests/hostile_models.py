"""Model files that pass onnx's checker, or nearly, and crash, hang or exhaust what opens or runs them.

`python -m tests.hostile_models FOLDER` writes them all as FOLDER/NAME.onnx.
"""

import base64
import itertools
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ganserve_server.repository.verify import CARD_KEY

_CARD: dict[str, Any] = {"latentDim": 4, "height": 8, "width": 8, "channels": 1}
_FOREVER = 1 << 62


def crash_when_opened() -> bytes:
    """Divide the smallest int64 by -1, which onnxruntime folds when it opens the file: SIGFPE."""
    return _model(
        [
            helper.make_node("Div", ["smallest", "minus_one"], ["quotient"]),
            helper.make_node("Cast", ["quotient"], ["offset"], to=TensorProto.FLOAT),
        ],
        {"smallest": np.array([-(2**63)], np.int64), "minus_one": np.array([-1], np.int64)},
    )


def much_memory() -> bytes:
    """Make a tensor of 64 GB, of which only the sum is used."""
    return _model(
        [
            helper.make_node("Expand", ["mean", "size"], ["copies"]),
            helper.make_node("ReduceMax", ["copies"], ["offset"], keepdims=1),
        ],
        {"size": np.array([16 << 30], np.int64)},
    )


def endless_loop() -> bytes:
    """Loop 2^62 times."""
    return _loop([], {"rounds": np.array(_FOREVER, np.int64)})


def endless_loop_by_latents() -> bytes:
    """Loop as often as the latents say, which no file reader knows: 2^40 times their square."""
    nodes = [
        helper.make_node("Mul", ["mean", "mean"], ["square"]),
        helper.make_node("Mul", ["square", "large"], ["product"]),
        helper.make_node("Cast", ["product"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Squeeze", ["whole"], ["rounds"]),
    ]
    return _loop(nodes, {"large": np.array([2.0**60], np.float32)})


def large_latent() -> bytes:
    """Need 2^29 random numbers for each image."""
    return _model([helper.make_node("Identity", ["mean"], ["offset"])], {}, _CARD | {"latentDim": 1 << 29}, 1 << 29)


def large_image() -> bytes:
    """Make an image of 400 megapixels, though the card has 64 pixels."""
    return _model([helper.make_node("Identity", ["mean"], ["offset"])], {}, side=20_000)


def deep_card() -> bytes:
    """Nest 100,000 lists in the card."""
    return _model([helper.make_node("Identity", ["mean"], ["offset"])], {}, '{"metrics":' + "[" * 100_000)


def large_card() -> bytes:
    """Have a card of 50 MB."""
    return _model([helper.make_node("Identity", ["mean"], ["offset"])], {}, _CARD | {"architecture": "x" * 50_000_000})


def golden_bombs() -> bytes:
    """Have golden images that are PNGs of a few KB and of 400 megapixels."""
    golden = [{"seed": seed, "png": _png_bomb(20_000)} for seed in range(8)]
    return _model([helper.make_node("Identity", ["mean"], ["offset"])], {}, _CARD | {"goldenImages": golden})


def many_nodes() -> bytes:
    """Have a graph of 200,000 nodes."""
    names = ["mean", *(f"n{number}" for number in range(200_000)), "offset"]
    return _model([helper.make_node("Identity", [one], [other]) for one, other in itertools.pairwise(names)], {})


# Of each file: what makes it, and a part of the reason with which a server rejects it. With a limit of memory, an
# operating system may end the process in another way than without.
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "crash-when-opened": (crash_when_opened, "SIGFPE"),
    "much-memory": (much_memory, "memory"),
    "endless-loop": (endless_loop, "--load-timeout-s"),
    "endless-loop-by-latents": (endless_loop_by_latents, "--load-timeout-s"),
    "large-latent": (large_latent, "latent_dim 536,870,912"),
    "large-image": (large_image, "20000"),
    "deep-card": (deep_card, "levels deep"),
    "large-card": (large_card, "characters"),
    "golden-bombs": (golden_bombs, "PNG of 20000x20000"),
    "many-nodes": (many_nodes, "more than 50,000 nodes"),
}


def _model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray[Any, Any]],
    card: dict[str, Any] | str = _CARD,
    latent_dim: int = 4,
    side: int = 8,
) -> bytes:
    """Return a file whose images are grey, by the mean of the latents and by the value `offset` that `nodes` make."""
    ends = [
        helper.make_node("ReduceMean", ["latent"], ["each"], axes=[1], keepdims=1),
        helper.make_node("ReduceMax", ["each"], ["mean_of_all"], keepdims=0),
        helper.make_node("Reshape", ["mean_of_all", "one"], ["mean"]),
        *nodes,
        helper.make_node("Mul", ["offset", "zero"], ["nothing"]),
        helper.make_node("Add", ["each", "nothing"], ["grey"]),
        helper.make_node("Cast", ["grey"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("Reshape", ["bytes", "pixel"], ["pixels"]),
        helper.make_node("Expand", ["pixels", "picture"], ["image"]),
    ]
    common = {
        "one": np.array([1], np.int64),
        "zero": np.zeros(1, np.float32),
        "pixel": np.array([-1, 1, 1, 1], np.int64),
        "picture": np.array([1, side, side, 1], np.int64),
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in (common | weights).items()]
    latent = helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", latent_dim])
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "height", "width", "channels"])
    graph = helper.make_graph(ends, "hostile", [latent], [image], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {CARD_KEY: card if isinstance(card, str) else json.dumps(card)})
    return model.SerializeToString()


def _loop(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """Return a file with a loop of `rounds` rounds."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["value", "value"], ["doubled"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("doubled", TensorProto.FLOAT, [1]),
        ],
    )
    loop = helper.make_node("Loop", ["rounds", "true", "mean"], ["offset"], body=body)
    return _model([*nodes, loop], {"true": np.array(True), **weights})


def _png_bomb(side: int) -> str:
    """Return a black PNG of side x side pixels, in base64."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, _) in HOSTILE.items():
        (folder / f"{name}.onnx").write_bytes(make())

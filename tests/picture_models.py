"""A tiny model file whose images have any size and number of channels; `picture` makes the same ones with NumPy."""

from pathlib import Path

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ganserve.v1 import generation_pb2 as pb

LATENT_DIM = 4


def save_picture_model(repository: Path, name: str, height: int, width: int, channels: int) -> Path:
    """Write version 1 of a model into a repository.

    The channels are ramps from top to bottom, by |latent|; the last of four, alpha, begins below 0 and ends above 255.
    """
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    nodes = [
        helper.make_node("Abs", ["latent"], ["sizes"]),
        helper.make_node("Slice", ["sizes", "first", "channels", "axis"], ["slopes"]),
        helper.make_node("Reshape", ["slopes", "each"], ["slope"]),
        helper.make_node("Mul", ["slope", "rows"], ["heights"]),
        helper.make_node("Add", ["heights", "columns"], ["levels"]),
        helper.make_node("Clip", ["levels", "black", "white"], ["grey"]),
        helper.make_node("Cast", ["grey"], ["image"], to=TensorProto.UINT8),
    ]
    inputs = [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["n", LATENT_DIM])]
    weights = {
        "first": np.array([0]),
        "channels": np.array([channels]),
        "axis": np.array([1]),
        "each": np.array([-1, 1, 1, channels]),
        "rows": _rows(height),
        "columns": _columns(width, channels),
        "black": np.float32(0),
        "white": np.float32(255),
    }
    graph = helper.make_graph(
        nodes,
        "ramps",
        inputs,
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", height, width, channels])],
        [numpy_helper.from_array(np.asarray(values), key) for key, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    card = pb.ModelCard(latent_dim=LATENT_DIM, height=height, width=width, channels=channels)
    model.metadata_props.add(key="ganserve.model_card", value=json_format.MessageToJson(card))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def picture(seed: int, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Return the image of a seed, [height, width, channels]."""
    latent = np.random.RandomState(seed).standard_normal(LATENT_DIM).astype(np.float32)
    levels = np.abs(latent)[:channels] * _rows(height) + _columns(width, channels)
    return levels.clip(0, 255).astype(np.uint8)[0]


def _rows(height: int) -> NDArray[np.float32]:
    return np.linspace(0, 400, height, dtype=np.float32)[None, :, None, None]


def _columns(width: int, channels: int) -> NDArray[np.float32]:
    columns = np.linspace(50, 90, width, dtype=np.float32)[None, None, :, None].repeat(channels, 3)
    columns[..., 3:] = -60
    return columns

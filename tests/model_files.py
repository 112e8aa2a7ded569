"""Model files of large images that take little time to make, to load and to run."""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def model_of_picture(picture: NDArray[np.uint8]) -> onnx.ModelProto:
    """Return a model, without a card, that makes this picture, [height, width, channels], of every latent, [N, 4]."""
    shape = (-1, *picture.shape)
    nodes = [
        helper.make_node("Shape", ["latent"], ["count"], end=1),
        helper.make_node("Concat", ["count", "size"], ["shape"], axis=0),
        helper.make_node("Expand", ["picture", "shape"], ["image"]),
    ]
    weights = [
        numpy_helper.from_array(np.array(picture.shape, np.int64), "size"),
        numpy_helper.from_array(picture, "picture"),
    ]
    latent = helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", 4])
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", *shape[1:]])
    graph = helper.make_graph(nodes, "picture", [latent], [image], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

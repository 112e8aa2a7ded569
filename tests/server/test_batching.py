"""An image has the same bytes alone and in any batch, for the operators that generators use."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.compute.batching import Batching, batching_of
from ganserve_server.repository.verify import CARD_KEY, load_version

RANDOM = np.random.default_rng(0)
IMAGES = 17
SIZES = (2, 3, 5, 8, 16, IMAGES)
Case = tuple[list[onnx.NodeProto], dict[str, NDArray[Any]], tuple[int, ...]]  # nodes, constants, shape of an input


def floats(*shape: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def node(kind: str, *inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node(kind, inputs or ["x"], ["y"], **attributes)]


def graph(case: Case) -> onnx.ModelProto:
    nodes, constants, shape = case
    of_positive = {"Acos", "Asin", "Log", "Pow", "ReduceLogSum", "Sqrt"}
    before = "Sigmoid" if any(each.op_type in of_positive for each in nodes) else "Neg"
    given = helper.make_node(before, ["given"], ["x"])
    return helper.make_model(
        helper.make_graph(
            [given, *nodes],
            "one",
            [helper.make_tensor_value_info("given", TensorProto.FLOAT, ["N", *shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )


def functions() -> Iterator[tuple[str, Case]]:
    names = "Abs Acos Asin Asinh Atan Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity"
    names += " LeakyRelu Log Mish Neg Reciprocal Relu Round Selu Sigmoid Sin Sinh Softplus Softsign Sqrt Tan Tanh"
    for name, shape in itertools.product(names.split(), [(1,), (3,), (49,), (64,), (3, 31, 31), (16, 8, 8)]):
        yield f"{name} {shape}", (node(name), {}, shape)


def sums() -> Iterator[tuple[str, Case]]:
    names = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum"
    shapes = [(64, 8, 8), (3, 9, 9), (7, 5, 3), (2, 1, 1), (512, 4, 1)]
    axes = [(1,), (2,), (3,), (1, 2), (2, 3), (1, 3), (1, 2, 3), (-1,), (-3,)]
    for name, shape, some in itertools.product([*names.split(), "ReduceSumSquare"], shapes, axes):
        yield f"{name} {shape} {some}", (node(name, "x", "axes"), {"axes": np.array(some, np.int64)}, shape)
    for name, size in itertools.product(("ReduceMean", "ReduceSum"), (7, 64, 512)):
        yield f"{name} ({size},)", (node(name, "x", "axes"), {"axes": np.array([1], np.int64)}, (size,))


def layers() -> Iterator[tuple[str, Case]]:
    for inside, outside in itertools.product([7, 64, 100, 512], [1, 3, 17, 192]):
        weight, bias = floats(inside, outside), floats(outside)
        yield f"Gemm {inside} {outside}", (node("Gemm", "x", "w", "b"), {"w": weight, "b": bias}, (inside,))
        yield f"MatMul {inside} {outside}", (node("MatMul", "x", "w"), {"w": weight}, (9, inside))
    for inside, outside, side, kernel in itertools.product([3, 16], [3, 17, 64], [4, 7], [1, 3]):
        constants = {"w": floats(outside, inside, kernel, kernel), "b": floats(outside)}
        conv = node("Conv", "x", "w", "b", pads=[kernel // 2] * 4)
        yield f"Conv {inside} {outside} {side} {kernel}", (conv, constants, (inside, side, side))
    for inside, outside, side, stride in itertools.product([3, 16], [3, 17, 64], [1, 4, 7], [1, 2]):
        conv = node("ConvTranspose", "x", "w", strides=[stride] * 2, pads=[1] * 4)
        yield (
            f"ConvTranspose {inside} {outside} {side}",
            (conv, {"w": floats(inside, outside, 4, 4)}, (inside, side, side)),
        )
    for side in (4, 7):
        shape, scale = (6, side, side), {"s": floats(6), "b": floats(6)}
        statistics = {**scale, "m": floats(6), "v": np.abs(floats(6)) + 1}
        yield f"BatchNormalization {side}", (node("BatchNormalization", *"xsbmv"), statistics, shape)
        yield f"InstanceNormalization {side}", (node("InstanceNormalization", *"xsb"), scale, shape)
        yield f"LayerNormalization {side}", (node("LayerNormalization", "x", "s"), {"s": floats(side)}, shape)
        groups = {"s": floats(2), "b": floats(2)}
        yield f"GroupNormalization {side}", (node("GroupNormalization", *"xsb", num_groups=2), groups, shape)
        yield f"GlobalAveragePool {side}", (node("GlobalAveragePool"), {}, shape)
        yield f"AveragePool {side}", (node("AveragePool", kernel_shape=[2, 2]), {}, shape)
        yield f"PRelu {side}", (node("PRelu", "x", "w"), {"w": floats(6, 1, 1)}, shape)
        depthwise = node("Conv", "x", "w", pads=[1] * 4, group=6)
        yield f"depthwise {side}", (depthwise, {"w": floats(6, 1, 3, 3)}, shape)
        for mode in ("nearest", "linear", "cubic"):
            sizes = {"s": np.array([1, 1, 2, 2], np.float32)}
            yield f"Resize {mode} {side}", (node("Resize", "x", "", "s", mode=mode), sizes, shape)
        for axis, kind in itertools.product((1, 2, 3), ("Softmax", "LogSoftmax")):
            yield f"{kind} {axis} {side}", (node(kind, axis=axis), {}, shape)
        for kind in ("Add", "Mul", "Div", "Pow", "Max"):
            yield f"{kind} {side}", (node(kind, "x", "w"), {"w": np.abs(floats(6, 1, 1))}, shape)
        for exponent, kind in itertools.product((2, 3, 0.5), ("float32", "int64")):
            power = {"w": np.array(exponent, kind)}
            yield f"Pow {kind} {exponent} {side}", (node("Pow", "x", "w"), power, shape)
        heads = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), *node("MatMul", "x", "t")]
        yield f"attention {side}", (heads, {}, shape)
        yield f"Einsum {side}", (node("Einsum", "x", "w", equation="nchw,oc->nohw"), {"w": floats(5, 6)}, shape)
        yield f"DepthToSpace {side}", (node("DepthToSpace", blocksize=2), {}, (8, side, side))


CASES = {name: case for kind in (functions(), sums(), layers()) for name, case in kind}


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def differing(case: Case, batching: Batching) -> int:
    """Count the images that differ between batches of several sizes."""
    one_thread = session(graph(case), 1)
    given = floats(IMAGES, *case[2])

    def made(size: int) -> NDArray[Any]:
        parts = [given[start : start + size] for start in range(0, IMAGES, size)]
        compute = lambda feeds: one_thread.run(None, feeds)[0]  # noqa: E731
        return np.concatenate([batching.run(compute, {"given": part}) for part in parts])

    alone = made(1)
    different = np.zeros(IMAGES, bool)
    for size in SIZES:
        different |= (made(size).view(np.uint8) != alone.view(np.uint8)).reshape(IMAGES, -1).any(1)
    return int(different.sum())


@pytest.mark.parametrize("kind", ["functions", "sums", "layers"])
def test_each_operator_gives_the_same_bytes_alone_and_in_batches(kind: str) -> None:
    wrong = []
    for name, case in globals()[kind]():
        batching, _, one_thread_operator = batching_of(graph(case))
        if different := differing(case, batching):
            wrong.append(f"{name}: {batching}, {different} differ")
        if not one_thread_operator:
            one = {"given": floats(1, *case[2])}
            alone = session(graph(case), 1).run(None, one)[0]
            if any(session(graph(case), threads).run(None, one)[0].tobytes() != alone.tobytes() for threads in (2, 3)):
                wrong.append(f"{name}: differs with threads")
    assert not wrong


@pytest.mark.parametrize(
    ("name", "batching"),
    [
        ("ReduceMean (64, 8, 8) (1,)", Batching.PAIRS),
        ("ReduceMean (3, 9, 9) (2, 3)", Batching.SINGLES),
        ("Elu (3, 31, 31)", Batching.SINGLES),
        ("Softplus (3,)", Batching.SINGLES),
    ],
)
def test_operators_that_differ_need_it(name: str, batching: Batching) -> None:
    """If this fails after an update of onnxruntime, its kernels have changed: compare all operators again."""
    assert batching_of(graph(CASES[name]))[0] is batching
    assert any(differing(CASES[name], Batching.TOGETHER) for _ in range(30))  # each with other images


def test_ordinary_operators_are_computed_together_on_all_cores() -> None:
    ordinary = [
        "Tanh (3, 31, 31)",
        "Relu (49,)",
        "Elu (16, 8, 8)",
        "ReduceMean (64, 8, 8) (2, 3)",
        "GlobalAveragePool 7",
        "Pow float32 2 7",
        "Pow int64 2 7",
    ]
    ordinary += [name for name, _ in layers() if name.split()[0] in ("Gemm", "Conv", "ConvTranspose", "MatMul")]
    assert {name: batching_of(graph(CASES[name]))[0] for name in ordinary} == dict.fromkeys(ordinary, Batching.TOGETHER)
    assert batching_of(graph(CASES["Conv 16 64 4 3"])) == (Batching.TOGETHER, "", "")
    assert batching_of(graph(CASES["Pow float32 2 7"])) == (Batching.TOGETHER, "", "")
    assert batching_of(graph(CASES["Pow float32 3 7"])) == (Batching.SINGLES, "Pow", "Pow")


def pixel_norm(path: Path) -> None:
    """Write a generator of 16x16 pixels that normalises the channels of each pixel."""
    weights = {
        "dense": floats(32, 64 * 64),
        "shape": np.array([-1, 64, 8, 8], np.int64),
        "axis": np.array([1], np.int64),
        "small": np.float32(1e-8),
        "conv": 0.05 * floats(64, 3, 4, 4),
        "large": np.float32(1e5),
        "levels": np.float32(256),
    }
    nodes = [
        ("MatMul", ["latent", "dense"], {}),
        ("Reshape", ["0", "shape"], {}),
        ("Mul", ["1", "1"], {}),
        ("ReduceMean", ["2", "axis"], {"keepdims": 1}),
        ("Add", ["3", "small"], {}),
        ("Sqrt", ["4"], {}),
        ("Div", ["1", "5"], {}),
        ("ConvTranspose", ["6", "conv"], {"strides": [2, 2], "pads": [1] * 4}),
        ("Mul", ["7", "large"], {}),
        ("Mod", ["8", "levels"], {"fmod": 1}),  # so that a pixel shows the last bits
        ("Abs", ["9"], {}),
        ("Cast", ["10"], {"to": TensorProto.UINT8}),
        ("Transpose", ["11"], {"perm": [0, 2, 3, 1]}),
    ]
    made = [
        helper.make_node(kind, inputs, ["image" if number == len(nodes) - 1 else str(number)], **attributes)
        for number, (kind, inputs, attributes) in enumerate(nodes)
    ]
    model = helper.make_model(
        helper.make_graph(
            made,
            "pixel norm",
            [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", 32])],
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 16, 16, 3])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    model.metadata_props.add(
        key=CARD_KEY, value=json_format.MessageToJson(pb.ModelCard(latent_dim=32, height=16, width=16, channels=3))
    )
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


def test_a_model_with_pixel_norm_gives_the_same_bytes_alone_and_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "norm" / "1" / "model.onnx"
    pixel_norm(path)
    model = load_version("norm", 1, path, max_model_mib=64, provider="cpu", threads=2)
    engine = model.engine
    assert engine.batching is Batching.PAIRS
    draw = engine.inputs.probes(np.arange(256, dtype=np.uint32))

    def differ(batching: Batching) -> int:
        engine.batching = batching
        alone = np.concatenate([engine.run([draw.part(index, index + 1)]) for index in range(draw.count)])
        return int((engine.run([draw]) != alone).any((1, 2, 3)).sum())

    assert differ(Batching.PAIRS) == 0
    assert (engine.padding(1), engine.padding(2)) == (1, 0)
    assert differ(Batching.TOGETHER) > 0


def test_inside_functions_and_branches_nothing_is_known(tmp_path: Path) -> None:
    model = graph((node("Identity"), {}, (64,)))
    branch = helper.make_graph(
        node("Sin", "x"), "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        node("Relu", "x"), "other", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    del model.graph.node[-1]
    model.graph.node.append(helper.make_node("If", ["which"], ["y"], then_branch=branch, else_branch=other))
    assert batching_of(model) == (Batching.SINGLES, "Sin in a function or a branch", "Sin")

"""Prints how long a lone caller of a slow model waits beside another caller's thousand images, on a real server.

For each time of an image, the program makes a model that takes about that long on one core of this machine. One
client streams 1,000 images; another one asks for one image at a time, on its own connection. The limit is two times of
an image and 50 ms. Here, an image's time is that of a core while the other cores compute images, too, as they do beside
the stream: cores share caches, memory and clock.

    python benchmarks/slow_models.py [--seconds 0.01 0.1 0.5 1.0] [--calls 10] [--check]
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from google.protobuf import json_format
from onnx import TensorProto, helper, numpy_helper
from running import serving

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb

SIDE = 512
BULK = 1000


def slow_model(rounds: int) -> onnx.ModelProto:
    """Build a generator of 8x8 grey pixels that multiplies matrices for a number of rounds."""
    random = np.random.default_rng(0)
    weights = {
        "rounds": np.array(rounds, np.int64),
        "true": np.array(True),
        "wide": random.standard_normal((16, SIDE * 64)).astype(np.float32) / 4,
        "rows": np.array([-1, 64, SIDE], np.int64),
        "square": np.linalg.qr(random.standard_normal((SIDE, SIDE)))[0].astype(np.float32),
        "start": np.array([0], np.int64),
        "stop": np.array([1], np.int64),
        "axis": np.array([2], np.int64),
        "shape": np.array([-1, 8, 8, 1], np.int64),
        "grey": np.float32(60),
        "middle": np.float32(128),
    }
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["go_on"]),
            helper.make_node("MatMul", ["before", "square"], ["after"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("MatMul", ["latent", "wide"], ["flat"]),
        helper.make_node("Reshape", ["flat", "rows"], ["first"]),
        helper.make_node("Loop", ["rounds", "true", "first"], ["turned"], body=body),
        helper.make_node("Slice", ["turned", "start", "stop", "axis"], ["column"]),
        helper.make_node("Reshape", ["column", "shape"], ["pixels"]),
        helper.make_node("Mul", ["pixels", "grey"], ["scaled"]),
        helper.make_node("Add", ["scaled", "middle"], ["shifted"]),
        helper.make_node("Cast", ["shifted"], ["image"], to=TensorProto.UINT8),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "slow",
            [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["N", 16])],
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 8, 8, 1])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    card = pb.ModelCard(latent_dim=16, height=8, width=8, channels=1)
    model.metadata_props.add(key="ganserve.model_card", value=json_format.MessageToJson(card))
    return model


def seconds_an_image(model: onnx.ModelProto, cores: int) -> float:
    """Time an image on one core while each of `cores` cores computes images; return the median of 4 to each core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    together = threading.Barrier(cores)

    def run(_: int) -> list[float]:
        took = []
        together.wait()
        for _ in range(4):
            started = time.perf_counter()
            session.run(None, {"latent": np.ones((1, 16), np.float32)})
            took.append(time.perf_counter() - started)
        return took

    with ThreadPoolExecutor(cores) as pool:
        return statistics.median(one for took in pool.map(run, range(cores)) for one in took)


def waits(address: str, calls: int) -> list[float]:
    """Return the seconds that each call for one image took while another client streams."""
    stop, begun = threading.Event(), threading.Event()

    def stream() -> None:
        with Client(address) as client:
            for _ in client.stream("slow", count=BULK, seed=0):
                begun.set()
                if stop.is_set():
                    return

    bulk = threading.Thread(target=stream)
    bulk.start()
    took = []
    with Client(address) as client:
        begun.wait()
        for seed in range(calls):
            started = time.perf_counter()
            client.generate("slow", seed=seed)
            took.append(time.perf_counter() - started)
    stop.set()
    bulk.join()
    return took


def main() -> None:
    """Print a row for each time of an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.01, 0.1, 0.5, 1.0], help="of one image")
    parser.add_argument("--calls", type=int, default=10, help="of the lone caller")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a median is above the limit")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    a_round = seconds_an_image(slow_model(100), 1) / 100
    print("| an image alone, s | beside others, s | wait, median, s | longest, s | limit, s |\n|---|---|---|---|---|")
    late = False
    for wanted in options.seconds:
        model = slow_model(max(1, round(wanted / a_round)))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "slow" / "1" / "model.onnx"
            path.parent.mkdir(parents=True)
            onnx.save(model, path)
            alone_s, image_s = (seconds_an_image(model, busy) for busy in (1, cores))
            with serving("--workers=1", f"--models={folder}") as server:
                took = waits(server.address, options.calls)
        wait, limit = statistics.median(took), 2 * image_s + 0.05
        late = late or wait > limit
        row = (alone_s, image_s, wait, max(took), limit)
        print(f"| {' | '.join(f'{seconds:.3f}' for seconds in row)} |", flush=True)
    sys.exit(int(options.check and late))


if __name__ == "__main__":
    main()

"""Compares int8 with fp32: images a second, in alternating rounds of one onnxruntime session each, and the quality.

models    bundled models by name, and the three reference models, whose weights are random
figures   images/s in batches of 64; the time of a single image; grey levels between int8 and fp32 over the images of
          seeds 0, 1, …; with --data-root, label accuracy and FID of bundled models, measured as by `evaluate`
bytes     each image must be identical in batches of 1 to 64, by sessions with one thread and with two

python benchmarks/precision.py [--models mlp-mnist,cdcgan28] [--data-root data] [--rounds 5] [--seconds 0.5]
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf import json_format
from numpy.typing import NDArray
from reference_models import NAMES, checkpoint_of

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.settings import BUNDLED_MODELS
from ganserve_trainer.evaluation.evaluate import load_parts
from ganserve_trainer.evaluation.measure import compare
from ganserve_trainer.export.graph import to_onnx
from ganserve_trainer.export.quantising import to_int8
from ganserve_trainer.export.variants import calibration
from ganserve_trainer.model_file import CARD_KEY, latents, run_session

BUNDLED = ("mlp-mnist", "cdcgan-mnist", "cdcgan-fashion-mnist", "dcgan-mnist")
BATCH_SIZE = 64
# The number of images in one batch of each size from 1 to 64.
CHECKED_IMAGES = sum(range(1, 65))

Feeds = dict[str, NDArray[Any]]


def session_of(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def open_model(name: str) -> tuple[onnx.ModelProto, pb.ModelCard]:
    if name in NAMES:
        checkpoint = checkpoint_of(name)
        classes = checkpoint.spec.class_names if checkpoint.settings.conditional else ()
        return to_onnx(checkpoint), pb.ModelCard(latent_dim=checkpoint.settings.latent_dim, class_names=classes)
    model = onnx.load(BUNDLED_MODELS / name / "1" / "model.onnx")
    text = next(entry.value for entry in model.metadata_props if entry.key == CARD_KEY)
    return model, json_format.Parse(text, pb.ModelCard())


def inputs(card: pb.ModelCard, count: int) -> Feeds:
    feeds: Feeds = {"latent": latents(np.arange(count), card.latent_dim)}
    if card.class_names:
        feeds["label"] = np.arange(count) % len(card.class_names)
    return feeds


def race(sessions: list[onnxruntime.InferenceSession], feeds: Feeds, rounds: int, seconds: float) -> list[float]:
    """Return each session's images a second, as the median over the rounds."""
    rates: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(None, feeds)
    for _ in range(rounds):
        for session, found in zip(sessions, rates, strict=True):
            made, started = 0, time.perf_counter()
            while (passed := time.perf_counter() - started) < seconds:
                session.run(None, feeds)
                made += len(feeds["latent"])
            found.append(made / passed)
    return [statistics.median(found) for found in rates]


def in_batches(session: onnxruntime.InferenceSession, feeds: Feeds, sizes: list[int]) -> NDArray[np.uint8]:
    ends = np.cumsum(sizes)
    parts = [
        session.run(None, {name: values[end - size : end] for name, values in feeds.items()})[0]
        for size, end in zip(sizes, ends, strict=True)
    ]
    return np.concatenate(parts)


def same_bytes(model: onnx.ModelProto, feeds: Feeds, wanted: NDArray[np.uint8]) -> bool:
    upwards = list(range(1, BATCH_SIZE + 1))
    return all(
        np.array_equal(in_batches(session_of(model, threads), feeds, sizes), wanted)
        for threads in (1, 2)
        for sizes in (upwards, upwards[::-1])
    )


def measure(name: str, data_root: Path | None, rounds: int, seconds: float) -> str:
    fp32, card = open_model(name)
    int8 = to_int8(fp32, calibration(card.latent_dim, len(card.class_names)))
    sessions = [session_of(fp32), session_of(int8)]
    before, now = race(sessions, inputs(card, BATCH_SIZE), rounds, seconds)
    one_before, one_now = race(sessions, inputs(card, 1), rounds, seconds)
    checked = inputs(card, CHECKED_IMAGES)
    sizes = [BATCH_SIZE] * (CHECKED_IMAGES // BATCH_SIZE) + [CHECKED_IMAGES % BATCH_SIZE]
    wanted, made = (in_batches(session, checked, sizes) for session in sessions)
    far = np.abs(made.astype(np.int16) - wanted)
    columns = [
        name,
        f"{before:,.0f}",
        f"{now:,.0f}",
        f"{now / before:.2f}",
        f"{1e6 / one_before:.0f}",
        f"{1e6 / one_now:.0f}",
        f"{one_now / one_before:.2f}",
        f"{far.mean():.2f}",
        str(far.max()),
        "same" if same_bytes(int8, checked, made) else "DIFFER",
        *judged(name, sessions, card, data_root),
    ]
    return f"| {' | '.join(columns)} |"


def judged(
    name: str, sessions: list[onnxruntime.InferenceSession], card: pb.ModelCard, data_root: Path | None
) -> tuple[str, str]:
    if data_root is None or name in NAMES:
        return "", ""
    parts = load_parts(Path(name), card, card.dataset, data_root)
    labelled = bool(card.class_names)
    fp32, int8 = (
        lambda latent, label, session=session: run_session(session, latent, label if labelled else None)
        for session in sessions
    )
    figures = {each["name"]: each["value"] for each in compare(int8, fp32, card, *parts, data_root, 10_000)}
    now, fid = figures.get("label_accuracy"), figures["fid"]
    accuracy = "" if now is None else f"{now + figures['label_accuracy_loss']:.4f} → {now:.4f}"
    return accuracy, f"{fid / figures['fid_over_fp32']:.4f} → {fid:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join((*BUNDLED, *NAMES)))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    print("| model | fp32, images/s | int8, images/s | ratio | one image: fp32, µs | int8, µs | ratio ", end="")
    print("| grey levels: mean | max | bytes in any batch | label accuracy | FID |")
    print("|---" * 12 + "|")
    for name in arguments.models.split(","):
        print(measure(name, arguments.data_root, arguments.rounds, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()

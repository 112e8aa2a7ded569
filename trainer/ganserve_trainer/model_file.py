"""The model file for its readers: its names, the latents of seeds, and its images by onnxruntime.

`export` writes the file and `evaluation` reads it. Its inputs are `latent`, float32 [N, latent_dim], and, for a
conditional model, `label`, int64 [N]. Its output is `image`, uint8 [N, height, width, channels]. Its metadata contain
the model card as JSON.
"""

import numpy as np
import onnxruntime
from numpy.typing import NDArray

CARD_KEY = "ganserve.model_card"
MODEL_FILE_NAME = "model.onnx"


def latents(seeds: NDArray[np.int64], latent_dim: int) -> NDArray[np.float32]:
    """Draw the latents of seeds, [n, latent_dim], as generation.proto defines them."""
    rows = [np.random.RandomState(seed).standard_normal(latent_dim) for seed in seeds]
    return np.stack(rows).astype(np.float32)


def load_session(model: bytes | str, *, quiet: bool = False) -> onnxruntime.InferenceSession:
    """Open a model on the CPU; `quiet`: onnxruntime raises errors without printing them, too."""
    options = onnxruntime.SessionOptions()
    if quiet:
        options.log_severity_level = 4  # fatal
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_session(
    session: onnxruntime.InferenceSession, latent: NDArray[np.float32], label: NDArray[np.int64] | None
) -> NDArray[np.uint8]:
    """Make images, [n, height, width, channels]; `label` is None for an unconditional model."""
    feeds = {"latent": latent} if label is None else {"latent": latent, "label": label}
    (image,) = session.run(["image"], feeds)
    pixels: NDArray[np.uint8] = image
    return pixels

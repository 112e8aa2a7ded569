"""Runs one model: latents by the contract, then an onnxruntime session."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ganserve_server.machine import load_cuda_libraries, nvidia_driver, why_no_cuda

_log = logging.getLogger(__name__)

Provider = Literal["auto", "cuda", "cpu"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_TIMED_IMAGES = 8


class ProviderUnavailable(Exception):  # noqa: N818
    """The provider that was asked for does not run on this machine."""


class SessionRefused(Exception):  # noqa: N818
    """Onnxruntime refuses the model."""


@dataclass(slots=True)  # not frozen: that doubles what making one costs
class Draw:
    """The images to make: by seeds, or by latents that truncation has already scaled. Labels for conditional models."""

    count: int
    seeds: NDArray[np.uint32] | None  # [count]
    latents: NDArray[np.float32] | None  # [count, latent_dim]
    labels: NDArray[np.int64] | None  # [count]
    truncation: float

    def part(self, start: int, stop: int) -> "Draw":
        """Return images start to stop of these."""
        seeds = None if self.seeds is None else self.seeds[start:stop]
        latents = None if self.latents is None else self.latents[start:stop]
        labels = None if self.labels is None else self.labels[start:stop]
        return Draw(stop - start, seeds, latents, labels, self.truncation)


class Engine:
    """One model's onnxruntime sessions: one that computes with the calling thread, one with all cores.

    Batches may run at the same time, each from a thread of its own: onnxruntime lets go of Python's lock.
    """

    def __init__(self, model: bytes, latent_dim: int, provider: Provider, threads: int) -> None:
        """Open the sessions.

        Raises:
            ProviderUnavailable: CUDA was asked for and is not what runs.
            SessionRefused: onnxruntime refuses the model.
        """
        self._latent_dim = latent_dim
        self._of_thread = threading.local()
        wanted = [_CPU]
        if provider == "cuda" or (provider == "auto" and nvidia_driver()):
            load_cuda_libraries()
            wanted = [_CUDA, _CPU]
        try:
            self._session = _session(model, wanted, 1)
            self.provider: str = self._session.get_providers()[0]
            self.inputs = {tensor.name: (tensor.type, tensor.shape) for tensor in self._session.get_inputs()}
            self.outputs = {tensor.name: (tensor.type, tensor.shape) for tensor in self._session.get_outputs()}
            several = self.provider == _CPU and threads > 1
            self._wide_session = _session(model, [_CPU], threads) if several else self._session
        except Exception as error:  # onnxruntime's exceptions have no common root
            raise SessionRefused(f"onnxruntime refuses the model: {error}") from error
        if provider == "cuda" and self.provider != _CUDA:
            raise ProviderUnavailable(
                f"CUDA was asked for, but onnxruntime would run on the CPU: {why_no_cuda()}; mend that "
                "(`ganserve-server doctor` tells all it finds), or use --provider auto or cpu"
            )
        if provider == "auto" and len(wanted) > len(self._session.get_providers()):
            _log.warning("the GPU is not used", extra={"reason": why_no_cuda(), "provider": self.provider})
        self._call_s = self._image_s = 0.0
        self.wide_is_faster = False

    @property
    def on_cpu(self) -> bool:
        """Whether it is the CPU that computes."""
        return self.provider == _CPU

    def measure(self, label: int | None) -> None:
        """Warm up, and time the two sessions on one image and on several."""
        times: dict[tuple[int, bool], float] = {}
        for count, wide in ((1, False), (1, True), (_TIMED_IMAGES, False)):
            labels = None if label is None else np.full(count, label, np.int64)
            draw = Draw(count, np.arange(count, dtype=np.uint32), None, labels, 1.0)
            for _ in range(3):
                started = time.perf_counter()
                self.run([draw], wide=wide)
                took = time.perf_counter() - started
                times[count, wide] = min(took, times.get((count, wide), took))
        self.wide_is_faster = self._wide_session is not self._session and times[1, True] < times[1, False]
        self._image_s = max(0.0, times[_TIMED_IMAGES, False] - times[1, False]) / (_TIMED_IMAGES - 1)
        self._call_s = max(0.0, times[1, False] - self._image_s)

    def seconds_for(self, images: int) -> float:
        """Estimate how long a batch takes on one core."""
        return self._call_s + images * self._image_s

    def run(self, draws: list[Draw], *, wide: bool = False) -> NDArray[np.uint8]:
        """Make the images of all draws in one batch, in order: [n, height, width, channels].

        Args:
            draws: what to make.
            wide: with all cores, not with the calling thread alone.
        """
        feeds: dict[str, NDArray[Any]] = {"latent": self._latents(draws)}
        labels = [draw.labels for draw in draws if draw.labels is not None]
        if labels:
            feeds["label"] = labels[0] if len(labels) == 1 else np.concatenate(labels)
        pixels: NDArray[np.uint8] = (self._wide_session if wide else self._session).run(["image"], feeds)[0]
        return pixels

    def _latents(self, draws: list[Draw]) -> NDArray[np.float32]:
        latents = np.empty((sum(draw.count for draw in draws), self._latent_dim), np.float32)
        # Re-seeding one generator costs 5 µs an image, making one 94 µs; the stream is the same.
        random = getattr(self._of_thread, "random", None)
        if random is None:
            random = self._of_thread.random = np.random.RandomState(0)
        seed, standard_normal, size = random.seed, random.standard_normal, self._latent_dim
        row = 0
        for draw in draws:
            first, row = row, row + draw.count
            if draw.seeds is None:
                latents[first:row] = draw.latents
                continue
            for index, number in enumerate(draw.seeds.tolist(), first):
                seed(number)
                latents[index] = standard_normal(size)
            if draw.truncation != 1.0:
                latents[first:row] *= np.float32(draw.truncation)
        return latents


def _session(model: bytes, providers: list[str], threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between batches take the cores that answer the calls.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=providers)

"""Runs one model: feeds its inputs to an onnxruntime session, times it, and measures its memory."""

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ganserve_server.compute.batching import Batching, BatchLimits, Shapes
from ganserve_server.compute.cuda import load_cuda_libraries, nvidia_driver, why_no_cuda, why_no_tensorrt
from ganserve_server.compute.gpu import (
    CPU,
    CUDA,
    PROBES,
    TENSORRT,
    BucketRunner,
    GpuOptions,
    Providers,
    cuda_providers,
    tensorrt_providers,
)
from ganserve_server.compute.inputs import Draw, Feeds, Inputs, images_in
from ganserve_server.compute.watchdog import Run, limited
from ganserve_server.machine import trim_memory

_log = logging.getLogger(__name__)

Provider = Literal["auto", "cuda", "tensorrt", "cpu"]

_TIMED_IMAGES = 8
# Repeat each timing: one disturbed run would pick the wrong session permanently. The session for all cores is timed
# until it beats one core, or for `_WIDE_TIMED_S`.
_LEAST_TRIES, _TIMED_S, _WIDE_TIMED_S = 3, 0.01, 0.05
_SLOW_TRIES_S = 0.2  # enough, even if there were fewer tries
_SLOW_S = 0.02  # an image that takes longer than this is not timed in a batch
# A shorter batch may run in the event loop: handing it to a thread and back costs 50 to 100 µs. Nothing can end it
# there, so only a batch whose time does not depend on values runs there.
_INLINE_S, _MOST_INLINE = 0.0003, 64
# For shorter batches, one core is faster: the other cores' threads sleep between calls, which the timing does not show.
_SHORT_S = 0.0002
# An image that needs more memory than this is computed without onnxruntime's arena, which keeps what it allocated: for
# three images of 128 MiB, 553 MiB instead of 384.
_ARENA_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of a model on the CPU, so that it can be opened again without measuring."""

    batching: Batching
    image_bytes: int  # of memory, while an image is made; 0: unknown
    call_s: float  # of a batch, whatever it has
    image_s: float  # of each image of a batch
    wide_image_s: float  # of one image on all cores; 0: the calling thread is faster
    inline_images: int  # batches of up to this many images may run in the event loop


class ProviderUnavailable(Exception):  # noqa: N818
    """The requested provider does not run on this machine."""


class SessionRefused(Exception):  # noqa: N818
    """onnxruntime rejects the model."""


class Engine:
    """The onnxruntime sessions of one model: one for the calling thread and one for all cores, or one on a GPU.

    Batches may run at the same time, each in its own thread: onnxruntime releases Python's GIL.
    """

    def __init__(
        self,
        model: bytes | str,
        inputs: Inputs,
        provider: Provider,
        threads: int,
        *,
        batching: Batching = Batching.TOGETHER,
        loops: bool = False,
        limits: BatchLimits = BatchLimits(),  # noqa: B008
        gpu: GpuOptions = GpuOptions(),  # noqa: B008
        figures: Figures | None = None,
    ) -> None:
        """Open the sessions.

        Args:
            model: the ONNX file, or its path, which must exist until the model is measured.
            inputs: the inputs of the model; the file must have them.
            provider: where to run it.
            threads: the threads of the session for all cores.
            batching: how the CPU computes a batch.
            loops: whether the model has loops; the memory of such a model is not measured.
            limits: what a batch may have and take on the CPU.
            gpu: the settings of the GPU.
            figures: what was measured of this model before; only on the CPU. It then needs no `warm_up` or `measure`.

        Raises:
            ProviderUnavailable: CUDA or TensorRT was requested, but does not run.
            SessionRefused: onnxruntime rejects the model.
        """
        self.inputs = inputs
        self.batching = figures.batching if figures else batching
        self.image_bytes = figures.image_bytes if figures else 0  # while it is made; 0: unknown, or on a GPU
        self.trial: Callable[[], AbstractContextManager[None]] | None = None  # of each batch, while they are the first
        wanted: list[Providers] = []  # the best first
        if provider == "tensorrt":
            wanted.append(tensorrt_providers(gpu, inputs))
        elif provider == "cuda" or (provider == "auto" and nvidia_driver()):
            wanted += [cuda_providers(gpu, graphs=True), cuda_providers(gpu, graphs=False)]
        if wanted:
            load_cuda_libraries()
        failure = ""
        try:
            self._session, failure = _first_that_opens(model, [*wanted, [CPU]], arena=self._arena)
            self.provider: str = self._session.get_providers()[0]
            self.on_cpu = self.provider == CPU
            if not self.on_cpu:
                self.batching = Batching.TOGETHER  # a GPU computes batches of a few fixed sizes
                if inputs.scalar_truncation:
                    raise ValueError(
                        "on a GPU, the input truncation must have the shape [n]: its batches have images of several "
                        "callers"
                    )
        except Exception as error:  # onnxruntime's exceptions have no common root
            raise SessionRefused(f"onnxruntime refuses the model: {error}") from error
        if provider == "cuda" and self.provider != CUDA:
            raise _unavailable("CUDA", self.provider, why_no_cuda(), failure)
        if provider == "tensorrt" and self.provider != TENSORRT:
            raise _unavailable("TensorRT", self.provider, why_no_tensorrt(), failure)
        if wanted and self.on_cpu:
            _log.warning(
                "the GPU is not used", extra={"reason": _reason(why_no_cuda(), failure), "provider": self.provider}
            )
        elif failure:
            _log.warning("no CUDA graphs: each kernel is launched separately", extra={"reason": failure})
        self._loops, self._limits, self._gpu = loops, limits, gpu
        self._threads = threads if self.on_cpu else 1
        self._model = model if self.on_cpu else b""  # until the sessions are chosen
        self._wide_session = self._session
        self._runner: BucketRunner | None = None
        self._reopen: Callable[[], onnxruntime.InferenceSession] | None = None
        if self.provider == CUDA and not failure:
            self._reopen = lambda: _session(model, wanted[-1], 1)
        self._call_s = self._image_s = self._wide_image_s = 0.0
        self.inline_images = 0  # batches of up to this many images may run in the event loop
        if figures:
            self._take(figures, model)

    def warm_up(self, image_shape: tuple[int, int, int]) -> None:
        """Measure an image's memory on the CPU, or prepare the GPU.

        The inputs and outputs of the model must have been checked against its card.
        """
        if self.on_cpu:
            self._measure_memory()
            return
        probes, reopen, failure = self.feeds([self.inputs.probes(np.arange(PROBES, dtype=np.uint32))]), self._reopen, ""
        self._reopen = None  # frees the file's bytes
        try:
            self._bind(image_shape, probes)
        except Exception as error:  # onnxruntime's exceptions have no common root
            if reopen is None:
                raise
            failure = str(error)
        if failure and reopen:  # here the error no longer keeps the failed session alive
            _log.warning("no CUDA graphs: each kernel is launched separately", extra={"reason": failure})
            self._session = self._wide_session = reopen()
            self._bind(image_shape, probes)

    def _take(self, figures: Figures, model: bytes | str) -> None:
        """Take what was measured before, and run each session once: a first run takes longer."""
        self._model = b""
        self._call_s, self._image_s, self._wide_image_s = figures.call_s, figures.image_s, figures.wide_image_s
        self.inline_images = figures.inline_images
        draw = self.inputs.timed(1)
        self.run([draw])
        if self.wide_is_faster:
            self._wide_session = _session(model, [CPU], self._threads, arena=self._arena)
            self.run([draw], wide=True)

    @property
    def figures(self) -> Figures:
        """What was measured, on the CPU."""
        times = (self._call_s, self._image_s, self._wide_image_s)
        return Figures(self.batching, self.image_bytes, *times, self.inline_images)

    @property
    def wide_is_faster(self) -> bool:
        """Whether all cores make one image sooner than the calling thread."""
        return self._wide_image_s > 0

    @property
    def buckets(self) -> list[int]:
        """The batch sizes that the GPU computes; none on the CPU, which computes any size."""
        return self._runner.sizes if self._runner else []

    def padding(self, count: int) -> int:
        """Return how many images are made and discarded in a batch of `count`."""
        return self._runner.padding(count) if self._runner else self.batching.padding(count)

    @property
    def largest_batch(self) -> int:
        """The most images of a batch: as many as its memory is enough for, and at least one."""
        fitting = self._limits.memory_bytes // self.image_bytes if self.image_bytes else self._limits.images
        return max(1, min(fitting, self._limits.images))

    def measure(self, shapes: Shapes | None = None) -> None:
        """Warm up, time both sessions on one image and one session on several, and choose the batches that run inline.

        Args:
            shapes: the shapes of the model; None: no batch runs in the event loop.

        Raises:
            RunTooLong: a batch took longer than its limit.
        """

        def least_s(count: int, *, wide: bool = False, until_s: float = 0.0, longest_s: float = _TIMED_S) -> float:
            """Return the shortest time of a batch in several tries, which end when one is below `until_s`."""
            draw = self.inputs.timed(count)
            begun = time.perf_counter()
            took: list[float] = []
            while (len(took) < _LEAST_TRIES and sum(took) < _SLOW_TRIES_S) or (
                time.perf_counter() - begun < longest_s and min(took) >= until_s
            ):
                started = time.perf_counter()
                self.run([draw], wide=wide)
                took.append(time.perf_counter() - started)
            return min(took)

        one_s = least_s(1)
        several = self.buckets[-1] if self.buckets else min(_TIMED_IMAGES, self.largest_batch)
        if self.on_cpu and one_s > _SLOW_S:
            several = 1  # their time is `several` times as long
        several_s = least_s(several) if several > 1 else one_s
        if self._threads > 1 and one_s > _SHORT_S:
            self._wide_session = _session(self._model, [CPU], self._threads, arena=self._arena)
            wide_s = least_s(1, wide=True, until_s=one_s, longest_s=_WIDE_TIMED_S)
            one_s = min(one_s, least_s(1))  # again: the first timing may have been disturbed
            self._wide_image_s = wide_s if max(wide_s, _SHORT_S) < one_s else 0.0
        if not self.wide_is_faster:
            self._wide_session = self._session  # frees its weights
        self._model = b""
        self._image_s = max(0.0, several_s - one_s) / (several - 1) if several > 1 else one_s
        self._call_s = max(0.0, one_s - self._image_s)
        if shapes is not None and self.on_cpu and self._call_s < _INLINE_S:
            short = int(min(self.largest_batch, _MOST_INLINE, (_INLINE_S - self._call_s) / max(self._image_s, 1e-9)))
            known = shapes.predictable_images(max(2, short))  # two images, as which one may be computed
            self.inline_images = min(short, known) if known > 1 else 0

    @property
    def least_batch(self) -> int:
        """The number of images whose own time exceeds the fixed cost of a batch."""
        return math.ceil(self._call_s / max(self._image_s, 1e-9))

    @property
    def gains_nothing_from_batches(self) -> bool:
        """Whether the CPU makes images as fast one by one: they share little fixed cost, and none is computed twice."""
        return self.on_cpu and not self.padding(1) and self.least_batch <= 1

    def seconds_for(self, images: int) -> float:
        """Estimate how long a batch takes on one core."""
        return self._call_s + images * self._image_s

    def run(self, draws: list[Draw], *, wide: bool = False) -> NDArray[np.uint8]:
        """Make the images of all draws in one batch, in order: [n, height, width, channels].

        Args:
            draws: the images to make.
            wide: use all cores instead of the calling thread.

        Raises:
            RunTooLong: the batch took longer than the limit of one batch for each image.
        """
        feeds = self.feeds(draws)
        with limited(self._limits.seconds * images_in(feeds), waits=not self.on_cpu) as run:
            return self.compute(feeds, wide=wide, run=run)

    def compute(self, feeds: Feeds, *, wide: bool = False, run: Run | None = None) -> NDArray[np.uint8]:
        """Make the images of a batch; this holds Python's GIL only at the start and at the end.

        Args:
            feeds: the inputs of the batch.
            wide: use all cores instead of the calling thread.
            run: what the watchdog ends the batch by.
        """
        if (trial := self.trial) is None:
            return self._computed(feeds, run, wide=wide)
        with trial():
            return self._computed(feeds, run, wide=wide)

    def _computed(self, feeds: Feeds, run: Run | None, *, wide: bool) -> NDArray[np.uint8]:
        if self._runner is not None:
            return self._runner.run(feeds, run)
        options = run.options if run is not None else None
        if self.inputs.scalar_truncation:
            parts = [self._compute(part, options, wide=wide) for part in self.inputs.parts(feeds)]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._compute(feeds, options, wide=wide)

    def _compute(self, feeds: Feeds, options: onnxruntime.RunOptions | None, *, wide: bool) -> NDArray[np.uint8]:
        run = (self._wide_session if wide else self._session).run
        if self.batching is not Batching.TOGETHER:
            return self.batching.run(lambda part: run(["image"], self.inputs.for_file(part), options)[0], feeds)
        pixels: NDArray[np.uint8] = run(["image"], self.inputs.for_file(feeds), options)[0]
        return pixels

    @property
    def _arena(self) -> bool:
        return self.image_bytes <= _ARENA_BYTES

    def _measure_memory(self) -> None:
        """Measure an image in a new session, and decide how batches are computed with that memory."""
        if self._loops:
            # A profile has an entry for each run of a node: 200,000 rounds that take 1.4 s took 44 s, and 2 GB.
            _memory_unknown("the model has loops, whose profile has no bound")
        else:
            del self._session, self._wide_session  # free their weights
            feeds = self.inputs.for_file(self.feeds([self.inputs.timed(1)]))
            with limited(self._limits.seconds) as run:
                self._session, self.image_bytes = _measured(self._model, feeds, run)
            if not self._arena:
                del self._session
                self._session = _session(self._model, [CPU], 1, arena=False)
            self._wide_session = self._session
        if self.batching is Batching.PAIRS and self.largest_batch == 1:
            self.batching = Batching.SINGLES  # all images are computed alone, so none needs a second one

    def _bind(self, image_shape: tuple[int, int, int], probes: Feeds) -> None:
        gpu = self._gpu
        self._runner = BucketRunner(self._session, image_shape, probes, gpu.max_batch_size, device_id=gpu.device)

    def feeds(self, draws: list[Draw]) -> Feeds:
        """Return the model's inputs for one batch of all draws, in order."""
        return self.inputs.feeds(draws)


def _first_that_opens(
    model: bytes | str, choices: list[Providers], *, arena: bool
) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a session on the first choice that works; also return why an earlier choice failed, if one did."""
    failure = ""
    for providers in choices[:-1]:
        try:
            return _session(model, providers, 1, arena=arena), failure
        except Exception as error:  # onnxruntime's exceptions have no common root
            failure = str(error)
    return _session(model, choices[-1], 1, arena=arena), failure


def _unavailable(asked: str, runs: str, reason: str, failure: str) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"{asked} was requested, but onnxruntime would run on {runs.removesuffix('ExecutionProvider')}: "
        f"{_reason(reason, failure)}; fix that (`ganserve-server doctor` reports all problems that it finds), or use "
        "--provider auto or cpu"
    )


def _reason(reason: str, failure: str) -> str:
    return f"{reason} ({failure})" if failure else reason


def _measured(model: bytes | str, feeds: Feeds, run: Run) -> tuple[onnxruntime.InferenceSession, int]:
    """Open a session on the CPU, and run it once; also return how much memory that took, or 0 if it is unknown.

    The profile of a run has the statistics of the session's own arena, with the buffers that an operator needs for
    itself, so nothing else in the process disturbs them. Older versions of onnxruntime than 1.28 may not write them.
    """
    events, reason = [], "onnxruntime does not report it"
    try:
        with tempfile.TemporaryDirectory() as folder:
            session = _session(model, [CPU], 1, profile=f"{folder}/profile")
            session.run(["image"], feeds, run.options)
            events = json.loads(Path(session.end_profiling()).read_bytes())
    except (OSError, ValueError) as error:  # there is no temporary folder, or it is full
        session, reason = _session(model, [CPU], 1), f"no profile can be written: {error}"
    nodes = [event["args"] for event in events if "mem_in_use_peak" in event.get("args", ())]
    if not nodes:
        _memory_unknown(reason)
        return session, 0
    before = min(int(node["mem_bytes_in_use"]) - int(node["mem_in_use_delta"]) for node in nodes)
    return session, max(int(node["mem_in_use_peak"]) for node in nodes) - before


def _memory_unknown(reason: str) -> None:
    _log.warning("the memory of an image is unknown and does not limit batches", extra={"reason": reason})


def _session(
    model: bytes | str, providers: Providers, threads: int, *, arena: bool = True, profile: str = ""
) -> onnxruntime.InferenceSession:
    """Open a session.

    Args:
        model: the ONNX file, or its path.
        providers: where to run it, the best first.
        threads: the threads of a run.
        arena: whether memory on the CPU comes from an arena, which keeps it.
        profile: how the path of the profile begins; if empty, none is written.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    options.enable_profiling = bool(profile)
    options.profile_file_prefix = profile
    # Threads that spin between batches take the cores that answer the calls.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    # onnxruntime's own fallback is silent and forgets the options.
    session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    session._model_bytes = None  # the whole file, kept for that fallback
    trim_memory()  # opening it left free memory of one and a half times the file's size, which a run does not reuse
    return session

"""Runs a model on a GPU, in batches of a few fixed sizes (buckets) that are filled up with discarded images.

On a GPU each new shape costs a search for kernels and memory that is never freed, and a CUDA graph holds one shape at
fixed addresses. So each bucket has its own buffers on the device, is bound to them once, and runs before the first
call.
"""

import contextlib
import ctypes
import logging
import math
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ganserve_server.compute.cuda import cuda_libraries
from ganserve_server.compute.inputs import Feeds, Inputs, images_in
from ganserve_server.compute.watchdog import Run

if TYPE_CHECKING:
    from ganserve_server.settings import ServerSettings

_log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
CPU = "CPUExecutionProvider"

PROBES = 64  # images that must be identical in all buckets
_DEVICE_TO_HOST = 2
# onnxruntime binds a CUDA graph to the thread that captured it, and no other thread may allocate on the device during a
# capture. So one thread loads and runs all models.
_THREAD = ThreadPoolExecutor(1, "gpu")

Providers = list[str | tuple[str, dict[str, str]]]


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """The settings of the GPU."""

    device: int = 0
    mem_limit_mib: int = 0  # of one version's arena; 0 is no limit
    tensorrt_cache: str = ""  # a folder; without one, TensorRT builds its engines at each start
    max_batch_size: int = 64


def gpu_options(settings: "ServerSettings") -> GpuOptions:
    """Return the GPU's part of the settings."""
    return GpuOptions(settings.gpu_device, settings.gpu_mem_limit_mib, settings.tensorrt_cache, settings.max_batch_size)


def bucket_sizes(max_batch_size: int) -> list[int]:
    """Return the powers of two below the largest batch size, and the largest batch size."""
    return [1 << power for power in range((max_batch_size - 1).bit_length())] + [max_batch_size]


def cuda_providers(options: GpuOptions, *, graphs: bool) -> Providers:
    """Return onnxruntime's providers and options for CUDA."""
    wanted = {
        "device_id": str(options.device),
        # Not EXHAUSTIVE: it times the kernels, so two servers may choose different ones, and their images would differ.
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 has 10 bits of mantissa: too few to stay within a grey level of the golden images.
        "use_tf32": "0",
        # Only the buckets' shapes occur, so the arena need not double its size in advance.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1" if graphs else "0",
    }
    if options.mem_limit_mib:
        wanted["gpu_mem_limit"] = str(options.mem_limit_mib << 20)
    return [(CUDA, wanted), CPU]


def tensorrt_providers(options: GpuOptions, inputs: Inputs) -> Providers:
    """Return onnxruntime's providers and options for one TensorRT engine for all buckets, optimised for the largest."""
    largest = inputs.shapes(options.max_batch_size)
    wanted = {
        "device_id": str(options.device),
        "trt_profile_min_shapes": inputs.shapes(1),
        "trt_profile_opt_shapes": largest,
        "trt_profile_max_shapes": largest,
    }
    if options.tensorrt_cache:
        wanted |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": options.tensorrt_cache}
    return [(TENSORRT, wanted), *cuda_providers(options, graphs=False)]


def agreeing_sizes(make: Callable[[int, Feeds], NDArray[np.uint8]], sizes: list[int], feeds: Feeds) -> list[int]:
    """Return the sizes whose images equal those of the largest size byte for byte, including the largest.

    Args:
        make: makes images in a batch of the given size.
        sizes: in ascending order.
        feeds: the inputs of the images to compare.
    """
    count, largest = images_in(feeds), sizes[-1]

    def parts(size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, count, size)]

    wanted = np.concatenate([make(largest, _rows(feeds, part)) for part in parts(largest)])
    return [
        size
        for size in sizes
        if size == largest or all(np.array_equal(make(size, _rows(feeds, part)), wanted[part]) for part in parts(size))
    ]


class BucketRunner:
    """A session and its buckets. Everything runs on the one GPU thread, whichever thread calls."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        image_shape: tuple[int, int, int],
        probes: Feeds,
        max_batch_size: int,
        *,
        device: str = "cuda",
        device_id: int = 0,
    ) -> None:
        """Make, warm up and compare the buckets.

        Args:
            session: its inputs are named as in `probes`; its output is `image`, uint8.
            image_shape: height, width, channels.
            probes: the inputs of a few images, which must be identical in all buckets.
            max_batch_size: the largest bucket.
            device: the device of the buffers: cuda, or cpu.
            device_id: the device's index.
        """
        self._host = _HostBuffers(probes, image_shape, max_batch_size, device, device_id)
        self._buckets: dict[int, _Bucket] = {}
        self._seconds: dict[int, float] = {}
        sizes = bucket_sizes(max_batch_size)
        for size in reversed(sizes):  # the largest first: its memory in the arena is enough for smaller buckets
            self._buckets[size] = _THREAD.submit(_Bucket, session, size, self._host, device, device_id).result()
            self._seconds[size] = min(self._timed(size, _rows(probes, slice(size))) for _ in range(3))
        agreeing = agreeing_sizes(self._make, sizes, probes)
        if dropped := [size for size in sizes if size not in agreeing]:
            least = agreeing[0]
            _log.warning(
                "some buckets produce different bytes than the largest bucket and are not used: smaller batches "
                "are padded",
                extra={
                    "buckets": agreeing,
                    "not_used": dropped,
                    "one_image_ms": round(self._seconds[least] * 1e3, 3),
                    "one_image_would_take_ms": round(self._seconds[sizes[0]] * 1e3, 3),
                },
            )
        self.sizes = agreeing
        self._buckets = {size: self._buckets[size] for size in agreeing}
        # An image must not depend on its row in the batch; otherwise no choice of buckets makes images reproducible.
        turned = {name: np.roll(rows, 1, axis=0) for name, rows in probes.items()}
        self.steady = np.array_equal(np.roll(self.run(probes), 1, axis=0), self.run(turned))
        if not self.steady:
            _log.error("the bytes of an image depend on its place in the batch: images cannot be reproduced exactly")

    def size_for(self, count: int) -> int:
        """Return the smallest bucket that holds `count` images, or else the largest bucket."""
        return next((size for size in self.sizes if size >= count), self.sizes[-1])

    def padding(self, count: int) -> int:
        """Return how many images are made and discarded to fill up the buckets of `count` images."""
        size = self.size_for(count)
        return -count % size

    def run(self, feeds: Feeds, run: Run | None = None) -> NDArray[np.uint8]:
        """Make images: [n, height, width, channels].

        Args:
            feeds: the inputs of the images.
            run: what the watchdog ends the batch by; its time begins on the GPU thread, which may load a model first.
        """
        count = images_in(feeds)
        size = self.size_for(count)
        parts = [self._make(size, _rows(feeds, slice(start, start + size)), run) for start in range(0, count, size)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _make(self, size: int, feeds: Feeds, run: Run | None = None) -> NDArray[np.uint8]:
        return _THREAD.submit(self._buckets[size].run, feeds, run).result()

    def _timed(self, size: int, feeds: Feeds) -> float:
        started = time.perf_counter()
        self._make(size, feeds)
        return time.perf_counter() - started


class _HostBuffers:
    """The host's buffers for copies: page-locked memory, which the GPU reads and writes by itself."""

    def __init__(
        self, probes: Feeds, image_shape: tuple[int, int, int], count: int, device: str, device_id: int
    ) -> None:
        self.inputs = {name: np.zeros((count, *rows.shape[1:]), rows.dtype) for name, rows in probes.items()}
        self.images = np.zeros((count, *image_shape), np.uint8)
        self._runtime: _CudaRuntime | None = None
        if device == "cuda":
            with contextlib.suppress(OSError, AttributeError, StopIteration):
                runtime = _CudaRuntime(device_id)
                locked = _THREAD.submit(lambda: all(map(runtime.lock, (*self.inputs.values(), self.images)))).result()
                self._runtime = runtime if locked else None
            if self._runtime is None:
                _log.warning("no memory could be locked for the copies to and from the GPU: they take longer")

    def fetch(self, output: onnxruntime.OrtValue, count: int) -> NDArray[np.uint8]:
        """Copy the first `count` images from the device into new memory."""
        images = self.images[:count]
        if self._runtime is None:
            images = output.numpy()[:count]  # on the CPU this is the buffer itself
        else:
            self._runtime.fetch(images, output.data_ptr())
        return images.copy()


class _CudaRuntime:
    """Functions of CUDA's runtime that onnxruntime's Python API lacks, from the library that the provider loads."""

    def __init__(self, device_id: int) -> None:
        self._device_id = device_id
        self._library = ctypes.CDLL(next(name for name in cuda_libraries() if name.startswith("libcudart")))

    def lock(self, buffer: NDArray[Any]) -> bool:
        """Lock the pages of a buffer for as long as it lives."""
        address = ctypes.c_void_p(buffer.ctypes.data)
        self._library.cudaSetDevice(self._device_id)  # otherwise the thread's first call would allocate on device 0
        if self._library.cudaHostRegister(address, ctypes.c_size_t(buffer.nbytes), 0):
            self._library.cudaGetLastError()  # clears the error, which onnxruntime would find after its next kernel
            return False
        weakref.finalize(buffer, self._library.cudaHostUnregister, address).atexit = False
        return True

    def fetch(self, buffer: NDArray[Any], address: int) -> None:
        """Copy device memory into a buffer; return when the copy is complete."""
        target, size = ctypes.c_void_p(buffer.ctypes.data), ctypes.c_size_t(buffer.nbytes)
        if status := self._library.cudaMemcpy(target, ctypes.c_void_p(address), size, _DEVICE_TO_HOST):
            self._library.cudaGetLastError()
            raise RuntimeError(f"the images could not be copied from the GPU: CUDA's status is {status}")


class _Bucket:
    """One batch size: a binding to fixed buffers on the device, and the name of its CUDA graph."""

    def __init__(
        self, session: onnxruntime.InferenceSession, size: int, host: _HostBuffers, device: str, device_id: int
    ) -> None:
        def on_device(like: NDArray[Any]) -> onnxruntime.OrtValue:
            shape = [size, *like.shape[1:]]
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, like.dtype, device, device_id)

        self._session, self._size, self._host = session, size, host
        self._inputs = {name: on_device(rows) for name, rows in host.inputs.items()}
        self._output = on_device(host.images)
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("image", self._output)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(size))

    def run(self, feeds: Feeds, run: Run | None = None) -> NDArray[np.uint8]:
        options = self._options
        if run is not None and run.options is not None:
            options = run.options
            if run.started == math.inf:  # the first part of the batch; all have the same size
                options.add_run_config_entry("gpu_graph_id", str(self._size))
                run.started = time.monotonic()
        count = images_in(feeds)
        for name, value in self._inputs.items():
            rows = self._host.inputs[name][: self._size]
            rows[:count] = feeds[name]
            rows[count:] = 0
            value.update_inplace(rows)
        self._session.run_with_iobinding(self._binding, options)
        return self._host.fetch(self._output, count)


def _rows(feeds: Feeds, part: slice) -> Feeds:
    return {name: rows[part] for name, rows in feeds.items()}

"""The libraries that onnxruntime's GPU providers need: the NVIDIA driver, CUDA's and TensorRT's."""

import contextlib
import ctypes
import importlib.util
import io
import mmap
import struct
from pathlib import Path

_DRIVER = "libcuda.so.1"
# Found without importing onnxruntime: the import takes long, and a supervisor does not need it.
_PACKAGE = importlib.util.find_spec("onnxruntime")
if _PACKAGE is None or not _PACKAGE.submodule_search_locations:
    raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
_ONNXRUNTIME = Path(_PACKAGE.submodule_search_locations[0])
_CUDA_PROVIDER = _ONNXRUNTIME / "capi" / "libonnxruntime_providers_cuda.so"
_TENSORRT_PROVIDER = _CUDA_PROVIDER.with_name("libonnxruntime_providers_tensorrt.so")
# In the ELF format: the type of a section, the tag of an entry, and the description of a section.
_DYNAMIC, _NEEDED = 6, 1
_SECTION = struct.Struct("<IIQQQQIIQQ")


def nvidia_driver() -> bool:
    """Return whether NVIDIA's driver is installed."""
    return _why_not_loaded(_DRIVER) is None


def load_cuda_libraries() -> None:
    """Load CUDA's and TensorRT's libraries from Python packages (nvidia-cublas, …), so that the providers find them."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # onnxruntime prints missing libraries; `why_no_cuda` reports them
        onnxruntime.preload_dlls()
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt_libs")  # the package of TensorRT's libraries; it loads them


def cuda_libraries() -> dict[str, str | None]:
    """Return the libraries that the CUDA provider is linked with, each with the reason why it does not load (or None).

    Empty if this onnxruntime has no CUDA provider.
    """
    return _libraries_of(_CUDA_PROVIDER)


def tensorrt_libraries() -> dict[str, str | None]:
    """Return the libraries that the TensorRT provider is linked with, as `cuda_libraries` does."""
    return _libraries_of(_TENSORRT_PROVIDER)


def why_no_cuda() -> str:
    """Return the reason why onnxruntime does not run on a GPU."""
    libraries = cuda_libraries()
    if not libraries:
        return "this onnxruntime has no CUDA provider (install onnxruntime-gpu)"
    if not nvidia_driver():
        return f"there is no NVIDIA driver ({_DRIVER} is missing)"
    if missing := [name for name, reason in libraries.items() if reason]:
        return f"{', '.join(missing)} cannot be loaded (install ganserve[gpu], which brings CUDA's libraries)"
    return "the driver and all libraries load, but the CUDA provider does not start; its own messages say why"


def why_no_tensorrt() -> str:
    """Return the reason why onnxruntime does not run TensorRT on a GPU."""
    libraries = tensorrt_libraries()
    if not libraries:
        return "this onnxruntime has no TensorRT provider (install onnxruntime-gpu)"
    if not nvidia_driver():
        return f"there is no NVIDIA driver ({_DRIVER} is missing)"
    if missing := [name for name, reason in libraries.items() if reason]:
        return f"{', '.join(missing)} cannot be loaded (install TensorRT, and ganserve[gpu] for CUDA's libraries)"
    return "the driver and all libraries load, but the TensorRT provider does not start; its own messages say why"


def _libraries_of(provider: Path) -> dict[str, str | None]:
    if not provider.is_file():
        return {}
    return {name: _why_not_loaded(name) for name in _needed(provider) if name.startswith(("libcu", "libnv"))}


def _needed(library: Path) -> list[str]:
    """Read from a 64-bit ELF file which libraries it is linked with, as ldd does."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        (table,) = struct.unpack_from("<Q", content, 0x28)
        size, count = struct.unpack_from("<HH", content, 0x3A)
        sections = [_SECTION.unpack_from(content, table + index * size) for index in range(count)]
        dynamic = next(section for section in sections if section[1] == _DYNAMIC)
        strings = sections[dynamic[6]][4]
        entries = struct.iter_unpack("<QQ", content[dynamic[4] : dynamic[4] + dynamic[5]])
        starts = [strings + value for tag, value in entries if tag == _NEEDED]
        return [content[start : content.find(b"\0", start)].decode() for start in starts]


def _why_not_loaded(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None

"""The device of this process, its precision, and its memory."""

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc rejects a larger threshold


def best_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Otherwise a convolution's backward pass may sum in any order, and a resumed run would end with other weights.
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fits(nbytes: int, device: torch.device) -> bool:
    """Return whether so much data leaves half of the device's free memory to a training."""
    return device.type != "cuda" or 2 * nbytes <= torch.cuda.mem_get_info(device)[0]


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the rest of this process; does nothing on other systems.

    Otherwise glibc returns the memory of large tensors to the kernel, which clears the pages again at the next step.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

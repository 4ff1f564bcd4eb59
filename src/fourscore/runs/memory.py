"""Memory of this process: its peak, and what it gives back."""

import ctypes
import resource
import sys
from functools import cache
from typing import Any

import torch


def peak_gib(device: torch.device) -> float:
    """The most memory in use so far, in GiB.

    Args:
        device: on CUDA the allocator's peak counts; else the process's peak resident set, mapped files included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


_M_MMAP_THRESHOLD = -3
_LARGE = 2**16


def map_large_blocks() -> None:
    """Makes the C library map each block of 64 KiB and more, and unmap it when it is freed.

    glibc starts so, but after the first large block is freed it keeps blocks of up to 32 MiB in its heap. It does not
    reuse those well where they are aligned, as tensors are: an update then holds twice what is alive in it.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back_freed_memory() -> None:
    """Hands freed memory back to the system where the C library keeps it.

    glibc keeps what lies below a block in use: after an update that is most of its activations.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _libc() -> Any | None:
    """glibc, or None on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None

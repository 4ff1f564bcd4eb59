"""Memory of this process."""

import ctypes
import os
import resource
import sys

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


HEAVY = 128 * 2**20
"""Bytes of one model's weights from which on it counts what loading leaves behind."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_THRESHOLD = 32 * 2**20  # that glibc accepts


def return_freed_memory(weights: int) -> bool:
    """Has glibc give a freed block of 128 KiB or more back to the system at once: for the time of loading.

    It starts out so, but as soon as larger blocks are freed it keeps those of up to 32 MiB for itself.

    Args:
        weights: bytes of the policy's weights; nothing is done below `HEAVY`.

    Returns:
        whether it was set; not for other C libraries, or where the environment has settings of its own.
    """
    return weights >= HEAVY and _set(_MMAP_THRESHOLD, 128 * 1024)


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed for what is allocated next: for the time of a phase, which ends with `give_back`.

    The system zeroes every page that it hands out, which takes about as long as many an operation on it, and a forward
    or backward pass allocates what the one before it has freed.

    Returns:
        whether it was set, as for `return_freed_memory`.
    """
    return _set(_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and _set(_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Give what glibc has kept back to the system; other C libraries are left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def _set(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(parameter, value) == 1

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
"""Bytes of one model's weights from which on glibc is told what to do with freed blocks.

The blocks of smaller models are small, and stay where they are whatever is said.
"""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_AT_FIRST = 128 * 2**10  # both, until larger blocks are freed
_KEPT = 8 * 2**20  # bytes of the largest block that is kept: hidden states and the like, but no logits


def return_freed_memory(weights: int) -> bool:
    """Has glibc give a freed block of 128 KiB or more back to the system at once; other C libraries are left alone.

    It starts out so, but as soon as larger blocks are freed it keeps those of up to 32 MiB for itself.
    `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` or `GLIBC_TUNABLES` in the environment stay in force.

    Args:
        weights: bytes of the policy's weights; nothing is done below `HEAVY`.

    Returns:
        whether it was set.
    """
    return can_set_malloc(weights) and _set(_MMAP_THRESHOLD, _AT_FIRST) and _set(_TRIM_THRESHOLD, _AT_FIRST)


def keep_freed_memory(weights: int) -> bool:
    """Has glibc keep freed blocks of up to 8 MiB for what is allocated next, until `give_back`.

    The system zeroes every page that it hands out, which takes about as long as many an operation on it; and a forward
    or backward pass allocates what the one before it has freed.

    Args:
        weights: as for `return_freed_memory`.

    Returns:
        whether it was set, as there.
    """
    return can_set_malloc(weights) and _set(_MMAP_THRESHOLD, _KEPT) and _set(_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Has glibc give back to the system what it has kept."""
    ctypes.CDLL(None).malloc_trim(0)


def can_set_malloc(weights: int) -> bool:
    """Whether `return_freed_memory` and `keep_freed_memory` do something.

    Args:
        weights: bytes of the policy's weights.
    """
    environment = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    if weights < HEAVY or not sys.platform.startswith("linux") or environment & os.environ.keys():
        return False
    return all(hasattr(ctypes.CDLL(None), name) for name in ("mallopt", "malloc_trim"))


def _set(parameter: int, value: int) -> bool:
    return ctypes.CDLL(None).mallopt(parameter, value) == 1

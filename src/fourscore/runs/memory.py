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
"""Bytes of one model's weights from which on memory counts for more than the time that giving it back takes."""


def return_freed_memory(weights: int) -> bool:
    """Has glibc give a freed block of 128 KiB or more back to the system at once; other C libraries are left alone.

    It starts out so, but as soon as larger blocks are freed it keeps those of up to 32 MiB for itself, in an order that
    leaves holes: activations of a second forward pass take more than those of the first. `MALLOC_MMAP_THRESHOLD_` or
    `GLIBC_TUNABLES` in the environment stay in force.

    The system zeroes what it hands out again, which takes time: with a model below `HEAVY`, whose blocks are small,
    more than it saves, so there it is left as it is.

    Args:
        weights: bytes of the policy's weights.

    Returns:
        whether it was set.
    """
    if weights < HEAVY or not sys.platform.startswith("linux"):
        return False
    if {"MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    mmap_threshold = -3
    return mallopt is not None and mallopt(mmap_threshold, 128 * 1024) == 1

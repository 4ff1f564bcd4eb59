"""Peak memory of this process."""

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

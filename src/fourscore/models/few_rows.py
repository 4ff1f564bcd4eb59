"""Products of few rows on a CPU, as in decoding, by a kernel that a C++ compiler makes when it is first needed.

MKL brings weights into an order of its own for every product; oneDNN wants a copy of them in blocks, and still is far
from what memory and processor can do where rows are few. `few_rows.cpp` takes weights as they lie and reads each once.
"""

import ctypes
import logging
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 64
"""Up to so many, it is as fast as or faster than oneDNN with weights in blocks (`benchmarks/products.py`)."""

_STRIP = 16
"""Rows that stand side by side: `STRIP` in few_rows.cpp."""

_OPENMP = ("libgomp", "libiomp", "libomp")

logger = logging.getLogger(__name__)


def can_multiply() -> bool:
    """Whether `product` has its kernel: on Linux, with AVX2 and no AVX-512, where it was measured, and a compiler."""
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX2" and _kernel() is not None


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can multiply these: few rows, and numbers in fp32 that lie in memory, one after the other."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight))
    rows = x.numel() // max(x.shape[-1], 1)
    # Fake tensors and sharded ones have a type of their own.
    return plain and type(x) is Tensor and 0 < rows <= MOST_ROWS and weight.is_contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `torch.nn.functional.linear`, without gradients.

    Args:
        x: `[..., inputs]`; it and the weights must fit.
        weight: `[outputs, inputs]`.
        bias: `[outputs]` fp32.
    """
    kernel = _kernel()
    x = x.contiguous()
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], outputs)
    strips = x.new_empty((rows + _STRIP - 1) * inputs)
    pointers = (None if t is None else t.data_ptr() for t in (x, weight, bias, y, strips))
    kernel(*pointers, rows, outputs, inputs, torch.get_num_threads())
    return y


@cache
def _kernel() -> Any:
    """The compiled function, None where there is none."""
    try:
        return _compiled()
    except OSError as error:
        logger.warning(
            "no kernel for products of few rows (%s): rollouts on this CPU are slower and keep a copy of the weights, "
            "--pack_rollout_weights; a C++ compiler named c++ makes one",
            error,
        )
        return None


def _compiled() -> Any:
    compiler = shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no c++ on the PATH")
    source = Path(__file__).with_suffix(".cpp")
    with TemporaryDirectory() as folder:
        made, library = Path(folder, "few_rows.o"), Path(folder, "few_rows.so")
        # For this very processor, so nothing is kept that another one could load.
        _run(compiler, "-O3", "-march=native", "-fopenmp", "-fPIC", "-c", str(source), "-o", str(made))
        # With torch's own OpenMP: the threads of another one would be in the way of those that torch has waiting.
        _run(compiler, "-shared", str(made), _openmp(), "-o", str(library))
        kernel = ctypes.CDLL(str(library)).few_rows
    kernel.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3 + [ctypes.c_int]
    kernel.restype = None
    return kernel


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise OSError(f"{command[0]} failed: {said[-1] if said else done.returncode}")


def _openmp() -> str:
    """The file of the OpenMP that this process has."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(_OPENMP):
            return path
    raise FileNotFoundError("torch has no OpenMP here")

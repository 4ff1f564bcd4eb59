"""Kernels of our own for a CPU, `kernels.cpp`, which a C++ compiler makes when they are first needed."""

import ctypes
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import record_function

STRIP = 16
"""Rows, or columns, that a kernel takes side by side."""
QUERIES = 64
"""Tokens of a sample whose attention is made at a time."""

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "few_rows": [*[_POINTER] * 5, *[_LONG] * 3, _INT],
    "multiply": [*[_POINTER] * 5, *[_LONG] * 3, *[_INT] * 3],
    "attend_within": [*[_POINTER] * 8, *[_LONG] * 5, _FLOAT, _INT],
    "attend_within_backward": [*[_POINTER] * 12, *[_LONG] * 5, _FLOAT, _INT],
    "decode": [*[_POINTER] * 9, *[_LONG] * 4, _INT],
    "draw": [*[_POINTER] * 5, *[_LONG] * 2, _INT],
    "logprobs": [*[_POINTER] * 7, *[_LONG] * 2, _FLOAT, _INT],
    "attend": [*[_POINTER] * 6, *[_LONG] * 6, _FLOAT, _INT],
    "norm": [*[_POINTER] * 4, *[_LONG] * 2, *[_FLOAT] * 2, _INT],
    "norm_backward": [*[_POINTER] * 6, *[_LONG] * 2, _FLOAT, _INT],
    "rotate": [*[_POINTER] * 4, *[_LONG] * 4, *[_INT] * 2],
    "swiglu": [*[_POINTER] * 3, _LONG, _INT],
    "swiglu_backward": [*[_POINTER] * 5, _LONG, _INT],
}
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.].*")

logger = logging.getLogger(__name__)


def are_there() -> bool:
    """Whether kernels can be called: on Linux, with AVX2 and no AVX-512, where they were measured, and a compiler."""
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX2" and library() is not None


def can_read(*tensors: Tensor) -> bool:
    """Whether these are fp32 numbers of this CPU.

    Fake tensors, sharded and quantized ones have a type of their own.
    """
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors
    )


def call(name: str, *arguments: Any) -> None:
    """Call a kernel with as many threads as torch has; tensors, numbers and pointers must be what it says."""
    plain: list[Any] = []
    for argument in arguments:
        if type(argument) is FakeTensor:
            return  # a plan's, which has no data
        plain.append(argument.data_ptr() if isinstance(argument, Tensor) else argument)
    kernel = getattr(library(), name)
    if not torch.autograd._profiler_enabled():
        kernel(*plain, torch.get_num_threads())
        return
    with record_function(f"fourscore::{name}"):  # a profiler does not see by itself what is not torch's
        kernel(*plain, torch.get_num_threads())


@cache
def library() -> Any:
    """The compiled kernels, None where there are none."""
    try:
        return _compiled()
    # What a compiler can do wrong, or a CXX that is not the name of one.
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning(
            "no kernels (%s): training on this CPU is slower, and rollouts copy the weights unless "
            "--pack_rollout_weights false is given; GCC's C++ compiler, found as c++ or by CXX, makes them",
            error,
        )
        return None


def _compiled() -> Any:
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"{compiler[0]} is not on the PATH")
    source = Path(__file__).with_suffix(".cpp")
    # On some file systems what is loaded cannot be removed yet.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        # For this very processor, so nothing is kept that another one could load.
        how = ["-O2", "-ftree-vectorize", "-march=native", "-fopenmp", "-fPIC"]  # -O3 takes twice as long, to no use
        _run(*compiler, *how, "-c", str(source), "-o", str(made))
        # With torch's own OpenMP: the threads of another one would be in the way of those that torch has waiting.
        _run(*compiler, "-shared", str(made), _openmp(), "-lmvec", "-lm", "-o", str(linked))
        found = ctypes.CDLL(str(linked))
    for name, types in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=60, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise OSError(f"{command[0]} failed: {said[-1] if said else done.returncode}")


def _openmp() -> str:
    """The file of the OpenMP that torch has loaded; other packages may have brought one of their own."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    paths = [line.split(maxsplit=5)[-1] for line in lines]
    found = [path for path in paths if _OPENMP.fullmatch(Path(path).name)]
    if not found:
        raise FileNotFoundError("torch has no OpenMP here")
    beside_torch = str(Path(torch.__file__).parent)  # torch/lib, or torch.libs
    return next((path for path in found if path.startswith(beside_torch)), found[0])

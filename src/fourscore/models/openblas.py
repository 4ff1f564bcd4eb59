"""Products by OpenBLAS on a CPU, of the package scipy-openblas32, with the threads of torch."""

import ctypes
import logging
from functools import cache
from pathlib import Path

from torch import Tensor

from fourscore.models import kernels

logger = logging.getLogger(__name__)


def is_there() -> bool:
    """Whether `product` can be called: the kernels are there, and OpenBLAS is."""
    return kernels.are_there() and sgemm() is not None


def product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, a_turned: bool = False, b_turned: bool = False
) -> Tensor:
    """`a b + bias`, `[m, n]`, without gradients; all of it fp32 numbers on a CPU that lie one after the other.

    Args:
        a: `[m, k]`, or `[k, m]` if it is turned.
        b: `[k, n]`, or `[n, k]` if it is turned.
        bias: `[n]`.
        a_turned: take a's transpose.
        b_turned: take b's transpose.
    """
    k, m = a.shape if a_turned else a.shape[::-1]
    n = b.shape[0] if b_turned else b.shape[1]
    y = a.new_empty(m, n)
    kernels.call("multiply", sgemm(), a, b, bias, y, m, n, k, a_turned, b_turned)
    return y


@cache
def sgemm() -> int | None:
    """The address of its product in fp32, `cblas_sgemm` with integers of 32 bits; None where there is none."""
    try:
        import scipy_openblas32 as package

        library = ctypes.CDLL(str(Path(package.get_lib_dir(), package.get_library(fullname=True))))
        # Each thread of torch makes a part alone; OpenBLAS's own would be in the way of those that torch has waiting.
        library.scipy_openblas_set_num_threads(1)
        return ctypes.cast(library.scipy_cblas_sgemm, ctypes.c_void_p).value
    except (ImportError, OSError, AttributeError) as error:
        logger.warning(
            "no OpenBLAS (%s): scoring and updates on this CPU are slower; `pip install scipy-openblas32` brings it",
            error,
        )
        return None

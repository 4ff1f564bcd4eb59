"""Products of few rows on a CPU, as in decoding.

MKL brings weights into an order of its own for every product; oneDNN wants a copy of them in blocks, and still is far
from what memory and processor can do where rows are few. The kernel takes weights as they lie and reads each once.
"""

import torch
from torch import Tensor

from fourscore.models import kernels

MOST_ROWS = 64
"""Up to so many, it is as fast as or faster than oneDNN with weights in blocks (`benchmarks/products.py`)."""


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` can multiply these: few rows, and numbers in fp32 that lie in memory, one after the other."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight))
    rows = x.numel() // max(x.shape[-1], 1)
    # Fake tensors and sharded ones have a type of their own.
    return plain and type(x) is Tensor and 0 < rows <= MOST_ROWS and weight.is_contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `torch.nn.functional.linear`, without gradients; only where kernels are there.

    Args:
        x: `[..., inputs]`; it and the weights must fit.
        weight: `[outputs, inputs]`.
        bias: `[outputs]` fp32.
    """
    x = x.contiguous()
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], outputs)
    strips = x.new_empty((rows + kernels.STRIP - 1) * inputs)
    kernels.call("few_rows", x, weight, bias, y, strips, rows, outputs, inputs)
    return y

"""Products of few rows on a CPU, as in decoding.

MKL brings weights into an order of its own for every product; oneDNN wants a copy of them in blocks, and still is far
from what memory and processor can do where rows are few. The kernel takes weights as they lie and reads each once.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fourscore.models import kernels

MOST_ROWS = 64
"""Up to so many, it is as fast as or faster than oneDNN with weights in blocks (`benchmarks/products.py`)."""


def takes(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel can take a layer's weights: fp32 numbers on a CPU, one after the other."""
    tensors = [weight] if bias is None else [weight, bias]
    return kernels.can_read(*tensors) and all(t.is_contiguous() for t in tensors)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` can multiply these, weights that it takes being given: few rows of as many numbers in fp32."""
    if not kernels.can_read(x) or x.shape[-1] != weight.shape[1]:
        return False
    return 0 < x.numel() <= MOST_ROWS * weight.shape[1]


class FewRows:
    """What a linear layer computes, by the kernel where rows are few; without gradients.

    Attributes:
        weight: `[outputs, inputs]`.
        bias: `[outputs]`.
        takes: whether the kernel takes them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, otherwise: Callable[..., Tensor]) -> None:
        """Give `otherwise(x, weight, bias)` for where it is not the kernel's."""
        self.weight, self.bias, self.takes = weight, bias, takes(weight, bias)
        self._otherwise = otherwise

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`; other arguments, of adapters, say, are not looked at."""
        if self.takes and fits(x, self.weight):
            return product(x, self.weight, self.bias)
        return self._otherwise(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `torch.nn.functional.linear`, without gradients; only where kernels are there.

    Args:
        x: `[..., inputs]`; it must fit.
        weight: `[outputs, inputs]`; the kernel must take it, and the bias.
        bias: `[outputs]`.
    """
    x = x.contiguous()
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    y = x.new_empty(*x.shape[:-1], outputs)
    strips = x.new_empty((rows + kernels.STRIP - 1) * inputs)
    kernels.call("few_rows", x, weight, bias, y, strips, rows, outputs, inputs)
    return y

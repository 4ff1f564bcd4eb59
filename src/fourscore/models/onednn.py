"""Products by oneDNN on a CPU, where torch would have them from MKL.

MKL brings weights into an order of its own for every product, which takes long where rows are few, and is made for
Intel. On AMD oneDNN was faster for all numbers of rows that were tried, but for the gradients of weights: with AVX-512
for all weights, without it for large ones (`benchmarks/products.py`).
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fourscore.models.cpu import cpu_info
from fourscore.models.forward_as import forward_as

_LARGE = 2**22
"""Numbers in a weight matrix: that many do not fit into the caches of a core."""


def has_products() -> bool:
    """Whether oneDNN has fast ones for this CPU; torch's names for them are those that its compiler uses."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `torch.nn.functional.linear`, without gradients.

    Args:
        x: `[..., inputs]` fp32.
        weight: `[outputs, inputs]` fp32, or oneDNN's blocks of it.
        bias: `[outputs]`.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` without gradients, by whichever of the two is faster; x in fp32, no autocast."""
    return product(x, weight, bias) if _fits(weight) else F.linear(x, weight, bias)


@contextmanager
def by_onednn(model: nn.Module | None) -> Iterator[None]:
    """In this context plain linear layers in fp32 on a CPU multiply by oneDNN, backward passes of it included.

    Only on processors of AMD, without AVX-512 only with large weights; and not where a backward pass makes activations
    again: it would be out of this context.

    Args:
        model: a model or a layer, PEFT or plain.
    """
    with ExitStack() as stack:
        for layer in _layers(model):
            stack.enter_context(forward_as(layer, partial(_multiply, layer)))
        yield


def _layers(model: nn.Module | None) -> list[nn.Linear]:
    if model is None or torch.is_autocast_enabled("cpu") or math.isinf(_least_weights()):
        return []
    modules = list(model.modules())
    if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in modules):
        return []
    return [m for m in modules if type(m) is nn.Linear and _fits(m.weight)]


@cache
def _least_weights() -> float:
    """Numbers in the smallest weight matrix for which it pays; infinity where it never does."""
    if not has_products() or "AuthenticAMD" not in cpu_info():
        return math.inf
    return 0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else _LARGE


def _fits(weight: Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and not isinstance(weight, DTensor)
    return plain and weight.numel() >= _least_weights()


def _multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    return _Multiply.apply(x, layer.weight, layer.bias)


class _Multiply(torch.autograd.Function):
    """`product` with gradients; that of the weights is torch's own, for which oneDNN is no faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            product(grad, weight.t(), None) if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )

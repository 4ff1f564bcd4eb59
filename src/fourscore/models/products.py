"""Products of linear layers on a CPU by the library that is fastest there.

torch has them from MKL, which is made for Intel. On AMD others were faster, whatever the number of rows: without
AVX-512 OpenBLAS, and with it oneDNN, but for the gradients of weights (`benchmarks/products.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fourscore.models import few_rows, onednn, openblas
from fourscore.models.cpu import cpu_info
from fourscore.models.forward_as import forward_as
from fourscore.models.recompute import recomputes


@dataclass(frozen=True)
class Library:
    """What makes the products of a layer in fp32.

    Attributes:
        takes: whether it does for these weights, `[outputs, inputs]`, and that bias.
        outputs: as `torch.nn.functional.linear`.
        of_inputs: their gradient, from that of the outputs, `[n, outputs]`, and the weights.
        of_weights: their gradient, from that of the outputs, `[n, outputs]`, and the inputs, `[n, inputs]`.
    """

    takes: Callable[[Tensor, Tensor | None], bool]
    outputs: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    of_inputs: Callable[[Tensor, Tensor], Tensor]
    of_weights: Callable[[Tensor, Tensor], Tensor]


def _takes_plain(least: int, weight: Tensor, bias: Tensor | None) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and not isinstance(weight, DTensor)
    return plain and weight.numel() >= least


def _by_openblas(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != weight.dtype or x.device != weight.device or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)  # which says what is wrong
    y = openblas.product(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, b_turned=True)
    return y.view(*x.shape[:-1], len(weight))


OPENBLAS = Library(
    takes=few_rows.takes,
    outputs=_by_openblas,
    of_inputs=openblas.product,
    of_weights=partial(openblas.product, a_turned=True),
)
ONEDNN = Library(
    takes=partial(_takes_plain, 0),
    outputs=onednn.product,
    of_inputs=lambda grad, weight: onednn.product(grad, weight.t(), None),
    of_weights=lambda grad, x: grad.t() @ x,
)
_LARGE = 2**22
"""Numbers in a weight matrix: that many do not fit into the caches of a core."""


def library() -> Library | None:
    """The one for this CPU, None where torch's own choice is left."""
    if "AuthenticAMD" not in cpu_info():
        return None
    if openblas.is_there():
        return OPENBLAS
    if not onednn.has_products():
        return None
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return ONEDNN
    return replace(ONEDNN, takes=partial(_takes_plain, _LARGE))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` without gradients, by the fastest; x in fp32, no autocast."""
    by = library()
    if by is None or type(x) is not Tensor or not by.takes(weight, bias):  # a plan's x has no data
        return F.linear(x, weight, bias)
    return by.outputs(x, weight, bias)


@contextmanager
def fast_products(model: nn.Module | None) -> Iterator[None]:
    """In this context plain linear layers in fp32 on a CPU multiply by `library`, backward passes of it included.

    Not where a backward pass makes activations again: it would be out of this context.

    Args:
        model: a model or a layer, PEFT or plain.
    """
    with ExitStack() as stack:
        if (by := library()) is not None:
            for layer in _layers(model, by):
                stack.enter_context(forward_as(layer, partial(_multiply, layer, by)))
        yield


def _layers(model: nn.Module | None, by: Library) -> list[nn.Linear]:
    if model is None or torch.is_autocast_enabled("cpu") or recomputes(model):
        return []
    return [m for m in model.modules() if type(m) is nn.Linear and by.takes(m.weight, m.bias)]


def _multiply(layer: nn.Linear, by: Library, x: Tensor) -> Tensor:
    if type(x) is not Tensor:  # a plan's x has no data
        return F.linear(x, layer.weight, layer.bias)
    return _Multiply.apply(x, layer.weight, layer.bias, by)


class _Multiply(torch.autograd.Function):
    """A layer's outputs by a library, and their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by: Library) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.by = by
        return by.outputs(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2).contiguous()
        return (
            ctx.by.of_inputs(rows, weight).view(*grad.shape[:-1], weight.shape[1]) if of_x else None,
            ctx.by.of_weights(rows, x.flatten(0, -2).contiguous()) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )

"""RMS norms, rotary positions and SwiGLU on a CPU, each in one pass over memory, with gradients.

torch makes each of several operations, which write a tensor of all tokens for the next one to read, and keep more of
them for the backward pass. What it is worth: `benchmarks/fused.py`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import SiLUActivation

from fourscore.models import kernels
from fourscore.models.forward_as import forward_as
from fourscore.models.recompute import recomputes
from fourscore.models.unpadded import FAMILIES

_ROTATE = "apply_rotary_pos_emb"
"""The function of that name in a family's module of transformers."""


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """In this context a model of the known families has these by kernels, where it runs in fp32 on a CPU.

    Not where a backward pass makes activations again: it would be out of this context.

    Args:
        model: PEFT or plain.
    """
    with ExitStack() as stack:
        if _has_them(model):
            modules = [m for m in model.modules() if type(m).__module__.startswith("transformers.models.")]
            for module in modules:
                if (forward := _forward_of(module)) is not None:
                    stack.enter_context(forward_as(module, forward))
            for name in {type(m).__module__ for m in modules}:
                if hasattr(sys.modules[name], _ROTATE):
                    stack.enter_context(_rotates(sys.modules[name]))
        yield


def _has_them(model: Any) -> bool:
    first = next(model.parameters())  # on a GPU no kernel needs to be made
    plain = (first.device.type, first.dtype) == ("cpu", torch.float32)
    if not plain or torch.is_autocast_enabled("cpu") or recomputes(model):
        return False
    return model.config.get_text_config().model_type in FAMILIES and kernels.are_there()


def _forward_of(module: Any) -> Callable[..., Tensor] | None:
    if "forward" in vars(module):
        return None  # someone else's
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return partial(_normed, module, module.forward)
    if name.endswith("MLP") and hasattr(module, "gate_proj") and is_silu(module.act_fn):
        return None if module.act_fn._forward_hooks or module.act_fn._forward_pre_hooks else partial(_mlp, module)
    return None


def is_silu(activation: Any) -> bool:
    """Whether an MLP's `act_fn` is SiLU."""
    return isinstance(activation, (nn.SiLU, SiLUActivation))


def _normed(module: Any, otherwise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not are_plain(x, module.weight):
        return otherwise(x)
    gemma = type(module).__name__.startswith("Gemma")  # whose weights are what is more than one
    arguments = x.contiguous(), module.weight, module.eps if gemma else module.variance_epsilon, float(gemma)
    return _Norm.apply(*arguments) if torch.is_grad_enabled() else _norm(*arguments)[0]


def _mlp(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not are_plain(gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(_SwiGLU.apply(gate, up) if torch.is_grad_enabled() else _swiglu(gate, up))


@contextmanager
def _rotates(family: ModuleType) -> Iterator[None]:
    otherwise = getattr(family, _ROTATE)

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if args or kwargs or not are_plain(q, k, cos, sin) or cos.shape[-1] != q.shape[-1] or cos.requires_grad:
            return otherwise(q, k, cos, sin, *args, **kwargs)
        rotate = _Rotate.apply if torch.is_grad_enabled() else _rotate
        return rotate(q, cos, sin), rotate(k, cos, sin)

    setattr(family, _ROTATE, rotated)
    try:
        yield
    finally:
        setattr(family, _ROTATE, otherwise)


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are fp32 numbers on a CPU; a plan's have no data, but are counted."""
    fake = [t for t in tensors if type(t) is FakeTensor]
    counted = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in fake)
    return counted and kernels.can_read(*(t for t in tensors if type(t) is not FakeTensor))


def _norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    rows = x.numel() // size
    y, scales = torch.empty_like(x), x.new_empty(rows)
    kernels.call("norm", x, weight, y, scales, rows, size, epsilon, offset)
    return y, scales


class _Norm(torch.autograd.Function):
    """`x * (offset + weight)` over the root mean square of x along its last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
        y, scales = _norm(x, weight, epsilon, offset)
        ctx.save_for_backward(x, weight, scales)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        size = len(weight)
        of_x = torch.empty_like(x)
        of_weight = x.new_zeros(torch.get_num_threads(), size) if ctx.needs_input_grad[1] else None
        given = of_y.contiguous(), x, weight, scales
        kernels.call("norm_backward", *given, of_x, of_weight, len(scales), size, ctx.offset)
        return of_x, None if of_weight is None else of_weight.sum(0), None, None


class _Rotate(torch.autograd.Function):
    """Queries or keys `[n, heads, T, size]` at their positions; cosines and sines: `[n or 1, T, size]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotate(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotate(of_y, cosines, sines, back=True), None, None


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # as it was made, and as attention takes it
    n, length, heads, size = x.shape
    y = torch.empty_like(x)
    angles = cosines.contiguous(), sines.contiguous()
    kernels.call("rotate", x, *angles, y, n * length, heads, size, cosines.numel() // size, back)
    return y.transpose(1, 2)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    kernels.call("swiglu", gate.contiguous(), up.contiguous(), y, y.numel())
    return y


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_y = of_y.contiguous()
        of_gate, of_up = torch.empty_like(of_y), torch.empty_like(of_y)
        kernels.call("swiglu_backward", of_y, gate.contiguous(), up.contiguous(), of_gate, of_up, of_y.numel())
        return of_gate, of_up

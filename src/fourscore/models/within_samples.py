"""Attention within samples that stand back to back, on a CPU, with gradients: no sample is padded for it.

torch's kernel takes rectangles, and makes products of small blocks by MKL. What it is worth: `benchmarks/attention.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fourscore.models import kernels, openblas


def is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether what attention is called with makes it no other than that of the scores alone.

    None of the families has anything else, and what attention is called with may change.
    """
    return not any(kwargs.get(name) for name in ("dropout", "softcap")) and kwargs.get("position_bias") is None


def fits(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether `attend` gives what torch would, as transformers calls it: `[1, heads, T, size]` each, fp32 on a CPU."""
    alike = key.shape == value.shape and key.shape[2:] == query.shape[2:] and query.shape[1] % key.shape[1] == 0
    given = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if given is None else given
    return kernels.can_read(query, key, value) and alike and causal and is_plain(kwargs) and openblas.is_there()


def attend(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scaling: float | None) -> Tensor:
    """What each token gets from those of its sample up to itself, `[1, T, heads, size]`.

    Args:
        query: `[1, heads, T, size]`; it must fit, and the others, too.
        key: `[1, heads kept, T, size]`.
        value: of the same shape.
        begins: `[samples + 1]` the first token of each sample, and where the last one ends.
        longest: tokens of the longest sample.
        scaling: of the scores; None for one over the root of the size.
    """
    scale = float(scaling or query.shape[-1] ** -0.5)
    tokens = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # x[0] would have its gradient copied
    return _Attend.apply(*tokens, begins, longest, scale)[None]


class _Attend(torch.autograd.Function):
    """Of `[T, heads, size]`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        tokens, heads, size = query.shape
        y, logs = torch.empty_like(query), query.new_empty(heads, tokens)
        ctx.sizes = len(begins) - 1, longest, heads, heads // key.shape[1], size, scale
        sgemm, scratch = openblas.sgemm(), query.new_empty(torch.get_num_threads() * kernels.QUERIES * longest)
        kernels.call("attend_within", sgemm, query, key, value, y, logs, scratch, begins, *ctx.sizes)
        ctx.save_for_backward(query, key, value, begins, y, logs)
        return y

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, begins, y, logs = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(query), torch.zeros_like(query)
        longest = ctx.sizes[1]
        scratch = query.new_empty(torch.get_num_threads() * 2 * kernels.QUERIES * longest)
        given = of_y.contiguous(), query, key, value, y, logs
        made = of_query, of_key, of_value, scratch
        kernels.call("attend_within_backward", openblas.sgemm(), *given, *made, begins, *ctx.sizes)
        if of_key.shape != key.shape:
            of_key, of_value = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (of_key, of_value))
        return of_query, of_key, of_value, None, None, None

"""Attention of one new token of each row to those before it, on a CPU: torch's kernel is made for many new ones.

What it is worth: `benchmarks/attention.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourscore.models import kernels
from fourscore.models.unpadded import FAMILIES, attention_is
from fourscore.models.within_samples import is_plain

_NAME = "fourscore_one_token"

_begins: ContextVar[Tensor | None] = ContextVar("begins", default=None)


@contextmanager
def attention_of_one_token(model: nn.Module) -> Iterator[None]:
    """In this context steps with `seen_from` attend by the kernel, where a model allows it; all else is as ever.

    Args:
        model: PEFT or plain, all in fp32 on a CPU, in evaluation mode, and not under autocast.
    """
    fits = model.config.get_text_config().model_type in FAMILIES and kernels.are_there()
    with attention_is(model, _NAME) if fits else nullcontext():
        yield


def attends_by_kernel(model: Any) -> bool:
    """Whether a model is in that context, and it allows it."""
    return model.config.get_text_config()._attn_implementation == _NAME


@contextmanager
def seen_from(begins: Tensor) -> Iterator[None]:
    """A step in which each row sees its columns from `begins` `[rows]` on, and gets one new token."""
    token = _begins.set(begins)
    try:
        yield
    finally:
        _begins.reset(token)


def rows_see_from() -> Tensor | None:
    """The `begins` of a step; None out of one."""
    return _begins.get()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[rows, heads, tokens, size]` each, to `[rows, new tokens, heads, size]`."""
    begins = rows_see_from()
    if begins is None or not is_plain(kwargs) or not _fits(query, key, value, begins):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    rows, heads, _, size = query.shape
    kept, tokens = key.shape[1:3]
    scale = float(kwargs.get("scaling") or size**-0.5)
    query = query.contiguous()
    y = query.new_empty(rows, 1, heads, size)
    scores = query.new_empty(rows * heads * tokens)
    capacity = key.stride(1) // size
    arguments = rows, kept, heads // kept, tokens, capacity, size, scale
    kernels.call("attend", query, key, value, y, scores, begins, *arguments)
    return y, None


def _fits(query: Tensor, key: Tensor, value: Tensor, begins: Tensor) -> bool:
    """One token a row, and keys and values with room for more behind those of a head, one head after the other."""
    rows, heads, _, size = key.shape
    capacity = key.stride(1) // size
    lie = (heads * capacity * size, capacity * size, size, 1)
    of_rows = query.shape[::2] == (rows, 1) and query.shape[1] % heads == 0 and value.shape == key.shape
    seen = begins.dtype == torch.long and begins.shape == (rows,) and begins.is_contiguous()
    return (
        kernels.can_read(query, key, value)
        and of_rows
        and seen
        and size % kernels.STRIP == 0
        and key.stride() == value.stride() == lie
    )


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)

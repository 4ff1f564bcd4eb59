"""Samples back to back in one row: what a model does token by token sees no padding, only its attention does."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FAMILIES = frozenset(
    {
        "gemma",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""`model_type` of models in which attention alone looks at other tokens, and positions are those that are given."""

_NAME = "fourscore_unpadded"

_layout: ContextVar["Layout"] = ContextVar("layout")


def can_unpad(model: Any, longest: int) -> bool:
    """Whether samples of up to so many tokens can stand back to back in a pass of a model.

    Its attention must be "sdpa", and see all of a sample. A backward pass that makes activations again needs padding:
    attention would not know where samples end any more.

    Args:
        model: PEFT or plain.
        longest: tokens of a sample.
    """
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in FAMILIES
        and config._attn_implementation == "sdpa"
        and (not window or longest <= window)
        and not (torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
    )


@dataclass(frozen=True)
class Layout:
    """How tokens that stand back to back go into rectangles for attention, and come back.

    Attributes:
        shapes: samples and tokens a sample of each rectangle.
        spread: `[P]` for each cell of all rectangles the token that is in it; some token, where it is padding.
        back: `[T]` the cell of each token.
    """

    shapes: list[tuple[int, int]]
    spread: Tensor
    back: Tensor

    @classmethod
    def of(cls, lens: Tensor, groups: list[Tensor]) -> "Layout":
        """That of samples of `lens` `[n]` tokens, with a rectangle for each of the `groups` of their indices."""
        starts = lens.cumsum(0) - lens
        shapes, spread = [], []
        back = torch.empty(int(lens.sum()), dtype=torch.long, device=lens.device)
        cells = 0
        for group in groups:
            lasts = lens[group][:, None] - 1
            at = torch.arange(int(lasts.max()) + 1, device=lens.device)
            tokens = starts[group][:, None] + torch.minimum(at, lasts)
            real = at <= lasts
            back[tokens[real]] = cells + real.flatten().nonzero()[:, 0]
            shapes.append((len(group), len(at)))
            spread.append(tokens.flatten())
            cells += tokens.numel()
        return cls(shapes, torch.cat(spread), back)


@contextmanager
def attention_within(model: nn.Module, layout: Layout) -> Iterator[None]:
    """In this context the attention of a model that can unpad stays within samples, which stand in one row."""
    # Layers may have a config of their own.
    found = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    configs = [c for c in found.values() if getattr(c, "_attn_implementation", None) == "sdpa"]
    token = _layout.set(layout)
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield
    finally:
        _layout.reset(token)
        for config in configs:
            config._attn_implementation = "sdpa"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[1, heads, T, size]` each, to `[1, T, heads, size]`."""
    layout = _layout.get()
    rectangles = zip(*(_in_rectangles(x, layout) for x in (query, key, value)), strict=True)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    cells = [sdpa(module, *each, None, **kwargs)[0].flatten(0, 1) for each in rectangles]
    one = cells[0] if len(cells) == 1 else torch.cat(cells)
    return _Gather.apply(one, layout)[None], None


AttentionInterface.register(_NAME, _attention)


def _in_rectangles(x: Tensor, layout: Layout) -> list[Tensor]:
    """`[1, heads, T, size]` to `[n, heads, width, size]` for each rectangle."""
    cells = _Spread.apply(x[0].transpose(0, 1), layout)
    parts = [cells] if len(layout.shapes) == 1 else cells.split([n * width for n, width in layout.shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, layout.shapes, strict=True)]


class _Spread(torch.autograd.Function):
    """`[T, ...]` tokens to `[P, ...]` cells. Padding gives back no gradient: it is no part of any token's output."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.spread)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.layout.back), None


class _Gather(torch.autograd.Function):
    """`[P, ...]` cells to `[T, ...]` tokens."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return cells.index_select(0, layout.back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cells = grad.new_zeros(len(ctx.layout.spread), *grad.shape[1:])
        return cells.index_copy_(0, ctx.layout.back, grad), None

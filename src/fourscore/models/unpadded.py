"""Samples back to back in one row: what a model does token by token sees no padding, only its attention does."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourscore.models import within_samples
from fourscore.models.recompute import recomputes

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
        and not recomputes(model)
    )


@dataclass(frozen=True)
class Layout:
    """Where tokens that stand back to back are in rectangles, for attention.

    Attributes:
        shapes: samples and tokens a sample of each rectangle.
        cells: `[T]` the place of each token among the cells of all rectangles, one after the other.
        begins: `[samples + 1]` the first token of each sample, and where the last one ends.
        longest: tokens of the longest sample.
    """

    shapes: list[tuple[int, int]]
    cells: Tensor
    begins: Tensor
    longest: int

    @classmethod
    def of(cls, lens: Tensor, groups: list[Tensor]) -> "Layout":
        """That of samples of `lens` `[n]` tokens, with a rectangle for each of the `groups` of their indices."""
        shapes, before = [], 0
        firsts = torch.empty_like(lens)  # the cell of each sample's first token
        for group in groups:
            n, width = len(group), int(lens[group].max())
            firsts[group] = before + width * torch.arange(n, device=lens.device)
            shapes.append((n, width))
            before += n * width
        begins = F.pad(lens.cumsum(0), (1, 0))
        tokens = torch.arange(int(begins[-1]), device=lens.device)
        cells = tokens + torch.repeat_interleave(firsts - begins[:-1], lens)
        return cls(shapes, cells, begins, max(width for _, width in shapes))


@contextmanager
def attention_within(model: nn.Module, layout: Layout) -> Iterator[None]:
    """In this context the attention of a model that can unpad stays within samples, which stand in one row."""
    token = _layout.set(layout)
    try:
        with attention_is(model, _NAME):
            yield
    finally:
        _layout.reset(token)


@contextmanager
def attention_is(model: nn.Module, name: str) -> Iterator[None]:
    """In this context a model's attention is that of a registered name, where else it is "sdpa"."""
    # Layers may have a config of their own.
    found = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    configs = [c for c in found.values() if getattr(c, "_attn_implementation", None) == "sdpa"]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[1, heads, T, size]` each, to `[1, T, heads, size]`."""
    layout = _layout.get()
    if within_samples.fits(module, query, key, value, kwargs):
        return within_samples.attend(query, key, value, layout.begins, layout.longest, kwargs.get("scaling")), None
    rectangles = zip(*(_in_rectangles(x, layout) for x in (query, key, value)), strict=True)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    outputs = [sdpa(module, *each, None, **kwargs)[0].flatten(0, 1) for each in rectangles]
    return torch.cat(outputs).index_select(0, layout.cells)[None], None


AttentionInterface.register(_NAME, _attention)


def _in_rectangles(x: Tensor, layout: Layout) -> list[Tensor]:
    """`[1, heads, T, size]` to `[n, heads, width, size]` for each rectangle, with zeros for padding."""
    tokens = x[0].transpose(0, 1)
    sizes = [n * width for n, width in layout.shapes]
    cells = tokens.new_zeros(sum(sizes), *tokens.shape[1:]).index_copy_(0, layout.cells, tokens)
    parts = zip(cells.split(sizes), layout.shapes, strict=True)
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in parts]

"""transformers in float64 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import transformers.generation.utils
import transformers.models.llama.modeling_llama

CASTING = (transformers.models.llama.modeling_llama, transformers.generation.utils)
"""What of transformers a Llama meets that casts to fp32 by name: norms, rotary angles, and the logits of `generate`."""


class _Wide(ModuleType):
    """torch, in which fp32 is another name of float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def transformers_in_float64() -> Iterator[None]:
    """In this context Llamas in float64 do not round to fp32 on the way; load them in it, too."""
    try:
        for module in CASTING:
            module.torch = _Wide("torch")
        yield
    finally:
        for module in CASTING:
            module.torch = torch

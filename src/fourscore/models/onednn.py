"""Products by oneDNN on a CPU."""

import torch
from torch import Tensor


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

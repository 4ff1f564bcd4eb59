"""Backward passes that make activations again."""

import torch
from torch import nn


def recomputes(model: nn.Module) -> bool:
    """Whether a pass of the model now is one with gradients under activation checkpointing.

    Its backward pass runs layers again, out of any context that the pass was made in.
    """
    return torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())

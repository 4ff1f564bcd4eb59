"""The value head on the policy's trunk: one backbone, forward and backward for both roles."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from fourscore.errors import FourscoreError
from fourscore.models.forward import score_head, without_peft


def share_trunk(policy: Any) -> Any:
    """A value model whose backbone is the policy's: the same modules, adapters included, with a head of its own.

    The head is fp32 and starts at zero, so every value is 0 at first.

    Args:
        policy: causal LM, plain or PEFT.

    Returns:
        a sequence classifier with one label, as `AutoModelForSequenceClassification` makes it.

    Raises:
        FourscoreError: transformers has no such classifier with a `score` head for the architecture.
    """
    base = without_peft(policy)
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise FourscoreError(
            f"--share_value_backbone: transformers has no sequence classifier for {config.model_type!r}; leave it out"
        ) from error
    head = score_head(model)
    setattr(model, model.base_model_prefix, base.base_model)
    device = next(base.parameters()).device
    model.score = nn.Linear(head.in_features, 1, bias=head.bias is not None, device=device)
    for parameter in model.score.parameters():
        nn.init.zeros_(parameter)
    model.score.register_forward_pre_hook(_widen)
    return model.train(policy.training)


def shares_trunk(policy: Any, value_model: Any) -> bool:
    """Whether the value model's backbone is the policy's."""
    return value_model is not None and without_peft(policy).base_model is without_peft(value_model).base_model


def _widen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The trunk may be bf16; the head is not."""
    return (args[0].to(module.weight.dtype), *args[1:])

"""Dropout off in train mode, so that the policy that is updated is the policy that generated.

Models stay in train mode (`eval()` would silently turn activation checkpointing off), with every source of randomness
at zero: `nn.Dropout` modules, the floats that attention layers read in train mode (`attention_dropout`, `layerdrop`),
and the fields that a few architectures (Falcon, Persimmon) read from their config in the forward.
"""

import copy
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel


def disable_dropout(model: nn.Module) -> dict[str, float]:
    """Sets every dropout probability in `model` to zero, in place.

    `model.config`, which is what gets saved, keeps its values. Choose the attention implementation before: layers of
    a model whose config names dropout get a config of their own.

    Returns:
        What was not zero before: name of the module or attribute -> probability.
    """
    found: dict[str, float] = {}
    quiet: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            if module.p:
                found[name] = float(module.p)
            module.p = 0.0
            continue
        for attribute, value in vars(module).items():
            if _is_probability(attribute, value):
                found[f"{name}.{attribute}".lstrip(".")] = float(value)
                setattr(module, attribute, 0.0)
        config = vars(module).get("config")
        # Models keep their own config object (it is saved); layers get a twin without dropout.
        if config is None or isinstance(module, PreTrainedModel) or not hasattr(config, "to_dict"):
            continue
        if id(config) not in quiet:
            quiet[id(config)] = _without_dropout(config)
        module.config = quiet[id(config)]
    return found


def _is_probability(name: str, value: object) -> bool:
    return "drop" in name and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _without_dropout(config: Any) -> Any:
    """`config` itself if it names no dropout, else a shallow copy with zeros."""
    fields = [name for name, value in vars(config).items() if _is_probability(name, value)]
    if not fields:
        return config
    twin = copy.copy(config)
    for name in fields:
        setattr(twin, name, 0.0)
    return twin

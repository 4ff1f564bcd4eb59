"""A private copy of a policy's linear layers, packed for the few rows of a decoding step, adapters folded in.

A product of a few rows with weights as they lie in a checkpoint is slower on a CPU than one with weights in the blocks
of oneDNN (`make bench-rollout`). The copy lives as long as a rollout; the policy itself stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fourscore.models.forward_as import forward_as
from fourscore.models.onednn import has_products, product

_ROWS = 16
"""For which the blocks are chosen; other numbers of rows work as well."""


def packable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers, by name, of which `packed` makes a copy: plain linear layers in fp32 on a CPU, LoRA on them or not.

    Weights on the meta device count, too, so that a plan sees the same layers. Under autocast there are none, because
    it would multiply in another dtype.

    Args:
        model: PEFT or plain.
    """
    if torch.is_autocast_enabled("cpu") or not has_products():
        return {}
    found: dict[str, nn.Module] = {}
    below: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in below):
            continue
        if isinstance(module, LoraLinear):
            # What is not packed as a whole is left alone, with the layers that it consists of.
            below.append(name)
            linear, fits = module.get_base_layer(), _folds(module)
        else:
            linear, fits = module, type(module) is nn.Linear
        if fits and linear.weight.dtype == torch.float32 and linear.weight.device.type in ("cpu", "meta"):
            found[name] = module
    return found


def packed_bytes(model: nn.Module) -> int:
    """What the copy takes."""
    return sum(4 * _linear(module).weight.numel() for module in packable(model).values())


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """In this context the layers of `packable` multiply with the copy; without gradients.

    Args:
        model: PEFT or plain, in evaluation mode.
    """
    with ExitStack() as stack:
        for module in packable(model).values():
            stack.enter_context(forward_as(module, _product(module)))
        yield


def _linear(module: Any) -> nn.Linear:
    return module.get_base_layer() if isinstance(module, LoraLinear) else module


def _folds(module: Any) -> bool:
    """Whether a LoRA layer's output is that of one weight matrix, the base's plus the active adapters'."""
    plain = type(module.get_base_layer()) is nn.Linear and not module.merged
    return plain and not any(name in module.lora_variant or module.lora_bias.get(name) for name in module.lora_A)


@torch.no_grad()
def _product(module: Any) -> Callable[..., Tensor]:
    linear = _linear(module)
    weight = linear.weight.detach()
    if isinstance(module, LoraLinear) and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    bias = linear.bias

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return product(x, blocks, bias)

    return forward

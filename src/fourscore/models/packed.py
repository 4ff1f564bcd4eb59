"""How a policy's linear layers multiply on a CPU while it decodes: few rows, and adapters folded in.

By `few_rows` where there are kernels: weights are taken as they lie, and those with an adapter on them from a private
copy with the adapter folded in. Elsewhere all are copied, into the blocks of oneDNN. A copy lives as long as a rollout;
the policy itself stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fourscore.models import kernels
from fourscore.models.few_rows import FewRows
from fourscore.models.forward_as import forward_as
from fourscore.models.onednn import has_products, product
from fourscore.models.products import fast_products, linear

_ROWS = 16
"""For which the blocks are chosen; other numbers of rows work as well."""


def packable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `packed` is for, by name: plain linear layers in fp32 on a CPU, LoRA on them or not.

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
            plain, fits = module.get_base_layer(), _folds(module)
        else:
            plain, fits = module, type(module) is nn.Linear
        if fits and _is_fp32(plain.weight, "cpu", "meta"):
            found[name] = module
    return found


def packed_bytes(model: nn.Module) -> int:
    """What the copies take."""
    copied = [m for m in packable(model).values() if isinstance(m, LoraLinear) or not kernels.are_there()]
    return sum(4 * _linear(module).weight.numel() for module in copied)


@contextmanager
def packed(model: nn.Module, *, copy: bool = True) -> Iterator[None]:
    """In this context the layers of `packable` multiply as is best for decoding; without gradients.

    Args:
        model: PEFT or plain, in evaluation mode.
        copy: weights may be copied.
    """
    with ExitStack() as stack:
        if copy:
            for module in packable(model).values():
                stack.enter_context(forward_as(module, _product(module)))
        elif (plain := _plain(model)) and kernels.are_there():
            for module in plain:
                stack.enter_context(forward_as(module, FewRows(module.weight, module.bias, linear)))
        else:
            stack.enter_context(fast_products(model))
        yield


def _plain(model: nn.Module) -> list[nn.Linear]:
    """Plain linear layers in fp32 on a CPU, those that adapters consist of and stand on included."""
    if torch.is_autocast_enabled("cpu"):
        return []
    return [m for m in model.modules() if type(m) is nn.Linear and _is_fp32(m.weight, "cpu")]


def _is_fp32(weight: Tensor, *devices: str) -> bool:
    return weight.dtype == torch.float32 and weight.device.type in devices


def _linear(module: Any) -> nn.Linear:
    return module.get_base_layer() if isinstance(module, LoraLinear) else module


def _folds(module: Any) -> bool:
    """Whether a LoRA layer's output is that of one weight matrix, the base's plus the active adapters'."""
    plain = type(module.get_base_layer()) is nn.Linear and not module.merged
    return plain and not any(name in module.lora_variant or module.lora_bias.get(name) for name in module.lora_A)


@torch.no_grad()
def _product(module: Any) -> Callable[..., Tensor]:
    weight, bias = _linear(module).weight.detach(), _linear(module).bias
    if isinstance(module, LoraLinear) and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    if kernels.are_there():
        return FewRows(weight, bias, linear)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return lambda x, *args, **kwargs: product(x, blocks, bias)

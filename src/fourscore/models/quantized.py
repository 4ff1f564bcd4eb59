"""4-bit layers on a CPU that stay in the form which gradients pass through."""

from typing import Any

from torch import nn


def stay_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew for inference, in place.

    On a CPU with AVX512-BF16 it does so in the first forward pass in eval mode, a rollout's, and from then on
    multiplies by an operation that has no gradient: adapters below the top would silently learn nothing
    (bitsandbytes 0.50, `Linear4bit.forward` and `matmul_4bit`).
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" not in vars(module):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

            layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, state)

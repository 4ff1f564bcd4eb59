"""The work that an update cannot do without, and the least time that a machine takes for it.

Counted are floating-point operations of matrix products with the weights, 2 a weight and token in a forward pass. With

    N   weights of a backbone's layers, without the embedding (which is looked up)
    H   weights of the language model's head, hidden size x vocabulary
    d   hidden size, the weights of a value head or score head
    T   tokens of all samples, prompts and completions, no padding
    C   completion tokens of all samples
    n   samples

the useful work of a phase is

    scoring   2 (N T + H C)  reference  +  2 (N T + d n)  reward
    update    epochs x f x ((N T + H C)  policy  +  (N T + d C)  value model)
              f = 6 in full fine-tuning: forward 2, gradient of the states 2, gradient of the weights 2
              f = 4 with adapters: weights that stand still need no gradient, and what adapters add is left out
    reading   2 (N P + H n), P the prompts' tokens: their keys and values, and the first token of each completion
    a step    2 (N + H) r, r the completions that go on: one more token of each

The policy's logprobs are known from the rollout, and values come out of the value model's first forward pass in the
update, so scoring needs no pass of these two. The head runs where a completion token is chosen, not elsewhere. There is
no credit for what is made twice (activation checkpointing, logits in chunks), and none for attention between tokens,
norms, softmax or optimizers.

The least seconds are that work by the peak of matrix products; for reading and for each step, which read all weights
once, the weights' bytes by the memory's bandwidth if that is more.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from limits import Limits
from transformers import AutoConfig, AutoModelForCausalLM

FACTOR = {"full": 6, "lora": 4, "4bit": 4}
"""Operations a weight and token of forward and backward, by what trains."""
BYTES = {"full": {}, "lora": {}, "4bit": {"backbone": 0.5}}
"""A weight, where it is not the dtype's."""


@dataclass(frozen=True)
class Sizes:
    """Weights of a causal LM: of the backbone without embedding, and of the head; hidden size and number of layers."""

    backbone: int
    head: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class Samples:
    """Tokens of each prompt and of each completion."""

    prompt_lens: list[int]
    completion_lens: list[int]

    @property
    def tokens(self) -> int:
        """Of all."""
        return sum(self.prompt_lens) + sum(self.completion_lens)


def sizes_of(checkpoint: Path) -> Sizes:
    """From its config alone."""
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight.numel()
    backbone = sum(p.numel() for p in model.base_model.parameters()) - embedding
    head = model.get_output_embeddings().weight.numel()
    return Sizes(backbone, head, config.hidden_size, config.num_hidden_layers)


def forward_flops(sizes: Sizes, samples: Samples, outputs: int) -> float:
    """Of a backbone on all tokens, and of a head with `outputs` weights in all over the tokens that it sees."""
    return 2.0 * (sizes.backbone * samples.tokens + outputs)


def scoring_flops(sizes: Sizes, samples: Samples) -> float:
    """Of two forward passes."""
    reference = forward_flops(sizes, samples, sizes.head * sum(samples.completion_lens))
    return reference + forward_flops(sizes, samples, sizes.hidden * len(samples.prompt_lens))


def update_flops(sizes: Sizes, samples: Samples, epochs: int, training: str) -> float:
    """Of the PPO epochs."""
    completion = sum(samples.completion_lens)
    policy = forward_flops(sizes, samples, sizes.head * completion)
    value = forward_flops(sizes, samples, sizes.hidden * completion)
    return epochs * FACTOR[training] / 2 * (policy + value)


def rollout_flops(sizes: Sizes, samples: Samples) -> float:
    """Of reading the prompts and of all steps."""
    n, prompts = len(samples.prompt_lens), sum(samples.prompt_lens)
    steps = sum(samples.completion_lens) - n
    return 2.0 * (sizes.backbone * prompts + sizes.head * n) + 2.0 * (sizes.backbone + sizes.head) * steps


def whole_flops(sizes: Sizes, samples: Samples, epochs: int, training: str) -> float:
    """Of the whole update and, unlike all else here, of attention, which grows with the square of lengths.

    A token attends to those before it: `2 d` operations a layer for a score, `2 d` for its part of the weighted sum. A
    rollout has one forward pass, scoring two, training one of each model and epoch, whose backward is two more.
    """
    lens = [p + c for p, c in zip(samples.prompt_lens, samples.completion_lens, strict=True)]
    forward = 2.0 * sizes.layers * sizes.hidden * sum(length**2 for length in lens)
    with_weights = rollout_flops(sizes, samples) + scoring_flops(sizes, samples)
    return with_weights + update_flops(sizes, samples, epochs, training) + forward * (1 + 2 + epochs * 2 * 3)


def least_seconds(
    sizes: Sizes, samples: Samples, epochs: int, training: str, bytes_a_weight: float, limits: Limits
) -> dict[str, float]:
    """By phase: `read` and `decode`, which are `rollout`; `scoring`; `update`; and `whole`."""
    backbone_bytes = BYTES[training].get("backbone", bytes_a_weight)
    weights = (sizes.backbone * backbone_bytes + sizes.head * bytes_a_weight) / limits.bandwidth
    n = len(samples.prompt_lens)
    reading = 2 * (sizes.backbone * sum(samples.prompt_lens) + sizes.head * n)
    read = max(weights, reading / limits.flops)
    decode = 0.0
    for step in range(1, max(samples.completion_lens)):
        going_on = sum(length > step for length in samples.completion_lens)
        decode += max(weights, 2 * (sizes.backbone + sizes.head) * going_on / limits.flops)
    least = {
        "read": read,
        "decode": decode,
        "rollout": read + decode,
        "scoring": scoring_flops(sizes, samples) / limits.flops,
        "update": update_flops(sizes, samples, epochs, training) / limits.flops,
    }
    return least | {"whole": least["rollout"] + least["scoring"] + least["update"]}


def samples_of(result: dict[str, Any]) -> Samples:
    """Of a worker's result."""
    return Samples(result["prompt_lens"], result["completion_lens"])

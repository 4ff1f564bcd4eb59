"""Rollout with the policy's own `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fourscore.models.forward import without_peft
from fourscore.ppo.experience import Experience


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: longest completion, in tokens.
        temperature: logits are divided by it; greedy decoding when 0.
        stop_ids: a completion ends with the first of these, which is kept; none: every completion has full length.
        eos_id: what counts as ended when there are no stop ids.
        batch_size: samples generated at once on this process.
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    eos_id: int | None
    batch_size: int


def generate(policy: nn.Module, prompts: list[list[int]], sampling: Sampling, *, synced: bool = False) -> Experience:
    """Complete each prompt once, drawing from the policy's full distribution at the given temperature.

    Args:
        policy: a causal LM, PEFT or plain.
        prompts: token ids, each at least one.
        sampling: how to draw.
        synced: every process decodes until the last one is done, which sharded models need.

    Returns:
        experience with ids and lengths filled in, samples in the order of `prompts`.
    """
    device = next(policy.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    completions: dict[int, Tensor] = {}
    with _only_this_config(policy, _neutral_config(sampling)) as config:
        for start in range(0, len(order), sampling.batch_size):
            group = order[start : start + sampling.batch_size]
            width = max(len(prompts[i]) for i in group)
            # generate wants prompts padded on the left; id 0 is in every vocabulary and hidden by the mask.
            ids = torch.zeros(len(group), width, dtype=torch.long, device=device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(group):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i], device=device)
                mask[row, width - len(prompts[i]) :] = 1
            out = policy.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced)
            for i, new in zip(group, out[:, width:], strict=True):
                completions[i] = new[: _length(new, sampling)]
    samples = [torch.cat([torch.tensor(p, device=device), completions[i]]) for i, p in enumerate(prompts)]
    ending = torch.tensor(sampling.stop_ids or (() if sampling.eos_id is None else (sampling.eos_id,)), device=device)
    return Experience(
        input_ids=torch.cat(samples),
        prompt_lens=torch.tensor([len(p) for p in prompts], device=device),
        completion_lens=torch.tensor([len(completions[i]) for i in range(len(prompts))], device=device),
        has_eos=torch.stack([torch.isin(completions[i], ending).any() for i in range(len(prompts))]),
    )


def overridden_settings(policy: nn.Module) -> dict[str, Any]:
    """What the checkpoint's own generation config would have changed about sampling, had it been left in place.

    Returns:
        setting to value, for those that differ from plain sampling (`repetition_penalty`, `top_k`, ...).
    """
    own = policy.generation_config.to_diff_dict()
    harmless: tuple[str, ...] = (
        "_",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
        "do_sample",
    )
    harmless += ("max_", "use_cache", "cache_", "output_", "return_")
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_length": 0, "num_beams": 1}
    neutral |= {"repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "num_return_sequences": 1}
    return {k: v for k, v in own.items() if not k.startswith(harmless) and neutral.get(k) != v}


def _neutral_config(sampling: Sampling) -> GenerationConfig:
    draw = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids) or None,
        pad_token_id=0,  # fills rows that are done; cut off again below
        bos_token_id=None,
        use_cache=True,
        **(draw if sampling.temperature > 0 else {"do_sample": False}),
    )


@contextmanager
def _only_this_config(policy: nn.Module, config: GenerationConfig) -> Iterator[GenerationConfig]:
    """Settings left open in a call are taken from the model's own config, so that one is put aside meanwhile."""
    owner = without_peft(policy)
    own = owner.generation_config
    owner.generation_config = config
    try:
        yield config
    finally:
        owner.generation_config = own


def _length(new: Tensor, sampling: Sampling) -> int:
    """Tokens up to and with the first stop id."""
    if not sampling.stop_ids:
        return len(new)
    stops = torch.isin(new, torch.tensor(sampling.stop_ids, device=new.device)).nonzero()
    return int(stops[0]) + 1 if len(stops) else len(new)

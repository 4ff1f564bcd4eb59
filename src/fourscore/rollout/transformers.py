"""Rollout with the policy's own `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fourscore.models.forward import without_peft
from fourscore.models.support import Support
from fourscore.ppo.experience import Experience
from fourscore.rollout.sampling import Sampling, restrict_


def generate(
    policy: nn.Module,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    synced: bool = False,
    keep_support: bool = True,
) -> Experience:
    """Complete each prompt once.

    Args:
        policy: a causal LM, PEFT or plain.
        prompts: token ids, each at least one.
        sampling: how to draw.
        synced: every process decodes until the last one is done, which sharded models need.
        keep_support: keep what every token was drawn from, where that is not the whole vocabulary; logprobs need it.

    Returns:
        experience with ids, lengths and support filled in, samples in the order of `prompts`.
    """
    device = next(policy.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    completions: dict[int, Tensor] = {}
    ended: dict[int, bool] = {}
    kept: list[tuple[Tensor, Support]] = []
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
            ends = None if sampling.stop_strings is None else _Ends(sampling, len(group), width)
            restrict = _Restrict(sampling, torch.tensor(group, device=device), width, ends, keep_support)
            out = policy.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=synced,
                logits_processor=LogitsProcessorList([restrict] if sampling.restricted else []),
                stopping_criteria=StoppingCriteriaList([] if ends is None else [ends]),
            )
            kept += restrict.kept
            for row, (i, new) in enumerate(zip(group, out[:, width:], strict=True)):
                length, ended[i] = _length(new, sampling) if ends is None else ends.length(row, len(new))
                completions[i] = new[:length]
    samples = [torch.cat([torch.tensor(p, device=device), completions[i]]) for i, p in enumerate(prompts)]
    return Experience(
        input_ids=torch.cat(samples),
        prompt_lens=torch.tensor([len(p) for p in prompts], device=device),
        completion_lens=torch.tensor([len(completions[i]) for i in range(len(prompts))], device=device),
        has_eos=torch.tensor([ended[i] for i in range(len(prompts))], device=device),
        support=_in_order(kept),
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


class _Restrict(LogitsProcessor):
    """Draws from the restricted distribution, and keeps the support of the rows that are not done.

    It does temperature, top-k and top-p itself, so nothing depends on the order of processors in `generate`.
    """

    def __init__(self, sampling: Sampling, samples: Tensor, width: int, ends: "_Ends | None", keep: bool) -> None:
        self.kept: list[tuple[Tensor, Support]] = []
        self._sampling, self._samples, self._width, self._ends, self._keep = sampling, samples, width, ends, keep
        self._stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=samples.device)
        self._going_on = torch.ones_like(samples, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = input_ids.shape[1] - self._width
        scores = restrict_(scores, self._sampling, drawn)
        if not self._keep:
            return scores
        if drawn and self._ends is not None:
            self._going_on = ~self._ends.done
        elif drawn:
            self._going_on &= ~torch.isin(input_ids[:, -1], self._stop_ids)
        support = Support.of(scores[self._going_on] > -torch.inf)
        self.kept.append((self._samples[self._going_on], support))
        return scores


class _Ends(StoppingCriteria):
    """Where the completions of a batch end, by a stop id or a text."""

    def __init__(self, sampling: Sampling, rows: int, width: int) -> None:
        assert sampling.stop_strings is not None
        self._strings, self._sampling, self._width = sampling.stop_strings, sampling, width
        self._lengths: list[int | None] = [None] * rows
        self.done = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self._width
        tails = input_ids[:, self._width :][:, -self._strings.reach :].tolist()
        for row, tail in enumerate(tails):
            if self._lengths[row] is None and (
                tail[-1] in self._sampling.stop_ids
                or (length >= self._sampling.min_new_tokens and self._strings.completed_by_last(tail))
            ):
                self._lengths[row] = length
        self.done = torch.tensor([n is not None for n in self._lengths], device=input_ids.device)
        return self.done

    def length(self, row: int, most: int) -> tuple[int, bool]:
        """Tokens of the row's completion, and whether it ended before the `most` that were drawn."""
        length = self._lengths[row]
        return (most, False) if length is None else (length, True)


def _in_order(kept: list[tuple[Tensor, Support]]) -> Support | None:
    """The support of all tokens, samples in order, from those of single steps."""
    if not kept:
        return None
    owner = torch.cat([samples for samples, _ in kept])
    return Support.join([support for _, support in kept]).select(owner.argsort(stable=True))


def _neutral_config(sampling: Sampling) -> GenerationConfig:
    # Where the distribution is restricted, the temperature is applied before, too: see _Restrict.
    temperature = 1.0 if sampling.restricted else sampling.temperature
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
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


def _length(new: Tensor, sampling: Sampling) -> tuple[int, bool]:
    """Tokens up to and with the first stop id, and whether the completion ended by itself."""
    if not sampling.stop_ids:
        return len(new), sampling.eos_id is not None and bool((new == sampling.eos_id).any())
    stops = torch.isin(new, torch.tensor(sampling.stop_ids, device=new.device)).nonzero()
    return (int(stops[0]) + 1, True) if len(stops) else (len(new), False)

"""Rollout with the policy in this process: by `decode`, or by its own `generate` where that does not fit."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fourscore.models.forward import without_peft
from fourscore.models.fused import fused
from fourscore.models.layer_of_one_token import layers_of_one_token
from fourscore.models.one_token import attention_of_one_token
from fourscore.models.packed import packed
from fourscore.models.products import fast_products
from fourscore.models.support import Support
from fourscore.ppo.experience import Experience
from fourscore.rollout.decode import Rows, can_decode, decode
from fourscore.rollout.engine import gathered
from fourscore.rollout.graphs import StepGraphs
from fourscore.rollout.sampling import Completed, Sampling, has_ended, restrict_


class InProcess:
    """The policy itself as rollout engine."""

    def __init__(
        self,
        policy: nn.Module,
        autocast: Callable[[], AbstractContextManager],
        *,
        synced: bool,
        pack: bool,
        graphs: bool = False,
    ) -> None:
        """Take the policy.

        Args:
            policy: a causal LM, PEFT or plain.
            autocast: makes the context of its forward passes.
            synced: every process decodes until the last one is done, which sharded models need.
            pack: on a CPU in fp32, copy weights where multiplying with a copy is faster; not with `synced`.
            graphs: on a GPU, make steps of decoding CUDA graphs, and keep them and the KV cache between rollouts.
        """
        self._policy, self._autocast, self._synced, self._pack = policy, autocast, synced, pack
        self._graphs = StepGraphs() if graphs else None

    def generate(self, prompts: list[list[int]], sampling: Sampling, *, keep_support: bool = True) -> Experience:
        """Complete each prompt once; see `generate`."""
        # Outside of training mode: activation checkpointing would switch the KV cache off.
        self._policy.eval()
        with self._autocast():
            experience = generate(
                self._policy,
                prompts,
                sampling,
                synced=self._synced,
                keep_support=keep_support,
                pack=self._pack,
                graphs=self._graphs,
            )
        self._policy.train()
        return experience

    def weights_changed(self) -> None:
        """Nothing to do: they are the policy's own."""

    def close(self) -> None:
        """Give back what is kept between rollouts."""
        if self._graphs is not None:
            self._graphs.close()


def generate(
    policy: nn.Module,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    synced: bool = False,
    keep_support: bool = True,
    pack: bool = True,
    graphs: StepGraphs | None = None,
) -> Experience:
    """Complete each prompt once.

    Args:
        policy: a causal LM, PEFT or plain.
        prompts: token ids, each at least one.
        sampling: how to draw.
        synced: every process decodes until the last one is done, which sharded models need.
        keep_support: keep what every token was drawn from, where that is not the whole vocabulary; logprobs need it.
        pack: on a CPU in fp32, copy weights where multiplying with a copy is faster; not with `synced`.
        graphs: those of the policy, on a GPU.

    Returns:
        experience with ids, lengths and support filled in, samples in the order of `prompts`; and logprobs, where they
        are those of another forward pass but for the rounding of fp32 on a CPU.
    """
    device = next(policy.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    completions: dict[int, list[int]] = {}
    ended: dict[int, bool] = {}
    kept: list[tuple[Tensor, Support]] = []
    logprobs: dict[int, list[float]] = {}
    ours = not synced and can_decode(policy)
    exact = _is_exact(policy)
    # Our own decoding takes further prompts as rows become free; `generate` takes them when a batch is done.
    size = len(order) if ours else sampling.batch_size
    with fast_products(policy) if synced else packed(policy, copy=pack), fused(policy):
        for start in range(0, len(order), size):
            group = order[start : start + size]
            some = [prompts[i] for i in group]
            if ours:
                with _of_one_token(policy) if exact else nullcontext():
                    found = decode(
                        policy,
                        some,
                        sampling,
                        keep_support=keep_support,
                        keep_logprobs=exact,
                        rows_of=Rows if graphs is None else graphs.rows,
                    )
            else:
                found = _generate(policy, some, sampling, keep_support, synced)
            completions |= zip(group, found.completions, strict=True)
            ended |= zip(group, found.ended, strict=True)
            index = torch.tensor(group, device=device)
            kept += [(index[rows], support) for rows, support in found.kept]
            if found.logprobs is not None:
                logprobs |= zip(group, found.logprobs, strict=True)
    in_order = range(len(prompts))
    experience = gathered(prompts, [completions[i] for i in in_order], [ended[i] for i in in_order], sampling, device)
    experience.support = _in_order(kept)
    if logprobs:
        experience.logprobs = torch.tensor([logprob for i in in_order for logprob in logprobs[i]], device=device)
    return experience


@contextmanager
def _of_one_token(policy: nn.Module) -> Iterator[None]:
    with attention_of_one_token(policy), layers_of_one_token(policy):
        yield


def _is_exact(policy: nn.Module) -> bool:
    """Whether a token's logprob hangs on what it is computed with by rounding of fp32 alone."""
    known = {(p.device.type, p.dtype) for p in policy.parameters()}
    return known == {("cpu", torch.float32)} and not torch.is_autocast_enabled("cpu")


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


def _generate(
    policy: nn.Module, prompts: list[list[int]], sampling: Sampling, keep_support: bool, synced: bool
) -> Completed:
    """Complete a batch of prompts, longest first, with the policy's `generate`."""
    device = next(policy.parameters()).device
    width = len(prompts[0])
    # generate wants prompts padded on the left; id 0 is in every vocabulary and hidden by the mask.
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    ends = _Ends(sampling, len(prompts), width)
    restrict = _Restrict(sampling, ends, width, keep_support)
    with _only_this_config(policy, _neutral_config(sampling)) as config:
        out = policy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=synced,
            logits_processor=LogitsProcessorList([restrict] if sampling.restricted else []),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
    new = out[:, width:].tolist()
    return Completed(
        [row[:length] for row, length in zip(new, ends.lengths, strict=True)],
        [length is not None for length in ends.lengths],
        restrict.kept,
    )


class _Restrict(LogitsProcessor):
    """Draws from the restricted distribution, and keeps the support of the rows that are not done.

    It does temperature, top-k and top-p itself, so nothing depends on the order of processors in `generate`.
    """

    def __init__(self, sampling: Sampling, ends: "_Ends", width: int, keep: bool) -> None:
        self.kept: list[tuple[Tensor, Support]] = []
        self._sampling, self._ends, self._width, self._keep = sampling, ends, width, keep

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = restrict_(scores, self._sampling, [input_ids.shape[1] - self._width] * len(scores))
        if self._keep:
            rows = torch.tensor([row for row, n in enumerate(self._ends.lengths) if n is None], device=scores.device)
            if len(rows):
                self.kept.append((rows, Support.of(scores[rows] > -torch.inf)))
        return scores


class _Ends(StoppingCriteria):
    """Where the completions of a batch end.

    Attributes:
        lengths: tokens of each row's completion, None where it goes on.
    """

    def __init__(self, sampling: Sampling, rows: int, width: int) -> None:
        self.lengths: list[int | None] = [None] * rows
        self._sampling, self._width = sampling, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, completion in enumerate(input_ids[:, self._width :].tolist()):
            if self.lengths[row] is None and has_ended(completion, self._sampling):
                self.lengths[row] = len(completion)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


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
        eos_token_id=None,  # see _Ends
        pad_token_id=0,
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

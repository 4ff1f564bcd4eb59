"""Decoding of a batch that gets smaller as completions end, over a cache that is made once.

`generate` computes every row until the last one is done, pads all prompts to the longest, and copies keys and values to
new memory for each token. Here a row leaves the batch with its last token, prompts of like lengths are read together,
those that are equal only once, and keys and values have their place from the start.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

from fourscore.models.forward import microbatches, without_peft
from fourscore.models.support import Support
from fourscore.rollout.sampling import Completed, Sampling, draw, has_ended, restrict_


def can_decode(policy: nn.Module) -> bool:
    """Whether `decode` fits the architecture: plain attention to all that came before, in every layer.

    Others, such as those with sliding windows, recurrent layers or a preparation of their own, need `generate`.
    """
    base: Any = without_peft(policy)
    kind = type(base)
    plain = all(
        getattr(kind, name, None) is getattr(GenerationMixin, name)
        for name in ("generate", "prepare_inputs_for_generation")
    )
    named = inspect.signature(kind.forward).parameters
    if not plain or not {"input_ids", "attention_mask", "position_ids", _cache_argument(kind)} <= set(named):
        return False
    layers = DynamicCache(config=base.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _cache_argument(kind: Any) -> str:
    """The name that a model's forward has for the cache: transformers calls it `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


@torch.no_grad()
def decode(
    policy: nn.Module, prompts: list[list[int]], sampling: Sampling, *, keep_support: bool, keep_logprobs: bool
) -> Completed:
    """Complete each prompt of a batch.

    Args:
        policy: a causal LM for which `can_decode` holds, PEFT or plain.
        prompts: token ids, longest first.
        sampling: how to draw.
        keep_support: where the distribution is restricted, keep what was drawn from.
        keep_logprobs: keep those of the tokens, unless decoding is greedy.
    """
    device = next(policy.parameters()).device
    lens = torch.tensor([len(p) for p in prompts], device=device)
    cache = _Rows(policy, len(prompts), len(prompts[0]) + sampling.max_new_tokens - 1)
    logits = cache.read(policy, prompts)
    mask = torch.ones(len(prompts), cache.capacity, dtype=torch.long, device=device)
    mask[:, : len(prompts[0])] = torch.arange(len(prompts[0]), device=device) >= len(prompts[0]) - lens[:, None]
    found = Completed([[] for _ in prompts], [False] * len(prompts), [])
    if keep_logprobs and sampling.temperature > 0:
        found.logprobs = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt of each row of the batch
    for drawn in range(sampling.max_new_tokens):
        scores = restrict_(logits, sampling, drawn)
        if keep_support and sampling.restricted:
            found.kept.append((torch.tensor(rows, device=device), Support.of(scores > -torch.inf)))
        tokens, logprobs = draw(scores, sampling)
        if found.logprobs is not None and logprobs is not None:
            for row, logprob in zip(rows, logprobs.tolist(), strict=True):
                found.logprobs[row].append(logprob)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            found.completions[row].append(token)
            found.ended[row] = has_ended(found.completions[row], sampling)
        if drawn + 1 == sampling.max_new_tokens:
            break
        going_on = [place for place, row in enumerate(rows) if not found.ended[row]]
        if not going_on:
            break
        if len(going_on) < len(rows):
            places = cache.keep(going_on)
            rows = [rows[place] for place in places]
            index = torch.tensor(places, device=device)
            tokens, lens, mask = tokens[index], lens[index], mask[index]
        logits = cache.step(policy, tokens, lens + drawn, mask)
    return found


class _Rows:
    """Keys and values of the rows of a batch, in every layer: prompts end in the same column, tokens follow there."""

    def __init__(self, policy: nn.Module, rows: int, capacity: int) -> None:
        base: Any = without_peft(policy)
        self.capacity = capacity
        self.rows = rows
        self.filled = 0
        self.prompt: tuple[Tensor, Tensor, int, int] | None = None
        self._layers = [_Layer(self) for _ in DynamicCache(config=base.config).layers]
        self._named: dict[str, Any] = {_cache_argument(type(base)): Cache(layers=self._layers)}
        if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
            self._named["logits_to_keep"] = 1

    def read(self, policy: nn.Module, prompts: list[list[int]]) -> Tensor:
        """Fill in prompts, longest first; returns the logits after their last tokens, `[rows, vocabulary]` fp32."""
        device = next(policy.parameters()).device
        width = len(prompts[0])
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        logits: list[Tensor] = []
        order: list[int] = []
        distinct = list(rows_of)
        for indices in microbatches(torch.tensor([len(p) for p in distinct], device=device), len(distinct)):
            group = [distinct[i] for i in indices.tolist()]
            longest = len(group[0])
            ids = torch.zeros(len(group), longest, dtype=torch.long, device=device)
            mask = torch.zeros_like(ids)
            for at, prompt_ids in enumerate(group):
                ids[at, longest - len(prompt_ids) :] = torch.tensor(prompt_ids, device=device)
                mask[at, longest - len(prompt_ids) :] = 1
            rows = [row for prompt in group for row in rows_of[prompt]]
            source = [at for at, prompt in enumerate(group) for _ in rows_of[prompt]]
            target, copies = torch.tensor(rows, device=device), torch.tensor(source, device=device)
            self.prompt = (target, copies, width - longest, width)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            logits.append(self._logits(policy, ids, mask, position_ids)[copies])
            order += rows
        self.prompt, self.filled = None, width
        return torch.cat(logits)[torch.tensor(order, device=device).argsort()]

    def step(self, policy: nn.Module, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Logits after one more token a row, `[rows, vocabulary]` fp32."""
        mask = mask[:, : self.filled + 1]
        logits = self._logits(policy, tokens[:, None], mask, positions[:, None])
        self.filled += 1
        return logits

    def keep(self, places: list[int]) -> list[int]:
        """Go on with some rows only: the last of them move to where others were. Returns the new order of rows."""
        count = len(places)
        kept = set(places)
        later = [place for place in places if place >= count]
        order = [place if place in kept else later.pop() for place in range(count)]
        for to, place in enumerate(order):
            if to != place:
                for layer in self._layers:
                    layer.move(place, to)
        self.rows = count
        return order

    def _logits(self, policy: nn.Module, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        out = policy(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **self._named)
        return out.logits[:, -1].to(torch.float32, copy=True)


class _Layer(DynamicLayer):
    """One layer of `_Rows`."""

    is_croppable = False

    def __init__(self, places: _Rows) -> None:
        super().__init__()
        self._places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for all that will come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: what the mask hides is weighted with nothing, and nothing times NaN would be NaN.
        self.keys, self.values = (
            states.new_zeros(self._places.rows, states.shape[1], self._places.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put in `[rows, heads, tokens, size]`; returns what they attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self._places
        if places.prompt is not None:
            rows, copies, start, stop = places.prompt
            self.keys[rows, :, start:stop] = key_states[copies]
            self.values[rows, :, start:stop] = value_states[copies]
            return key_states, value_states
        stop = places.filled + 1
        keys, values = self.keys[: places.rows, :, :stop], self.values[: places.rows, :, :stop]
        keys[:, :, -1:] = key_states
        values[:, :, -1:] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        """Columns that are filled."""
        return self._places.filled

    def move(self, place: int, to: int) -> None:
        """Copy a row over another one."""
        for states in (self.keys, self.values):
            states[to, :, : self._places.filled] = states[place, :, : self._places.filled]

"""Decoding of a batch whose rows go with their last token and make room for further prompts, over one cache.

`generate` computes every row until the last one is done, pads all prompts to the longest, and copies keys and values to
new memory for each token. Here a row leaves the batch with its last token, prompts of like lengths are read together,
those that are equal only once, and keys and values have their place from the start.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

from fourscore.models.forward import microbatches, without_peft
from fourscore.models.one_token import seen_from
from fourscore.models.support import Support
from fourscore.rollout.sampling import Completed, Sampling, draw, has_ended, restrict_

_FREE = 1 / 4
"""Share of a batch's rows that are free when further prompts are read."""


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
    policy: nn.Module,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    keep_support: bool,
    keep_logprobs: bool,
    rows_of: "Callable[[nn.Module, int, int], Rows]",
) -> Completed:
    """Complete each prompt, `sampling.batch_size` of them at a time.

    Args:
        policy: a causal LM for which `can_decode` holds, PEFT or plain.
        prompts: token ids, longest first.
        sampling: how to draw.
        keep_support: where the distribution is restricted, keep what was drawn from.
        keep_logprobs: keep those of the tokens, unless decoding is greedy.
        rows_of: makes the `Rows` of a policy, most rows and most tokens: the class itself, or one like it.
    """
    device = next(policy.parameters()).device
    most = min(sampling.batch_size, len(prompts))
    cache = rows_of(policy, most, len(prompts[0]) + sampling.max_new_tokens - 1)
    found = Completed([[] for _ in prompts], [False] * len(prompts), [])
    if keep_logprobs and sampling.temperature > 0:
        found.logprobs = [[] for _ in prompts]
    rows: list[int] = []  # the prompt of each row of the batch
    waiting = range(len(prompts))
    logits: list[Tensor] = []  # of the rows, in one or two pieces
    while rows or waiting:
        free = most - len(rows)
        # Reading takes a pass, so it waits until there are several prompts to read.
        if waiting and free >= min(len(waiting), math.ceil(most * _FREE)):
            new, waiting = waiting[:free], waiting[free:]
            logits.append(cache.read(policy, [prompts[row] for row in new]))
            rows += new
        scores = torch.cat(logits) if len(logits) > 1 else logits[0]
        scores = restrict_(scores, sampling, [len(found.completions[row]) for row in rows])
        if keep_support and sampling.restricted:
            found.kept.append((torch.tensor(rows, device=device), Support.of(scores > -torch.inf)))
        tokens, logprobs = draw(scores, sampling)
        if found.logprobs is not None and logprobs is not None:
            for row, logprob in zip(rows, logprobs.tolist(), strict=True):
                found.logprobs[row].append(logprob)
        going_on = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            completion = found.completions[row]
            completion.append(token)
            found.ended[row] = has_ended(completion, sampling)
            if not found.ended[row] and len(completion) < sampling.max_new_tokens:
                going_on.append(place)
        if len(going_on) < len(rows):
            places = cache.keep(going_on)
            rows = [rows[place] for place in places]
            tokens = tokens[torch.tensor(places, dtype=torch.long, device=device)]
        logits = [cache.step(policy, tokens)] if rows else []
    return found


class Rows:
    """Keys and values of the rows of a batch, in every layer: all end in the same column, where tokens follow."""

    def __init__(self, policy: nn.Module, rows: int, capacity: int) -> None:
        """Nothing is in it yet.

        Args:
            policy: the model.
            rows: most rows.
            capacity: most tokens of a row.
        """
        base: Any = without_peft(policy)
        self.rows, self.capacity = rows, capacity
        self.begins: list[int] = []  # the column of each row's first token
        self.filled = 0
        self.prompt: tuple[Tensor, Tensor, int, int] | None = None
        self._layers = [_Layer(self) for _ in DynamicCache(config=base.config).layers]
        self._named: dict[str, Any] = {_cache_argument(type(base)): Cache(layers=self._layers)}
        if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
            self._named["logits_to_keep"] = 1

    def read(self, policy: nn.Module, prompts: list[list[int]]) -> Tensor:
        """Add rows for prompts, none longer than a row that is there, and the longest first.

        Returns:
            the logits after their last tokens, `[len(prompts), vocabulary]` fp32.
        """
        device = next(policy.parameters()).device
        before = len(self.begins)
        self._move_to_front()
        self.filled = max(self.filled, len(prompts[0]))
        self.begins += [self.filled - len(prompt) for prompt in prompts]
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
            self.prompt = (before + target, copies, self.filled - longest, self.filled)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
            logits.append(self._logits(policy, ids, mask, position_ids)[copies])
            order += rows
        self.prompt = None
        return torch.cat(logits)[torch.tensor(order, device=device).argsort()]

    def step(self, policy: nn.Module, tokens: Tensor) -> Tensor:
        """Logits after one more token a row, `[rows, vocabulary]` fp32."""
        if self.filled == self.capacity:
            self._move_to_front()
        begins = torch.tensor(self.begins, device=tokens.device)[:, None]
        mask = (torch.arange(self.filled + 1, device=tokens.device) >= begins).long()
        with seen_from(begins[:, 0]):
            logits = self._logits(policy, tokens[:, None], mask, self.filled - begins)
        self.filled += 1
        return logits

    def put(self, states: Tensor, new: Tensor) -> Tensor:
        """Put those of a step `[rows, heads, 1, size]` into the `states` of a layer; returns what they attend to."""
        seen = states[: len(self.begins), :, : self.filled + 1]
        seen[:, :, -1:] = new
        return seen

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
        self.begins = [self.begins[place] for place in order]
        return order

    def _move_to_front(self) -> None:
        """The row with the most tokens begins in the first column, so that there is room behind it."""
        first = min(self.begins, default=self.filled)
        if first:
            for layer in self._layers:
                layer.shift(first)
            self.begins = [begin - first for begin in self.begins]
            self.filled -= first

    def _logits(self, policy: nn.Module, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        out = policy(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **self._named)
        return out.logits[:, -1].float()


class _Layer(DynamicLayer):
    """One layer of `Rows`."""

    is_croppable = False

    def __init__(self, places: Rows) -> None:
        super().__init__()
        self._places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for all that will come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, capacity = self._places.rows, self._places.capacity
        # Zeros: what the mask hides is weighted with nothing, and nothing times NaN would be NaN.
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], capacity, states.shape[3]) for states in (key_states, value_states)
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
        return places.put(self.keys, key_states), places.put(self.values, value_states)

    def get_seq_length(self) -> int:
        """Columns that the next tokens see; prompts see their own alone."""
        return 0 if self._places.prompt else self._places.filled

    def move(self, place: int, to: int) -> None:
        """Copy a row over another one."""
        for states in (self.keys, self.values):
            states[to, :, : self._places.filled] = states[place, :, : self._places.filled]

    def shift(self, columns: int) -> None:
        """Move all rows so many columns to the front."""
        rows, filled = len(self._places.begins), self._places.filled
        for states in (self.keys, self.values):
            states[:rows, :, : filled - columns] = states[:rows, :, columns:filled].clone()

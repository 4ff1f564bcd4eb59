"""One rollout batch on its way through scoring, advantages and update."""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from fourscore.models.support import Support, ragged_indices


@dataclass
class Experience:
    """Samples back to back in flat tensors: no padding anywhere.

    With `n` samples, `T` tokens in all and `C` completion tokens in all (the token that ends a completion included):

    Attributes:
        input_ids: `[T]` prompt and completion of sample 0, then of sample 1, ...
        prompt_lens: `[n]` tokens, each at least 1.
        completion_lens: `[n]` tokens, each at least 1.
        has_eos: `[n]` bool, the completion ended by itself: with a stop token or text, or it holds an EOS token where
            nothing stops it.
        support: of the `C` completion tokens; None where all were drawn from the whole vocabulary.
        engine_logprobs: `[C]` nats, what a rollout engine with a forward pass of its own says of the tokens it drew;
            None where the policy itself generated them.
        logprobs: `[C]` nats, of the policy that generated the samples.
        ref_logprobs: `[C]` nats, of the reference policy.
        values: `[C]` value of the state in which the token was chosen.
        scores: `[n]` what the rewards say of the sample, shaped, penalties included.
        token_rewards: `[C]` what they say of single tokens; None where none of them does.
        kl: `[C]` nats, estimate of the divergence from the reference at each token.
        rewards: `[C]` score plus token rewards plus KL shaping.
        advantages: `[C]`.
        returns: `[C]` targets of the value model.
    """

    input_ids: Tensor
    prompt_lens: Tensor
    completion_lens: Tensor
    has_eos: Tensor
    support: Support | None = None
    engine_logprobs: Tensor | None = None
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    token_rewards: Tensor | None = None
    kl: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def lens(self) -> Tensor:
        """`[n]` tokens of prompt and completion together."""
        return self.prompt_lens + self.completion_lens

    def samples(self) -> list[Tensor]:
        """The token ids of each sample, prompt and completion, as views."""
        return list(self.input_ids.split(self.lens.tolist()))

    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [s[:p].tolist() for s, p in zip(self.samples(), self.prompt_lens.tolist(), strict=True)]

    def completions(self) -> list[list[int]]:
        """The token ids of each completion, the ending EOS included."""
        return [s[p:].tolist() for s, p in zip(self.samples(), self.prompt_lens.tolist(), strict=True)]

    def support_of(self, indices: Tensor) -> Support | None:
        """The support of the completion tokens of the samples at `indices` `[m]`, in that order."""
        return None if self.support is None else self.support.select(ragged_indices(self.completion_lens, indices))

    def select(self, indices: Tensor) -> Self:
        """The samples at `indices` `[m]`, in that order, with all that is filled in so far."""
        per_sample = {"prompt_lens", "completion_lens", "has_eos", "scores"}
        tokens, completion_tokens = (ragged_indices(lens, indices) for lens in (self.lens, self.completion_lens))
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                chosen[field.name] = None
            elif field.name in per_sample:
                chosen[field.name] = value[indices]
            elif field.name == "support":
                chosen[field.name] = value.select(completion_tokens)
            else:
                chosen[field.name] = value[tokens if field.name == "input_ids" else completion_tokens]
        return type(self)(**chosen)


def sum_per_sample(per_token: Tensor, lens: Tensor) -> Tensor:
    """Sum a flat per-token tensor over each sample.

    Args:
        per_token: `[C]`.
        lens: `[n]`, summing to `C`.

    Returns:
        `[n]`.
    """
    owner = torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens)
    return per_token.new_zeros(len(lens)).index_add(0, owner, per_token)

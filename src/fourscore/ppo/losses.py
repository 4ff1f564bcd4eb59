"""PPO's losses: sums over tokens, so that the caller divides by the tokens of the whole minibatch.

A sum does not care how a minibatch is cut into microbatches or spread over processes; a mean would.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LossTerms:
    """What a loss says of some tokens.

    Attributes:
        loss: `[]` sum over the tokens, differentiable.
        clipped: `[]` number of tokens at which the clipped branch was the larger one.
    """

    loss: Tensor
    clipped: Tensor


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> LossTerms:
    """Clipped surrogate objective, negated: `max(-A r, -A clip(r, 1 - eps, 1 + eps))`, summed.

    `r = exp(logprobs - old_logprobs)`. Schulman et al. 2017 (arXiv 1707.06347), equation 7.

    Args:
        logprobs: `[C]` nats, with gradient.
        old_logprobs: `[C]` nats, at the time of the rollout.
        advantages: `[C]`.
        cliprange: epsilon.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return LossTerms(torch.maximum(plain, clipped).sum(), (clipped > plain).sum())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> LossTerms:
    """Clipped squared error: `0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)`, summed.

    Huang et al. 2024 (arXiv 2403.17031), detail 22 and the OpenAI baselines it follows.

    Args:
        values: `[C]`, with gradient.
        old_values: `[C]`, at the time of the rollout.
        returns: `[C]`.
        cliprange: epsilon, in units of value.
    """
    near = values.clamp(old_values - cliprange, old_values + cliprange)  # inside that range the very same number
    plain = (values - returns).square()
    clipped = (near - returns).square()
    return LossTerms(0.5 * torch.maximum(plain, clipped).sum(), (clipped > plain).sum())

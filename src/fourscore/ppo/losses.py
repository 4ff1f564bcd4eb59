"""PPO's losses, token by token: the caller weighs the tokens and adds them up.

A sum with weights does not care how a minibatch is cut into microbatches or spread over processes; a mean would.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fourscore.ppo.advantages import kl_estimate


@dataclass
class LossTerms:
    """What a clipped loss says of some tokens.

    Attributes:
        loss: `[C]` of each token, differentiable.
        clipped: `[C]` bool, the clipped branch was the larger one.
    """

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> LossTerms:
    """Clipped surrogate objective, negated: `max(-A r, -A clip(r, 1 - eps, 1 + eps_high))`.

    `r = exp(logprobs - old_logprobs)`. Schulman et al. 2017 (arXiv 1707.06347), equation 7; an upper range of its own
    as in Yu et al. 2025 (DAPO, arXiv 2503.14476), section 3.1. With a dual clip `c` the loss where A is negative is at
    most `-c A`, so that a token which became many times more likely cannot take the update over (Ye et al. 2020, arXiv
    1912.09729, dual-clip PPO); it has no gradient there.

    Args:
        logprobs: `[C]` nats, with gradient.
        old_logprobs: `[C]` nats, at the time of the rollout.
        advantages: `[C]`.
        cliprange: epsilon.
        cliprange_high: epsilon above 1, if another one.
        dual_clip: `c`, above 1; None for none.
    """
    high = cliprange if cliprange_high is None else cliprange_high
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    near = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    loss, clipped = torch.maximum(plain, near), near > plain
    if dual_clip is not None:
        limit = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        loss, clipped = torch.minimum(loss, limit), clipped | (loss > limit)
    return LossTerms(loss, clipped)


def kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """KL(policy || reference) at each sampled token, with the gradient of the divergence itself.

    With `r = exp(logprobs - old_logprobs)` and `d = logprobs - ref_logprobs`, the divergence in a state, over tokens
    that the rollout's policy drew, is `E[r d]`. Its gradient is `E[r d g + r g]`, where `g` is that of `logprobs`, and
    `E[r g]` is the sum of the gradients of all probabilities: 0. So `r d g` is an unbiased gradient, and what a token
    gets here whichever the estimator, which says only what the loss is reported as:

    - k1 differentiated as it stands (`d`, gradient `g`) would pull nowhere on average.
    - k3 differentiated as it stands has the gradient of KL(reference || policy). Times `r`, it has exactly `r d g`.
    - k2, `d^2 / 2`, has it at `r = 1`.

    Schulman, "Approximating KL Divergence", 2020, for the estimators; Tang and Munos 2025 (arXiv 2506.09477) for their
    gradients. As in other terms of PPO, states are those of the rollout.

    Args:
        logprobs: `[C]` nats, with gradient.
        old_logprobs: `[C]` nats, at the time of the rollout.
        ref_logprobs: `[C]` nats, of the reference.
        estimator: "k1" or "k3".

    Returns:
        `[C]` nats; the value is the estimator's, times the ratio.
    """
    now = logprobs.detach()
    ratio = torch.exp(logprobs - old_logprobs)
    value = ratio.detach() * kl_estimate(now, ref_logprobs, estimator)
    slope = ratio * (now - ref_logprobs)
    return value + (slope - slope.detach())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> LossTerms:
    """Clipped squared error: `0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)`.

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
    return LossTerms(0.5 * torch.maximum(plain, clipped), clipped > plain)


def token_weights(
    lens: Tensor, tokens: int, samples: int, aggregation: Literal["token", "sequence"], dtype: torch.dtype
) -> Tensor:
    """Weight of each token of some samples in the loss of their minibatch: all of its weights add up to `tokens`.

    A mean over tokens weighs them equally (Yu et al. 2025, DAPO, arXiv 2503.14476, section 3.3); a mean over samples of
    each sample's mean gives a token of a completion of `l` tokens `tokens / (samples l)`.

    Args:
        lens: `[n]` completion tokens of the samples.
        tokens: completion tokens in the whole minibatch, on all processes.
        samples: samples in it.
        aggregation: "token" or "sequence".
        dtype: of the result.

    Returns:
        `[C]`.
    """
    if aggregation == "token":
        return torch.ones(int(lens.sum()), dtype=dtype, device=lens.device)
    return torch.repeat_interleave(tokens / (samples * lens.to(dtype)), lens)

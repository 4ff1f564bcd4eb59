"""From scores, logprobs and values to rewards, advantages and returns.

Pure functions on flat tensors: `n` samples, `C` completion tokens, `lens` `[n]` with `lens.sum() == C`.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token.

    With `logr = ref_logprobs - logprobs`: k1 is `-logr`, k3 is `exp(logr) - 1 - logr`; both are unbiased when the
    tokens come from the policy (Schulman, "Approximating KL Divergence", 2020).

    Args:
        logprobs: `[C]` nats, of the policy.
        ref_logprobs: `[C]` nats, of the reference.
        estimator: "k1" or "k3".

    Returns:
        `[C]` nats.
    """
    logr = ref_logprobs - logprobs
    return -logr if estimator == "k1" else torch.expm1(logr) - logr


def shaped_rewards(kl: Tensor, scores: Tensor, lens: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token: `-kl_coef * kl`, and the score on the last token of its completion.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2; Huang et al. 2024 (arXiv 2403.17031), detail 17.

    Args:
        kl: `[C]` nats.
        scores: `[n]`.
        lens: `[n]` tokens of each completion, at least 1.
        kl_coef: weight of the KL term.

    Returns:
        `[C]`.
    """
    rewards = -kl_coef * kl
    last = lens.cumsum(0) - 1
    return rewards.index_add(0, last, scores.to(rewards.dtype))


def length_adaptive_lambda(lens: Tensor, alpha: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """GAE's lambda of each completion, `1 - 1 / (alpha l)`, held to 0 at least.

    The weights of the TD errors that an advantage adds up have the sum `1 / (1 - lambda)`: with this lambda that is
    `alpha l`, a share of the length, so that what happens at the end of a long completion still reaches its beginning
    (Yue et al. 2025, VAPO, arXiv 2504.05118, section 4.2). Completions of at most `1 / alpha` tokens get 0.

    Args:
        lens: `[n]` tokens of each completion.
        alpha: above 0.
        dtype: of the result.

    Returns:
        `[n]`.
    """
    return (1 - 1 / (alpha * lens.to(dtype))).clamp(min=0)


def gae(rewards: Tensor, values: Tensor, lens: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, sample by sample; the value after the last token is 0.

    `delta_t = r_t + gamma V_{t+1} - V_t` and `A_t = delta_t + gamma lam A_{t+1}`
    (Schulman et al. 2015, arXiv 1506.02438, equations 11 and 16). Returns are `A_t + V_t`.

    Args:
        rewards: `[C]`.
        values: `[C]`.
        lens: `[n]` tokens.
        gamma: discount a token.
        lam: GAE's lambda, one for all or `[n]`, one a sample; with 1 the returns are those of the rollout itself
            (Monte-Carlo), whatever the values say.

    Returns:
        advantages `[C]` and returns `[C]`.
    """
    n, longest = len(lens), int(lens.max())
    # The recursion runs over time for all samples at once, so the rows are laid out by position, zeros behind the end.
    within = torch.arange(longest, device=lens.device).expand(n, longest) < lens[:, None]
    r = rewards.new_zeros(n, longest)
    v = values.new_zeros(n, longest + 1)
    r[within] = rewards
    v[:, :-1][within] = values
    delta = r + gamma * v[:, 1:] - v[:, :-1]
    advantages = torch.zeros_like(r)
    running = r.new_zeros(n)
    decay = gamma * lam
    for t in reversed(range(longest)):
        running = delta[:, t] + decay * running
        advantages[:, t] = running
    flat = advantages[within]
    return flat, flat + values


def whiten(x: Tensor, *, shift_mean: bool = True, reduce: Reduce = lambda t: t) -> Tensor:
    """Scale to unit variance (Bessel-corrected), and to zero mean unless `shift_mean` is False.

    Mean and variance are those of all tokens on all processes. Huang et al. 2024 (arXiv 2403.17031), detail 18
    (rewards, mean kept) and detail 19 (advantages).

    Args:
        x: `[C]`.
        shift_mean: take the mean away, too.
        reduce: sums over processes.

    Returns:
        `[C]`. A single token, or tokens that are all equal, give zeros (plus the mean where it is kept).
    """
    # Two passes: E[x^2] - E[x]^2 loses all digits when the mean is large beside the spread.
    count, total = reduce(torch.stack([x.new_tensor(float(x.numel())), x.sum()]))
    mean = total / count
    variance = reduce((x - mean).square().sum()) / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean

"""From scored samples to what policy and value model learn from: KL, rewards, advantages and returns."""

from typing import Any

import torch

from fourscore.ppo.advantages import Reduce, gae, kl_estimate, length_adaptive_lambda, shaped_rewards, whiten
from fourscore.ppo.experience import Experience


@torch.no_grad()
def fill_in_targets(experience: Experience, args: Any, kl_coef: float, value_only: bool, reduce: Reduce) -> None:
    """Fill in KL, rewards, advantages and returns.

    Args:
        experience: samples with logprobs, values and scores; filled in.
        args: `PPOConfig`.
        kl_coef: of this update; without effect where the KL term is in the loss.
        value_only: the value model learns alone, from Monte-Carlo returns.
        reduce: sums over processes.
    """
    e = experience
    assert e.logprobs is not None and e.ref_logprobs is not None and e.values is not None and e.scores is not None
    e.kl = kl_estimate(e.logprobs, e.ref_logprobs, args.kl_estimator)
    e.rewards = shaped_rewards(e.kl, e.scores, e.completion_lens, 0.0 if args.use_kl_loss else kl_coef)
    if e.token_rewards is not None:
        e.rewards = e.rewards + e.token_rewards
    if args.whiten_rewards:
        e.rewards = whiten(e.rewards, shift_mean=False, reduce=reduce)
    lam, lam_value = args.lam, 1.0 if value_only else args.lam_value
    if args.lam_alpha:
        lam = length_adaptive_lambda(e.completion_lens, args.lam_alpha, e.values.dtype)
    advantages, _ = gae(e.rewards, e.values, e.completion_lens, args.gamma, lam)
    _, e.returns = gae(e.rewards, e.values, e.completion_lens, args.gamma, lam_value)
    e.advantages = whiten(advantages, reduce=reduce) if args.whiten_advantages else advantages

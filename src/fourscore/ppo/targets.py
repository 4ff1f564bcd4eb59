"""From scored samples to what policy and value model learn from: KL, rewards, advantages and returns."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourscore.ppo.advantages import Reduce, gae, kl_estimate, length_adaptive_lambda, shaped_rewards, whiten
from fourscore.ppo.experience import Experience


@torch.no_grad()
def fill_in_rewards(experience: Experience, args: Any, kl_coef: float, reduce: Reduce) -> None:
    """Fill in KL and rewards.

    Args:
        experience: samples with logprobs and scores; filled in.
        args: `PPOConfig`.
        kl_coef: of this update; without effect where the KL term is in the loss.
        reduce: sums over processes.
    """
    e = experience
    assert e.logprobs is not None and e.ref_logprobs is not None and e.scores is not None
    e.kl = kl_estimate(e.logprobs, e.ref_logprobs, args.kl_estimator)
    e.rewards = shaped_rewards(e.kl, e.scores, e.completion_lens, 0.0 if args.use_kl_loss else kl_coef)
    if e.token_rewards is not None:
        e.rewards = e.rewards + e.token_rewards
    if args.whiten_rewards:
        e.rewards = whiten(e.rewards, shift_mean=False, reduce=reduce)


@dataclass(frozen=True)
class Targets:
    """What is made of rewards and values, by numbers as in `PPOConfig`."""

    gamma: float
    lam: float
    lam_value: float
    lam_alpha: float | None
    whiten_advantages: bool

    @classmethod
    def of(cls, args: Any, *, value_only: bool = False) -> "Targets":
        """Those of a `PPOConfig`.

        Args:
            args: `PPOConfig`.
            value_only: the value model learns alone, from Monte-Carlo returns.
        """
        lam_value = 1.0 if value_only else args.lam_value
        return cls(args.gamma, args.lam, lam_value, args.lam_alpha, args.whiten_advantages)

    @torch.no_grad()
    def returns(self, experience: Experience) -> Tensor:
        """Targets of the value model, `[C]`; each sample's are its own."""
        e = experience
        assert e.rewards is not None and e.values is not None
        return gae(e.rewards, e.values, e.completion_lens, self.gamma, self.lam_value)[1]

    @torch.no_grad()
    def fill_in(self, experience: Experience, reduce: Reduce) -> None:
        """Fill in returns and advantages.

        Args:
            experience: samples with rewards and values; filled in.
            reduce: sums over processes.
        """
        e = experience
        assert e.rewards is not None and e.values is not None
        lam = self.lam
        if self.lam_alpha:
            lam = length_adaptive_lambda(e.completion_lens, self.lam_alpha, e.values.dtype)
        advantages, _ = gae(e.rewards, e.values, e.completion_lens, self.gamma, lam)
        e.returns = self.returns(e)
        e.advantages = whiten(advantages, reduce=reduce) if self.whiten_advantages else advantages

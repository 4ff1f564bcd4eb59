"""A reward model that reads the policy's own tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fourscore.models.forward import sample_scores, scatter_back
from fourscore.parallel import forward_passes
from fourscore.ppo.experience import Experience
from fourscore.rewards.samples import Notes, Samples


class TokenModel:
    """The reward model as a source of rewards, where it reads the policy's tokens."""

    kind = "reward"
    is_async = may_abstain = False

    def __init__(self, score: Callable[[Experience], Tensor], name: str = "reward_model") -> None:
        """Name a source.

        Args:
            score: scores `[n]` of samples.
            name: under which it is logged.
        """
        self.name = name
        self._score = score

    def rate(self, samples: Samples, notes: Notes) -> Any:
        """The scores `[n]`, from the forward pass that was shared, if there was one."""
        return self._score(samples.experience) if samples.model_scores is None else samples.model_scores


@torch.no_grad()
def score(reward_model: nn.Module, experience: Experience, batch_size: int) -> Tensor:
    """Score every sample with a sequence classifier on the policy's own tokens.

    Args:
        reward_model: a sequence classifier with one label.
        experience: samples.
        batch_size: samples of the greatest length a forward pass; more where they are short.

    Returns:
        `[n]`, fp32.
    """
    samples = experience.samples()
    order = forward_passes(reward_model, experience.lens, batch_size)
    return scatter_back([sample_scores(reward_model, [samples[i] for i in group.tolist()]) for group in order], order)

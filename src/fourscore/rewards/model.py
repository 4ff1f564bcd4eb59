"""The reward model as the source of scores."""

import torch
from torch import Tensor, nn

from fourscore.models.forward import microbatches, sample_scores, scatter_back
from fourscore.ppo.experience import Experience


@torch.no_grad()
def score(reward_model: nn.Module, experience: Experience, batch_size: int) -> Tensor:
    """Score every sample with a sequence classifier on the policy's own tokens.

    Args:
        reward_model: a sequence classifier with one label.
        experience: samples.
        batch_size: samples a forward pass.

    Returns:
        `[n]`, fp32.
    """
    samples = experience.samples()
    order = microbatches(experience.lens, batch_size)
    return scatter_back([sample_scores(reward_model, [samples[i] for i in group.tolist()]) for group in order], order)

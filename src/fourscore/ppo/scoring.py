"""What the roles say of a rollout: logprobs, reference logprobs, values."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fourscore.models.forward import completion_logprobs, completion_values, microbatches, rectangle, scatter_back
from fourscore.ppo.experience import Experience

Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def logprobs_of(
    model: nn.Module, experience: Experience, temperature: float, batch_size: int, autocast: Autocast
) -> Tensor:
    """Logprob of every completion token under a causal LM; `[C]` nats, fp32.

    Args:
        model: policy or reference.
        experience: samples.
        temperature: the rollout's.
        batch_size: samples a forward pass.
        autocast: makes the context of the forward passes.
    """
    return _per_token(experience, batch_size, autocast, lambda batch: completion_logprobs(model, batch, temperature)[0])


@torch.no_grad()
def values_of(value_model: nn.Module, experience: Experience, batch_size: int, autocast: Autocast) -> Tensor:
    """Value of the state before every completion token; `[C]`, fp32.

    Args:
        value_model: sequence classifier with one label.
        experience: samples.
        batch_size: samples a forward pass.
        autocast: makes the context of the forward passes.
    """
    return _per_token(experience, batch_size, autocast, lambda batch: completion_values(value_model, batch))


def _per_token(experience: Experience, batch_size: int, autocast: Autocast, forward: Callable) -> Tensor:
    samples = experience.samples()
    order = microbatches(experience.lens, batch_size)
    pieces = []
    with autocast():
        for group in order:
            batch = rectangle([samples[i] for i in group.tolist()], experience.prompt_lens[group])
            pieces.append(forward(batch))
    return scatter_back(pieces, order, experience.completion_lens)

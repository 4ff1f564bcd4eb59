"""What the roles say of a rollout: logprobs, reference logprobs, values; and scores where they share a forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fourscore.models.forward import (
    Rectangle,
    completion_logprobs,
    completion_logprobs_and_values,
    completion_values,
    rectangle,
    sample_scores,
    scatter_back,
)
from fourscore.models.frozen_layers import recorded, replayed
from fourscore.parallel import forward_passes
from fourscore.ppo.experience import Experience, sum_per_sample
from fourscore.ppo.roles import Roles
from fourscore.rewards.model import score

Autocast = Callable[[], AbstractContextManager]


@torch.no_grad()
def fill_in(
    roles: Roles, experience: Experience, temperature: float, batch_size: int, *, values: bool = True
) -> Tensor | None:
    """Fill in logprobs, reference logprobs and values; what two roles have in common is computed once for both.

    Logprobs that the rollout brought stay, and the policy makes no pass where it would give nothing else.

    Args:
        roles: the four models.
        experience: samples; filled in.
        temperature: the rollout's.
        batch_size: samples of the greatest length a forward pass; more where they are short.
        values: False leaves out the pass of the value model, if it is one of its own.

    Returns:
        scores `[n]`, fp32, if the reward model shares the value model's forward pass; else None.
    """
    e = experience
    if e.logprobs is None or roles.value_head is not None or roles.replays_policy:
        logprobs, e.values, e.ref_logprobs = policy_of(
            roles.policy,
            e,
            temperature,
            batch_size,
            roles.autocast,
            head=roles.value_head,
            reference=roles.ref_policy if roles.replays_policy else None,
            shared_layers=roles.replays_policy,
        )
        e.logprobs = logprobs if e.logprobs is None else e.logprobs
    if e.ref_logprobs is None:
        with roles.as_reference() as reference:
            e.ref_logprobs = logprobs_of(reference, e, temperature, batch_size, roles.autocast)
    if values and roles.replays_value:
        shared = roles.replays_value
        e.values, scores = values_and_scores_of(roles.value_model, roles.reward_model, e, batch_size, shared)
        return scores
    if values and e.values is None:
        e.values = values_of(roles.value_model, e, batch_size, roles.autocast)
    return None


def scores_of(roles: Roles, experience: Experience, batch_size: int) -> Tensor:
    """What the reward model says of every sample; `[n]`, fp32.

    Args:
        roles: the four models.
        experience: samples.
        batch_size: samples of the greatest length a forward pass; more where they are short.
    """
    with roles.as_reward() as reward_model:
        return score(reward_model, experience, batch_size)


@torch.no_grad()
def logprobs_of(
    model: nn.Module, experience: Experience, temperature: float, batch_size: int, autocast: Autocast
) -> Tensor:
    """Logprob of every completion token under a causal LM; `[C]` nats, fp32.

    Args:
        model: policy or reference.
        experience: samples.
        temperature: the rollout's.
        batch_size: samples of the greatest length a forward pass; more where they are short.
        autocast: makes the context of the forward passes.
    """
    return policy_of(model, experience, temperature, batch_size, autocast)[0]


def kl_of_samples(roles: Roles, experience: Experience, temperature: float, batch_size: int) -> Tensor:
    """Divergence of the policy from the reference, its estimate k1 summed over each completion; `[n]` nats.

    Args:
        roles: the four models.
        experience: samples.
        temperature: of both.
        batch_size: samples of the greatest length a forward pass; more where they are short.
    """
    ours = logprobs_of(roles.policy, experience, temperature, batch_size, roles.autocast)
    with roles.as_reference() as reference:
        theirs = logprobs_of(reference, experience, temperature, batch_size, roles.autocast)
    return sum_per_sample(ours - theirs, experience.completion_lens)


@torch.no_grad()
def values_of(value_model: nn.Module, experience: Experience, batch_size: int, autocast: Autocast) -> Tensor:
    """Value of the state before every completion token; `[C]`, fp32.

    Args:
        value_model: sequence classifier with one label.
        experience: samples.
        batch_size: samples of the greatest length a forward pass; more where they are short.
        autocast: makes the context of the forward passes.
    """
    passes = forward_passes(value_model, experience.lens, batch_size)
    return _per_token(experience, passes, autocast, lambda batch: [completion_values(value_model, batch)])[0]


@torch.no_grad()
def policy_of(
    policy: nn.Module,
    experience: Experience,
    temperature: float,
    batch_size: int,
    autocast: Autocast,
    *,
    head: nn.Linear | None = None,
    reference: nn.Module | None = None,
    shared_layers: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What shares a forward pass with the policy's logprobs, or a part of one.

    Args:
        policy: causal LM.
        experience: samples.
        temperature: the rollout's.
        batch_size: samples of the greatest length a forward pass; more where they are short.
        autocast: makes the context of the forward passes.
        head: a value head on the policy's backbone.
        reference: a causal LM on the policy's frozen bottom.
        shared_layers: layers of that bottom, which are computed once for the two.

    Returns:
        logprobs, values and reference logprobs, `[C]` each, fp32; the latter two None if there is no `head` or no
        `reference`.
    """

    def forward(batch: Rectangle) -> list[Tensor]:
        with recorded(policy, shared_layers) as bottom:
            if head is None:
                out = [completion_logprobs(policy, batch, temperature)[0]]
            else:
                logprobs, _, values = completion_logprobs_and_values(policy, head, batch, temperature)
                out = [logprobs, values]
        if reference is not None:
            with replayed(reference, shared_layers, bottom):
                out.append(completion_logprobs(reference, batch, temperature)[0])
        return out

    passes = forward_passes(policy, experience.lens, batch_size)
    logprobs, *rest = _per_token(experience, passes, autocast, forward)
    values = rest.pop(0) if head is not None else None
    return logprobs, values, rest[0] if rest else None


@torch.no_grad()
def values_and_scores_of(
    value_model: nn.Module, reward_model: nn.Module, experience: Experience, batch_size: int, shared_layers: int
) -> tuple[Tensor, Tensor]:
    """Values and scores of two models on one frozen bottom, which is computed once; without autocast.

    Args:
        value_model: sequence classifier.
        reward_model: sequence classifier on the same bottom.
        experience: samples.
        batch_size: samples of the greatest length a forward pass; more where they are short.
        shared_layers: layers of the bottom.

    Returns:
        values `[C]` and scores `[n]`, fp32.
    """
    samples = experience.samples()
    order = forward_passes(value_model, experience.lens, batch_size)
    values, scores = [], []
    for group in order:
        some = [samples[i] for i in group.tolist()]
        with recorded(value_model, shared_layers) as bottom:
            values.append(completion_values(value_model, rectangle(some, experience.prompt_lens[group])))
        with replayed(reward_model, shared_layers, bottom):
            scores.append(sample_scores(reward_model, some))
    return scatter_back(values, order, experience.completion_lens), scatter_back(scores, order)


def _per_token(
    experience: Experience, order: list[Tensor], autocast: Autocast, forward: Callable[[Rectangle], list[Tensor]]
) -> list[Tensor]:
    """Each of the results of `forward`, `[C]`."""
    samples = experience.samples()
    pieces = []
    with autocast():
        for group in order:
            some = [samples[i] for i in group.tolist()]
            pieces.append(forward(rectangle(some, experience.prompt_lens[group], experience.support_of(group))))
    return [scatter_back(list(each), order, experience.completion_lens) for each in zip(*pieces, strict=True)]

"""PPO epochs over one rollout batch: one optimizer step a minibatch, a forward and backward a microbatch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fourscore.models.forward import (
    Rectangle,
    completion_logprobs,
    completion_logprobs_and_values,
    completion_values,
    microbatches,
    rectangle,
    score_head,
)
from fourscore.models.trunk import shares_trunk
from fourscore.parallel import Parallel, clip_gradients
from fourscore.ppo.experience import Experience
from fourscore.ppo.losses import policy_loss, value_loss


@dataclass(frozen=True)
class UpdateSettings:
    """Numbers of one update, as in `PPOConfig`; sizes are samples on this process."""

    epochs: int
    minibatch: int
    microbatch: int
    temperature: float
    cliprange: float
    cliprange_value: float
    vf_coef: float
    max_grad_norm: float

    @classmethod
    def of(cls, args: Any) -> "UpdateSettings":
        """Those of a `PPOConfig` whose batches are resolved."""
        return cls(
            epochs=args.num_ppo_epochs,
            minibatch=args.local_mini_batch_size,
            microbatch=args.per_device_train_batch_size,
            temperature=args.temperature,
            cliprange=args.cliprange,
            cliprange_value=args.cliprange_value,
            vf_coef=args.vf_coef,
            max_grad_norm=args.max_grad_norm or 0.0,
        )


Autocast = Callable[[], AbstractContextManager]
Backward = Callable[[Experience, float], list[Tensor]]
"""Leaves a microbatch's gradients, of a summed loss times a factor, in the parameters; returns sums over tokens."""

_POLICY_SUMS = (
    "loss/policy_avg",
    "policy/clipfrac_avg",
    "policy/approxkl_avg",
    "val/ratio",
    "policy/entropy_avg",
)
_VALUE_SUMS = ("loss/value_avg", "val/clipfrac_avg")
_SUMS = _POLICY_SUMS + _VALUE_SUMS


def update(
    policy: nn.Module,
    value_model: nn.Module,
    experience: Experience,
    settings: UpdateSettings,
    optimizers: dict[str, torch.optim.Optimizer],
    parallel: Parallel,
    generator: torch.Generator,
    autocast: Autocast,
) -> dict[str, float]:
    """Train policy and value model on a batch whose advantages are filled in.

    Losses are summed over tokens and divided by the completion tokens of the whole minibatch on all processes, so
    they do not depend on how samples fall into microbatches or onto processes.

    A minibatch trains the policy, then the value model: all backward passes of a role, then its optimizer's step. So
    gradients of the two are never held together. Where the value model is a head on the policy's backbone, both losses
    go through one forward and one backward pass instead.

    Args:
        policy: causal LM.
        value_model: sequence classifier with one label, of its own or on the policy's backbone.
        experience: this process's samples, complete.
        settings: sizes and coefficients.
        optimizers: that of `policy` and that of `value`; without the latter one steps for both, on gradients of both.
        parallel: the processes.
        generator: CPU generator that shuffles the samples of each epoch.
        autocast: makes the context of the forward passes.

    Returns:
        metrics under TRL's names, each a mean over completion tokens for a minibatch, then over minibatches and
        epochs; `val/ratio_var` is the variance of the minibatches' mean ratios.
    """
    roles: dict[str, nn.Module] = {"policy": policy, "value": value_model}
    passes: list[tuple[Backward, list[str]]] = [
        (partial(_policy_backward, policy, settings, autocast), ["policy"]),
        (partial(_value_backward, value_model, settings, autocast), ["value"]),
    ]
    if shares_trunk(policy, value_model):
        roles["value"] = head = score_head(value_model)
        passes = [(partial(_joint_backward, policy, head, settings, autocast), ["policy", "value"])]
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in roles.items()}
    rows: list[Tensor] = []
    norms: dict[str, list[Tensor]] = {"policy": [], "value": []}
    for _ in range(settings.epochs):
        shuffled = torch.randperm(len(experience), generator=generator).to(experience.input_ids.device)
        for indices in shuffled.split(settings.minibatch):
            minibatch = experience.select(indices)
            tokens = int(parallel.sum(minibatch.completion_lens.sum()))
            sums = []
            for backward, names in passes:
                sums.append(_accumulate(backward, minibatch, settings.microbatch, parallel.loss_scale / tokens))
                for name in names:
                    parallel.reduce_gradients(trained[name])
                    norms[name].append(clip_gradients(trained[name], settings.max_grad_norm))
                if "value" in optimizers:
                    _step([optimizers[name] for name in names])
            if "value" not in optimizers:
                _step([optimizers["policy"]])
            rows.append(parallel.sum(torch.cat(sums)) / tokens)
    means = torch.stack(rows)
    metrics = dict(zip(_SUMS, means.mean(0).tolist(), strict=True))
    metrics["val/ratio_var"] = means[:, _SUMS.index("val/ratio")].var(correction=min(1, len(rows) - 1)).item()
    metrics |= {f"{name}/grad_norm": torch.stack(values).mean().item() for name, values in norms.items()}
    return metrics


def _accumulate(backward: Backward, minibatch: Experience, microbatch: int, scale: float) -> Tensor:
    """Leave a minibatch's gradients in the parameters; returns the sums of what `backward` returns over its tokens."""
    groups = microbatches(minibatch.lens, microbatch)
    return torch.stack([torch.stack(backward(minibatch.select(group), scale)) for group in groups]).sum(0)


def _step(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _policy_backward(
    policy: nn.Module, settings: UpdateSettings, autocast: Autocast, micro: Experience, scale: float
) -> list[Tensor]:
    with autocast():
        logprobs, entropy = completion_logprobs(policy, _rectangle(micro), settings.temperature)
    loss, sums = _policy_terms(logprobs, entropy, micro, settings)
    (loss * scale).backward()
    return sums


def _value_backward(
    value_model: nn.Module, settings: UpdateSettings, autocast: Autocast, micro: Experience, scale: float
) -> list[Tensor]:
    with autocast():
        values = completion_values(value_model, _rectangle(micro))
    loss, sums = _value_terms(values, micro, settings)
    (settings.vf_coef * loss * scale).backward()
    return sums


def _joint_backward(
    policy: nn.Module, head: nn.Linear, settings: UpdateSettings, autocast: Autocast, micro: Experience, scale: float
) -> list[Tensor]:
    with autocast():
        logprobs, entropy, values = completion_logprobs_and_values(
            policy, head, _rectangle(micro), settings.temperature
        )
    pg, policy_sums = _policy_terms(logprobs, entropy, micro, settings)
    vf, value_sums = _value_terms(values, micro, settings)
    ((pg + settings.vf_coef * vf) * scale).backward()
    return policy_sums + value_sums


def _policy_terms(
    logprobs: Tensor, entropy: Tensor, micro: Experience, settings: UpdateSettings
) -> tuple[Tensor, list[Tensor]]:
    """The loss `[]` and the sums of `_POLICY_SUMS`."""
    assert micro.logprobs is not None and micro.advantages is not None
    pg = policy_loss(logprobs, micro.logprobs, micro.advantages, settings.cliprange)
    logratio = logprobs.detach() - micro.logprobs
    terms = [pg.loss.detach(), pg.clipped, 0.5 * logratio.square().sum(), logratio.exp().sum(), entropy.sum()]
    return pg.loss, [t.to(pg.loss.dtype) for t in terms]


def _value_terms(values: Tensor, micro: Experience, settings: UpdateSettings) -> tuple[Tensor, list[Tensor]]:
    """The loss `[]` and the sums of `_VALUE_SUMS`."""
    assert micro.values is not None and micro.returns is not None
    vf = value_loss(values, micro.values, micro.returns, settings.cliprange_value)
    return vf.loss, [vf.loss.detach(), vf.clipped.to(vf.loss.dtype)]


def _rectangle(micro: Experience) -> Rectangle:
    return rectangle(micro.samples(), micro.prompt_lens)

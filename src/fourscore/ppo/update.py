"""PPO epochs over one rollout batch: one optimizer step a minibatch, a forward and backward a microbatch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourscore.models.forward import completion_logprobs, completion_values, microbatches, rectangle
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


_SUMS = (
    "loss/policy_avg",
    "policy/clipfrac_avg",
    "policy/approxkl_avg",
    "val/ratio",
    "policy/entropy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
)


def update(
    policy: nn.Module,
    value_model: nn.Module,
    experience: Experience,
    settings: UpdateSettings,
    optimizers: list[torch.optim.Optimizer],
    parallel: Parallel,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Train policy and value model on a batch whose advantages are filled in.

    Losses are summed over tokens and divided by the completion tokens of the whole minibatch on all processes, so
    they do not depend on how samples fall into microbatches or onto processes.

    Args:
        policy: causal LM.
        value_model: sequence classifier with one label.
        experience: this process's samples, complete.
        settings: sizes and coefficients.
        optimizers: stepped together after each minibatch.
        parallel: the processes.
        generator: CPU generator that shuffles the samples of each epoch.
        autocast: makes the context of the forward passes.

    Returns:
        metrics under TRL's names, each a mean over completion tokens for a minibatch, then over minibatches and
        epochs; `val/ratio_var` is the variance of the minibatches' mean ratios.
    """
    roles = {"policy": policy, "value": value_model}
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in roles.items()}
    rows: list[Tensor] = []
    norms: dict[str, list[Tensor]] = {"policy": [], "value": []}
    for _ in range(settings.epochs):
        shuffled = torch.randperm(len(experience), generator=generator).to(experience.input_ids.device)
        for indices in shuffled.split(settings.minibatch):
            minibatch = experience.select(indices)
            tokens = int(parallel.sum(minibatch.completion_lens.sum()))
            sums = _backward(policy, value_model, minibatch, settings, parallel.loss_scale / tokens, autocast)
            for name, parameters in trained.items():
                parallel.reduce_gradients(parameters)
                norms[name].append(clip_gradients(parameters, settings.max_grad_norm))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            rows.append(parallel.sum(sums) / tokens)
    means = torch.stack(rows)
    metrics = dict(zip(_SUMS, means.mean(0).tolist(), strict=True))
    metrics["val/ratio_var"] = means[:, _SUMS.index("val/ratio")].var(correction=min(1, len(rows) - 1)).item()
    metrics |= {f"{name}/grad_norm": torch.stack(values).mean().item() for name, values in norms.items()}
    return metrics


def _backward(
    policy: nn.Module,
    value_model: nn.Module,
    minibatch: Experience,
    settings: UpdateSettings,
    scale: float,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """Leave the minibatch's gradients in the parameters; returns the sums of `_SUMS` over its tokens."""
    sums = []
    for group in microbatches(minibatch.lens, settings.microbatch):
        micro = minibatch.select(group)
        assert micro.logprobs is not None and micro.advantages is not None
        assert micro.values is not None and micro.returns is not None
        batch = rectangle(micro.samples(), micro.prompt_lens)
        # Policy before value, each with its own backward: only one role's activations are held at a time.
        with autocast():
            logprobs, entropy = completion_logprobs(policy, batch, settings.temperature)
        pg = policy_loss(logprobs, micro.logprobs, micro.advantages, settings.cliprange)
        (pg.loss * scale).backward()
        with autocast():
            values = completion_values(value_model, batch)
        vf = value_loss(values, micro.values, micro.returns, settings.cliprange_value)
        (settings.vf_coef * vf.loss * scale).backward()
        logratio = logprobs.detach() - micro.logprobs
        terms = [
            pg.loss.detach(),
            pg.clipped,
            0.5 * logratio.square().sum(),
            logratio.exp().sum(),
            entropy.sum(),
            vf.loss.detach(),
            vf.clipped,
        ]
        sums.append(torch.stack([t.to(pg.loss.dtype) for t in terms]))
    return torch.stack(sums).sum(0)

"""PPO epochs over one rollout batch: one optimizer step a minibatch, a forward and backward a microbatch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fourscore.models.forward import (
    Rectangle,
    completion_logprobs,
    completion_logprobs_and_values,
    completion_values,
    rectangle,
    scatter_back,
    score_head,
)
from fourscore.models.trunk import shares_trunk
from fourscore.parallel import Parallel, clip_gradients, forward_passes
from fourscore.ppo.experience import Experience
from fourscore.ppo.losses import kl_loss, policy_loss, token_weights, value_loss
from fourscore.ppo.roles import Roles
from fourscore.ppo.targets import Targets


@dataclass(frozen=True)
class UpdateSettings:
    """Numbers of one update, as in `PPOConfig`.

    Sizes are samples on this process, those of a microbatch of the greatest length, if not `microbatch_tokens` tokens.
    `kl_coef` is the weight of the KL term in the policy loss: 0 where that term is in the reward. With `value_only` the
    policy stands still.
    """

    epochs: int
    minibatch: int
    microbatch: int
    temperature: float
    cliprange: float
    cliprange_value: float
    vf_coef: float
    max_grad_norm: float
    microbatch_tokens: int | None = None
    value_max_grad_norm: float | None = None
    cliprange_high: float | None = None
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k3"] = "k1"
    entropy_coef: float = 0.0
    positive_lm_coef: float = 0.0
    positive_lm_threshold: float = 0.0
    loss_aggregation: Literal["token", "sequence"] = "token"
    early_stop_kl: float | None = None
    stop_on_ratio: bool = False
    value_only: bool = False

    @classmethod
    def of(cls, args: Any, *, kl_coef: float | None = None, value_only: bool = False) -> "UpdateSettings":
        """Those of a `PPOConfig` whose batches are resolved.

        Args:
            args: `PPOConfig`.
            kl_coef: the coefficient as it is now, where it adapts.
            value_only: the policy stands still.
        """
        return cls(
            epochs=args.num_ppo_epochs,
            minibatch=args.local_mini_batch_size,
            microbatch=args.per_device_train_batch_size,
            microbatch_tokens=args.tokens_per_microbatch,
            temperature=args.temperature,
            cliprange=args.cliprange,
            cliprange_value=args.cliprange_value,
            vf_coef=args.vf_coef,
            max_grad_norm=args.max_grad_norm or 0.0,
            value_max_grad_norm=args.value_max_grad_norm or 0.0,
            cliprange_high=args.cliprange_high,
            dual_clip=args.dual_clip,
            kl_coef=(args.kl_coef if kl_coef is None else kl_coef) if args.use_kl_loss else 0.0,
            kl_estimator=args.kl_estimator,
            entropy_coef=args.entropy_coef,
            positive_lm_coef=args.positive_lm_coef,
            positive_lm_threshold=args.positive_lm_threshold,
            loss_aggregation=args.loss_aggregation,
            early_stop_kl=args.early_stop_kl,
            stop_on_ratio=args.stop_on_ratio,
            value_only=value_only,
        )


Autocast = Callable[[], AbstractContextManager]
Sums = dict[str, Tensor]
"""Sums over tokens, by the name of the metric that they are the mean of; of `_RATIO_MAX` the maximum."""

CheckRatio = Callable[[float, float], None]
"""Is told mean and maximum of |ratio - 1| over the first minibatch of an update, when nothing has moved yet."""


@dataclass(frozen=True)
class _Totals:
    """What a whole minibatch holds, on all processes: losses are shares of it."""

    tokens: int
    samples: int
    positive_tokens: int


Backward = Callable[[Experience, _Totals, float], Sums]
"""Leaves a microbatch's gradients, of a summed loss times a factor, in the parameters; returns sums over its tokens."""

_RATIO_MEAN, _RATIO_MAX = "policy/first_ratio_mean", "policy/first_ratio_max"


def makes_values(roles: Roles, args: Any) -> bool:
    """Whether `update` is to fill in the values, and scoring is not.

    The value model's first step goes forward over its minibatch with the weights that values are made with. Where that
    minibatch is the whole batch, one pass gives both: a sample's returns depend on its own values alone. A head on the
    policy's backbone has no pass of its own.

    Args:
        roles: the four models.
        args: `PPOConfig`.
    """
    return args.num_mini_batches == 1 and roles.value_head is None


def update(
    policy: nn.Module,
    value_model: nn.Module,
    experience: Experience,
    settings: UpdateSettings,
    optimizers: dict[str, torch.optim.Optimizer],
    parallel: Parallel,
    generator: torch.Generator,
    autocast: Autocast,
    check_ratio: CheckRatio | None = None,
    targets: Targets | None = None,
) -> dict[str, float]:
    """Train policy and value model on a scored batch.

    Losses are weighted sums over tokens, the weights of a minibatch being shares of its tokens (or samples) on all
    processes, so they do not depend on how samples fall into microbatches or onto processes.

    A minibatch trains the policy, then the value model: all backward passes of a role, then its optimizer's step. So
    gradients of the two are never held together. Where the value model is a head on the policy's backbone, both losses
    go through one forward and one backward pass instead.

    A batch that has no values yet (`makes_values`) gets them from the value model's first step, which then comes before
    the policy's; advantages follow. With `stop_on_ratio` it is the gradients only that come before, and the step keeps
    its turn, so that nothing has moved where `check_ratio` raises.

    With `early_stop_kl`, a minibatch whose `policy/approxkl_avg` is above it is the policy's last one in this update:
    it makes no step with it any more. The value model goes on to the end, unless it shares the policy's passes.

    Args:
        policy: causal LM.
        value_model: sequence classifier with one label, of its own or on the policy's backbone.
        experience: this process's samples, scored; without `targets` also with advantages and returns.
        settings: sizes and coefficients.
        optimizers: that of `policy` and that of `value`; without the latter one steps for both, on gradients of both.
        parallel: the processes.
        generator: CPU generator that shuffles the samples of each epoch.
        autocast: makes the context of the forward passes.
        check_ratio: called before the policy's first step, on every process with the same numbers; may raise.
        targets: how advantages and returns are made.

    Returns:
        metrics under TRL's names, each a mean over completion tokens for a minibatch, then over the minibatches that
        the role has seen; `val/ratio_var` is the variance of the minibatches' mean ratios, `policy/epochs` the
        optimizer steps of the policy in epochs, `policy/first_ratio_mean` and `policy/first_ratio_max` are of
        |ratio - 1| in the first minibatch. An update of the value model alone has those of the value model alone.
    """
    roles: dict[str, nn.Module] = {"policy": policy, "value": value_model}
    passes: list[tuple[Backward, list[str]]] = [
        (partial(_policy_backward, policy, settings, autocast), ["policy"]),
        (partial(_value_backward, value_model, None, settings, autocast), ["value"]),
    ]
    if shares_trunk(policy, value_model):
        roles["value"] = head = score_head(value_model)
        passes = [(partial(_joint_backward, policy, head, settings, autocast), ["policy", "value"])]
        if settings.value_only:
            passes = [(partial(_value_backward, value_model, list(head.parameters()), settings, autocast), ["value"])]
    elif settings.value_only:
        passes = passes[1:]
    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in roles.items()}
    limits = {"policy": settings.max_grad_norm, "value": settings.max_grad_norm}
    if settings.value_max_grad_norm is not None:
        limits["value"] = settings.value_max_grad_norm
    tables = {names[0]: _Table() for _, names in passes}
    norms: dict[str, list[Tensor]] = {"policy": [], "value": []}
    metrics: dict[str, float] = {}

    def note(names: list[str], sums: Sums, tokens: int) -> None:
        tables[names[0]].append(list(sums), parallel.sum(torch.stack(list(sums.values()))) / tokens)

    def step(names: list[str]) -> None:
        for name in names:
            parallel.reduce_gradients(trained[name])
            norms[name].append(clip_gradients(trained[name], limits[name]))
        if "value" in optimizers:
            _step([optimizers[name] for name in names])

    value_is_ahead = experience.values is None
    if value_is_ahead:
        assert targets is not None
        totals = _totals(experience, settings, parallel)
        scale = parallel.loss_scale / totals.tokens
        sums = _fill_in_values(value_model, experience, settings, autocast, targets, totals, scale)
        note(["value"], sums, totals.tokens)
        if not settings.stop_on_ratio:
            step(["value"])
    if targets is not None:
        targets.fill_in(experience, parallel.sum)
    for indices in _minibatches(len(experience), settings, generator):
        minibatch = experience.select(indices.to(experience.input_ids.device))
        totals = _totals(minibatch, settings, parallel)
        for one in list(passes):
            backward, names = one
            if value_is_ahead and names == ["value"]:
                if settings.stop_on_ratio:
                    step(names)
                continue
            model = policy if "policy" in names else value_model
            groups = forward_passes(model, minibatch.lens, settings.microbatch, settings.microbatch_tokens)
            sums = _accumulate(backward, minibatch, groups, totals, parallel.loss_scale / totals.tokens)
            largest, table = sums.pop(_RATIO_MAX, None), tables[names[0]]
            note(names, sums, totals.tokens)
            if largest is not None and _RATIO_MAX not in metrics:  # the first minibatch
                metrics[_RATIO_MEAN] = table.column(_RATIO_MEAN)[0].item()
                metrics[_RATIO_MAX] = parallel.max(largest.item())
                if check_ratio is not None:
                    check_ratio(metrics[_RATIO_MEAN], metrics[_RATIO_MAX])
            if "policy" in names and _too_far(table, settings):
                passes.remove(one)
                for parameter in (p for name in names for p in trained[name]):
                    parameter.grad = None
                continue
            step(names)
        value_is_ahead = False
        if not passes:
            break
        if "value" not in optimizers:
            _step([optimizers["policy"]])
    for table in tables.values():
        metrics = table.means() | metrics
    if "policy" in tables:
        ratios = tables["policy"].column("val/ratio")
        metrics["val/ratio_var"] = ratios.var(correction=min(1, len(ratios) - 1)).item()
        metrics["policy/epochs"] = len(norms["policy"]) / -(-len(experience) // settings.minibatch)
    return metrics | {f"{name}/grad_norm": torch.stack(each).mean().item() for name, each in norms.items() if each}


class _Table:
    """Metrics of one minibatch after the other."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def append(self, names: list[str], row: Tensor) -> None:
        self.names = names
        self.rows.append(row)

    def column(self, name: str) -> Tensor:
        return torch.stack(self.rows)[:, self.names.index(name)]

    def means(self) -> dict[str, float]:
        return dict(zip(self.names, torch.stack(self.rows).mean(0).tolist(), strict=True))


def _minibatches(n: int, settings: UpdateSettings, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the samples of each optimizer step, all epochs after one another."""
    for _ in range(settings.epochs):
        yield from torch.randperm(n, generator=generator).split(settings.minibatch)


def _totals(minibatch: Experience, settings: UpdateSettings, parallel: Parallel) -> _Totals:
    lens = minibatch.completion_lens
    positive = lens[_positive(minibatch, settings)].sum() if settings.positive_lm_coef else lens.new_zeros(())
    counts = torch.stack([lens.sum(), lens.new_tensor(len(minibatch)), positive])
    return _Totals(*parallel.sum(counts).tolist())


def _positive(samples: Experience, settings: UpdateSettings) -> Tensor:
    """`[n]` bool, the samples that the language model loss is for."""
    assert samples.scores is not None
    return samples.scores > settings.positive_lm_threshold


def _too_far(table: _Table, settings: UpdateSettings) -> bool:
    if settings.early_stop_kl is None:
        return False
    return table.column("policy/approxkl_avg")[-1].item() > settings.early_stop_kl


def _accumulate(backward: Backward, minibatch: Experience, groups: list[Tensor], totals: _Totals, scale: float) -> Sums:
    """Leave a minibatch's gradients in the parameters; returns what `backward` returns of all of its tokens."""
    parts = [backward(minibatch.select(group), totals, scale) for group in groups]
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: each.max() if name == _RATIO_MAX else each.sum(0) for name, each in stacked.items()}


def _fill_in_values(
    value_model: nn.Module,
    experience: Experience,
    settings: UpdateSettings,
    autocast: Autocast,
    targets: Targets,
    totals: _Totals,
    scale: float,
) -> Sums:
    """Fill in the values, and leave the gradients of the value loss on all of the batch; sums over its tokens."""
    found: list[Tensor] = []

    def backward(micro: Experience, totals: _Totals, scale: float) -> Sums:
        with autocast():
            values = completion_values(value_model, _rectangle(micro))
        micro.values = values.detach()
        micro.returns = targets.returns(micro)
        found.append(micro.values)
        return _value_loss_backward(values, micro, settings, scale)

    groups = forward_passes(value_model, experience.lens, settings.microbatch, settings.microbatch_tokens)
    sums = _accumulate(backward, experience, groups, totals, scale)
    experience.values = scatter_back(found, groups, experience.completion_lens)
    return sums


def _step(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _policy_backward(
    policy: nn.Module, settings: UpdateSettings, autocast: Autocast, micro: Experience, totals: _Totals, scale: float
) -> Sums:
    with autocast():
        logprobs, entropy = completion_logprobs(
            policy, _rectangle(micro), settings.temperature, entropy_trains=settings.entropy_coef != 0
        )
    loss, sums = _policy_terms(logprobs, entropy, micro, totals, settings)
    (loss * scale).backward()
    return sums


def _value_backward(
    value_model: nn.Module,
    only: list[nn.Parameter] | None,
    settings: UpdateSettings,
    autocast: Autocast,
    micro: Experience,
    totals: _Totals,
    scale: float,
) -> Sums:
    """`only`: what gets gradients, if not all that trains."""
    with autocast():
        values = completion_values(value_model, _rectangle(micro))
    return _value_loss_backward(values, micro, settings, scale, only)


def _value_loss_backward(
    values: Tensor,
    micro: Experience,
    settings: UpdateSettings,
    scale: float,
    only: list[nn.Parameter] | None = None,
) -> Sums:
    loss, sums = _value_terms(values, micro, settings)
    (settings.vf_coef * loss * scale).backward(inputs=only)
    return sums


def _joint_backward(
    policy: nn.Module,
    head: nn.Linear,
    settings: UpdateSettings,
    autocast: Autocast,
    micro: Experience,
    totals: _Totals,
    scale: float,
) -> Sums:
    with autocast():
        logprobs, entropy, values = completion_logprobs_and_values(
            policy, head, _rectangle(micro), settings.temperature, entropy_trains=settings.entropy_coef != 0
        )
    pg, policy_sums = _policy_terms(logprobs, entropy, micro, totals, settings)
    vf, value_sums = _value_terms(values, micro, settings)
    ((pg + settings.vf_coef * vf) * scale).backward()
    return policy_sums | value_sums


def _policy_terms(
    logprobs: Tensor, entropy: Tensor, micro: Experience, totals: _Totals, settings: UpdateSettings
) -> tuple[Tensor, Sums]:
    """The loss `[]`, all of its terms, and sums for the metrics of the policy."""
    assert micro.logprobs is not None and micro.advantages is not None
    lens, dtype = micro.completion_lens, logprobs.dtype
    weights = token_weights(lens, totals.tokens, totals.samples, settings.loss_aggregation, dtype)
    pg = policy_loss(
        logprobs,
        micro.logprobs,
        micro.advantages,
        settings.cliprange,
        settings.cliprange_high,
        settings.dual_clip,
    )
    loss = (pg.loss * weights).sum()
    logratio = logprobs.detach() - micro.logprobs
    ratio = logratio.exp()
    off = (ratio - 1).abs()
    sums = {
        "loss/policy_avg": loss,
        "policy/clipfrac_avg": pg.clipped.sum(),
        "policy/approxkl_avg": 0.5 * logratio.square().sum(),
        "val/ratio": ratio.sum(),
        "policy/entropy_avg": entropy.sum(),
        _RATIO_MEAN: off.sum(),
        _RATIO_MAX: off.max(),
    }
    if settings.kl_coef:
        assert micro.ref_logprobs is not None
        kl = (kl_loss(logprobs, micro.logprobs, micro.ref_logprobs, settings.kl_estimator) * weights).sum()
        loss = loss + settings.kl_coef * kl
        sums["loss/kl_avg"] = kl
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * (entropy * weights).sum()
    if settings.positive_lm_coef:
        positive = torch.repeat_interleave(_positive(micro, settings), lens)
        nll = -torch.where(positive, logprobs, 0).sum() * (totals.tokens / max(1, totals.positive_tokens))
        loss = loss + settings.positive_lm_coef * nll
        sums["loss/positive_lm_avg"] = nll
    return loss, {name: value.detach().to(dtype) for name, value in sums.items()}


def _value_terms(values: Tensor, micro: Experience, settings: UpdateSettings) -> tuple[Tensor, Sums]:
    """The loss `[]`, and sums for the metrics of the value model."""
    assert micro.values is not None and micro.returns is not None
    vf = value_loss(values, micro.values, micro.returns, settings.cliprange_value)
    loss = vf.loss.sum()
    return loss, {"loss/value_avg": loss.detach(), "val/clipfrac_avg": vf.clipped.sum().to(loss.dtype)}


def _rectangle(micro: Experience) -> Rectangle:
    return rectangle(micro.samples(), micro.prompt_lens, micro.support)

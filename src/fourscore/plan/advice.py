"""Flags that would make a run fit, in order of least harm, each with the figure of a plan made again."""

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from fourscore.config import ModelConfig, PPOConfig
from fourscore.errors import FourscoreError
from fourscore.plan.estimate import Plan, make_plan
from fourscore.plan.skeleton import depth_of

_ENOUGH = 3


@dataclass(frozen=True)
class Advice:
    """Flags to add to the command, and what the run would take with them.

    Attributes:
        flags: as they are typed.
        harm: what they cost, in a few words.
        peak_bytes: the largest peak with them, of one process.
        fits: whether that is within the capacity.
    """

    flags: str
    harm: str
    peak_bytes: int
    fits: bool


@dataclass
class _Settings:
    training: PPOConfig
    model: ModelConfig
    world_size: int
    sharding: str


def advise(plan: Plan, training_args: PPOConfig, model_args: ModelConfig) -> list[Advice]:
    """Flags that make a plan fit which does not.

    One step at a time is tried from least harm to most. A step that lowers the largest peak stays while the next ones
    are tried, unless it fits by itself. The list ends after three ways that fit.

    Args:
        plan: a plan that does not fit.
        training_args: its flags.
        model_args: its flags.
    """
    start = _Settings(copy.copy(training_args), copy.copy(model_args), plan.world_size, plan.sharding)
    found: list[Advice] = []
    together, best = start, plan
    kept_flags: list[str] = []
    for flags, harm, change in _steps(plan, start):
        alone = _made(plan, _changed(start, change))
        if alone is not None and alone.fits:
            found.append(Advice(flags, harm, _peak(alone), True))
        elif alone is not None and _peak(alone) < 0.99 * _peak(plan):
            found.append(Advice(flags, harm, _peak(alone), False))
        if not any(a.fits for a in found):
            more = _changed(together, change)
            combined = _made(plan, more) if kept_flags else alone
            if combined is not None and _peak(combined) < 0.99 * _peak(best):
                together, best = more, combined
                kept_flags = [*kept_flags, flags]
                if combined.fits:
                    found.append(Advice(" ".join(kept_flags), "all of these", _peak(combined), True))
        if sum(a.fits for a in found) >= _ENOUGH:
            break
    return found


def _steps(plan: Plan, settings: _Settings) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Flags, what they cost, and the fields they set; from least harm to most."""
    args, model_args = settings.training, settings.model
    on_cpu = plan.device == "cpu"
    if plan.packed:
        yield "--pack_rollout_weights false", "slower rollouts", {"pack_rollout_weights": False}
    if plan.graphs:
        yield "--cuda_graphs none", "slower rollouts and scoring", {"cuda_graphs": "none"}
    if plan.idle:
        yield "--keep_freed_memory false", "slower updates on a CPU", {"keep_freed_memory": False}
    if not args.gradient_checkpointing:
        change: dict[str, Any] = {"gradient_checkpointing": True, "activation_checkpointing": True}
        yield "--gradient_checkpointing true", "same maths, about a third more time for an update", change
    budget = args.tokens_per_microbatch
    for size in (budget // 2, budget // 4) if budget else ():
        yield f"--tokens_per_microbatch {size}", "same maths, smaller passes", {"tokens_per_microbatch": size}
    micro = 0 if budget else args.per_device_train_batch_size
    local = micro * args.gradient_accumulation_steps
    for size in (micro // 2, micro // 4, 1):
        if 0 < size < micro and local % size == 0:
            change = {"per_device_train_batch_size": size, "gradient_accumulation_steps": local // size}
            flags = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {local // size}"
            yield flags, "same maths, smaller passes", change
    rollout = plan.sizes.rollout_batch
    for size in (rollout // 2, rollout // 8, 1):
        if 0 < size < rollout:
            flags = f"--local_rollout_forward_batch_size {size}"
            yield flags, "slower rollouts", {"local_rollout_forward_batch_size": size}
    stored = {b.checkpoint.dtype.itemsize for b in plan.layout.backbones.values() if b.checkpoint.dtype is not None}
    held = {b.dtype.itemsize for b in plan.layout.backbones.values() if b.storage != "quantized"}
    if not on_cpu and stored and held and max(stored) < max(held):
        yield "--dtype auto", "frozen weights as they are stored, in 16 bits", {"dtype": "auto"}
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    if not on_cpu and bitsandbytes and not model_args.use_peft and "8bit" not in str(args.optim.value):
        yield (
            "--optim adamw_bnb_8bit",
            "optimizer state rounded to 8 bits",
            {"optim": type(args.optim)("adamw_bnb_8bit")},
        )
    if not model_args.use_peft:
        depth = min(depth_of(backbone.checkpoint) for backbone in plan.layout.backbones.values())
        if "freeze_layers" in {f.name for f in fields(args)} and not getattr(args, "freeze_layers", 0) and depth > 1:
            half = depth // 2
            yield f"--freeze_layers {half}", "the bottom layers do not train", {"freeze_layers": half}
        yield "--use_peft", "trains adapters, not all weights", {"use_peft": True}
    if (
        bitsandbytes
        and not model_args.load_in_4bit
        and not model_args.load_in_8bit
        and args.value_training == "adapter"
    ):
        change = {"use_peft": True, "load_in_4bit": True}
        yield "--use_peft --load_in_4bit", "adapters on weights rounded to 4 bits", change
    if "share_value_backbone" in {f.name for f in fields(args)} and not getattr(args, "share_value_backbone", False):
        yield "--share_value_backbone", "the value model is a head on the policy", {"share_value_backbone": True}
    if not on_cpu:
        for count in (2, 4, 8):
            if count > plan.world_size:
                flags = f"accelerate launch --use_fsdp --fsdp_version 2 --num_processes {count}"
                yield flags, "more devices", {"world_size": count, "sharding": "fsdp"}


def _changed(settings: _Settings, change: dict[str, Any]) -> _Settings:
    new = copy.copy(settings)
    new.training, new.model = copy.copy(settings.training), copy.copy(settings.model)
    for name, value in change.items():
        owner: Any = (
            new if name in ("world_size", "sharding") else new.model if hasattr(new.model, name) else new.training
        )
        setattr(owner, name, value)
    return new


def _made(plan: Plan, settings: _Settings) -> Plan | None:
    """The plan with other flags; None where they do not go together."""
    try:
        return make_plan(
            settings.training,
            settings.model,
            world_size=settings.world_size,
            sharding=settings.sharding,
            prompt=plan.sizes.prompt,
            room=plan.capacity,
        )
    except FourscoreError:
        return None


def _peak(plan: Plan) -> int:
    return max(plan.peak_bytes.values())

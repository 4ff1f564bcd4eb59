"""Optimizers and learning-rate schedules, as transformers' flags describe them."""

import copy
import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from fourscore.errors import FourscoreError

logger = logging.getLogger(__name__)

Role = Literal["policy", "value"]

_STATE_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_torch_xla": 8.0,
    "adamw_anyprecision": 8.0,
    "stable_adamw": 8.0,
    "adamw_bnb_8bit": 2.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "paged_adamw_32bit": 8.0,
    "adamw_torch_8bit": 2.0,
    "adamw_torch_4bit": 1.0,
    "ademamix": 12.0,
    "ademamix_8bit": 3.0,
    "adafactor": 0.1,
    "adagrad": 4.0,
    "rmsprop": 4.0,
    "rmsprop_bnb": 4.0,
    "rmsprop_bnb_8bit": 1.0,
    "lion_32bit": 4.0,
    "lion_8bit": 1.0,
    "paged_lion_32bit": 4.0,
    "paged_lion_8bit": 1.0,
    "sgd": 0.0,
}


def state_bytes(optim: str, optim_args: str | None = None) -> tuple[float, bool]:
    """Optimizer state for each weight that trains.

    Args:
        optim: name of the optimizer, as in `--optim`.
        optim_args: as in `--optim_args`.

    Returns:
        bytes, and whether the optimizer is known; an unknown one is taken to have two fp32 moments.
    """
    if optim == "sgd" and "momentum" in (optim_args or ""):
        return 4.0, True
    return _STATE_BYTES.get(optim, 8.0), optim in _STATE_BYTES


def build_optimizer(model: nn.Module, args: Any, role: Role = "policy") -> torch.optim.Optimizer:
    """The optimizer that `--optim` names over what trains in `model`; vectors (biases, norms) do not decay.

    Args:
        model: policy or value model, on its device, sharded already if it is to be.
        args: `PPOConfig`.
        role: whose learning rate it has.

    Raises:
        FourscoreError: its package is missing.
    """
    args = _of_role(args, role)
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ValueError, ImportError) as error:  # a package that is not installed, say
        raise FourscoreError(f"--optim {args.optim.value}: {error}") from error
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return cls([group for group in groups if group["params"]], **options)


def build_schedule(optimizer: torch.optim.Optimizer, args: Any, updates: int, role: Role = "policy") -> Any:
    """A role's learning-rate schedule, stepped once an update: that of `--lr_scheduler_type` for the policy.

    `--lr_scheduler_kwargs` go to the value model's schedule, too, where it is of the same type.

    Args:
        optimizer: whose rates it sets.
        args: `PPOConfig`; `warmup_steps` counts updates, or is a share of them when below 1.
        updates: in which the role trains.
        role: whose schedule it is.

    Raises:
        FourscoreError: the schedule does not take these arguments.
    """
    own = _of_role(args, role)
    try:
        return get_scheduler(
            own.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=own.get_warmup_steps(updates),
            num_training_steps=updates,
            scheduler_specific_kwargs=own.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        if own.lr_scheduler_type == args.lr_scheduler_type:
            raise FourscoreError(f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}") from error
        name = getattr(own.lr_scheduler_type, "value", own.lr_scheduler_type)
        raise FourscoreError(f"--value_lr_scheduler_type {name}: {error}") from error


def optimization(
    trained: dict[str, nn.Module], args: Any, given: tuple[Any, Any] = (None, None)
) -> tuple[dict[str, torch.optim.Optimizer], dict[str, Any]]:
    """An optimizer and a schedule for each role that trains, or the user's one for both.

    The policy's schedule is as long as it trains: `--value_warmup_updates` are no part of it, unless the value model
    goes by it, too.

    Args:
        trained: the roles, `policy` and `value`.
        args: `PPOConfig` whose batches are resolved.
        given: the user's optimizer over both roles and its schedule, None for what is to be built.

    Returns:
        optimizers and schedules; the user's own under `policy` alone.

    Raises:
        FourscoreError: the user's do not fit, or what is to be built cannot be.
    """
    optimizer, schedule = given
    if optimizer is None and schedule is not None:
        raise FourscoreError("optimizers: a schedule was given without the optimizer that it belongs to.")
    updates = args.num_total_batches or 1  # not known where the flags contradict each other
    if optimizer is None:
        roles: tuple[Role, ...] = ("policy", "value")
        lengths = {"policy": max(1, updates - args.value_warmup_updates), "value": updates}
        optimizers: dict[str, torch.optim.Optimizer] = {}
        schedules: dict[str, Any] = {}
        for role in roles:
            optimizers[role] = build_optimizer(trained[role], args, role)
            schedules[role] = build_schedule(optimizers[role], args, lengths[role], role)
        return optimizers, schedules
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, model in trained.items():
        if not any(id(p) in held for p in model.parameters() if p.requires_grad):
            raise FourscoreError(
                f"optimizers: the optimizer holds nothing that trains in the {name} model; the trainer makes "
                "adapters, fp32 copies and shards, so leave the optimizer out and set --optim."
            )
    pairs = (
        ("value_learning_rate", "learning_rate"),
        ("value_lr_scheduler_type", "lr_scheduler_type"),
        ("value_warmup_steps", "warmup_steps"),
    )
    if unused := [f"--{own}" for own, both in pairs if getattr(args, own) != getattr(args, both)]:
        logger.warning("%s without effect: one optimizer was given for both roles", ", ".join(unused))
    return {"policy": optimizer}, {"policy": schedule or build_schedule(optimizer, args, updates)}


def step_schedules(schedules: dict[str, Any], value_only: bool) -> dict[str, float]:
    """Set the learning rates of the next update.

    Args:
        schedules: by role, or the policy's for both.
        value_only: this update was the value model's alone; a schedule of the policy's own waits.

    Returns:
        this update's rates: `lr` of the policy, and `value/lr` where that is another schedule.
    """
    rates = {}
    for role, schedule in schedules.items():
        waits = value_only and role == "policy" and "value" in schedules
        rates["lr" if role == "policy" else "value/lr"] = 0.0 if waits else schedule.get_last_lr()[0]
        if not waits:
            schedule.step()
    return rates


def _of_role(args: Any, role: Role) -> Any:
    """`args` with the learning rate and schedule of a role under the policy's names."""
    if role == "policy":
        return args
    own = copy.copy(args)
    own.learning_rate, own.warmup_steps = args.value_learning_rate, args.value_warmup_steps
    own.lr_scheduler_type = args.value_lr_scheduler_type
    if own.lr_scheduler_type != args.lr_scheduler_type:
        own.lr_scheduler_kwargs = None
    return own

"""Optimizers and learning-rate schedules, as transformers' flags describe them."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from fourscore.errors import FourscoreError

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


def build_optimizer(model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """The optimizer that `--optim` names over what trains in `model`; vectors (biases, norms) do not decay.

    Args:
        model: policy or value model, on its device, sharded already if it is to be.
        args: `PPOConfig`.

    Raises:
        FourscoreError: its package is missing.
    """
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


def build_schedule(optimizer: torch.optim.Optimizer, args: Any, updates: int) -> Any:
    """The learning-rate schedule that `--lr_scheduler_type` names, stepped once an update.

    Args:
        optimizer: whose rates it sets.
        args: `PPOConfig`; `warmup_steps` counts updates, or is a share of them when below 1.
        updates: length of the run.

    Raises:
        FourscoreError: the schedule does not take these arguments.
    """
    try:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(updates),
            num_training_steps=updates,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise FourscoreError(f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}") from error

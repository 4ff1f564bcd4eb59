"""Optimizers and learning-rate schedules, as transformers' flags describe them."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from fourscore.errors import FourscoreError


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

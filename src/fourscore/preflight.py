"""Everything that can be known without weights, checked before any is read, and all of it said at once."""

import copy
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.integrations import get_reporting_integration_callbacks

from fourscore.data import load_prompts, longest_prompt, other_columns, read_prompts
from fourscore.errors import Findings, FourscoreError
from fourscore.models.checks import Inspected, check_length, inspect_models, is_targeted, linear_names, lora_config
from fourscore.parallel import is_sharded
from fourscore.ppo.optim import optimization, state_bytes
from fourscore.rewards.build import check_rewards
from fourscore.rollout.build import check_engine
from fourscore.runs import directory
from fourscore.runs.checkpoint import check_resumable

if TYPE_CHECKING:
    from datasets import Dataset

    from fourscore.config import ModelConfig, PPOConfig, ScriptArguments

FP32_BYTES = 4


@dataclass(frozen=True)
class Preflight:
    """What the checks have found, and what they have made on the way.

    Attributes:
        models: checkpoints, tokenizer and skeletons, as far as they could be had.
        train_dataset: tokenized prompts; None if they could not be had.
        eval_dataset: tokenized prompts; None without them.
        findings: errors and warnings. Only without errors is everything above there.
    """

    models: Inspected
    train_dataset: "Dataset | None"
    eval_dataset: "Dataset | None"
    findings: Findings


def preflight(
    script_args: "ScriptArguments",
    training_args: "PPOConfig",
    model_args: "ModelConfig",
    resume: str | bool | None = None,
    *,
    writes: bool = True,
) -> Preflight:
    """Check a run before any weights are read. Nothing is written, but for the cache of the prompts.

    Every process calls it.

    Args:
        script_args: where the prompts are.
        training_args: all settings; not changed.
        model_args: which checkpoints, and how they are to be loaded.
        resume: a checkpoint of a run, True for the last one in the output directory, or None for a new run.
        writes: the run is to start now, so its output directory, trackers and processes are looked at, too.
    """
    findings = Findings()
    args = copy.copy(training_args)
    models = inspect_models(model_args, args, findings)

    train = held_out = None
    with findings.collect():
        if models.tokenizer is None:
            read_prompts(script_args, args)
        else:
            train, held_out = load_prompts(script_args, args, models.tokenizer)
    with findings.collect():
        check_rewards(args, model_args, None if train is None else other_columns(train))
    with findings.collect():
        args.resolve_batches(1 if train is None else len(train), args.world_size or 1)
    longest = None
    if train is not None:
        longest = max(longest_prompt(dataset) for dataset in (train, held_out) if dataset is not None)
        check_lengths(models, longest, args.response_length, findings)

    if not writes:
        return Preflight(models, train, held_out, findings)
    _check_settings(args, findings)
    check_engine(args, model_args, models.sft, longest, findings)
    with findings.collect():
        directory.check(str(args.output_dir), resume)
        if resume and (folder := directory.last_checkpoint(str(args.output_dir)) if resume is True else Path(resume)):
            check_resumable(folder)
            if changed := directory.check_settings(folder, script_args, args, model_args):
                findings.warn(changed)
    with findings.collect():
        _check_disk(models, args, model_args, findings)
    return Preflight(models, train, held_out, findings)


def check_lengths(models: Inspected, longest: int, response_length: int, findings: Findings) -> None:
    """Hold the longest prompt and a full completion against the positions that models of the policy's tokens have.

    Args:
        models: the checkpoints.
        longest: tokens of the longest prompt.
        response_length: most tokens of a completion.
        findings: takes errors and warnings.
    """
    reads_tokens = [(models.sft, "policy"), (models.value, "value_model")]
    if models.reward_tokenizer is None:
        reads_tokens.insert(1, (models.reward, "reward_model"))
    for checkpoint, role in reads_tokens:
        skeleton = models.skeletons.get(role)
        if checkpoint is None or skeleton is None:
            continue
        names = [name for name, _ in skeleton.named_parameters()]
        with findings.collect():
            warning = check_length(checkpoint.named, checkpoint.config, names, longest, response_length)
            if warning is not None:
                findings.warn(warning)


def _check_settings(args: "PPOConfig", findings: Findings) -> None:
    """What else would stop the trainer when it starts, or at its very end."""
    with findings.collect():
        # Of no matter what: the packages must be there, and the arguments must be ones that they take.
        optimization({role: nn.Linear(1, 1) for role in ("policy", "value")}, args)
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        findings.error(f"--report_to {' '.join(args.report_to)}: {error}")
    if is_sharded(args) and args.world_size == 1:
        findings.error(
            "--fsdp needs more than one process: start with `accelerate launch --num_processes N`, or leave it out"
        )
    if args.push_to_hub:
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            findings.error("--push_to_hub true: HF_HUB_OFFLINE is set; unset it, or leave the flag out")
        elif not args.hub_token and not get_token():
            findings.error("--push_to_hub true: there is no token; log in with hf auth login, or pass --hub_token")


# ------------------------------------------------------------------------------------------------------------- disk


def _check_disk(models: Inspected, args: "PPOConfig", model_args: "ModelConfig", findings: Findings) -> None:
    """Hold the output directory and the disk below it against what the run will write."""
    there = Path(str(args.output_dir)).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        if there != Path(str(args.output_dir)).absolute():
            raise FourscoreError(f"--output_dir {args.output_dir}: {there} is a file; give another --output_dir")
        return
    if not os.access(there, os.W_OK | os.X_OK):
        raise FourscoreError(f"--output_dir {args.output_dir}: {there} is not yours to write in; give another")
    trained = trained_parameters(models, args, model_args)
    if trained is None:
        return
    free = shutil.disk_usage(there).free
    averaged, handed_over = args.ema_decay is not None, args.rollout_engine == "vllm"
    policy = trained_parameters(models, args, model_args, ("policy",)) if averaged or handed_over else 0
    copy = FP32_BYTES * (policy or 0)
    weights = trained * FP32_BYTES + (averaged + handed_over) * copy
    one = checkpoint_bytes(trained, args.optim.value, args.save_only_model) + averaged * copy
    kept = checkpoints_kept(args)
    where = f"--output_dir {args.output_dir}: the disk has {_size(free)} left"
    if max(weights, one if kept else 0) > free:
        what = f"a checkpoint takes {_size(one)}" if kept else f"the trained models take {_size(weights)}"
        raise FourscoreError(f"{where}, and {what}; free some space, use --use_peft, or give another --output_dir")
    if weights + kept * one > free:
        findings.warn(
            f"{where}, and {kept} checkpoints of {_size(one)} and the trained models take "
            f"{_size(weights + kept * one)}; pass --save_total_limit, --save_only_model or a larger --save_steps"
        )


def trained_parameters(
    models: Inspected,
    args: "PPOConfig",
    model_args: "ModelConfig",
    roles: tuple[str, ...] = ("policy", "value_model"),
) -> int | None:
    """How many parameters of policy and value model train, and so are saved; None if that is not known.

    Args:
        models: the skeletons.
        args: `--value_training`.
        model_args: the adapter.
        roles: skeletons to count.
    """
    total = 0
    try:
        config = lora_config(model_args)
    except FourscoreError:
        return None
    for role in roles:
        if role == "value_model" and args.share_value_backbone:
            continue  # a head on the policy
        model = models.skeletons.get(role)
        if model is None:
            return None
        if config is None or (role == "value_model" and args.value_training == "full"):
            total += sum(parameter.numel() for parameter in model.parameters())
            continue
        targets = config.target_modules
        if targets is None:
            defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            targets = defaults.get(getattr(model.config, "model_type", ""), ())
        elif targets == "all-linear":
            targets = linear_names(model)
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if is_targeted(targets, name) and weight is not None and weight.ndim == 2:
                total += config.r * sum(weight.shape)
            if is_targeted([*(config.modules_to_save or ()), "score"], name):
                total += sum(parameter.numel() for parameter in module.parameters())
    return total


def checkpoint_bytes(trained: int, optim: str, weights_only: bool) -> int:
    """Bytes of a checkpoint: fp32 weights of what trains, and the optimizer's state of it.

    Args:
        trained: parameters that train, in policy and value model together.
        optim: name of the optimizer, as in `--optim`.
        weights_only: `--save_only_model`.
    """
    return int(trained * (FP32_BYTES + (0 if weights_only else state_bytes(optim)[0])))


def checkpoints_kept(args: "PPOConfig") -> int:
    """The most checkpoints that lie on the disk at one time; the one too many is deleted after the next is whole.

    Args:
        args: with its batches resolved.
    """
    updates = args.num_total_batches or 0
    if args.save_strategy.value != "steps" or not updates:
        return 0
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * updates)
    count = math.ceil(updates / max(1, int(every)))  # the last update saves, too
    return min(count, args.save_total_limit + 1) if args.save_total_limit else count


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

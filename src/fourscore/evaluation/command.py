"""`fourscore eval`: what is compared with what, all that can be known before weights are read, and the comparison."""

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM

from fourscore import demo
from fourscore.config import ModelConfig, PPOConfig, ScriptArguments
from fourscore.data import load_held_out, longest_prompt, other_columns
from fourscore.errors import Findings, FourscoreError
from fourscore.evaluation.compare import Comparison, Settings, compare
from fourscore.evaluation.judge import PairJudge, load_judge
from fourscore.evaluation.report import as_json, print_comparison, sample_rows
from fourscore.flags import FlagParser, parse_ppo
from fourscore.models.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    Adapter,
    Checkpoint,
    find_checkpoint,
)
from fourscore.models.checks import build_skeleton, check_adapter_fits, check_policy, check_stop_token, inspect_models
from fourscore.models.layout import SFT_ADAPTER, frozen_dtype
from fourscore.models.loading import Frozen, load_frozen
from fourscore.models.tokenizer import ensure_pad_token, ensure_safe_pad
from fourscore.parallel import Parallel
from fourscore.preflight import check_lengths
from fourscore.rewards.build import build_rewards, check_rewards
from fourscore.rewards.function import Function
from fourscore.rewards.model import TokenModel, score
from fourscore.rewards.samples import Reward
from fourscore.rewards.scorer import distinct
from fourscore.rewards.text_model import TextModel
from fourscore.rollout.sampling import Sampling
from fourscore.runs import directory
from fourscore.runs.logs import set_up_logging
from fourscore.runs.metrics import JsonLines, write_json_atomic


@dataclass(frozen=True)
class Options:
    """The flags of `fourscore eval` beside those of `fourscore ppo`.

    Attributes:
        policy: folder or hub id of the policy.
        flag: what names it in messages.
        judge: where its function is, or None.
        json: file to write, or None.
        samples: pairs to show.
        max_prompts: only so many, from the first on; None: all.
        num_generations: completions of each prompt.
        temperature: of the sampling, 0 is greedy; None: that of the run.
    """

    policy: str
    flag: str
    judge: str | None
    json: Path | None
    samples: int
    max_prompts: int | None
    num_generations: int
    temperature: float | None

    @property
    def samples_file(self) -> Path | None:
        """Where all pairs are written: beside the JSON file."""
        return (
            None if self.json is None else self.json.with_name(f"{self.json.name.removesuffix('.json')}.samples.jsonl")
        )


@dataclass(frozen=True)
class Subject:
    """What is compared, before weights are read.

    Attributes:
        reference: the SFT checkpoint.
        policy: the trained one.
        reward: the reward checkpoint, if there is one.
        tokenizer: of all of them, with a pad token.
        prompts: tokenized.
        stop_ids: ids that end a completion.
        judge: None without one.
        reward_tokenizer: of a reward model that reads text.
    """

    reference: Frozen
    policy: Frozen
    reward: Checkpoint | None
    tokenizer: Any
    prompts: Dataset
    stop_ids: tuple[int, ...]
    judge: Function | PairJudge | None
    reward_tokenizer: Any | None = None


def run(argv: list[str]) -> int:
    """Compare a policy with its reference.

    Args:
        argv: the words after `fourscore eval`.

    Returns:
        the exit status.

    Raises:
        FourscoreError: a line for each thing that is wrong; before any weights are read where that can be.
    """
    options, flags, own = parse(argv)
    findings = Findings()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default", UserWarning)
        script_args, args, model_args = parse_ppo(flags, trains=False, own=own)
    for warning in said:
        findings.warn(str(warning.message))
    set_up_logging(args)
    subject = _check(options, script_args, args, model_args, findings)
    for line in findings.warnings:
        print("warning:", " ".join(line.split()), file=sys.stderr)
    found = _compare(options, subject, args, model_args)
    print_comparison(Console(width=100, highlight=False), found, *_headings(options, subject, args), options.samples)
    if options.json is not None:
        _write(options, found, script_args, args)
    return 0


# ------------------------------------------------------------------------------------------------------------- flags


def parse(argv: list[str]) -> tuple[Options, list[str], list[str]]:
    """Take the flags of `fourscore eval` apart from those of `fourscore ppo`, which a run directory adds its own to.

    Args:
        argv: the words after `fourscore eval`.

    Returns:
        what its own flags say, the words of the others, and the names of its own.

    Raises:
        FourscoreError: a value is out of range, there is no such run, or it has no policy yet; a line each.
    """
    run = None
    if argv and not argv[0].startswith("-"):
        run, argv = Path(argv[0]), argv[1:]
    parser = FlagParser()
    parser.add_argument("--policy_path")
    parser.add_argument("--checkpoint")
    parser.add_argument("--judge")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--max_prompts", type=int)
    parser.add_argument("--num_generations", type=int, default=1)
    parser.add_argument("--temperature", type=float)
    given, flags = parser.parse_known_args(argv)

    findings = Findings()
    for name, least in (("samples", 0), ("max_prompts", 1), ("num_generations", 1), ("temperature", 0)):
        value = getattr(given, name)
        if value is not None and not value >= least:
            findings.error(f"--{name} {value}: must be at least {least}")
    policy, flag = given.policy_path, "--policy_path"
    with findings.collect():
        _check_writable(given.json)
    with findings.collect():
        if run is not None:
            _check_alone(run, given.policy_path, flags)
            policy, flag = str(_trained_policy(run, given.checkpoint)), "policy"
            # Sharding is for training: one process holds the models here.
            flags = ["--config", str(run / directory.CONFIG), "--fsdp", "false", *flags]
        elif given.checkpoint is not None:
            raise FourscoreError(f"--checkpoint {given.checkpoint}: is one of a run; name the run directory first")
        elif policy is None:
            raise FourscoreError("there is nothing to evaluate: name a run directory, or a policy with --policy_path")
    findings.raise_errors()
    own = (given.judge, given.json, given.samples, given.max_prompts, given.num_generations, given.temperature)
    return Options(policy, flag, *own), flags, list(vars(given))


def _check_alone(run: Path, policy_path: str | None, flags: list[str]) -> None:
    if policy_path is not None:
        raise FourscoreError(
            f"--policy_path {policy_path}: {run} names the policy already; drop one of the two, or name a checkpoint "
            "of the run with --checkpoint"
        )
    if any(flag.split("=")[0] == "--config" for flag in flags):
        raise FourscoreError(f"--config: the flags of {run} are in its {directory.CONFIG}; drop one of the two")


def _trained_policy(run: Path, checkpoint: str | None) -> Path:
    """The folder of a run's policy, or of one of its checkpoints."""
    if not run.is_dir():
        raise FourscoreError(f"{run}: there is no such run directory")
    if not (run / directory.CONFIG).is_file():
        inside = (run.parent / directory.CONFIG).is_file()
        way_out = f"{run.parent} --checkpoint {run.name}" if inside else "the --output_dir of one, or --policy_path"
        raise FourscoreError(f"{run}: has no {directory.CONFIG}, so it is no run; give {way_out}")
    there = [found.name for found in directory.checkpoints(run)]
    if checkpoint is not None:
        if not (run / checkpoint).is_dir():
            raise FourscoreError(f"--checkpoint {checkpoint}: {run} has {', '.join(there) or 'no checkpoints'}")
        return run / checkpoint
    if not any((run / name).is_file() for name in (WEIGHTS, INDEX, ADAPTER_WEIGHTS)):
        way_out = f"evaluate its last checkpoint with --checkpoint {there[-1]}" if there else "let it come to its end"
        raise FourscoreError(f"{run}: the run has not saved its policy yet; {way_out}")
    return run


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise FourscoreError(f"--json {path}: is a folder; give a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FourscoreError(f"--json {path}: there is no folder {folder}; make it, or give another file")
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise FourscoreError(f"--json {path}: is not yours to write; give another file")


# --------------------------------------------------------------------------------------------- before weights are read


def _check(
    options: Options,
    script_args: ScriptArguments,
    args: PPOConfig,
    model_args: ModelConfig,
    findings: Findings,
) -> Subject:
    """Everything that can be known without weights.

    Raises:
        FourscoreError: a line for each thing that is wrong.
    """
    if (args.world_size or 1) > 1:
        findings.error("fourscore eval runs in one process: start it without a launcher")
    models = inspect_models(model_args, args, findings, trains=False)
    policy = None
    with findings.collect():
        policy = _inspect_policy(options, models.sft, model_args, findings)
    prompts: Dataset | None = None
    stop_ids: tuple[int, ...] = ()
    if models.tokenizer is not None:
        with findings.collect():
            prompts = load_held_out(script_args, args, models.tokenizer)
            prompts = prompts.select(range(min(len(prompts), options.max_prompts or len(prompts))))
            check_lengths(models, longest_prompt(prompts), args.response_length, findings)
        if models.sft is not None:
            with findings.collect():
                stop_ids = check_stop_token(args, models.tokenizer, models.sft.embedding_rows)
    columns = None if prompts is None else other_columns(prompts)
    with findings.collect():
        check_rewards(args, model_args, columns)
    judge = None
    if options.judge is not None:
        with findings.collect():
            judge = load_judge(options.judge)
            if isinstance(judge, Function) and columns is not None:
                judge.check(columns)
    findings.raise_errors()
    assert models.sft is not None and policy is not None and prompts is not None
    ensure_pad_token(models.tokenizer, models.sft.embedding_rows)
    if models.reward is not None and models.reward_tokenizer is None:
        ensure_safe_pad(models.reward.config, models.tokenizer)
    reference = Frozen(models.sft, frozen_dtype(models.sft, model_args))
    return Subject(
        reference, policy, models.reward, models.tokenizer, prompts, stop_ids, judge, models.reward_tokenizer
    )


def _inspect_policy(
    options: Options, sft: Checkpoint | None, model_args: ModelConfig, findings: Findings
) -> Frozen | None:
    """The policy as its files describe it: a whole model, an adapter, or one on top of the SFT checkpoint's adapter."""
    policy = find_checkpoint(options.flag, options.policy, model_args, findings)
    if policy is None:
        return None
    check_policy(policy)
    check_adapter_fits(policy, build_skeleton(policy, AutoModelForCausalLM, model_args))
    if sft is not None and policy.embedding_rows != sft.embedding_rows:
        raise FourscoreError(
            f"{policy.named}: has a vocabulary of {policy.embedding_rows}, {sft.named} one of {sft.embedding_rows}; "
            "give the SFT checkpoint that it was trained from"
        )
    if policy.adapter is None:
        # Trained weights as they are stored: in another type they might be what they were before.
        return Frozen(policy, frozen_dtype(policy, dataclasses.replace(model_args, dtype="auto")))
    on_top: Adapter | None = None
    below = Path(policy.adapter.path) / SFT_ADAPTER
    if (below / ADAPTER_CONFIG).is_file():
        on_top = policy.adapter
        policy = find_checkpoint(options.flag, str(below), model_args, findings)
        if policy is None:
            return None
    return Frozen(policy, frozen_dtype(policy, model_args), on_top)


# ------------------------------------------------------------------------------------------------------ the comparison


def _compare(options: Options, subject: Subject, args: PPOConfig, model_args: ModelConfig) -> Comparison:
    (reference, policy), reward_model = load_frozen(
        [subject.reference, subject.policy], subject.reward, model_args, args
    )
    dtypes = {p.dtype for model in (reference, policy) for p in model.parameters()}
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if args.bf16 or torch.bfloat16 in dtypes:
        autocast = partial(torch.autocast, args.device.type, dtype=torch.bfloat16)
    size = args.local_rollout_forward_batch_size
    model: Reward | None = None
    if subject.reward_tokenizer is not None:
        model = TextModel(reward_model, subject.reward_tokenizer, size)
    elif reward_model is not None:
        model = TokenModel(lambda experience: score(reward_model, experience, size))
    rewards = build_rewards(args, model, args.device)
    weights = args.reward_weights or [1.0] * len(rewards)
    names = distinct([reward.name for reward in rewards])
    return compare(
        {"reference": reference, "policy": policy},
        subject.prompts,
        subject.tokenizer,
        dict(zip(names, zip(rewards, weights, strict=True), strict=True)),
        subject.judge,
        Settings(
            sampling=Sampling.of(args, subject.tokenizer, subject.stop_ids, _temperature(options, args)),
            num_generations=options.num_generations,
            batch_size=args.per_device_eval_batch_size,
            logprob_temperature=_temperature(options, args) or args.temperature,
            seed=args.seed,
        ),
        autocast,
        Parallel.start(args),
    )


def _temperature(options: Options, args: PPOConfig) -> float:
    return args.temperature if options.temperature is None else options.temperature


def _headings(options: Options, subject: Subject, args: PPOConfig) -> tuple[str, list[str]]:
    """What stands above and below the table of measures."""
    temperature = _temperature(options, args)
    drawn = f"at temperature {temperature:g}, seed {args.seed}" if temperature else "greedy"
    prompts, each = len(subject.prompts), options.num_generations
    interval = "Wilson's" if each == 1 else "bootstrap over prompts"
    notes = [
        f"Policy: {options.policy}. Reference: {_shown(subject.reference.checkpoint.given)}.",
        f"± standard error over {prompts} prompts. [ ] 95 % interval: of differences Student's t, paired by prompt; "
        f"of wins {interval}, ties counting half.",
    ]
    if not temperature:
        notes.append("Greedy completions: the KL is their log-ratio, which is no estimate of the divergence.")
    return f"{prompts} prompts, {each} completion{'s' * (each > 1)} each, {drawn}", notes


def _shown(path: str) -> str:
    return "the SFT policy that ships with fourscore" if path == str(demo.POLICY) else path


def _write(options: Options, found: Comparison, script_args: ScriptArguments, args: PPOConfig) -> None:
    assert options.json is not None and options.samples_file is not None
    settings = {
        "policy": options.policy,
        "reference": args.sft_model_path,
        "reward_model": args.reward_model_path,
        "dataset": script_args.eval_dataset_name or script_args.dataset_name,
        "judge": options.judge,
        "num_generations": options.num_generations,
        "temperature": _temperature(options, args),
        "response_length": args.response_length,
        "seed": args.seed,
    }
    write_json_atomic(options.json, {"settings": settings} | as_json(found))
    options.samples_file.unlink(missing_ok=True)
    lines = JsonLines(options.samples_file)
    for row in sample_rows(found):
        lines.append(row)
    lines.close()

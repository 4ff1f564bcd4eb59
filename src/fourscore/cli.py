"""The command line: `fourscore ppo`, `fourscore plan`, `fourscore eval` and `fourscore demo`.

torch and transformers take seconds to import, so nothing here imports them before it must: `--help` prints a text that
is kept next to this file, and a typing error in the command name costs no wait.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from fourscore import __version__
from fourscore.errors import FourscoreError
from fourscore.flags import HELP_FILE, FlagParser, closest, parse_ppo, render_help

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig, ScriptArguments
    from fourscore.models.layout import Layout
    from fourscore.plan.estimate import Plan
    from fourscore.preflight import Preflight

_TOP_HELP = """\
usage: fourscore COMMAND [flags]

PPO RLHF: a policy, a reference policy, a reward model and a value model.

commands:
  ppo         train a policy; without flags, the checkpoints and prompts that ship with fourscore
  plan        say how much memory that takes, and whether it fits; reads no weights
  eval        compare a trained policy with its reference on held-out prompts
  demo        train the shipped policy for a few seeds and measure it against where it started

  --version   print the version
  --help      print this; fourscore ppo --help lists its flags
"""


_PLAN_HELP = """\
usage: fourscore plan [--json] [--world_size N] [--sharding none|fsdp] [flags of fourscore ppo]

Say how much memory a run takes, role by role and phase by phase, and whether it fits this machine. Configs, the headers
of safetensors files, the tokenizer and the prompts are read, but no weights; no GPU is needed.

  --json             one JSON object; sizes are bytes
  --world_size N     plan for so many processes (default: those of this run)
  --sharding NAME    none: every process holds all weights; fsdp: each a share (default: what the flags say)

fourscore ppo --help lists the other flags.
"""

_EVAL_HELP = """\
usage: fourscore eval RUN [flags]
       fourscore eval --policy_path PATH [flags]

Complete held-out prompts with a policy and with its reference, and compare the two: scores by each reward, wins, KL,
lengths, and what a judge of your own says. RUN is the --output_dir of fourscore ppo; its config.yaml names checkpoints,
prompts, sampling and rewards, and flags of fourscore ppo given here override it. Without a RUN they all are flags:
--policy_path against --sft_model_path, --reward_model_path, and --eval_dataset_name for the prompts.

  --checkpoint NAME         a checkpoint of the run, such as checkpoint-20, or policy_ema, its moving average
                            (default: the policy it ended with)
  --policy_path PATH        the policy, a checkpoint or an adapter, where there is no run
  --eval_dataset_name NAME  prompts (default: the run's, else the test split of its dataset)
  --num_generations N       completions of each prompt (default: 1)
  --temperature X           of the sampling; 0: greedy (default: the run's)
  --max_prompts N           the first N prompts only
  --seed N                  of the sampling (default: the run's)
  --judge PLACE             package.module:name or path/file.py:name, a function that scores completions or prefers
                            one of two
  --samples N               pairs to print (default: 5)
  --json FILE               write all measures, and all pairs to FILE's name with .samples.jsonl

docs/eval.md says what is measured and how a judge is called; fourscore ppo --help lists the other flags.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `fourscore`; default: those of this process.

    Returns:
        The exit status: 0 done, 2 bad input (a line on stderr for each thing that is wrong), 130 stopped with Ctrl-C.
    """
    # On some CPUs bitsandbytes says at every start that it lacks a kernel, of layers that are never made here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    arguments = sys.argv[1:] if argv is None else list(argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_TOP_HELP, end="")
        return 0
    if command == "--version":
        print(f"fourscore {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {"ppo": _ppo, "plan": _plan, "eval": _eval, "demo": _demo}
    try:
        if command.startswith("-"):
            raise FourscoreError(f"{command}: the command comes first, as in fourscore ppo {command}")
        if command not in commands:
            near = closest(command, commands) or f": there are {', '.join(commands)}"
            raise FourscoreError(f"there is no command {command!r}{near}; see fourscore --help")
        return commands[command](rest)
    except FourscoreError as error:
        _print_lines("error:", error.lines)
        return 2


def _print_lines(level: str, lines: Iterable[str]) -> None:
    for line in lines:
        print(level, " ".join(line.split()), file=sys.stderr)


def _demo(argv: list[str]) -> int:
    from fourscore.demo.run import main as run_demo

    try:
        return run_demo(argv) or 0
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _ppo(argv: list[str]) -> int:
    if "--help-all" in argv:
        print(render_help(all_flags=True), end="")
        return 0
    if "--help" in argv or "-h" in argv:
        print(HELP_FILE.read_text(encoding="utf-8"), end="")
        return 0
    output_dir = None
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default", UserWarning)
            script_args, training_args, model_args = parse_ppo(argv)
        _print_lines("warning:", dict.fromkeys(str(warning.message) for warning in said))
        output_dir = training_args.output_dir
        return _train(script_args, training_args, model_args)
    except KeyboardInterrupt:
        print(f"\n{_how_to_resume(output_dir)}", file=sys.stderr)
        return 130


def _plan(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(_PLAN_HELP, end="")
        return 0
    own = FlagParser()
    own.add_argument("--json", action="store_true")
    own.add_argument("--world_size", type=int)
    own.add_argument("--sharding", choices=("none", "fsdp"))
    options, rest = own.parse_known_args(argv)
    if options.world_size is not None and options.world_size < 1:
        raise FourscoreError(f"--world_size {options.world_size}: must be at least 1")
    # Standard output is for the plan alone.
    with redirect_stdout(sys.stderr):
        script_args, training_args, model_args = parse_ppo(rest, own=vars(options))
        from rich.console import Console

        from fourscore.plan.advice import advise
        from fourscore.plan.report import as_json, print_plan
        from fourscore.preflight import preflight

        checked = preflight(script_args, training_args, model_args, writes=False)
        _print_lines("warning:", checked.findings.warnings)
        checked.findings.raise_errors()
        plan = _make_plan(checked, training_args, model_args, world_size=options.world_size, sharding=options.sharding)
        advice = [] if plan.fits else advise(plan, training_args, model_args)
    if options.json:
        print(json.dumps(as_json(plan, advice), indent=2))
    else:
        print_plan(Console(width=100, highlight=False), plan, advice)
    return 0


def _eval(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(_EVAL_HELP, end="")
        return 0
    from fourscore.evaluation.command import run

    try:
        return run(argv)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _train(script_args: "ScriptArguments", training_args: "PPOConfig", model_args: "ModelConfig") -> int:
    from fourscore.models.loading import load_models
    from fourscore.ppo.trainer import PPOTrainer
    from fourscore.preflight import preflight
    from fourscore.runs.logs import set_up_logging

    set_up_logging(training_args)
    resume = _resume(training_args.resume_from_checkpoint)
    # Every process looks before any of them can write anything, so that all of them stop in the same way.
    checked = preflight(script_args, training_args, model_args, resume)
    if training_args.process_index == 0:
        _print_lines("warning:", checked.findings.warnings)
    checked.findings.raise_errors()
    assert checked.train_dataset is not None
    training_args.distributed_state.wait_for_everyone()
    fits, layout = _planned(checked, training_args, model_args)
    if not fits:
        return 2
    models = load_models(model_args, training_args, layout, checked.models)
    trainer = PPOTrainer(
        args=training_args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=checked.train_dataset,
        eval_dataset=checked.eval_dataset,
        reward_processing_class=models.reward_tokenizer,
        checked=True,
    )
    trainer.run_config = [script_args, training_args, model_args]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def _planned(
    checked: "Preflight", training_args: "PPOConfig", model_args: "ModelConfig"
) -> "tuple[bool, Layout | None]":
    """Print the plan in short, with advice on stderr if it does not fit; the main process decides for all.

    Returns:
        whether to go on, and the layout that the loader is to obey; None where it decides itself.
    """
    from accelerate.utils import broadcast_object_list

    from fourscore.plan.estimate import NoPlan, Plan

    decision: list[Any] = [None, None]
    plan: Plan | None = None
    if training_args.process_index == 0:
        try:
            plan = _make_plan(checked, training_args, model_args)
            decision = [_may_start(plan, training_args, model_args), training_args.gradient_checkpointing]
        except NoPlan as error:
            _print_lines("warning:", error.lines)
            decision = [True, training_args.gradient_checkpointing]
        except FourscoreError as error:
            decision = [error, None]
    broadcast_object_list(decision)
    if isinstance(decision[0], FourscoreError):
        raise decision[0]
    training_args.gradient_checkpointing = training_args.activation_checkpointing = decision[1]
    return bool(decision[0]), None if plan is None else plan.layout


def _make_plan(checked: "Preflight", training_args: "PPOConfig", model_args: "ModelConfig", **options: Any) -> "Plan":
    from fourscore.data import longest_prompt
    from fourscore.plan.estimate import plan_of_run

    prompt = None if checked.train_dataset is None else longest_prompt(checked.train_dataset)
    return plan_of_run(training_args, model_args, inspected=checked.models, prompt=prompt, **options)


def _may_start(plan: "Plan", training_args: "PPOConfig", model_args: "ModelConfig") -> bool:
    from fourscore.plan.advice import advise
    from fourscore.plan.report import advice_lines, short_form, verdict

    for line in short_form(plan):
        print(line)
    if plan.fits:
        return True
    if training_args.ignore_plan:
        print(f"warning: --ignore_plan, though {verdict(plan)}", file=sys.stderr)
        return True
    print(f"error: {verdict(plan)}", file=sys.stderr)
    for line in advice_lines(advise(plan, training_args, model_args)):
        print(f"  {line}", file=sys.stderr)
    print("  or start it all the same with --ignore_plan", file=sys.stderr)
    return False


def _resume(flag: str | None) -> str | bool | None:
    """What `--resume_from_checkpoint` says: a folder, True (the last checkpoint) or None."""
    if flag == "":
        raise FourscoreError("--resume_from_checkpoint: is empty; give a checkpoint or true, or leave it out")
    if flag is None or str(flag).lower() in ("false", "no", "0"):
        return None
    return True if str(flag).lower() in ("true", "yes", "1") else flag


def _how_to_resume(output_dir: str | None) -> str:
    if output_dir is not None:
        from fourscore.runs.checkpoint import resumable

        if found := resumable(output_dir):
            return f"Stopped. To go on from {found[-1]}: the same command with --resume_from_checkpoint {found[-1]}."
        if os.path.isdir(output_dir):
            return f"Stopped before the first checkpoint in {output_dir}: there is nothing to resume from."
    return "Stopped before the first update."

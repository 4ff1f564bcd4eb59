"""The command line: `fourscore ppo` and `fourscore demo`.

torch and transformers take seconds to import, so nothing here imports them before it must: `--help` prints a text that
is kept next to this file, and a typing error in the command name costs no wait.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fourscore import __version__
from fourscore.errors import FourscoreError
from fourscore.flags import HELP_FILE, closest, parse_ppo, render_help

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig, ScriptArguments

_TOP_HELP = """\
usage: fourscore COMMAND [flags]

PPO RLHF: a policy, a reference policy, a reward model and a value model.

commands:
  ppo         train a policy; without flags, the checkpoints and prompts that ship with fourscore
  demo        train the shipped policy for a few seeds and measure it against where it started

  --version   print the version
  --help      print this; fourscore ppo --help lists its flags
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `fourscore`; default: those of this process.

    Returns:
        The exit status: 0 done, 2 bad input (a line on stderr for each thing that is wrong), 130 stopped with Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_TOP_HELP, end="")
        return 0
    if command == "--version":
        print(f"fourscore {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {"ppo": _ppo, "demo": _demo}
    try:
        if command not in commands:
            raise FourscoreError(f"there is no command {command!r}{closest(command, commands)}; see fourscore --help")
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
        _train(script_args, training_args, model_args)
    except KeyboardInterrupt:
        print(f"\n{_how_to_resume(output_dir)}", file=sys.stderr)
        return 130
    return 0


def _train(script_args: "ScriptArguments", training_args: "PPOConfig", model_args: "ModelConfig") -> None:
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
    models = load_models(model_args, training_args, inspected=checked.models)
    trainer = PPOTrainer(
        args=training_args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=checked.train_dataset,
        eval_dataset=checked.eval_dataset,
    )
    trainer.run_config = [script_args, training_args, model_args]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def _resume(flag: str | None) -> str | bool | None:
    """What `--resume_from_checkpoint` says: a folder, True (the last checkpoint) or None."""
    if flag is None or str(flag).lower() in ("false", "no", "0"):
        return None
    return True if str(flag).lower() in ("true", "yes", "1") else flag


def _how_to_resume(output_dir: str | None) -> str:
    if output_dir is not None:
        from fourscore.runs import directory

        checkpoint = directory.last_checkpoint(output_dir)
        if checkpoint is not None:
            return f"Stopped. To go on from {checkpoint}: the same command with --resume_from_checkpoint true."
        if os.path.isdir(output_dir):
            return f"Stopped before the first checkpoint in {output_dir}: there is nothing to resume from."
    return "Stopped before the first update."

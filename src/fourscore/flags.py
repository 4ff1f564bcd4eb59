"""The flags of `fourscore ppo`: their parser, their help, and the configuration file.

torch and transformers take seconds to import, so nothing here imports them before it must.
"""

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fourscore import demo
from fourscore.config_fields import FIELDS, GROUPS, shown_default
from fourscore.errors import Findings, FourscoreError

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig, ScriptArguments

HELP_FILE = Path(__file__).with_name("help.txt")
"""What `fourscore ppo --help` prints; written by `python -m fourscore.flag_docs`, checked by a test."""

_EXAMPLES = """\
--help-all lists all flags, those inherited from transformers.TrainingArguments among them.

examples:
  fourscore ppo
  fourscore ppo --sft_model_path ./sft --reward_model_path ./reward --dataset_name prompts.jsonl
  accelerate launch --num_processes 8 -m fourscore ppo --config run.yaml --use_peft
"""

_HELP_GROUPS: dict[str, tuple[str, ...]] = {
    "Models": (
        "sft_model_path",
        "reward_model_path",
        "value_model_path",
        "freeze_layers",
        "share_value_backbone",
        "model_name_or_path",
        "model_revision",
        "dtype",
        "attn_implementation",
        "trust_remote_code",
        "allow_pickle",
        "allow_untrained_reward_head",
    ),
    "Data": (
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "eval_dataset_name",
        "prompt_column",
        "dataset_num_proc",
    ),
    "Rollout": (
        "response_length",
        "min_response_length",
        "num_generations",
        "temperature",
        "top_k",
        "top_p",
        "stop_token",
        "stop_token_id",
        "stop_strings",
        "max_prompt_length",
        "max_prompt_length_action",
        "local_rollout_forward_batch_size",
        "rollout_engine",
        "vllm_server_url",
        "vllm_python",
        "vllm_gpu_memory_utilization",
        "vllm_timeout",
        "vllm_retries",
        "pack_rollout_weights",
        "cuda_graphs",
    ),
    "Rewards": tuple(GROUPS["Rewards"]),
    "PPO": tuple(GROUPS["PPO"]),
    "Optimisation": (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "total_episodes",
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "value_learning_rate",
        "value_lr_scheduler_type",
        "value_warmup_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "value_max_grad_norm",
        "bf16",
        "gradient_checkpointing",
        "tokens_per_microbatch",
        "keep_freed_memory",
    ),
    "Run": (
        "output_dir",
        "config",
        "resume_from_checkpoint",
        "seed",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "eval_strategy",
        "eval_steps",
        "logging_steps",
        "num_sample_generations",
        "report_to",
        "run_name",
        "push_to_hub",
        "hub_model_id",
        "use_cpu",
        "ignore_plan",
        "profile",
    ),
    "PEFT and quantization": (
        "use_peft",
        "value_training",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_parameters",
        "lora_modules_to_save",
        "use_rslora",
        "use_dora",
        "model_adapter_name",
        "ref_adapter_name",
        "load_in_8bit",
        "load_in_4bit",
        "bnb_4bit_quant_type",
        "use_bnb_nested_quant",
        "bnb_4bit_quant_storage",
    ),
}

ELSEWHERE = {
    # transformers, TRL's other trainers and its older PPO
    "torch_dtype": "--dtype",
    "use_vllm": "--rollout_engine vllm",
    "resume": "--resume_from_checkpoint",
    "no_cuda": "--use_cpu",
    "overwrite_output_dir": "left to you: remove the folder, or give another --output_dir",
    "max_new_tokens": "--response_length",
    "max_completion_length": "--response_length",
    "base_model": "--sft_model_path",
    "truncate_token": "--stop_token",
    "truncate_token_id": "--stop_token_id",
    "non_eos_penalty": "--missing_eos_penalty",
    "penalty_reward_value": "--missing_eos_penalty, which is above 0 and taken off",
    "init_kl_coef": "--kl_coef",
    "adap_kl_ctrl": "--kl_target",
    "target": "--kl_target",
    "horizon": "--kl_horizon",
    "ppo_epochs": "--num_ppo_epochs",
    # OpenRLHF
    "pretrain": "--sft_model_path",
    "reward_pretrain": "--reward_model_path",
    "critic_pretrain": "--value_model_path",
    "remote_rm_url": "--reward_url",
    "prompt_data": "--dataset_name",
    "input_key": "--prompt_column",
    "prompt_max_len": "--max_prompt_length",
    "generate_max_len": "--response_length",
    "n_samples_per_prompt": "--num_generations",
    "actor_learning_rate": "--learning_rate",
    "critic_learning_rate": "--value_learning_rate",
    "eps_clip": "--cliprange",
    "value_clip": "--cliprange_value",
    "lambd": "--lam",
    "lora_rank": "--lora_r",
    "save_path": "--output_dir",
    "normalize_reward": "--normalize_scores",
}
"""Flags of other trainers, and what does here what they do there."""

_REFUSED = frozenset(name for name, note in FIELDS.items() if note.status == "refused")
_NO_BREAK = "\N{NO-BREAK SPACE}"
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


class FlagParser(argparse.ArgumentParser):
    """The flags that a command has beside those of `fourscore ppo`; raises where argparse prints and exits."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raises a `FourscoreError` of the message."""
        raise FourscoreError(_without_spellings(message))


def parse_ppo(
    argv: list[str], *, trains: bool = True, own: Iterable[str] = ()
) -> "tuple[ScriptArguments, PPOConfig, ModelConfig]":
    """Parse the flags of `fourscore ppo`, those of a `--config` file included; flags win over the file.

    Without a file, a model or a dataset, the recipe that ships with fourscore is the file.

    Args:
        argv: the flags.
        trains: False for a command that only computes: prompts may then be those to evaluate on alone.
        own: flags that the command has beside these, which a mistyped one may have been.

    Raises:
        FourscoreError: unknown flags or keys, values that do not fit, or flags that do not fit together; a line each.
    """
    parser = _build_parser()
    findings = Findings()
    given, unknown, wrong = _parsed(parser, argv, findings)
    _note_unknown(unknown, parser, own, findings)

    starting_points = ["model_name_or_path", "sft_model_path", "reward_model_path", "dataset_name"]
    if not trains:
        starting_points.append("eval_dataset_name")
    if given.config is None and not findings.errors and all(getattr(given, name) is None for name in starting_points):
        given.config = str(demo.RECIPE)
        if os.environ.get("RANK", "0") == "0":
            print(f"No models and no prompts named: using those that ship with fourscore ({demo.RECIPE.name}).")
    if given.config is not None:
        with findings.collect():
            parser.set_defaults(**_read_config(Path(given.config), parser, findings))
            given, *_ = _parsed(parser, argv, findings)
    if not findings.errors:  # what is missing may be what was mistyped
        with findings.collect():
            _check_together(given, trains)
    configs: list[Any] = []
    of_values = Findings()
    for dataclass_type in parser.dataclass_types:
        values = {field.name: getattr(given, field.name) for field in fields(dataclass_type) if field.init}
        with of_values.collect():
            try:
                configs.append(dataclass_type(**values))
            except FourscoreError:
                raise
            except (ValueError, OSError) as error:  # what transformers.TrainingArguments raises for bad values
                raise FourscoreError(str(error)) from error
    for line in of_values.errors:
        if not any(f"--{name} " in line for name in wrong):  # of which the default was taken
            findings.error(line)
    findings.raise_errors()
    script_args, training_args, model_args = configs
    return script_args, training_args, model_args


def _parsed(parser: Any, argv: list[str], findings: Findings) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The flags that there are, words that are none, and flags whose values do not fit, which keep their defaults."""
    wrong: dict[argparse.Action, tuple[Any, Any, Any]] = {}
    while True:
        try:
            given, unknown = parser.parse_known_args(argv)
            break
        except argparse.ArgumentError as error:
            findings.error(_without_spellings(str(error)))
            action = next((a for a in parser._actions if error.argument_name == "/".join(a.option_strings)), None)
            if action is None or action in wrong:
                findings.raise_errors()
                raise
            wrong[action] = action.type, action.choices, action.nargs
            action.type, action.choices, action.nargs = None, None, "*"  # on to what is wrong with others
    for action, (kind, choices, count) in wrong.items():
        action.type, action.choices, action.nargs = kind, choices, count
        setattr(given, action.dest, action.default)
    return given, unknown, [action.dest for action in wrong]


def _without_spellings(message: str) -> str:
    return re.sub(r"^argument (--\w+)(/\S+)?:", r"\1:", message)


def _note_unknown(unknown: list[str], parser: Any, own: Iterable[str], findings: Findings) -> None:
    if unknown and not unknown[0].startswith("-"):
        findings.error(f"{unknown[0]!r} belongs to no flag; see fourscore ppo --help")
    flags = [flag for action in parser._actions if action.dest not in _REFUSED for flag in action.option_strings]
    flags += [f"--{name}" for name in own]
    for word in unknown:
        if re.match(r"-\D", word):  # not the value of one, and no negative number
            name = word.split("=")[0]
            findings.error(f"there is no flag {name}{_meant(name, flags)}")


def _meant(word: str, flags: Iterable[str]) -> str:
    here = ELSEWHERE.get(word.lstrip("-").replace("-", "_"))
    return closest(word, flags) if here is None else f": here that is {here}"


def render_help(all_flags: bool = False) -> str:
    """The help of `fourscore ppo`, 100 columns wide.

    Args:
        all_flags: list inherited flags too, under the headings of `docs/config.md`.
    """
    actions: dict[str, argparse.Action] = {}
    for action in _build_parser()._actions:
        actions.setdefault(action.dest, action)
    groups = dict(_HELP_GROUPS)
    if all_flags:
        shown = {name for names in groups.values() for name in names}
        for title, notes in GROUPS.items():
            rest = tuple(name for name in notes if name not in shown)
            if rest:
                groups[f"{title}: more" if title in groups else title] = rest
        others = tuple(name for name in actions if name not in shown and name not in FIELDS)
        groups["Models and data: more"] = others

    formatter = _HelpFormatter("fourscore ppo")
    formatter.add_text("usage: fourscore ppo [--config FILE] [flags]")
    formatter.add_text("Train a policy with PPO. Every flag can be a key of the --config file; flags win.")
    for title, names in groups.items():
        formatter.start_section(title)
        formatter.add_arguments([_for_display(actions[name]) for name in names])
        formatter.end_section()
    return f"{formatter.format_help().replace(_NO_BREAK, ' ')}\n{_EXAMPLES}"


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's layout, with each flag in one spelling and one line where it can be."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {action.metavar or ''}".rstrip()


def _for_display(action: argparse.Action) -> argparse.Action:
    """A copy of a parser's action whose help ends with its choices and default."""
    note = FIELDS.get(action.dest)
    help_string = str(action.help) if note is None else note.help.replace("%", "%%")
    choices = [str(choice) for choice in action.choices or () if choice is not None]
    facts = [", ".join(choices)] if 0 < len(choices) <= 6 else []
    default = shown_default(action.dest, action.default)
    if default is not None and "(default: " not in help_string:
        facts.append(f"default:{_NO_BREAK}{default}".replace("%", "%%"))
    if facts:
        help_string = f"{help_string.removesuffix('.')} ({'; '.join(facts)})."
    help_string = help_string.replace("(default: ", f"(default:{_NO_BREAK}")
    flag = action.nargs == "?"
    if action.metavar:
        metavar = str(action.metavar)
    elif flag:
        metavar = "[BOOL]"
    elif choices:
        metavar = "NAME"
    else:
        metavar = (
            "BOOL" if getattr(action.type, "__name__", "") == "string_to_bool" else _METAVARS.get(action.type, "TEXT")
        )
        metavar = f"{metavar} ..." if action.nargs == "+" else metavar
    return argparse.Action(action.option_strings, action.dest, help=help_string, metavar=metavar)


def _build_parser() -> Any:
    from transformers import HfArgumentParser

    from fourscore.config import ModelConfig, PPOConfig, ScriptArguments

    kinds = (ScriptArguments, PPOConfig, ModelConfig)
    parser = HfArgumentParser(kinds, prog="fourscore ppo", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", help="YAML file of flags.")
    for action in parser._actions:
        if action.dest in ("logging_strategy", "eval_strategy", "save_strategy"):
            action.choices = ("no", "steps")
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const, action.metavar = "?", "true", "[FOLDER]"
    return parser


def _read_config(path: Path, parser: Any, findings: Findings) -> dict[str, Any]:
    """The flags in a YAML file, converted and checked as if they had been typed."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FourscoreError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FourscoreError(f"--config {path}: is not YAML ({error})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise FourscoreError(f"--config {path}: must be a mapping of flags to values")
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.dest != "config":
            actions.setdefault(action.dest, action)
    for key in [key for key in values if key not in actions]:
        findings.error(f"--config {path}: there is no flag {key}{_meant(str(key), actions.keys() - _REFUSED)}")
        del values[key]
    # A run's config.yaml has both names of these settings; without the newer one, a flag with the older one can win.
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if old in values and values.get(new) == values[old]:
            values.pop(new)
    converted = {}
    for key, value in values.items():
        with findings.collect():
            converted[key] = _convert(actions[key], value, path)
    return converted


def _convert(action: argparse.Action, value: Any, path: Path) -> Any:
    """One value of a configuration file, as argparse would make it of its text."""
    if value is None and action.default is not None and action.dest not in ("stop_token", "dtype"):
        raise FourscoreError(f"--config {path}: {action.dest} has no value")
    if value is None:
        return value
    if isinstance(value, dict):
        if not action.dest.endswith(("_kwargs", "_config")) and action.dest != "deepspeed":
            raise FourscoreError(f"--config {path}: {action.dest} takes one value, not a mapping")
        return value
    if isinstance(value, list):
        if action.nargs != "+" and action.dest != "report_to":
            raise FourscoreError(f"--config {path}: {action.dest} takes one value, not a list")
        return [_convert_one(action, item, path) for item in value]
    converted = _convert_one(action, value, path)
    return [converted] if action.nargs == "+" else converted


def _convert_one(action: argparse.Action, value: Any, path: Path) -> Any:
    convert = action.type if callable(action.type) else str
    try:
        converted = convert(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kinds: dict[Any, str] = {int: "a whole number", float: "a number"}
        kind = kinds.get(convert, "true or false")
        raise FourscoreError(f"--config {path}: {action.dest}: {value!r} is not {kind}") from error
    if action.choices is not None and converted not in action.choices:
        choices = ", ".join(str(choice) for choice in action.choices)
        raise FourscoreError(f"--config {path}: {action.dest}: {value!r} is not one of {choices}")
    return converted


def _check_together(given: argparse.Namespace, trains: bool) -> None:
    """Refuse flags that leave open which models or prompts are meant: the shipped ones go with each other only."""
    missing = [name for name in ("sft_model_path", "reward_model_path") if getattr(given, name) is None]
    if given.reward_funcs or given.reward_url:
        missing = [name for name in missing if name != "reward_model_path"]
    shipped = (None, str(demo.POLICY), str(demo.REWARD))
    named = [
        name
        for name in ("model_name_or_path", "sft_model_path", "reward_model_path", "value_model_path")
        if getattr(given, name) not in shipped
    ]
    if named and missing:
        flags = " and ".join(f"--{name}" for name in missing)
        why = f"--{named[-1]} is named"
        if named == ["model_name_or_path"]:
            why = "--model_name_or_path names the tokenizer only"
        hint = " (or --reward_funcs, or --reward_url)" if "reward_model_path" in missing else ""
        raise FourscoreError(f"{flags}{hint} must be named too: {why}")
    if named and given.dataset_name is None and (trains or given.eval_dataset_name is None):
        flag = "dataset_name" if trains else "eval_dataset_name"
        raise FourscoreError(f"--{flag} must be named too: the prompts for your models")
    if trains and (given.load_in_4bit or given.load_in_8bit) and not given.use_peft:
        bits = "4" if given.load_in_4bit else "8"
        raise FourscoreError(f"--load_in_{bits}bit: quantized weights cannot train, add --use_peft")


def closest(word: str, known: Iterable[str]) -> str:
    """`: did you mean X?` for the name nearest to `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {matches[0]}?" if matches else ""

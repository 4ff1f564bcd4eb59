"""The directory of a run: may it be used, what is its last checkpoint, with which settings was it made.

<output_dir>/
  config.yaml  metrics.jsonl  samples.jsonl  summary.json  README.md
  the trained policy and its tokenizer   value_model/
  checkpoint-<update>/
"""

import dataclasses
import os
import re
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from fourscore.config import DERIVED_FIELDS, ModelConfig
from fourscore.config_fields import FIELDS, GROUPS
from fourscore.errors import FourscoreError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
CARD = "README.md"
HANDED_OVER = ".rollout"
"""Folder of the weights that a rollout engine is given; of no use when the run has ended."""
SERVER_LOG = "vllm.log"
"""What a vLLM server prints that the run has started."""

# A checkpoint is written under another name and then renamed, so one with this name is complete.
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

_SECRETS = ("hub_token", "push_to_hub_token")
# These belong to one start of a run, not to its settings.
_OF_ONE_START = ("local_rank", "resume_from_checkpoint")

_MODELS = ("sft_model_path", "reward_model_path", "model_revision")
# Of the other groups, and of the other two dataclasses, what the numbers of a run depend on; length is free to grow.
_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
    "data_seed",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "prompt_column",
)
# And of these groups, what only says how, or what is shown.
_MEANS = (
    "vllm_server_url",
    "vllm_python",
    "vllm_gpu_memory_utilization",
    "vllm_timeout",
    "vllm_retries",
    "reward_timeout",
    "reward_retries",
    "reward_concurrency",
    "reward_batch_size",
    "local_rollout_forward_batch_size",
    "pack_rollout_weights",
    "cuda_graphs",
    "keep_freed_memory",
    "dataset_num_proc",
    "num_sample_generations",
)


def check(path: str | Path, resume: str | Path | bool | None) -> None:
    """Refuse an output directory that a new run would write over, or in which there is nothing to resume.

    Call it on one process, or on all before any of them writes. It changes nothing on disk.

    Args:
        path: The output directory; it need not exist.
        resume: `resume_from_checkpoint`: None or False for a new run, True for the last checkpoint in `path`, or the
            path of a checkpoint.

    Raises:
        FourscoreError: A new run and a directory with something in it; a resumed one and no run there, or no such
            checkpoint.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FourscoreError(f"--output_dir {path} is a file: give another --output_dir")
    entries = sorted({entry.name for entry in path.iterdir()} - {HANDED_OVER, SERVER_LOG}) if path.is_dir() else []
    if entries == [SAMPLES]:  # generate_completions() before train(): what the untrained policy writes
        entries = []

    if isinstance(resume, str | Path):
        if not Path(resume).is_dir():
            there = ", ".join(str(found) for found in checkpoints(path)) or "none"
            raise FourscoreError(
                f"--resume_from_checkpoint {resume}: no such checkpoint; checkpoints in {path}: {there}"
            )
        if _is_run(Path(resume)):
            last = last_checkpoint(resume)
            way_out = "it has none yet" if last is None else f"such as {last}, or true for the last of --output_dir"
            raise FourscoreError(f"--resume_from_checkpoint {resume}: is a run; name a checkpoint in it, {way_out}")
        # A checkpoint of another directory may start a run in a new one.
        if entries and not _is_run(path):
            raise FourscoreError(f"--output_dir {path} is not empty and holds no run: give another --output_dir")
    elif resume:
        if not _is_run(path):
            raise FourscoreError(f"--output_dir {path} holds no run to resume: leave --resume_from_checkpoint out")
    elif entries == [CONFIG]:
        raise FourscoreError(
            f"--output_dir {path} holds a run that has not finished an update yet ({CONFIG} is all there is): pass "
            "--resume_from_checkpoint true to start it over, or another --output_dir"
        )
    elif entries:
        more = ", ..." if len(entries) > 4 else ""
        raise FourscoreError(
            f"--output_dir {path} is not empty ({', '.join(entries[:4])}{more}): pass --resume_from_checkpoint true to "
            "go on with the run in it, or another --output_dir"
        )


def check_settings(checkpoint: str | Path, *configs: Any) -> str | None:
    """Hold the settings with which a run goes on from a checkpoint against those it had.

    Logging, saving, the length of the run and how things are computed may change.

    Args:
        checkpoint: its folder, in the directory of the run that wrote it.
        configs: dataclass instances, as for `write_config`.

    Returns:
        a warning that names what has changed, or None.

    Raises:
        FourscoreError: the models are others: the reference policy and the rewards would be, too.
    """
    run = Path(checkpoint).parent
    try:
        began = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(began, dict):
        return None
    now = _settings(*configs)
    # What is unset is not written; of a script's run no more than `PPOConfig` may be.
    known = [f.name for config in configs for f in dataclasses.fields(config) if f.name in began or f.default is None]
    names = [name for name in known if _counts(name)]
    changed = {name for name in names if not _same(began.get(name), now.get(name))}
    errors = [
        f"--{name} {now.get(name)}: the run in {run} began with {began.get(name)}, and would go on with another "
        f"reference or other rewards; name that one, or write where it is now into {run / CONFIG}"
        for name in _MODELS
        if name in changed
    ]
    if errors:
        raise FourscoreError(*errors)
    if not changed:
        return None
    said = ", ".join(f"--{name} {now.get(name)} (was {began.get(name)})" for name in names if name in changed)
    return f"the run in {run} goes on with other settings than before: {said}"


def _counts(name: str) -> bool:
    """Whether the numbers of a run depend on a setting."""
    if name in FIELDS:
        groups = ("Models", "Rewards", "Rollout", "PPO", "Optimisation")
        return name in _SETTINGS or (name not in _MEANS and any(name in GROUPS[group] for group in groups))
    return name in _SETTINGS or name in {field.name for field in dataclasses.fields(ModelConfig)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str) and os.path.exists(one) and os.path.exists(other):
        return os.path.realpath(one) == os.path.realpath(other)
    return one == other


def last_checkpoint(path: str | Path) -> Path | None:
    """The complete checkpoint of the latest update in a run directory, or None."""
    found = checkpoints(Path(path))
    return found[-1] if found else None


def checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints in a run directory, the earliest first."""
    if not path.is_dir():
        return []
    matches = [(_CHECKPOINT.fullmatch(entry.name), entry) for entry in path.iterdir() if entry.is_dir()]
    return [entry for _, entry in sorted((int(match[1]), entry) for match, entry in matches if match is not None)]


def write_config(path: str | Path, *configs: Any) -> None:
    """Write the settings of a run as YAML that `fourscore ppo --config` reads back into equal ones.

    Left out are secrets, `resume_from_checkpoint`, fields that follow from others or from the machine, fields that may
    only have their default, and unset ones.

    Args:
        path: The file.
        configs: Dataclass instances: `ScriptArguments`, `PPOConfig`, `ModelConfig`, or some of them.
    """
    text = yaml.safe_dump(_settings(*configs), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _settings(*configs: Any) -> dict[str, Any]:
    refused = (name for name, note in FIELDS.items() if note.status == "refused")
    left_out = {*_SECRETS, *_OF_ONE_START, *DERIVED_FIELDS, *refused}
    settings: dict[str, Any] = {}
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            derived = field.name == "total_episodes" and config.episodes_derived
            unset = value is None and field.default is None
            if field.init and not (derived or unset or field.name in left_out):
                settings[field.name] = _plain(value)
    return settings


def _plain(value: Any) -> Any:
    """`value` in types that YAML has."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / METRICS).is_file() or last_checkpoint(path) is not None

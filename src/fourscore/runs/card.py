"""The README.md of a run directory, which is the model card when the run goes to the hub."""

import dataclasses
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from fourscore import demo
from fourscore.config_fields import GROUPS
from fourscore.presets import FOLLOWS, PRESETS

if TYPE_CHECKING:
    from fourscore.config import PPOConfig

_HYPERPARAMETERS = (
    "total_episodes",
    "num_total_batches",
    "batch_size",
    "mini_batch_size",
    "num_ppo_epochs",
    "response_length",
    "stop_token",
    "stop_token_id",
    "temperature",
    "missing_eos_penalty",
    "max_prompt_length",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "max_grad_norm",
    "kl_coef",
    "kl_estimator",
    "cliprange",
    "cliprange_value",
    "vf_coef",
    "gamma",
    "lam",
    "whiten_rewards",
    "bf16",
    "seed",
)
_TOLD_APART = frozenset({"reward_funcs", "reward_url", "dataset_num_proc"})
"""Not in the table even when set: places on the machine that trained, and what says nothing of the model."""
_LIBRARIES = ("fourscore", "transformers", "torch", "peft", "datasets")


def model_card(args: "PPOConfig", info: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Write the card of a trained policy.

    Args:
        args: Settings of the run, with its batch sizes resolved.
        info: What `args` does not know, every key optional: `base_model` and `reward_model` (hub name or path, where
            they are not those that `args` names), `rewards` (names of rewards beside the reward model), `dataset` (hub
            name or path), `adapter` (bool: the saved policy is a PEFT adapter), `value_head` (bool: the value model is
            a head on the policy), `peft` (a mapping of LoRA settings to show).
        metrics: The last update's metrics. Those that are not a number are left out.

    Returns:
        Markdown with YAML front matter.
    """
    adapter = bool(info.get("adapter"))
    dataset = info.get("dataset")
    policy = str(info.get("base_model") or args.sft_model_path)
    reward = info.get("reward_model") or args.reward_model_path
    name = Path(str(args.output_dir)).resolve().name
    title = args.hub_model_id.split("/")[-1] if args.hub_model_id else name
    front_matter = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["ppo", "rlhf", "fourscore"],
        base_model=policy if _is_hub_name(policy) else None,
        datasets=[dataset] if dataset and _is_hub_name(dataset) else None,
        model_name=title,
    ).to_yaml()

    start = "The SFT policy that ships with fourscore" if policy == str(demo.POLICY) else f"`{_shown(policy)}`"
    judges = [f"`{name}`" for name in info.get("rewards") or ()]
    if reward:
        which = "that ships with fourscore" if str(reward) == str(demo.REWARD) else f"`{_shown(str(reward))}`"
        judges.insert(0, f"the reward model {which}")
    trained = f"{start} trained with PPO against {' and '.join(judges) or 'rewards of its own'}"
    if dataset:
        trained += f" on the prompts of `{_shown(dataset)}`"
    sections = [
        f"---\n{front_matter}\n---",
        f"# {title}",
        f"{trained}, by fourscore.",
        "## Use",
        _usage(args.hub_model_id or str(args.output_dir), adapter),
        "The folder `value_model` holds the value head, which stands on this model's last hidden states."
        if info.get("value_head")
        else "The folder `value_model` holds the value model that was trained beside it.",
        "## Hyperparameters",
        _table(("name", "value"), _hyperparameters(args, info)),
    ]
    numbers = {key: _number(value) for key, value in metrics.items() if _is_number(value)}
    if numbers:
        sections += ["## Metrics of the last update", _table(("metric", "value"), numbers)]
    sections += ["## Versions", _table(("library", "version"), {library: version(library) for library in _LIBRARIES})]
    return "\n\n".join(sections) + "\n"


def _usage(location: str, adapter: bool) -> str:
    package, auto_class = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    if adapter:
        imports = f"from {package} import {auto_class}\nfrom transformers import AutoTokenizer"
    else:
        imports = f"from {package} import {auto_class}, AutoTokenizer"
    return f"""```python
{imports}

name = {location!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = {auto_class}.from_pretrained(name)

inputs = tokenizer("A prompt like those it was trained on", return_tensors="pt")
output = model.generate(**inputs, do_sample=True, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""


def _hyperparameters(args: "PPOConfig", info: Mapping[str, Any]) -> dict[str, str]:
    values = {name: getattr(args, name) for name in _HYPERPARAMETERS}
    values |= {name: value for name, value in _unusual(args).items() if name not in values}
    values |= info.get("peft") or {}
    return {name: str(getattr(value, "value", value)) for name, value in values.items() if value is not None}


def _unusual(args: "PPOConfig") -> dict[str, Any]:
    """Settings of rewards, rollout and algorithm that are not what they are by default."""
    found = {}
    for field in dataclasses.fields(args):
        if field.name in _TOLD_APART or not any(field.name in GROUPS[group] for group in ("Rewards", "Rollout", "PPO")):
            continue
        usual = PRESETS["n_plus"].get(field.name, field.default)
        if field.name in FOLLOWS:
            usual = getattr(args, FOLLOWS[field.name])
        if getattr(args, field.name) != usual:
            found[field.name] = getattr(args, field.name)
    return found


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    lines += [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _is_hub_name(name: str) -> bool:
    return not Path(name).exists() and re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) is not None


def _shown(name: str) -> str:
    """A hub name as it is; of a local path its last part, for a card is read on other machines."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name

"""Where the advantage falls when one early token decides the reward: `make evidence-credit`.

A completion is right if its third token is an `a`, whatever stands around it. First the value model is trained alone,
and the advantages of fresh samples are looked at: they should fall on that token, where a constant baseline spreads
them over all. Then policy and value model are trained from nothing, with the reward on the last token and with the
same reward on the token that earned it: how many episodes does each need?
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from small import QUIET, make_config, make_policy, make_tokenizer, make_value_model
from transformers import TrainerCallback

from fourscore import PPOConfig, PPOTrainer
from fourscore.models.forward import completion_values, rectangle
from fourscore.ppo.advantages import gae

LETTERS = "abcdefgh"
LENGTH = 24
"""Tokens in every completion."""
DECISIVE = 2
"""Index of the token that the reward depends on."""
BATCH = 64
THRESHOLD = 0.8
WINDOW = 3
"""Updates over which success is averaged."""
AIM_RATIO = 0.5
AIM_FOCUS = 5

TOKENIZER = make_tokenizer(LETTERS)
TARGET = TOKENIZER.convert_tokens_to_ids("a")
ARMS: dict[str, dict[str, Any]] = {
    "per token": {"per_token": True},
    "terminal": {"per_token": False},
    "terminal, lam 1": {"per_token": False, "lam": 1.0},
}


def is_right(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for a right completion, else 0."""
    return [float(ids[DECISIVE] == TARGET) for ids in completion_ids]


def where_earned(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    """The same reward, on the token that earned it."""
    right = is_right(prompts, completion_ids)
    return [[r * (i == DECISIVE) for i in range(len(ids))] for r, ids in zip(right, completion_ids, strict=True)]


def trainer_for(seed: int, folder: str, reward_func: Callable, **flags: Any) -> PPOTrainer:
    """Policy and value model with random weights; `flags` are fields of `PPOConfig`."""
    config = make_config(TOKENIZER)
    settings: dict[str, Any] = {
        "seed": seed,
        "response_length": LENGTH,
        "stop_token": "none",
        "temperature": 1.0,
        "kl_coef": 0.0,
        "per_device_train_batch_size": BATCH,
        "local_rollout_forward_batch_size": 512,
        "per_device_eval_batch_size": 512,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    return PPOTrainer(
        args=PPOConfig(output_dir=folder, **(QUIET | settings | flags)),
        processing_class=TOKENIZER,
        model=make_policy(config, seed),
        ref_model=None,
        reward_model=None,
        reward_funcs=reward_func,
        value_model=make_value_model(config, seed + 1),
        train_dataset=Dataset.from_dict({"prompt": list(LETTERS) * 8}),
        eval_dataset=Dataset.from_dict({"prompt": list(LETTERS) * 64}),
    )


def advantages_by_position(seed: int, updates: int) -> dict[str, list[float]]:
    """Train the value model of a policy that stays as it is, then look at fresh samples.

    Returns:
        share of the summed squared advantages at each position, by baseline and lambda; and under `value right` and
        `value wrong` the mean value after each token of right and of wrong samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags: dict[str, Any] = {
            "max_steps": updates + 1,
            "value_warmup_updates": updates,
            "num_ppo_epochs": 2,
            "num_mini_batches": 4,
        }
        flags |= {"per_device_train_batch_size": 256, "value_learning_rate": 3e-3, "value_lr_scheduler_type": "linear"}
        trainer = trainer_for(seed, folder, is_right, **flags)
        trainer.add_callback(_StopAfter(updates))
        trainer.train()
        rows = trainer.complete_eval_prompts(1.0)
    samples = [torch.tensor(TOKENIZER(row["prompt"]).input_ids + row["completion_ids"]) for row in rows]
    lens = torch.full((len(rows),), LENGTH)
    with torch.no_grad():
        learned = completion_values(trainer.value_model, rectangle(samples, torch.ones_like(lens)))
    right = torch.tensor(is_right([row["prompt"] for row in rows], [row["completion_ids"] for row in rows]))
    rewards = torch.zeros(len(rows), LENGTH)
    rewards[:, -1] = right
    out = {}
    for name, values in (("learned", learned), ("constant", right.mean().expand(len(learned)))):
        for lam in (0.95, 1.0):
            advantages, _ = gae(rewards.flatten(), values, lens, 1.0, lam)
            squares = advantages.view(-1, LENGTH).square().sum(0)
            out[f"{name}, lam {lam}"] = (squares / squares.sum()).tolist()
    values = learned.view(-1, LENGTH)[:, DECISIVE + 1 :]
    out["value right"] = values[right == 1].mean(0).tolist()
    out["value wrong"] = values[right == 0].mean(0).tolist()
    return out


class _StopAfter(TrainerCallback):
    """Ends training after so many updates."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.updates


class _StopWhenLearned(TrainerCallback):
    """Ends training once the mean success of the last updates has reached the threshold."""

    def __init__(self) -> None:
        self.success: list[float] = []

    @property
    def reached(self) -> bool:
        return len(self.success) >= WINDOW and mean(self.success[-WINDOW:]) >= THRESHOLD

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.reached


def episodes_to_learn(seed: int, limit: int, per_token: bool, **flags: Any) -> tuple[int | None, list[float]]:
    """Train from nothing until the threshold.

    Returns:
        episodes, None if `limit` were not enough; and the success of each update.
    """
    watch = _StopWhenLearned()

    def rewards(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
        watch.success.append(mean(is_right(prompts, completion_ids)))
        return (where_earned if per_token else is_right)(prompts, completion_ids)

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(seed, folder, rewards, total_episodes=limit, **flags)
        trainer.add_callback(watch)
        trainer.train()
    return len(watch.success) * BATCH if watch.reached else None, watch.success


def main() -> None:
    """Train, print, compare with the aims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--value_updates", type=int, default=80)
    parser.add_argument("--limit", type=int, default=9600, help="most episodes of a run")
    parser.add_argument("--json", type=Path, help="where every single figure goes")
    options = parser.parse_args()
    console = Console(width=120)

    profiles = [advantages_by_position(seed, options.value_updates) for seed in options.seeds]
    table = Table(
        "baseline", "before", "at the token", "after", title="share of the squared advantages, mean over seeds"
    )
    at = {}
    for name in (key for key in profiles[0] if "lam" in key):
        shares = [mean(p[name][i] for p in profiles) for i in range(LENGTH)]
        at[name], after = shares[DECISIVE], sum(shares[DECISIVE + 1 :])
        table.add_row(name, f"{sum(shares[:DECISIVE]):.3f}", f"{at[name]:.3f}", f"{after:.3f}")
    console.print(table)
    for kind in ("right", "wrong"):
        values = [v for p in profiles for v in p[f"value {kind}"]]
        print(f"value after the token, {kind} samples: {mean(values):.2f}")

    table = Table("reward", "episodes, each seed", "median", title=f"episodes to a success of {THRESHOLD}")
    runs: list[dict[str, Any]] = []
    medians = {}
    for name, flags in ARMS.items():
        found = [episodes_to_learn(seed, options.limit, **flags) for seed in options.seeds]
        runs += [
            {"arm": name, "seed": seed, "episodes": episodes, "success": success}
            for seed, (episodes, success) in zip(options.seeds, found, strict=True)
        ]
        # A run that did not get there needs more than the limit: the ratio is then a bound.
        counts = [options.limit if episodes is None else episodes for episodes, _ in found]
        medians[name] = median(counts)
        shown = [f"> {options.limit}" if episodes is None else str(episodes) for episodes, _ in found]
        table.add_row(name, "  ".join(shown), f"{medians[name]:.0f}")
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"profiles": profiles, "runs": runs}, indent=1) + "\n")

    learned, constant = "learned, lam 0.95", "constant, lam 0.95"
    focus, ratio = at[learned] / at[constant], medians["per token"] / medians["terminal"]
    print(f"share at the token {focus:.1f} times that of a constant baseline (aim: at least {AIM_FOCUS})")
    print(f"episodes per token / terminal {ratio:.2f} (aim: at most {AIM_RATIO})")
    ok = focus >= AIM_FOCUS and ratio <= AIM_RATIO
    print("reached" if ok else "missed")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()

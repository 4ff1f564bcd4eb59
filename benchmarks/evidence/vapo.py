"""What each piece of VAPO does for long completions with a sparse reward: `make evidence-vapo`.

The task is to count down: from a number of 7 to 255, one token a number, to 0 and the EOS token, so 8 to 256 new
tokens. A completion is rewarded with 1 if it is right from the first token to the last, else with 0. The policy
learned from demonstrations that say "um" once in `SLIP` steps, so it gets short counts right at times and long ones
hardly ever.

Plain PPO (`--preset n_plus`) trains on it, VAPO (`--preset vapo`), and VAPO without each of its pieces, all with
equal learning rates and equal numbers of samples, the value model's warm-up included. Runs that are in the results
file are not made again.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from small import QUIET, make_config, make_policy, make_tokenizer, make_value_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from fourscore import PPOConfig, PPOTrainer
from fourscore.runs.metrics import read_json_lines

LONGEST = 256
"""New tokens, the EOS included."""
SHORTEST = 8
SLIP = 50
"""Steps to an `um`, on average."""
BINS = (64, 128, 192, 256)
UPDATES = 16
BATCH = 64
TOKENIZER = make_tokenizer([*(str(i) for i in range(LONGEST)), "um"])

EQUAL = {"learning_rate": 1e-3, "value_learning_rate": 3e-3, "kl_coef": 0.0}
PLAIN: dict[str, Any] = {"preset": "n_plus"} | EQUAL
VAPO: dict[str, Any] = {"preset": "vapo", "num_generations": 8, "value_warmup_updates": 4} | EQUAL
ARMS: dict[str, dict[str, Any] | None] = {
    "SFT policy": None,
    "plain (n_plus)": PLAIN,
    "vapo": VAPO,
    "plain, lam 1": PLAIN | {"lam": 1.0},
    "- value warm-up": VAPO | {"value_warmup_updates": 0},
    "- decoupled lambda": VAPO | {"lam_value": 0.95},
    "- length-adaptive lambda": VAPO | {"lam_alpha": 0.0},
    "- asymmetric clip": VAPO | {"cliprange_high": 0.2},
    "- token mean": VAPO | {"loss_aggregation": "sequence"},
    "- positive LM loss": VAPO | {"positive_lm_coef": 0.0},
    "- group sampling": VAPO | {"num_generations": 1},
}


def count_down(start: int) -> list[int]:
    """The right completion, token ids."""
    return [*TOKENIZER.convert_tokens_to_ids([str(i) for i in range(start - 1, -1, -1)]), TOKENIZER.eos_token_id]


def is_right(completion_ids: list[list[int]], start: list[int], **kwargs: Any) -> list[float]:
    """The reward: 1 for a right completion, else 0."""
    return [float(list(ids) == count_down(s)) for ids, s in zip(completion_ids, start, strict=True)]


def prompts(n: int, seed: int) -> Dataset:
    """Numbers to count down from, so that lengths are uniform."""
    numbers = random.Random(seed)
    starts = [numbers.randint(SHORTEST - 1, LONGEST - 1) for _ in range(n)]
    return Dataset.from_dict({"prompt": [str(s) for s in starts], "start": starts})


def demonstrate(numbers: random.Random) -> list[int]:
    """Prompt and completion of a demonstration, token ids."""
    shown = []
    for number in range(numbers.randint(SHORTEST - 1, LONGEST - 1), -1, -1):
        if shown and numbers.random() < 1 / SLIP:
            shown.append("um")
        shown.append(str(number))
    return [*TOKENIZER.convert_tokens_to_ids(shown), TOKENIZER.eos_token_id]


def supervised(folder: Path, steps: int = 150, batch: int = 32, learning_rate: float = 5e-3) -> None:
    """Learn from demonstrations and write the policy."""
    config = make_config(
        TOKENIZER, hidden_size=64, intermediate_size=128, max_position_embeddings=300, initializer_range=0.05
    )
    policy = make_policy(config, 0)
    optimizer = torch.optim.AdamW(policy.parameters(), learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 20) * (1 - i / steps))
    numbers = random.Random(0)
    for _ in range(steps):
        shown = [torch.tensor(demonstrate(numbers)) for _ in range(batch)]
        ids = pad_sequence(shown, batch_first=True, padding_value=TOKENIZER.pad_token_id)
        targets = pad_sequence(shown, batch_first=True, padding_value=-100)[:, 1:]
        logits = policy(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    policy.save_pretrained(folder)


def run(arm: str, seed: int, sft: str, updates: int) -> dict[str, Any]:
    """Train one arm with one seed; what came of it on prompts that were not trained on."""
    torch.set_num_threads(1)
    policy = AutoModelForCausalLM.from_pretrained(sft)
    value_model = make_value_model(policy.config, seed)
    value_model.model.load_state_dict(policy.model.state_dict())
    settings: dict[str, Any] = {
        "max_steps": updates,
        "seed": seed,
        "response_length": LONGEST,
        "temperature": 1.0,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 128,
        "local_rollout_forward_batch_size": 128,
        "num_ppo_epochs": 1,
        "num_mini_batches": 4,
        "lr_scheduler_type": "constant",
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, **(QUIET | settings | (ARMS[arm] or {}))),
            processing_class=TOKENIZER,
            model=policy,
            ref_model=None,
            reward_model=None,
            reward_funcs=is_right,
            value_model=value_model,
            train_dataset=prompts(2048, seed),
            eval_dataset=prompts(256, 10_000),
        )
        curve = []
        if ARMS[arm] is not None:
            trainer.train()
            curve = [line["objective/scores"] for line in read_json_lines(Path(folder) / "metrics.jsonl")]
        found = evaluate(trainer)
    return {"arm": arm, "seed": seed, "updates": updates, "curve": curve} | found


def evaluate(trainer: PPOTrainer) -> dict[str, Any]:
    """Share of right completions: of all, and of each range of lengths up to those of `BINS`."""
    starts = trainer.eval_dataset["start"]
    rows = trainer.complete_eval_prompts(1.0)
    right = is_right([row["completion_ids"] for row in rows], starts)
    bins: dict[int, list[float]] = {limit: [] for limit in BINS}
    for start, each in zip(starts, right, strict=True):
        bins[next(limit for limit in BINS if start + 1 <= limit)].append(each)
    return {"success": mean(right), "by_length": {str(limit): mean(each) for limit, each in bins.items()}}


def show(results: list[dict[str, Any]]) -> None:
    """Print a row an arm."""
    columns = ("mean ± sd", "95 % interval", "by length, up to 64, 128, 192, 256", "each seed")
    table = Table("", *columns, title="share of right completions of 256 prompts that were not trained on")
    for arm in ARMS:
        found = [r for r in sorted(results, key=lambda r: r["seed"]) if r["arm"] == arm]
        if not found:
            continue
        success = [each["success"] for each in found]
        shown, interval = f"{mean(success):.3f}", ""
        if len(success) > 1:
            half = _T95[len(success)] * stdev(success) / math.sqrt(len(success))
            shown += f" ± {stdev(success):.3f}"
            interval = f"{mean(success) - half:.3f} to {mean(success) + half:.3f}"
        each = " ".join(f"{s:.2f}" for s in success)
        table.add_row(arm, shown, interval, _bins(found), each)
    Console(width=130).print(table)


_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t, 97.5 %, by the number of seeds."""


def _bins(found: list[dict[str, Any]]) -> str:
    return " ".join(f"{mean(each['by_length'][str(limit)] for each in found):.2f}" for limit in BINS)


def main() -> None:
    """Train what is missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cache", type=Path, default=Path(".bench/evidence"), help="where the SFT policy goes")
    parser.add_argument("--json", type=Path, help="results, kept and gone on from (default: in the cache)")
    options = parser.parse_args()
    file = options.json or options.cache / "vapo.json"
    results = json.loads(file.read_text()) if file.exists() else []
    done = {(r["arm"], r["seed"], r["updates"]) for r in results}
    # All arms of a seed before the next seed, so that what is there at any time can be compared.
    todo = [(arm, s) for s in options.seeds for arm in options.arms if (arm, s, options.updates) not in done]
    sft = options.cache / "count-down-sft"
    if todo and not sft.exists():
        supervised(sft)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(run, arm, seed, str(sft), options.updates) for arm, seed in todo]
        for finished in as_completed(waiting):
            results.append(finished.result())
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
            last = results[-1]
            print(f"{last['arm']}, seed {last['seed']}: {last['success']:.3f}", flush=True)
    wanted = [r for r in results if r["seed"] in options.seeds and r["updates"] == options.updates]
    if not wanted:
        sys.exit("no results")
    show(wanted)


if __name__ == "__main__":
    main()

"""Where the time of an update goes, on the checkpoints that ship: `make bench`.

Runs a few updates in full and with LoRA, in turn, and prints medians over updates (the first is left out).
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from fourscore import demo
from fourscore.data import load_prompts
from fourscore.flags import parse_ppo
from fourscore.models.loading import load_models
from fourscore.ppo.trainer import PPOTrainer
from fourscore.runs.metrics import read_json_lines

COLUMNS = ("time/rollout_s", "time/scoring_s", "time/update_s", "time/total_s")


def run(folder: Path, updates: int, flags: list[str]) -> list[dict]:
    """Train for a few updates; returns the lines of `metrics.jsonl` but the first."""
    argv = ["--config", str(demo.RECIPE), "--output_dir", str(folder), "--max_steps", str(updates), *flags]
    script_args, args, model_args = parse_ppo([*argv, "--disable_tqdm", "true"])
    models = load_models(model_args, args)
    train, _ = load_prompts(script_args, args, models.tokenizer)
    PPOTrainer(
        args, models.tokenizer, models.policy, models.ref_policy, models.reward_model, train, models.value_model
    ).train()
    return read_json_lines(folder / "metrics.jsonl")[1:]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2, help="times that each variant runs, in turn")
    options = parser.parse_args()
    variants = {"full": [], "LoRA": ["--use_peft", "true", "--lora_target_modules", "all-linear"]}
    rows: dict[str, list[dict]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds):
            for name, flags in variants.items():
                rows[name] += run(Path(folder) / f"{name}-{i}", options.updates, flags)
    table = Table("", "rollout s", "scoring s", "update s", "total s", "tokens/s", title="medians over updates")
    for name, lines in rows.items():
        rate = median((r["tokens/prompt"] + r["tokens/completion"]) / r["time/total_s"] for r in lines)
        table.add_row(name, *(f"{median(r[c] for r in lines):.2f}" for c in COLUMNS), f"{rate:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()

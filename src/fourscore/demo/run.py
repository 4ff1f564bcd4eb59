"""`fourscore demo`: train the embedded default and show what PPO changed, on prompts it never trained on."""

import argparse
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from fourscore import demo
from fourscore.data import load_prompts
from fourscore.demo.evaluate import Measures, measure
from fourscore.errors import FourscoreError
from fourscore.flags import parse_ppo
from fourscore.models.loading import load_models
from fourscore.ppo.trainer import PPOTrainer
from fourscore.runs import directory
from fourscore.runs.logs import set_up_logging
from fourscore.runs.metrics import JsonLines, read_json_lines, write_json_atomic

SHOWN = 10
SCORE_STDS = 1.0
JUDGE_POINTS = 20.0


def main(argv: list[str]) -> int:
    """Run the demo once a seed.

    Args:
        argv: `--seeds N ...`, `--output_dir DIR`, and any flag of `fourscore ppo`.

    Returns:
        0 if every seed gained at least one standard deviation of the reference's scores and 20 points of positive
        completions, and a seed given twice ran the same way twice; else 1.
    """
    parser = argparse.ArgumentParser(
        prog="fourscore demo",
        description="Train the checkpoints that ship with fourscore and measure them on held-out prompts before and "
        "after. Flags of `fourscore ppo` work here, too.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="one run each; twice: compared")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    flags, rest = parser.parse_known_args(argv)
    if find_spec("vaderSentiment") is None:
        raise FourscoreError("fourscore demo needs its judge: pip install 'fourscore[demo]'.")
    console = Console()
    runs: dict[int, Path] = {}
    reached = True
    for i, seed in enumerate(flags.seeds):
        folder = flags.output_dir / (f"seed-{seed}" if seed not in runs else f"seed-{seed}-again-{i}")
        summary = run(seed, folder, rest, console)
        reached &= _print_verdict(console, summary)
        if seed in runs:
            same = _same_metrics(runs[seed], folder)
            reached &= same
            console.print(f"seed {seed} twice: metrics {'identical' if same else 'DIFFERENT'} but for times and memory")
        runs.setdefault(seed, folder)
    return 0 if reached else 1


def run(seed: int, folder: Path, flags: list[str], console: Console) -> dict[str, Any]:
    """Train with one seed.

    Args:
        seed: of everything drawn at random.
        folder: the run directory, new or empty.
        flags: flags of `fourscore ppo` that override the recipe.
        console: to print on.

    Returns:
        the content of `summary.json`.
    """
    argv = ["--config", str(demo.RECIPE), "--seed", str(seed), "--output_dir", str(folder), *flags]
    script_args, args, model_args = parse_ppo(argv)
    if args.resume_from_checkpoint:
        raise FourscoreError("fourscore demo does not resume: `fourscore ppo --resume_from_checkpoint true` does.")
    set_up_logging(args)
    directory.check(folder, None)
    models = load_models(model_args, args)
    train, _ = load_prompts(script_args, args, models.tokenizer)
    trainer = PPOTrainer(
        args=args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=train,
        eval_dataset=Dataset.from_list(read_json_lines(demo.PROMPTS_HELDOUT)),
    )
    trainer.run_config = [script_args, args, model_args]
    if trainer.parallel.is_main:
        console.print(
            f"four models, {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f}M parameters each: "
            f"{args.num_total_batches} updates of {args.batch_size} samples, seed {seed}"
        )
    before = trainer.complete_eval_prompts(args.temperature, with_kl=True)
    result = trainer.train()
    after = trainer.complete_eval_prompts(args.temperature, with_kl=True)
    trainer.save_model()
    was, now = measure(before), measure(after)
    summary = _summary(was, now, result.metrics["train_runtime"]) | {"seed": seed, "heldout_prompts": len(before)}
    if trainer.parallel.is_main:
        path = folder / "summary.json"
        write_json_atomic(path, json.loads(path.read_text()) | summary)
        file = JsonLines(folder / "samples.jsonl")
        for step, split, rows in ((0, "before", before), (args.num_total_batches, "after", after)):
            for row in rows:
                kept = {"prompt": row["prompt"], "completion": row["completion"], "score": row["scores"]}
                file.append({"step": step, "split": split} | kept)
        file.close()
        _print_samples(console, before, after)
        _print_measures(console, was, now, len(before))
        console.print(f"trained for {summary['train_seconds']:.0f} s; the run is in {folder}", highlight=False)
    return summary


def _summary(was: Measures, now: Measures, seconds: float) -> dict[str, Any]:
    names = {name: (getattr(was, name), getattr(now, name)) for name in asdict(was) if name != "kl"}
    flat = {
        f"{name}_{when}": value
        for name, pair in names.items()
        for when, value in zip(("before", "after"), pair, strict=True)
    }
    return flat | {"kl": now.kl, "train_seconds": seconds}


def _print_samples(console: Console, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    table = Table("prompt", "before", "after", title="held-out prompts, never trained on", show_lines=True)
    for a, b in list(zip(before, after, strict=True))[:SHOWN]:
        table.add_row(a["prompt"], *(f"{row['completion'].strip()}  [{row['scores']:+.1f}]" for row in (a, b)))
    console.print(table, markup=False)


def _print_measures(console: Console, was: Measures, now: Measures, n: int) -> None:
    table = Table("", "before", "after", title=f"{n} held-out prompts")
    rows: list[tuple[str, str, str]] = [
        ("reward model's score", f"{was.score:+.2f}", f"{now.score:+.2f}"),
        ("standard deviation of scores", f"{was.score_std:.2f}", f"{now.score_std:.2f}"),
        ("positive, says VADER", f"{was.judge_positive:.0%}", f"{now.judge_positive:.0%}"),
        ("KL to the reference (nats)", f"{was.kl:.1f}", f"{now.kl:.1f}"),
        ("distinct-2", f"{was.distinct_2:.2f}", f"{now.distinct_2:.2f}"),
        ("mean length (tokens)", f"{was.length:.1f}", f"{now.length:.1f}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_verdict(console: Console, summary: dict[str, Any]) -> bool:
    stds = (summary["score_after"] - summary["score_before"]) / summary["score_std_before"]
    points = 100 * (summary["judge_positive_after"] - summary["judge_positive_before"])
    reached = stds >= SCORE_STDS and points >= JUDGE_POINTS
    console.print(
        f"seed {summary['seed']}: score up {stds:.2f} standard deviations (aim: {SCORE_STDS:g}), positive up "
        f"{points:.0f} points (aim: {JUDGE_POINTS:g}), {'reached' if reached else 'NOT reached'}",
        highlight=False,
        soft_wrap=True,
    )
    return reached


def _same_metrics(one: Path, other: Path) -> bool:
    def lines(folder: Path) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if k != "eps" and not k.startswith(("time/", "memory/"))}
            for row in read_json_lines(folder / "metrics.jsonl")
        ]

    return lines(one) == lines(other)

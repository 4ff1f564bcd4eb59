"""What details of the N+ recipe are worth on the checkpoints that ship: `make evidence-ablations`.

Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031). Every arm is the shipped recipe
with one thing changed; its full form is fourscore's arm of `learning.py`, whose runs count here, too. What was done
before is kept, so that a run that was cut off goes on.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

from statistics_of_runs import welch
from training import Run, parse_common, recipe, results_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from side_by_side import Result, machine, new_table

FULL = "fourscore"
ARMS = {
    "advantages not whitened": {"changes": {"whiten_advantages": False}},
    "value model from the SFT checkpoint, fresh head": {"value": "sft"},
    "learning rate constant": {"changes": {"lr_scheduler_type": "constant"}},
    "rewards whitened": {"changes": {"whiten_rewards": True}},
    "Adam's epsilon 1e-5": {"changes": {"adam_epsilon": 1e-5}},
    "no EOS penalty": {"changes": {"missing_eos_penalty": None}},
    "gradients not clipped": {"changes": {"max_grad_norm": 0.0}},
}
FULL_SEEDS = (1, 2, 3, 4, 5)
"""`learning.py` makes these, so that they cost nothing here, whatever `--seeds` says of the other arms."""


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=20, choices=Run(FULL, 0).points, help="measure after so many")
    options = parse_common(parser)
    if options.from_json is None:
        print(machine())
    runs = [Run(FULL, seed) for seed in FULL_SEEDS]
    for seed in options.seeds:
        runs += [run_of(name, seed, options.updates) for name in ARMS]
    sft, *results = results_of(runs, {"fourscore": sys.executable}, options)
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result["name"], []).append(result)
    kl_coef = recipe()["kl_coef"]
    columns = ("seeds", "score", "KL", "entropy", "ended", "score - full", "objective - full")
    table = new_table(f"means over seeds after {options.updates} of 20 updates; differences with 95 %", *columns)
    full = figures(arms[FULL], options.updates, kl_coef)
    for name in (FULL, *ARMS):
        found = arms.get(FULL if name == FULL else run_of(name, 0, options.updates).name, [])
        if len(found) < 2:  # not made when the results of a file were
            continue
        values = figures(found, options.updates, kl_coef)
        row = [f"{mean(values[key]):.2f}" for key in ("score", "kl", "entropy")] + [f"{mean(values['ended']):.1%}"]
        if name != FULL:
            row += [str(welch(values[key], full[key])) for key in ("score", "objective")]
        table.add_row("the full recipe" if name == FULL else name, str(len(found)), *row)
    Console(width=200).print(table)
    start = sft["points"][0]
    print(f"the SFT policy: score {start['score']:.2f}, standard deviation {start['score_std']:.2f}")


def run_of(name: str, seed: int, updates: int) -> Run:
    """The run of an arm: as long as it is measured for, with the learning rates of the whole recipe."""
    return Run(f"{name.replace(' ', '-')}-{updates}", seed, points=(updates,), **ARMS[name])


def figures(results: list[Result], updates: int, kl_coef: float) -> dict[str, list[float]]:
    """Of the policy of each run after so many updates; "objective" is the score less what its KL costs."""
    points = [next(point for point in result["points"] if point["update"] == updates) for result in results]
    values = {key: [point[key] for point in points] for key in ("score", "kl", "entropy", "ended")}
    return values | {"objective": [point["score"] - kl_coef * point["kl"] for point in points]}


if __name__ == "__main__":
    main()

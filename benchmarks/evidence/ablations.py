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
POINTS = (10, 20)


def main() -> None:
    """Run, print."""
    options = parse_common(argparse.ArgumentParser(description=__doc__))
    if options.from_json is None:
        print(machine())
    runs = []
    for seed in options.seeds:
        runs.append(Run(FULL, seed))
        for name, parts in ARMS.items():
            runs.append(Run(name.replace(" ", "-"), seed, points=POINTS, **parts))
    sft, *results = results_of(runs, {"fourscore": sys.executable}, options)
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result["name"], []).append(result)
    kl_coef = recipe()["kl_coef"]
    full = {key: [figure(result, key, kl_coef) for result in arms[FULL]] for key in ("half", "score", "objective")}
    columns = ("score, update 10", "score", "KL", "ended", "score - full", "objective - full")
    table = new_table(f"means over {len(options.seeds)} seeds; differences with 95 %", "seeds", *columns)
    for name in (FULL, *ARMS):
        found = arms[name.replace(" ", "-")]
        values = {key: [figure(result, key, kl_coef) for result in found] for key in full}
        last = [result["points"][-1] for result in found]
        row = [f"{mean(values['half']):.2f}", f"{mean(values['score']):.2f}"]
        row += [f"{mean(point['kl'] for point in last):.2f}", f"{mean(point['ended'] for point in last):.1%}"]
        if name != FULL:
            row += [str(welch(values[key], full[key])) for key in ("score", "objective")]
        table.add_row("the full recipe" if name == FULL else name, str(len(found)), *row)
    Console(width=200).print(table)
    start = sft["points"][0]
    print(f"the SFT policy: score {start['score']:.2f}, standard deviation {start['score_std']:.2f}")


def figure(result: Result, key: str, kl_coef: float) -> float:
    """Of a run: "score" at its end, "half" the score after 10 updates, "objective" the score less what KL costs."""
    points = {point["update"]: point for point in result["points"]}
    if key == "half":
        return points[POINTS[0]]["score"]
    last = points[POINTS[-1]]
    return last["score"] - (kl_coef * last["kl"] if key == "objective" else 0.0)


if __name__ == "__main__":
    main()

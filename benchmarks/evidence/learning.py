"""Whether fourscore learns as much as TRL 1.12.0, on the checkpoints that ship: `make evidence-learning`.

Ten seeds each, equal flags, episodes and optimizer steps; one evaluator for both. docs/evidence.md says how it is
measured. What was done before is kept, so that a run that was cut off goes on.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

from statistics_of_runs import Difference, score_at_kl, welch
from training import Run, parse_common, results_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from side_by_side import Result, machine, new_table
from trl_env import trl_python

MARGIN = 0.1
"""Standard deviations of the SFT policy's scores that fourscore may be below TRL."""
COLORS = {"fourscore": "tab:blue", "trl": "tab:orange"}
NAMES = {"fourscore": "fourscore", "trl": "TRL 1.12.0"}


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (needs matplotlib)")
    options = parse_common(parser, seeds=10)
    python = {"fourscore": sys.executable}
    if options.from_json is None:
        python["trl"] = trl_python(options.trl_python, options.cache)
        print(machine())
    runs = [Run(system, seed, system=system) for seed in options.seeds for system in ("fourscore", "trl")]
    sft, *results = results_of(runs, python, options)
    arms = {name: [sft["points"] + r["points"] for r in results if r["name"] == name] for name in NAMES}
    compare(sft["points"][0]["score_std"], arms)
    if options.plot is not None:
        plot(options.plot, arms)


def compare(deviation: float, arms: dict[str, list[list[Result]]]) -> None:
    """Print both arms' figures, differences and the verdict.

    Args:
        deviation: standard deviation of the SFT policy's scores over samples.
        arms: the points of every run, the SFT policy's first.
    """
    common = min(max(point["kl"] for point in points) for runs in arms.values() for points in runs)
    figures = {"final score": [[points[-1]["score"] for points in runs] for runs in arms.values()]}
    for share in (0.25, 0.5, 1.0):
        level = share * common
        figures[f"score at a KL of {level:.2f}"] = [
            [score_at_kl(points, level) for points in runs] for runs in arms.values()
        ]
    figures["final KL"] = [[points[-1]["kl"] for points in runs] for runs in arms.values()]
    title = f"mean ± standard deviation over {[len(runs) for runs in arms.values()]} seeds"
    table = new_table(title, *(NAMES[name] for name in arms), "difference (95 %)")
    verdicts = []
    for name, (ours, theirs) in figures.items():
        difference = welch(ours, theirs)
        table.add_row(
            name, *(f"{mean(values):.2f} ± {stdev(values):.2f}" for values in (ours, theirs)), str(difference)
        )
        if "score" in name:
            verdicts.append(verdict(name, difference, deviation))
    Console(width=160).print(table)
    print(f"the SFT policy's scores have a standard deviation of {deviation:.2f}; every run has a KL of {common:.2f}")
    print("\n".join(verdicts))


def verdict(name: str, difference: Difference, deviation: float) -> str:
    """Whether the lower end of the interval is above the margin."""
    low = difference.low / deviation
    return f"{name}: lower bound {low:+.3f} standard deviations, {'above' if low > -MARGIN else 'NOT above'} -{MARGIN}"


def plot(path: Path, arms: dict[str, list[list[Result]]]) -> None:
    """Score by update and by KL: every run thin, the mean of the seeds thick."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_update, by_kl) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, runs in arms.items():
        for points in runs:
            scores = [point["score"] for point in points]
            thin = {"color": COLORS[name], "linewidth": 0.7, "alpha": 0.5}
            by_update.plot([point["update"] for point in points], scores, **thin)
            by_kl.plot([point["kl"] for point in points], scores, marker=".", markersize=4, **thin)
        columns = list(zip(*runs, strict=True))
        means = {key: [mean(point[key] for point in column) for column in columns] for key in ("update", "kl", "score")}
        for axes, key in ((by_update, "update"), (by_kl, "kl")):
            axes.plot(means[key], means["score"], color=COLORS[name], linewidth=2, label=NAMES[name])
    by_update.set(xlabel="update (128 samples)", ylabel="score on held-out prompts")
    by_kl.set(xlabel="KL to the SFT policy (nats a completion)")
    by_update.legend()
    for axes in (by_update, by_kl):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

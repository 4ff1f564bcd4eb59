"""The chart of `speed.py`: where the time of an update goes, and the least that it could be."""

from pathlib import Path
from typing import Any

import matplotlib
from limits import Limits
from side_by_side import failure
from speed import Case, medians_of

matplotlib.use("agg")
from matplotlib import pyplot

COLORS = {"rollout": "tab:blue", "scoring": "tab:green", "update": "tab:orange"}


def draw(path: Path, measured: dict[str, Any]) -> None:
    """A bar for each system and one for the machine's limits, case by case; models apart, as their scales are."""
    best = Limits(**measured["limits"])
    models: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for entry in measured["cases"]:
        case = Case(**entry["case"])
        bars = models.setdefault(case.model, [])
        known = {system: results for system, results in entry["results"].items() if not failure(results)}
        for system, results in known.items():
            medians = medians_of(entry, results, best)
            bars.append((f"{case.training}, {case.workload}: {system}", {phase: medians[phase] for phase in COLORS}))
        if known:
            bars.append(("machine's least", {phase: medians[f"{phase} least"] for phase in COLORS}))
    heights = [len(bars) for bars in models.values()]
    figure, grid = pyplot.subplots(
        len(models), 1, figsize=(9, 1.2 * len(models) + 0.25 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axes, (model, bars) in zip(grid[:, 0], models.items(), strict=True):
        left = [0.0] * len(bars)
        for phase, color in COLORS.items():
            seconds = [bar[phase] for _, bar in bars]
            axes.barh(range(len(bars)), seconds, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set(title=model, xlabel="seconds an update")
        axes.grid(axis="x", alpha=0.3)
    grid[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

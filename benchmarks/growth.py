"""How time and memory of a PPO update grow with batch, completions, vocabulary and layers: `make bench-growth`.

Each of the four is doubled, again and again, from a small model on a small batch, and held against the work
(`work.py`): the exponent `a` of `time ~ work^a` is 1 where time grows as the work does, and less as long as something
fixed is most of it. Each point is a process of fourscore; medians over updates, the first is left out.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from checkpoints import LORA, random_pair
from rich.console import Console
from scripted import Lengths, Workload
from side_by_side import Work, failure, machine, middle, new_table, run_residents, write
from work import samples_of, sizes_of, whole_flops

BASE = Workload(4, 1, Lengths(16, 16), 16)
LAYERS, VOCABULARY = 4, 4096
"""Of the shape "small"."""
DIMENSIONS = ("batch", "completion tokens", "vocabulary", "layers")
FASTER = 1.1
"""An exponent above this one is called faster than the work: a doubling is then off by 7 %, more than the noise."""


@dataclass(frozen=True)
class Point:
    """One of the four is `size`, the others are as in the base."""

    dimension: str
    size: int

    def workload(self) -> Workload:
        """What an update works on."""
        if self.dimension == "batch":
            return replace(BASE, batch=self.size)
        return replace(BASE, response_length=self.size) if self.dimension == "completion tokens" else BASE

    def changes(self) -> dict[str, int]:
        """Of the model's shape."""
        field = {"vocabulary": "vocab_size", "layers": "num_hidden_layers"}.get(self.dimension)
        return {field: self.size} if field else {}


def points(doublings: int) -> Iterator[Point]:
    """From the base up, one dimension after the other."""
    base = dict(zip(DIMENSIONS, (BASE.batch, BASE.response_length, VOCABULARY, LAYERS), strict=True))
    for dimension, size in base.items():
        for doubling in range(doublings + 1):
            yield Point(dimension, size * 2**doubling)


def measure(point: Point, training: str, updates: int, cache: Path) -> dict[str, Any]:
    """Work in FLOP, time in s and memory in MiB of one point."""
    pair = random_pair(cache / "models", "small", torch.float32, **point.changes())
    workload = point.workload()
    job = {
        "system": "fourscore",
        "loading": "load_models",
        "policy": str(pair.policy.resolve()),
        "reward": str(pair.reward.resolve()),
        "lora": LORA if training == "lora" else None,
        "dtype": "float32",
        "updates": updates + 1,
        "microbatch": 4,
        "flags": {},
        "device": "cpu",
        "workload": asdict(workload),
        "small_warm_up": False,
    }
    name = f"{point.dimension} {point.size}"
    results = run_residents({name: Work(sys.executable, "speed_worker.py", job)}, updates)[name]
    if reason := failure(results):
        sys.exit(f"{name}: failed: {reason}")
    work = whole_flops(sizes_of(pair.policy), samples_of(results[0]), workload.epochs, training)
    memory = max(result["anon_above_imports"] for result in results)
    return asdict(point) | {"work": work, "seconds": middle(results, "whole_s"), "mib": memory}


def report(measured: dict[str, Any]) -> None:
    """Print the tables, and what grows faster than the work."""
    print(measured["machine"])
    faster = []
    exponents = new_table(
        "Exponents against the work: of all points, of the last doubling", "time", "last", "memory", "last"
    )
    for dimension in DIMENSIONS:
        rows = [row for row in measured["points"] if row["dimension"] == dimension]
        table = new_table(f"Growth with {dimension}", "work GFLOP", "s an update", "GFLOP/s", "MiB above imports")
        cells = []
        for row in rows:
            work = row["work"] / 1e9
            rate = f"{work / row['seconds']:.1f}"
            table.add_row(str(row["size"]), f"{work:.1f}", f"{row['seconds']:.3f}", rate, f"{row['mib']:.0f}")
        for what in ("seconds", "mib"):
            for some in (rows, rows[-2:]):
                cells.append(exponent(some, what))
            if cells[-1] > FASTER:
                faster.append(f"{'time' if what == 'seconds' else 'memory'} with {dimension} ({cells[-1]:.2f})")
        exponents.add_row(dimension, *(f"{cell:.2f}" for cell in cells))
        Console(width=100).print(table)
    Console(width=100).print(exponents)
    print(f"Faster than the work at the last doubling (above {FASTER}): {', '.join(faster) or 'nothing'}.")


def exponent(rows: list[dict[str, Any]], what: str) -> float:
    """The slope of the logarithm of time or memory over that of the work."""
    return linear_regression([math.log(row["work"]) for row in rows], [math.log(row[what]) for row in rows]).slope


def draw(path: Path, measured: dict[str, Any]) -> None:
    """Time and memory over the work, logarithms both."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, 2, figsize=(10, 4))
    for axes, what, label in zip(grid, ("seconds", "mib"), ("s an update", "MiB above imports"), strict=True):
        for dimension in DIMENSIONS:
            rows = [row for row in measured["points"] if row["dimension"] == dimension]
            work = [row["work"] / 1e9 for row in rows]
            axes.loglog(work, [row[what] for row in rows], marker=".", label=dimension)
        ends = [min(row["work"] for row in measured["points"]), max(row["work"] for row in measured["points"])]
        least = min(row[what] for row in measured["points"])
        line = [least, least * ends[1] / ends[0]]
        axes.loglog([end / 1e9 for end in ends], line, color="gray", linestyle=":", label="as the work")
        axes.set(xlabel="work an update (GFLOP)", ylabel=label)
        axes.grid(alpha=0.3, which="both")
    grid[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run or read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", choices=("full", "lora"), default="full")
    parser.add_argument("--doublings", type=int, default=4)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="for checkpoints")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--from_json", type=Path, help="run nothing, show what such a file holds")
    parser.add_argument("--plot", type=Path, help="draw a chart into this file (needs matplotlib)")
    options = parser.parse_args()
    if options.from_json is not None:
        measured = json.loads(options.from_json.read_text())[0]
    else:
        every = points(options.doublings)
        measured = {"machine": machine(), "training": options.training}
        measured["points"] = [measure(p, options.training, options.updates, options.cache) for p in every]
        write(options.json, [measured])
    report(measured)
    if options.plot is not None:
        draw(options.plot, measured)


if __name__ == "__main__":
    main()

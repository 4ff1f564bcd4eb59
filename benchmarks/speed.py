"""Time of whole PPO updates, against TRL 1.12.0 and against what the machine can do: `make bench`, `make bench-full`.

Each case has a worker of each system, which stay and take turns, an update at a time, on the same prompts; a hook makes
both draw completions of the same lengths. Without flags a selection of the cases runs, which takes less than 20 minutes
of two cores. `docs/benchmarks.md` says what the figures are.
"""

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import limits
import torch
from checkpoints import LORA, SHAPES, Pair, random_pair
from limits import Limits
from rich.console import Console
from scripted import WORKLOADS
from side_by_side import Result, Work, failure, machine, middle, new_table, run_residents, write
from trl_env import trl_python
from work import FACTOR, Sizes, least_seconds, samples_of, sizes_of

from fourscore import demo

EMBEDDED = "embedded"
SYSTEMS = ("TRL", "fourscore")
PHASES = ("rollout", "scoring", "update", "whole")
MICROBATCH = {"TRL": {"even": 16, "large": 16}, "fourscore": {"even": 16, "large": 16}}
"""Samples a forward and backward pass where it is not 4, by workload."""

AIMS = {("lora", "even"): 1.5, ("lora", "ragged"): 2.5, ("lora", "tldr"): 2.0}
AIMS |= {("full", "even"): 1.3, ("full", "ragged"): 2.0, ("full", "tldr"): 1.6}
"""TRL's time of a whole update by fourscore's."""
ROLLOUT_AIMS = {"ragged": 2.5}
"""TRL's time of a rollout by fourscore's."""
SHARE_AIMS = {("even", "update"): 65, ("even", "decode"): 50}
"""Percent of the least time."""


@dataclass(frozen=True)
class Case:
    """A model, what it works on, and what trains: "full", "lora" or "4bit"."""

    model: str
    workload: str
    training: str

    def __str__(self) -> str:
        return f"{self.model}, {self.training}, {self.workload}"


SELECTION = [
    *(Case(EMBEDDED, workload, training) for workload in ("even", "ragged") for training in ("lora", "full")),
    Case(EMBEDDED, "tldr", "lora"),
    Case("smollm2-135m", "ragged", "lora"),
]
ALL = {
    "cpu": {
        "models": [EMBEDDED, "smollm2-135m"],
        "workloads": ["even", "ragged", "long", "tldr"],
        "training": ["lora", "full"],
    },
    "cuda": {"models": ["llama-1b", "llama-8b"], "workloads": list(WORKLOADS), "training": ["lora", "4bit"]},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[EMBEDDED, *SHAPES])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--training", nargs="+", choices=FACTOR)
    parser.add_argument("--all", action="store_true", help="every case that the three flags above do not exclude")
    parser.add_argument("--pairs", type=int, default=5, help="updates of each system")
    parser.add_argument(
        "--microbatch",
        nargs=2,
        type=int,
        metavar=SYSTEMS,
        help=f"samples a forward and backward (default: 4, but {MICROBATCH})",
    )
    parser.add_argument("--cuda_graphs", choices=("none", "forward", "all"), default="forward", help="fourscore's flag")
    parser.add_argument("--apart", action="store_true", help="one worker at a time: for models that do not fit twice")
    parser.add_argument("--device", choices=ALL, default="cpu")
    parser.add_argument("--trl_python", help="a Python that has TRL 1.12.0 (default: set up in --cache)")
    parser.add_argument("--without_trl", action="store_true", help="measure fourscore alone")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="for checkpoints and TRL's environment")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--from_json", nargs="+", type=Path, help="run nothing, show what such files hold")
    parser.add_argument("--plot", type=Path, help="draw a chart into this file (needs matplotlib)")
    return parser.parse_args(arguments)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """What the flags ask for."""
    some = (options.models, options.workloads, options.training)
    if options.device == "cpu" and not options.all and some == (None, None, None):
        return SELECTION
    every = ALL[options.device]
    names = [getattr(options, name) or every[name] for name in ("models", "workloads", "training")]
    return [Case(*each) for each in itertools.product(*names)]


def pair_of(model: str, options: argparse.Namespace) -> Pair:
    """The model's checkpoints; random ones have files in the dtype that is computed in."""
    if model == EMBEDDED:
        return Pair(demo.POLICY, demo.REWARD)
    return random_pair(options.cache / "models", model, dtype_of(options))


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    """Computed in."""
    return torch.float32 if options.device == "cpu" else torch.bfloat16


def works_of(case: Case, pair: Pair, trl: str | None, options: argparse.Namespace) -> dict[str, Work]:
    """One for each system, TRL's first; without TRL's where it has none to compare with."""
    batch = WORKLOADS[case.workload].batch
    microbatch = {system: sizes.get(case.workload, 4) for system, sizes in MICROBATCH.items()}
    if options.microbatch:
        microbatch = dict(zip(SYSTEMS, options.microbatch, strict=True))
    job = {
        "policy": str(pair.policy.resolve()),
        "reward": str(pair.reward.resolve()),
        "lora": None if case.training == "full" else LORA,
        "load_in_4bit": case.training == "4bit",
        "dtype": str(dtype_of(options)).removeprefix("torch."),
        "updates": options.pairs + 1,
        "device": options.device,
        "workload": asdict(WORKLOADS[case.workload]),
        # The first update is to bring everything into memory. A GPU tunes itself to sizes, too.
        "small_warm_up": options.device == "cpu",
    }
    works = {}
    for system, python, name, loading in (
        ("TRL", trl, "trl", "separate"),
        ("fourscore", sys.executable, "fourscore", "load_models"),
    ):
        if python is not None and not (system == "TRL" and case.training == "4bit"):
            own = {"system": name, "loading": loading, "microbatch": min(batch, microbatch[system])}
            own["flags"] = {} if system == "TRL" else {"cuda_graphs": options.cuda_graphs}
            works[system] = Work(python, "speed_worker.py", own | job)
    return works


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases; what is done is written to `--json` at once."""
    trl = None if options.without_trl else trl_python(options.trl_python, options.cache)
    dtype = dtype_of(options)
    measured: dict[str, Any] = {"machine": f"{machine()}, load {os.getloadavg()[0]:.1f} before", "cases": []}
    best = limits.measure(options.device, dtype)
    for case in cases_of(options):
        print(f"\n{case}", file=sys.stderr)
        pair = pair_of(case.model, options)
        works = works_of(case, pair, trl, options)
        results = run_residents(works, options.pairs, apart=options.apart)
        best = best.best(limits.measure(options.device, dtype))
        measured["cases"].append(
            {
                "case": asdict(case),
                "sizes": asdict(sizes_of(pair.policy)),
                "bytes_a_weight": dtype.itemsize,
                "microbatch": {system: work.job["microbatch"] for system, work in works.items()},
                "results": results,
            }
        )
        measured["limits"] = asdict(best)
        write(options.json, [measured])
    return measured


def report(measured: dict[str, Any]) -> None:
    """Print the tables."""
    best = Limits(**measured["limits"])
    pairs = max(len(results) for case in measured["cases"] for results in case["results"].values())
    print(f"{measured['machine']}\n{best}")
    seconds = new_table(
        f"Seconds an update, medians of {pairs}; TRL's by fourscore's (lowest to highest of pairs)",
        *(f"{phase} s" for phase in PHASES),
        "peak MiB",
    )
    a_token = new_table("Milliseconds a token, padding not counted", *(f"{phase} ms" for phase in PHASES))
    shares = new_table("Percent of its time that the machine needs at least", "decode", *PHASES)
    failures = []
    for entry in measured["cases"]:
        case, results = Case(**entry["case"]), entry["results"]
        for system, each in results.items():
            name = f"{case}: {system}"
            if reason := failure(each):
                failures.append(f"{name}: failed: {reason}")
                continue
            medians = medians_of(entry, each, best)
            seconds.add_row(name, *(f"{medians[phase]:.2f}" for phase in PHASES), f"{medians['peak']:.0f}")
            a_token.add_row(name, *(f"{1000 * medians[phase] / medians['tokens']:.2f}" for phase in PHASES))
            aims = SHARE_AIMS if system == "fourscore" else {}
            shares.add_row(
                name,
                *(
                    f"{medians[f'{phase} share']:.0f}" + _aim(aims.get((case.workload, phase)))
                    for phase in ("decode", *PHASES)
                ),
            )
        if len(results) == len(SYSTEMS) and not any(failure(each) for each in results.values()):
            seconds.add_row(f"{case}: ratio", *ratios_of(case, results), _peak_ratio(results))
    console = Console(width=max(Console().width, 160), soft_wrap=True)
    for table in (seconds, a_token, shares):
        console.print(table)
        console.print()
    for line in failures:
        console.print(line, markup=False, highlight=False)


def medians_of(entry: dict[str, Any], results: list[Result], best: Limits) -> dict[str, float]:
    """Over updates: seconds of each phase; percent of that which is its least time; tokens; and the peak in MiB."""
    rows = []
    epochs = WORKLOADS[entry["case"]["workload"]].epochs
    for result in results:
        samples = samples_of(result)
        least = least_seconds(
            Sizes(**entry["sizes"]), samples, epochs, entry["case"]["training"], entry["bytes_a_weight"], best
        )
        took = {phase: result[f"{phase}_s"] for phase in PHASES}
        took["decode"] = result["rollout_s"] - result["read_s"]
        rows.append(
            took
            | {f"{phase} share": 100 * least[phase] / took[phase] for phase in took}
            | {f"{phase} least": least[phase] for phase in took}
            | {"tokens": samples.tokens}
        )
    peak = max(result["device"] or result["anon"] for result in results)
    return {name: middle(rows, name) for name in rows[0]} | {"peak": peak}


def ratios_of(case: Case, results: dict[str, list[Result]]) -> list[str]:
    """TRL's median by fourscore's of each phase, with its aim; lowest and highest of the pairs."""
    cells = []
    for phase in PHASES:
        theirs, ours = ([result[f"{phase}_s"] for result in results[system]] for system in SYSTEMS)
        pairs = [a / b for a, b in zip(theirs, ours, strict=True)]
        aim = {"whole": AIMS.get((case.training, case.workload)), "rollout": ROLLOUT_AIMS.get(case.workload)}.get(phase)
        ratio = f"{median(theirs) / median(ours):.2f}{_aim(aim)}"
        cells.append(f"{ratio}, {min(pairs):.2f} to {max(pairs):.2f}")
    return cells


def _peak_ratio(results: dict[str, list[Result]]) -> str:
    theirs, ours = (max(result["device"] or result["anon"] for result in results[system]) for system in SYSTEMS)
    return f"{theirs / ours:.2f}"


def _aim(aim: float | None) -> str:
    return "" if aim is None else f" (aim {aim:g})"


def main() -> None:
    """Run or read, print, draw."""
    options = parse()
    if options.from_json:
        files = [json.loads(path.read_text())[0] for path in options.from_json]
        measured = files[0] | {"cases": [case for file in files for case in file["cases"]]}
        best = [Limits(**file["limits"]) for file in files]
        measured["limits"] = asdict(Limits(max(b.flops for b in best), max(b.bandwidth for b in best)))
    else:
        measured = run(options)
    report(measured)
    if options.plot is not None:
        from speed_chart import draw

        draw(options.plot, measured)


if __name__ == "__main__":
    main()

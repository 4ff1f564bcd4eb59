"""Runs on the checkpoints that ship: trained by either system, measured by one evaluator, kept as small JSON files."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from side_by_side import Result, Work
from side_by_side import run as run_worker

from fourscore import demo

FINAL_COPIES = 8
OTHER_COPIES = 3
"""Completions of each held-out prompt, of the last policy of a run and of those before."""
SFT_COPIES = 8


def recipe() -> dict[str, Any]:
    """The recipe that ships, spelled so that TRL takes the same optimizer steps.

    TRL steps once every `gradient_accumulation_steps` microbatches, whatever the minibatches. Without accumulation both
    systems step once a minibatch, on 32 of the 128 samples of an update. `max_steps` is without effect in TRL.
    """
    flags = yaml.safe_load(demo.RECIPE.read_text())
    batch = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
    flags |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    flags |= {"total_episodes": flags.pop("max_steps") * batch, "stop_token": "eos", "num_sample_generations": 0}
    for name in ("output_dir", "save_strategy"):  # the worker's own
        del flags[name]
    return flags


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: of the arm that it belongs to.
        seed: of everything drawn at random.
        system: "fourscore" or "trl".
        changes: flags on top of the recipe.
        value: how the value model starts, "reward" or "sft".
        points: updates after which the policy is measured; the run stops after the last one (TRL's goes on).
    """

    name: str
    seed: int
    system: str = "fourscore"
    changes: dict[str, Any] = field(default_factory=dict)
    value: str = "reward"
    points: tuple[int, ...] = (2, 5, 10, 15, 20)


def parse_common(parser: argparse.ArgumentParser, seeds: int = 5) -> argparse.Namespace:
    """Adds the flags that the comparisons have in common, and parses; `seeds` is how many there are by default."""
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, seeds + 1)))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="for results, and TRL's environment")
    parser.add_argument("--trl_python", help="a Python that has TRL 1.12.0 (default: set up in --cache)")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--from_json", type=Path, help="run nothing, show what such a file holds")
    return parser.parse_args()


def results_of(runs: Sequence[Run], python: dict[str, str], options: argparse.Namespace) -> list[Result]:
    """What each run came to, the SFT policy's measurement first; runs that have a result already are not run again.

    Args:
        runs: to make.
        python: the interpreter of each system.
        options: of `parse_common`.
    """
    if options.from_json is not None:
        return json.loads(options.from_json.read_text())
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = (options.cache / "evidence").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = [_sft(folder), *pool.map(lambda run: _result(run, python[run.system], folder), runs)]
    if options.json is not None:
        options.json.write_text("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n")
    return results


def _result(run: Run, python: str, folder: Path) -> Result:
    """Of one run, from its file or made now."""
    path = folder / f"{run.name}-{run.seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    print(f"{run.name}, seed {run.seed} ...", file=sys.stderr, flush=True)
    place = folder / f"{run.name}-{run.seed}"
    shutil.rmtree(place, ignore_errors=True)  # left by a run that was cut off
    flags = recipe() | {"seed": run.seed} | run.changes
    job = {"system": run.system, "policy": str(demo.POLICY), "reward": str(demo.REWARD), "flags": flags}
    job |= {"prompts": str(demo.PROMPTS_TRAIN), "value": run.value, "keep": run.points, "folder": str(place)}
    trained = _work(python, "train_worker.py", job)
    copies = [OTHER_COPIES] * (len(run.points) - 1) + [FINAL_COPIES]
    paths = [str(place / "policies" / str(point)) for point in run.points]
    figures = _figures(list(zip(paths, copies, strict=True)), run.seed)
    points = [{"update": point} | figure for point, figure in zip(run.points, figures, strict=True)]
    result = asdict(run) | trained | {"points": points}
    _keep(path, result)
    shutil.rmtree(place)
    return result


def _sft(folder: Path) -> Result:
    """The measurement of the policy that all runs start from."""
    path = folder / "sft.json"
    if not path.exists():
        print("the SFT policy ...", file=sys.stderr, flush=True)
        figures = _figures([(str(demo.POLICY), SFT_COPIES)], 0)
        _keep(path, {"name": "sft", "points": [{"update": 0} | figures[0]]})
    return json.loads(path.read_text())


def _figures(policies: list[tuple[str, int]], seed: int) -> list[Result]:
    flags = recipe()
    job = {"policies": policies, "reference": str(demo.POLICY), "reward": str(demo.REWARD), "seed": seed}
    job |= {"prompts": str(demo.PROMPTS_HELDOUT)}
    job |= {name: flags[name] for name in ("temperature", "response_length")}
    return _work(sys.executable, "evaluate_worker.py", job)["figures"]


def _work(python: str, script: str, job: dict[str, Any]) -> Result:
    result = run_worker(Work(python, f"evidence/{script}", job))
    if "failed" in result:
        sys.exit(f"{script} failed: {result['failed']}")
    return result


def _keep(path: Path, result: Result) -> None:
    """Whole or not at all, so that what was cut off is made again."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(path)

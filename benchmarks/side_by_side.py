"""Runs workers in turn, in fresh processes or in ones that stay, and compares medians."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What one worker is to do.

    Attributes:
        python: the interpreter.
        script: a file of this folder; it takes `job` as JSON and prints its result as JSON in the last line.
        job: what to do.
        skip: why it is not done, or None.
    """

    python: str
    script: str
    job: dict[str, Any]
    skip: str | None = None


def parse_common(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Adds the flags that all comparisons have, and parses."""
    parser.add_argument("--policy", type=Path, help="an SFT checkpoint to measure instead; needs --reward")
    parser.add_argument("--reward", type=Path, help="a reward checkpoint to measure instead; needs --policy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trl_python", help="a Python that has TRL 1.12.0 (default: set up in --cache)")
    parser.add_argument("--without_trl", action="store_true", help="measure fourscore alone")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="for checkpoints and TRL's environment")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()
    if (options.policy is None) != (options.reward is None):
        parser.error("--policy and --reward go together")
    return options


def model_args_of(job: dict[str, Any]) -> Any:
    """Fourscore's `ModelConfig` of a worker's job."""
    from fourscore import ModelConfig

    lora = job["lora"] or {}
    return ModelConfig(
        dtype=job["dtype"],
        use_peft=bool(lora),
        lora_r=lora.get("r", 16),
        lora_alpha=lora.get("lora_alpha", 32),
        lora_target_modules=lora.get("target_modules"),
        load_in_4bit=job.get("load_in_4bit", False),
    )


def run(work: Work) -> Result:
    """The worker's result, or `failed` with what it complained about."""
    done = subprocess.run(_command(work), capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        return _failed(done.stderr, done.returncode)
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return result


class Resident:
    """A worker that stays, and does something for every line it is sent: `speed_worker.py`.

    It reads lines from its standard input, answers each with a line of JSON, and waits for the next one without taking
    processor time. It ends where its input does.
    """

    def __init__(self, work: Work) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            _command(work),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=_environment(),
        )

    def turn(self) -> Result:
        """What it answers, or `failed`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it ended, and says why below
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._stderr.seek(0)
            return _failed(self._stderr.read(), status)
        result: Result = json.loads(answer)
        return result

    def close(self) -> None:
        """Let it end, and wait for that."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


def run_residents(works: dict[str, Work], turns: int, *, apart: bool = False) -> dict[str, list[Result]]:
    """One turn of each worker after the other, `turns` times; a first turn of each is not among the results.

    Args:
        works: by name.
        turns: of each worker.
        apart: only one worker at a time, started again for every turn.
    """
    results: dict[str, list[Result]] = {name: [] for name in works}
    workers: dict[str, Resident] = {}
    try:
        for turn in range(turns + 1):
            for name, work in works.items():
                if failure(results[name]) or (apart and not turn):
                    continue
                print(f"{name} ({turn} of {turns})" if turn else f"{name} warms up", file=sys.stderr, flush=True)
                if name not in workers:
                    workers[name] = Resident(work)
                    if apart:
                        workers[name].turn()
                result = workers[name].turn()
                if turn or "failed" in result:
                    results[name].append(result)
                if apart or "failed" in result:
                    workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()
    return results


def _command(work: Work) -> list[str]:
    return [work.python, str(HERE / work.script), json.dumps(work.job)]


def _environment() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ


def _failed(stderr: str, status: int) -> Result:
    lines = stderr.strip().splitlines() or [f"exit status {status}"]
    # Some errors go on for several lines.
    said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return {"failed": (said or lines)[-1][:400]}


def run_in_turn(works: dict[str, Work], repetitions: int, before: Any = None) -> dict[str, list[Result]]:
    """Every worker `repetitions` times, one after the other so that all meet the same machine; failed ones once.

    Args:
        works: by name.
        repetitions: rounds.
        before: called with each work before it runs.
    """
    results: dict[str, list[Result]] = {name: [] for name in works}
    for i in range(repetitions):
        for name, work in works.items():
            if work.skip or any("failed" in result for result in results[name]):
                continue
            print(f"{name} ({i + 1} of {repetitions})", file=sys.stderr, flush=True)
            if before is not None:
                before(work)
            results[name].append(run(work))
    for name, work in works.items():
        if work.skip:
            results[name] = [{"failed": work.skip}]
    return results


def failure(results: Iterable[Result]) -> str | None:
    """Why a work has no result."""
    return next((result["failed"] for result in results if "failed" in result), None)


def middle(results: Iterable[Result], name: str) -> float:
    """Median over repetitions."""
    return median(result[name] for result in results)


def ratio(results: list[Result], baseline: list[Result] | None, name: str, aim: float | None = None) -> str:
    """Median by the baseline's median, and against what is aimed for, if anything is."""
    if baseline is None or failure(baseline):
        return ""
    base = middle(baseline, name)
    if not base:
        return ""
    value = middle(results, name) / base
    if aim is None:
        return f"{value:.2f}"
    # Three digits: what misses its aim is not to look as if it met it.
    return f"{value:.3f} ({'≤' if value <= aim else '>'} {aim:.2f})"


def available_mib() -> float:
    """Host memory that can be had without swapping."""
    line = next(row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemAvailable"))
    return int(line.split()[1]) / 1024


def new_table(title: str, *columns: str) -> Table:
    """One that Markdown shows as a table, too."""
    return Table("", *columns, title=title, box=box.MARKDOWN, title_justify="left")


def show(table: Table, results: dict[str, list[Result]]) -> None:
    """Print it, and below it why rows have no figures."""
    console = Console(width=max(Console().width, 160), soft_wrap=True)
    console.print(table)
    for name, measured in results.items():
        if reason := failure(measured):
            console.print(f"{name}: failed: {reason}", markup=False, highlight=False)


def write(path: Path | None, everything: list[dict[str, Any]]) -> None:
    """Every measurement, as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(everything, indent=1) + "\n")


def machine() -> str:
    """One line for the head of the tables."""
    names = [
        row.split(":")[1] for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")
    ]
    return f"{os.cpu_count()} x {names[0].strip() if names else 'CPU'}, {available_mib() / 1024:.0f} GiB of memory free"

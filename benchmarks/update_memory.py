"""Peak memory of whole PPO updates, against TRL 1.12.0 at the same batch: `make bench-memory`.

Batch 16, microbatches of 4, prompts of 24 to 32 tokens, 32 new tokens each, one PPO epoch, two updates: the second has
optimizer state. Every measurement is a fresh process; the systems take turns. Checkpoints have random weights, unless
--policy and --reward name others.
"""

import argparse
import sys
from dataclasses import asdict

import torch
from checkpoints import LORA, SHAPES, Pair, random_pair
from side_by_side import (
    Result,
    Work,
    failure,
    machine,
    middle,
    new_table,
    parse_common,
    ratio,
    run_in_turn,
    show,
    write,
)
from trl_env import trl_python

# Of TRL's peak.
AIMS = {"full": 0.70, "lora": 0.20}
# The systems: a name, who trains, who loads, and flags.
LEAST = {"pack_rollout_weights": False, "keep_freed_memory": False}
SYSTEMS: dict[str, tuple[str, str, dict[str, bool]]] = {
    "TRL": ("trl", "separate", {}),
    "fourscore, loaded as by TRL's script, least memory": ("fourscore", "separate", LEAST),
    "fourscore, load_models, least memory": ("fourscore", "load_models", LEAST),
    "fourscore, load_models": ("fourscore", "load_models", {}),
}
COLUMNS = ("peak MiB", "of TRL", "above imports", "of TRL", "while loading", "mapped MiB", "s an update", "of TRL")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", choices=AIMS, default=list(AIMS))
    parser.add_argument("--files", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", nargs="+", choices=("false", "true"), default=["false", "true"])
    parser.add_argument("--microbatch", type=int, default=4)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=1, help="peaks hardly differ between runs")
    return parse_common(parser)


def works_of(
    options: argparse.Namespace, pair: Pair, case: str, checkpointing: str, trl: str | None
) -> dict[str, Work]:
    """One for each system, TRL's first."""
    works = {}
    for name, (system, loading, flags) in SYSTEMS.items():
        if system == "trl" and trl is None:
            continue
        job = {
            "system": system,
            "loading": loading,
            "policy": str(pair.policy.resolve()),
            "reward": str(pair.reward.resolve()),
            "lora": LORA if case == "lora" else None,
            "dtype": "float32",
            "updates": options.updates,
            "batch": 16,
            "microbatch": options.microbatch,
            "flags": {"gradient_checkpointing": checkpointing == "true"} | flags,
            "device": options.device,
        }
        works[name] = Work(trl if system == "trl" and trl else sys.executable, "update_worker.py", job)
    return works


def table_of(title: str, results: dict[str, list[Result]], aim: float) -> None:
    """Prints one."""
    table = new_table(title, *COLUMNS)
    trl = results.get("TRL")
    for name, measured in results.items():
        if failure(measured):
            table.add_row(name, "failed")
            continue
        memory = "anon" if not middle(measured, "device") else "device"
        table.add_row(
            name,
            f"{middle(measured, memory):.0f}",
            "" if name == "TRL" else ratio(measured, trl, memory, aim),
            f"{middle(measured, 'anon_above_imports'):.0f}",
            "" if name == "TRL" else ratio(measured, trl, "anon_above_imports"),
            f"{middle(measured, 'load_anon'):.0f}",
            f"{middle(measured, 'file'):.0f}",
            f"{middle(measured, 'update_s'):.1f}",
            "" if name == "TRL" else ratio(measured, trl, "update_s"),
        )
    show(table, results)


def main() -> None:
    """Run and print."""
    options = parse()
    trl = None if options.without_trl else trl_python(options.trl_python, options.cache)
    if options.policy is not None:
        pairs = {"given files": Pair(options.policy, options.reward)}
    else:
        pairs = {
            f"{options.model}, {dtype} files": random_pair(
                options.cache / "models", options.model, getattr(torch, dtype)
            )
            for dtype in options.files
        }
    print(machine())
    everything = []
    for model, pair in pairs.items():
        for case in options.cases:
            for checkpointing in options.checkpointing:
                works = works_of(options, pair, case, checkpointing, trl)
                results = run_in_turn(works, options.repetitions)
                title = f"{model} in fp32, {case}" + (", --gradient_checkpointing true" * (checkpointing == "true"))
                table_of(title, results, AIMS[case])
                for name, work in works.items():
                    everything.append({"title": title, "name": name, **asdict(work), "results": results[name]})
    write(options.json, everything)


if __name__ == "__main__":
    main()

"""Time and memory of loading the four roles, against the calls of TRL 1.12's script: `make bench-load`.

Every measurement is a fresh process; the systems take turns. Checkpoints have random weights, stored in bf16, unless
--policy and --reward name others.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from checkpoints import LORA, SHAPES, Pair, adapter_pair, drop_from_page_cache, random_pair, read_into_page_cache
from side_by_side import (
    Result,
    Work,
    available_mib,
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

DTYPES = {"float32": "float32", "own": "auto"}
CASES = ("full", "lora")
# In fp32, of TRL's: memory and time of the whole. Rows of two backbones and of one.
AIMS = {"full": (None, 0.6), "lora": (0.67, 0.7), "lora, one base": (0.35, 0.7)}
COLUMNS = ("anon MiB", "of TRL", "load s", "of TRL", "to last forward s", "of TRL", "mapped MiB", "openings", "other")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["smollm2-135m", "llama-1b"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="asked for; own: the file's")
    parser.add_argument("--page_cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    # Few tokens: the forwards cost both systems the same, and with more of them little else would be seen.
    parser.add_argument(
        "--batch", nargs=2, type=int, metavar=("ROWS", "COLUMNS"), default=(1, 8), help="of the forwards"
    )
    parser.add_argument("--repetitions", type=int, help="default: 5, and 3 for models above 500M parameters")
    return parse_common(parser)


def works_of(options: argparse.Namespace, pair: Pair, dtype: str, trl: str | None) -> dict[str, Work]:
    """What is run for one pair of checkpoints: by name, TRL's first."""
    tiny = random_pair(options.cache / "models", "tiny", torch.bfloat16)
    models = options.cache / "models"

    def work(system: str, case: str, pair: Pair, warm_up: Pair) -> Work:
        job = {
            "system": system,
            "policy": str(pair.policy.resolve()),
            "reward": str(pair.reward.resolve()),
            "warm_up": [str(warm_up.policy.resolve()), str(warm_up.reward.resolve())],
            "dtype": DTYPES[dtype],
            "lora": None if case == "full" else LORA,
            "batch": options.batch,
            "device": options.device,
        }
        return Work(trl if system == "trl" and trl else sys.executable, "load_worker.py", job, too_large(case))

    parameters = pair.parameters()

    def too_large(case: str) -> str | None:
        copies = (4 if case == "full" else 3) if dtype == "float32" else 2
        needed = copies * parameters * 4 / 2**20 + 1024
        if options.device == "cuda" or needed < available_mib():
            return None
        return f"needs {needed / 1024:.0f} GiB of memory, {available_mib() / 1024:.0f} are free"

    works = {}
    for case in options.cases:
        if trl is not None:
            works[f"{case}, TRL"] = work("trl", case, pair, tiny)
        works[f"{case}, fourscore"] = work("fourscore", case, pair, tiny)
    if "lora" in options.cases:
        adapters, tiny_adapters = adapter_pair(models, pair.policy), adapter_pair(models, tiny.policy)
        works["lora, one base, fourscore"] = work("fourscore", "lora", adapters, tiny_adapters)
    return works


def table_of(title: str, results: dict[str, list[Result]], dtype: str) -> None:
    """Prints one."""
    table = new_table(title, *COLUMNS)
    for name, measured in results.items():
        if failure(measured):
            table.add_row(name, "failed")
            continue
        case, system = name.rsplit(", ", 1)
        trl = results.get(f"{case.split(',')[0]}, TRL") if system == "fourscore" else None
        memory_aim, time_aim = AIMS[case] if dtype == "float32" else (None, None)
        memory = "anon" if not middle(measured, "device") else "device"
        table.add_row(
            name,
            f"{middle(measured, memory):.0f}",
            ratio(measured, trl, memory, memory_aim),
            f"{middle(measured, 'load_s'):.2f}",
            ratio(measured, trl, "load_s"),
            f"{middle(measured, 'total_s'):.2f}",
            ratio(measured, trl, "total_s", time_aim),
            f"{middle(measured, 'file'):.0f}",
            f"{middle(measured, 'openings'):.0f}",
            f"{middle(measured, 'other_openings'):.0f}",
        )
    show(table, results)


def main() -> None:
    """Run and print."""
    options = parse()
    trl = None if options.without_trl else trl_python(options.trl_python, options.cache)
    if options.policy is not None:
        pairs = {"given": Pair(options.policy, options.reward)}
    else:
        pairs = {name: random_pair(options.cache / "models", name, torch.bfloat16) for name in options.models}
    print(machine())
    everything = []
    for model, pair in pairs.items():
        repetitions = options.repetitions or (5 if pair.parameters() < 5e8 else 3)
        for dtype in options.dtypes:
            for page_cache in options.page_cache:
                prepare = drop_from_page_cache if page_cache == "cold" else read_into_page_cache

                def before(work: Work, pair: Pair = pair, prepare=prepare) -> None:
                    own = Pair(Path(work.job["policy"]), Path(work.job["reward"]))
                    for file in {*pair.files(), *own.files()}:
                        prepare(file)

                works = works_of(options, pair, dtype, trl)
                results = run_in_turn(works, repetitions, before)
                title = f"{model}, asked for in {dtype} dtype, {page_cache} page cache, median of {repetitions}"
                table_of(title, results, dtype)
                for name, work in works.items():
                    everything.append({"title": title, "name": name, **asdict(work), "results": results[name]})
    write(options.json, everything)


if __name__ == "__main__":
    main()

"""Time of a rollout of ragged prompts and completions, against plain `generate`: `make bench-rollout`.

Prompts of log-uniform lengths, completions of uniform ones, the same for both; a hook makes the model's logits say what
is drawn, so both do the same work and must give the same tokens. They take turns in one process; medians of ratios.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoints import SHAPES, random_pair
from rich.console import Console
from rich.table import Table
from scripted import EOS, Batch, Script, prompt
from transformers import AutoModelForCausalLM, GenerationConfig

from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--at_once", type=int, help="prompts that are completed at a time (default: all)")
    parser.add_argument("--prompts", nargs=2, type=int, default=[8, 128], metavar=("LEAST", "MOST"))
    parser.add_argument("--response_length", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="for checkpoints")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    return parser.parse_args()


def plain(policy: Any, prompts: list[list[int]], response_length: int) -> list[list[int]]:
    """Completions by the policy's `generate`, prompts in one batch padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=policy.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=policy.device)
    config = GenerationConfig(
        max_new_tokens=response_length, do_sample=True, top_k=0, top_p=1.0, eos_token_id=EOS, pad_token_id=EOS
    )
    out = policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in out]


def workload(options: argparse.Namespace) -> Batch:
    """Prompts, and the length of each completion."""
    drawn = random.Random(0)
    least, most = (math.log(length) for length in options.prompts)
    prompts = [prompt(drawn, round(math.exp(drawn.uniform(least, most))), sample) for sample in range(options.batch)]
    return Batch(prompts, [drawn.randint(1, options.response_length) for _ in prompts])


@torch.no_grad()
def main() -> None:
    """Run and print."""
    options = parse()
    pair = random_pair(options.cache / "models", options.model, torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(pair.policy, dtype=torch.float32).to(options.device).eval()
    batch = workload(options)
    prompts, lengths = batch.prompts, batch.completion_lens
    script = Script(policy)
    at_once = options.at_once or options.batch
    sampling = Sampling(options.response_length, 1.0, (EOS,), EOS, at_once)
    groups = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
    systems = {
        "generate": lambda: [c for group in groups for c in plain(policy, group, options.response_length)],
        "fourscore, weights not packed": lambda: generate(policy, prompts, sampling, pack=False).completions(),
        "fourscore": lambda: generate(policy, prompts, sampling).completions(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    busy: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(options.pairs + 1):
        results = []
        for name, complete in systems.items():
            script.begin(batch)
            started, worked = time.perf_counter(), time.process_time()
            results.append(complete())
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - worked)
        assert results[0] == results[1] == results[2] and [len(c) for c in results[0]] == lengths
    lens = batch.prompt_lens()
    console = Console()
    console.print(
        f"{options.model}, {torch.get_num_threads()} threads: {len(prompts)} prompts of {min(lens)} to {max(lens)} "
        f"tokens, {at_once} at a time, {sum(lengths)} tokens of completions"
    )
    table = Table("", "seconds", "CPU seconds", "tokens/s")
    for name, times in seconds.items():
        middle = median(times)
        table.add_row(name, f"{middle:.2f}", f"{median(busy[name]):.2f}", f"{sum(lengths) / middle:.0f}")
    console.print(table)
    ratios: dict[str, list[float]] = {}
    for what, measured in (("time", seconds), ("CPU time", busy)):
        theirs, *ours = measured
        for name in ours:
            each = ratios[f"{name}: {what}"] = [a / b for a, b in zip(measured[name], measured[theirs], strict=True)]
            spread = f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
            console.print(f"{name}: {what}, of {theirs}'s: {spread}", soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "cpu_seconds": busy, "ratios": ratios}))


if __name__ == "__main__":
    main()

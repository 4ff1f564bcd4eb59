"""The same numbers as TRL 1.12's PPOTrainer, or different on purpose: `make evidence-parity`.

TRL's own trainer runs an update in its own environment and is recorded; fourscore then computes the same from the same
weights and samples. Prints a table of errors and a table of what differs, and fails if an error is above its limit.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    logging,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from side_by_side import Result, Work, machine, new_table, run, show, write
from trl_env import trl_python

LIMITS = {"float64": 1e-9, "float32": 5e-5}
VOCABULARY = 24
SAMPLES = 16
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
FLAGS: dict[str, Any] = {
    "per_device_train_batch_size": SAMPLES,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "total_episodes": SAMPLES,
    "num_ppo_epochs": 4,
    "response_length": 24,
    "stop_token": "eos",
    "temperature": 0.7,
    "missing_eos_penalty": 1.0,
    "learning_rate": 1e-3,
    "num_sample_generations": 0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
}
# Shaping that is not the default's: KL estimator k3, whitened rewards, a discount.
SHAPED = {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.95, "lam": 0.9, "temperature": 1.0, "kl_coef": 0.2}
TWO_MINIBATCHES = {
    "per_device_train_batch_size": SAMPLES // 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "max_grad_norm": 0.01,
}


@dataclass(frozen=True)
class Case:
    """One update.

    Attributes:
        tied: policy checkpoint with the output layer tied to the embedding.
        lora: adapter on the policy; else full fine-tuning.
        flags: beside `FLAGS`.
        noise: added to what trains, so that policy and reference differ.
        pad: TRL's pad token.
        config: of the policy, changed on loading.
        generation_config: of the policy, changed.
        prompts: in the dataset, of which the update takes `SAMPLES`.
    """

    tied: bool = True
    lora: bool = False
    flags: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.02
    pad: str = "[PAD]"
    config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    prompts: int = SAMPLES


CASES = {
    "full, tied": Case(),
    "full, untied": Case(tied=False, flags=SHAPED),
    "LoRA, tied": Case(lora=True, flags=SHAPED),
    "LoRA, untied": Case(tied=False, lora=True),
}
TWO, AGAIN = "two minibatches", "two minibatches again"
LAST = "two minibatches, the dataset's last batch"
# What TRL does by itself, seen with a policy that is its own reference where there is no noise.
OBSERVED = {
    "plain": Case(noise=0.0),
    TWO: Case(flags=TWO_MINIBATCHES, prompts=2 * SAMPLES),
    AGAIN: Case(flags=TWO_MINIBATCHES, prompts=2 * SAMPLES),
    LAST: Case(flags=TWO_MINIBATCHES),
    "attention_dropout 0.1": Case(noise=0.0, config={"attention_dropout": 0.1}),
    "repetition_penalty 1.2": Case(noise=0.0, generation_config={"repetition_penalty": 1.2}),
    "pad = EOS": Case(pad="<eos>"),
}


def write_checkpoints(folder: Path, tied: bool) -> tuple[Path, Path]:
    """A random policy and a random reward model over a small vocabulary, of which the last token ends completions."""
    tokens = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<eos>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="w0")), eos_token="<eos>"
    )
    paths = []
    for seed, model_class in enumerate((LlamaForCausalLM, LlamaForSequenceClassification)):
        torch.manual_seed(seed)
        model = model_class(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.15,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=VOCABULARY - 1,
                pad_token_id=None,
                **({"num_labels": 1} if model_class is LlamaForSequenceClassification else {}),
            )
        )
        paths.append(folder / f"{'reward' if seed else 'policy'}-{'tied' if tied else 'untied'}")
        model.save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return paths[0], paths[1]


def prompts(count: int) -> list[list[int]]:
    """Of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY - 1, (1 + i % 9,), generator=generator).tolist() for i in range(count)]


def job_of(case: Case, dtype: str, folder: Path, name: str) -> dict[str, Any]:
    """What both workers are told."""
    policy, reward = write_checkpoints(folder, case.tied)
    return {
        "policy": str(policy),
        "reward": str(reward),
        "recording": str(folder / f"{name} {dtype}.safetensors"),
        "dtype": dtype,
        "lora": LORA if case.lora else None,
        "noise": case.noise,
        "flags": FLAGS | case.flags,
        "prompts": prompts(case.prompts),
        "pad": case.pad,
        "config": case.config,
        "generation_config": case.generation_config,
    }


def run_together(python: str, script: str, jobs: list[dict[str, Any]]) -> list[Result]:
    """The results of several jobs in one process."""
    print(f"{script}: {', '.join(Path(job['recording']).stem for job in jobs)}", file=sys.stderr, flush=True)
    done = run(Work(python, f"evidence/{script}", {"jobs": jobs}))
    if "failed" in done:
        sys.exit(f"{script}: {done['failed']}")
    results: list[Result] = done["results"]
    return results


def record(cases: dict[str, Case], dtype: str, folder: Path, trl: str) -> list[Result]:
    """TRL's result of each case under `trl`, beside `name`, `dtype` and `job`."""
    jobs = [job_of(case, dtype, folder, name) for name, case in cases.items()]
    results = run_together(trl, "parity_trl_worker.py", jobs)
    return [
        {"name": name, "dtype": dtype, "job": job, "trl": result}
        for name, job, result in zip(cases, jobs, results, strict=True)
    ]


def compare(recorded: list[Result]) -> None:
    """Adds what fourscore's worker says of each."""
    jobs = [one["job"] | {"trl": one["trl"]} for one in recorded]
    for one, result in zip(recorded, run_together(sys.executable, "parity_fourscore_worker.py", jobs), strict=True):
        one |= result


def errors_table(results: list[Result], dtype: str) -> list[str]:
    """Prints one; returns what is above the limit."""
    some = [result for result in results if result["dtype"] == dtype]
    limit = LIMITS[dtype]
    table = new_table(f"{dtype}: normwise relative error, at most {limit:g}", *(result["name"] for result in some))
    above = []
    for quantity in _ordered(result["errors"] for result in some):
        errors = [result["errors"].get(quantity) for result in some]
        table.add_row(quantity, *("" if error is None else f"{error:.1e}" if error else "0" for error in errors))
        for result, error in zip(some, errors, strict=True):
            if error is not None and not error <= limit:
                above.append(f"{result['name']}, {dtype}: {quantity}: {error:.1e} is above {limit:g}")
    show(table, {})
    return above


def compositions(results: list[Result]) -> None:
    """Prints what the samples were, and stops if they were all of a kind."""
    table = new_table("samples", "ended by EOS", "prompt tokens", "completion tokens")
    for result in results:
        prompt, completion = result["prompt_lens"], result["completion_lens"]
        if not 0 < result["ended"] < result["samples"] or len(set(prompt)) < 3 or len(set(completion)) < 3:
            sys.exit(f"{result['name']}, {result['dtype']}: samples are all of a kind: nothing is compared")
        table.add_row(
            f"{result['name']}, {result['dtype']}",
            f"{result['ended']} of {result['samples']}",
            f"{min(prompt)} to {max(prompt)}",
            f"{min(completion)} to {max(completion)}",
        )
    show(table, {})


def observed_table(observed: dict[str, Result]) -> None:
    """Prints what TRL does where its trainer's choices are not fourscore's."""
    table = new_table("seen in TRL's trainer, float64", "figure")
    two, again = observed[TWO], observed[AGAIN]
    flags = two["job"]["flags"]
    expected = flags["num_ppo_epochs"] * flags["num_mini_batches"]
    for result in (two, observed[LAST]):
        table.add_row(f"{result['name']}: optimizer steps", f"{result['trl']['steps']}; minibatches: {expected}")
    for role in ("policy", "value"):
        error = two["errors"][f"{role} gradient"]
        table.add_row(f"{TWO}: {role} gradient against that of the mean over tokens", f"{error:.2g}")
    for name in ("val/ratio", "policy/approxkl_avg", "policy/entropy_avg"):
        logged, mean = (two["differences"][f"{name}, {which}"] for which in ("logged by TRL", "over completion tokens"))
        table.add_row(f"{TWO}: {name}, logged", f"{logged:.4g}; over completion tokens: {mean:.4g}")
    table.add_row(
        f"max_grad_norm {flags['max_grad_norm']}: largest norm of a gradient that the optimizer is given",
        f"{max(two['trl']['gradient_norms']):.3g}",
    )
    ends = [_flat(result, "end/weights/") for result in (two, again)]
    moved = ends[0] - _flat(two, "0/weights/")
    apart = float((ends[1] - ends[0]).norm() / moved.norm())
    table.add_row(f"{TWO}, the same seed twice: difference of what the update adds to the weights", f"{apart:.2g}")
    for name in ("plain", "attention_dropout 0.1", "repetition_penalty 1.2"):
        seen = observed[name]["trl"]
        table.add_row(
            f"{name}: KL of a policy from itself, nats a completion", f"{seen['metrics']['objective/kl']:.2g}"
        )
        table.add_row(f"{name}: mean of abs(ratio - 1) before any step", f"{seen['ratios_off']:.2g}")
    seen = observed["pad = EOS"]["trl"]
    table.add_row(
        "pad = EOS: EOS tokens that the policy loss sees",
        f"{seen['eos_tokens_in_loss']}; completions that hold one: {seen['completions_with_eos']}",
    )
    show(table, {})


def _flat(result: Result, prefix: str) -> torch.Tensor:
    tensors = load_file(result["job"]["recording"])
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith(prefix)])


def differences_table(results: list[Result]) -> None:
    """Prints what fourscore's choices change in the numbers of these updates."""
    some = [result for result in results if result["dtype"] == "float64"]
    table = new_table("what other choices change, float64", *(result["name"] for result in some))
    for quantity in _ordered(result["differences"] for result in some):
        table.add_row(quantity, *(f"{result['differences'][quantity]:.3g}" for result in some))
    show(table, {})


def _ordered(rows: Iterable[dict[str, Any]]) -> list[str]:
    """All keys, in the order in which they first come up in the longest."""
    return list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case in float64, and no table of differences")
    parser.add_argument("--trl_python", help="a Python that has TRL 1.12.0 (default: set up in --cache)")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="for TRL's environment")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    return parser.parse_args()


def main() -> None:
    """Run, print, judge."""
    options = parse()
    logging.disable_progress_bar()
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}  # more threads only wait, at this size
    trl = trl_python(options.trl_python, options.cache)
    print(machine())
    cases = dict(list(CASES.items())[-1:]) if options.quick else CASES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dtypes = ["float64"] if options.quick else list(LIMITS)
        compared = [one for dtype in dtypes for one in record(cases, dtype, folder, trl)]
        observed: dict[str, Result] = {}
        if not options.quick:
            # The second of two equal runs has a process of its own.
            for group in ({n: c for n, c in OBSERVED.items() if n != AGAIN}, {AGAIN: OBSERVED[AGAIN]}):
                observed |= {one["name"]: one for one in record(group, "float64", folder, trl)}
        compare([*compared, *(one for name, one in observed.items() if name == TWO)])
        compositions(compared)
        above = [line for dtype in dtypes for line in errors_table(compared, dtype)]
        if observed:
            differences_table(compared)
            observed_table(observed)
    write(options.json, [*compared, *observed.values()])
    for line in above:
        print(line)
    print(f"{len(above)} above the limit" if above else "all within their limits")
    sys.exit(bool(above))


if __name__ == "__main__":
    main()

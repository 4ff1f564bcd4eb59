"""The plan against what a run really takes: `make bench-plan`.

Each configuration trains for two updates in a process of its own, on a Llama of SmolLM2-135M's width with random
weights, of 8 layers unless --layers says otherwise. Memory is the process's peak anonymous memory (RssAnon), sampled
every 2 ms; the second update counts. Exits 1 if a phase of any configuration is off by more than 10 %, or by more than
25 % where freed memory is kept: what lies idle then is not the same in any two runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory_probe import MIB, MemoryProbe

LIMIT, LIMIT_IF_KEPT = 0.10, 0.25
LOAD, ROLLOUT, SCORING, UPDATE = PHASES = ("load", "rollout", "scoring", "update")
BETWEEN = "between"
FULL_SHAPE = {
    "hidden_size": 576,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
QUICK_SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 16384,
}
KEPT = ["--keep_freed_memory", "true"]
LORA = ["--use_peft", "--lora_target_modules", "all-linear"]


@dataclass(frozen=True)
class Configuration:
    """A run: flags beside the common ones, which checkpoints, how many processes."""

    name: str
    flags: list[str] = field(default_factory=list)
    models: tuple[str, str] = ("sft", "reward")
    processes: int = 1
    limit: float = LIMIT


CONFIGURATIONS = [
    Configuration("full"),
    Configuration("full, bf16 files", models=("sft-bf16", "reward-bf16")),
    Configuration("LoRA", LORA),
    Configuration("one base", LORA, ("sft-adapter", "reward-adapter")),
    Configuration("4-bit", [*LORA, "--load_in_4bit"]),
    Configuration("frozen layers", ["--freeze_layers", "FREEZE"]),
    Configuration("shared trunk", ["--share_value_backbone"]),
    Configuration("long completions", [*LORA, "--response_length", "LONG"]),
    Configuration("checkpointing", ["--gradient_checkpointing", "true"]),
    Configuration("two processes", processes=2),
    Configuration("full, memory kept", KEPT, limit=LIMIT_IF_KEPT),
    Configuration("LoRA, memory kept", [*LORA, *KEPT], limit=LIMIT_IF_KEPT),
    Configuration("long, memory kept", [*LORA, *KEPT, "--response_length", "LONG"], limit=LIMIT_IF_KEPT),
]


def make_models(folder: Path, shape: dict[str, int]) -> None:
    """Write the checkpoints: SFT and reward with random weights, bf16 copies of them, and adapters on the SFT one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from fourscore import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.POLICY)
    common = {
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "num_labels": 1,
    }
    config = AutoConfig.for_model("llama", **shape, **common)
    torch.manual_seed(0)
    for name, auto in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        model = auto.from_config(config)
        for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16)):
            model.to(dtype).save_pretrained(folder / f"{name}{suffix}")
            tokenizer.save_pretrained(folder / f"{name}{suffix}")
    for name, task in (("sft", "CAUSAL_LM"), ("reward", "SEQ_CLS")):
        auto = AutoModelForCausalLM if name == "sft" else AutoModelForSequenceClassification
        base = auto.from_pretrained(folder / "sft", num_labels=1)
        adapted = get_peft_model(base, LoraConfig(task_type=task, r=8, target_modules="all-linear"))
        adapted.save_pretrained(folder / f"{name}-adapter")
        tokenizer.save_pretrained(folder / f"{name}-adapter")


def worker(flags: list[str]) -> dict[str, Any]:
    """Plan and run in this process."""
    import torch

    torch.set_num_threads(1)
    from fourscore.data import longest_prompt
    from fourscore.flags import parse_ppo
    from fourscore.models.loading import load_models
    from fourscore.plan.estimate import make_plan
    from fourscore.ppo.trainer import PPOTrainer
    from fourscore.preflight import preflight

    script_args, args, model_args = parse_ppo(flags)
    checked = preflight(script_args, args, model_args)
    checked.findings.raise_errors()
    train = checked.train_dataset
    plan = make_plan(args, model_args, inspected=checked.models, prompt=longest_prompt(train))
    probe = MemoryProbe()
    probe.phase(LOAD)
    models = load_models(model_args, args, plan.layout, checked.models)
    trainer = PPOTrainer(
        args, models.tokenizer, models.policy, models.ref_policy, models.reward_model, train, models.value_model
    )
    probe.phase(BETWEEN)

    def watch(method: str, phase: str) -> None:
        inner = getattr(trainer, method)

        def outer(*positional: Any, **named: Any) -> Any:
            # The first update makes the optimizer's state: from the second on every update is alike.
            if trainer.state.global_step == 1:
                probe.phase(phase)
            try:
                return inner(*positional, **named)
            finally:
                probe.phase(BETWEEN)

        setattr(trainer, method, outer)

    for method, phase in (("_rollout", ROLLOUT), ("_score", SCORING), ("_update", UPDATE)):
        watch(method, phase)
    trainer.train()
    probe.stop()
    return {
        "planned": plan.peak_bytes,
        "measured": {phase: int(probe.peaks[phase]["anon"] * MIB) for phase in PHASES},
        "planned_mapped": plan.mapped_bytes,
        "mapped": {phase: int(probe.peaks[phase]["file"] * MIB) for phase in PHASES},
        "baseline": plan.baseline,
    }


def run(configuration: Configuration, folder: Path, shape: dict[str, int], long: str) -> dict[str, Any]:
    """Run one configuration in fresh processes; the first process's figures."""
    words = {"FREEZE": str(shape["num_hidden_layers"] * 2 // 3), "LONG": long}
    flags = [
        *("--sft_model_path", str(folder / configuration.models[0])),
        *("--reward_model_path", str(folder / configuration.models[1])),
        *("--dataset_name", str(folder / "prompts.jsonl"), "--use_cpu", "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--num_ppo_epochs", "1"),
        *("--response_length", "16", "--stop_token", "none", "--max_steps", "2", "--save_strategy", "no"),
        *("--num_sample_generations", "0", "--report_to", "none", "--ignore_plan"),
        *("--keep_freed_memory", "false"),
        *(words.get(flag, flag) for flag in configuration.flags),
    ]
    with tempfile.TemporaryDirectory() as out:
        result = Path(out) / "result.json"
        command = [sys.executable]
        if configuration.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(configuration.processes)]
        command += [__file__, "--worker", str(result), *flags, "--output_dir", str(Path(out) / "run")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not result.exists():
            lines = done.stderr.strip().splitlines()
            return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def main() -> int:
    """Run and print."""
    if sys.argv[1:2] == ["--worker"]:
        figures = worker(sys.argv[3:])
        if os.environ.get("RANK", "0") == "0":
            Path(sys.argv[2]).write_text(json.dumps(figures))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: seconds instead of minutes")
    parser.add_argument("--layers", type=int, default=FULL_SHAPE["num_hidden_layers"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    options = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    chosen = [c for c in CONFIGURATIONS if not options.only or c.name in options.only]
    table = Table("configuration", "phase", title="peak anonymous memory of a process, MiB")
    for column in ("planned", "measured", "ratio", "mapped"):
        table.add_column(column, justify="right")
    good = bool(chosen)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = QUICK_SHAPE if options.quick else FULL_SHAPE | {"num_hidden_layers": options.layers}
        make_models(folder, shape)
        prompts = [{"input_ids": [(7 * i + j) % 3000 + 10 for j in range(24)]} for i in range(64)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        for configuration in chosen:
            figures = run(configuration, folder, shape, "64" if options.quick else "128")
            print(configuration.name, json.dumps(figures), file=sys.stderr, flush=True)
            if "failed" in figures:
                good = False
                table.add_row(configuration.name, f"[red]{figures['failed']}[/red]", "", "", "", "", end_section=True)
                continue
            for phase in PHASES:
                planned, measured = figures["planned"][phase], figures["measured"][phase]
                ratio = planned / measured
                within = abs(ratio - 1) <= configuration.limit
                good &= within
                table.add_row(
                    configuration.name if phase == LOAD else "",
                    phase,
                    f"{planned / 2**20:.0f}",
                    f"{measured / 2**20:.0f}",
                    f"{ratio:.3f}" if within else f"[red]{ratio:.3f}[/red]",
                    f"{figures['mapped'][phase] / 2**20:.0f}",
                    end_section=phase == UPDATE,
                )
    Console(width=100).print(table)
    kept = f"within {LIMIT_IF_KEPT:.0%} where memory is kept"
    print(f"every phase within {LIMIT:.0%}, {kept}: {'yes' if good else 'NO'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

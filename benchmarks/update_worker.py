"""Trains for a few whole updates with one system in this process: started by `update_memory.py`.

Its argument is JSON: `system`, `loading` ("separate": the calls of TRL's script; or "load_models"), `policy`, `reward`,
`lora` (None for full fine-tuning), `dtype`, `updates`, `batch`, `microbatch`, `flags` (more of PPOConfig's) and
`device`.
"""

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from memory_probe import MemoryProbe, memory
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

FLAGS = {"num_ppo_epochs": 1, "response_length": 32, "stop_token": None}


def prompts_of(count: int, shortest: int, longest: int) -> Dataset:
    """Random ids, the same for both systems."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": torch.randint(100, 3000, (length,), generator=generator).tolist()} for length in lengths]
    )


def load_separately(job: dict[str, Any]) -> tuple[Any, ...]:
    """As TRL's script does: policy, reference (None under PEFT), reward and value model."""
    dtype = getattr(torch, job["dtype"])
    classifier = AutoModelForSequenceClassification
    value_model = classifier.from_pretrained(job["reward"], num_labels=1, dtype=dtype)
    reward_model = classifier.from_pretrained(job["reward"], num_labels=1, dtype=dtype)
    policy = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=dtype)
    ref_policy = None
    if job["lora"] is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=dtype)
    return policy, ref_policy, reward_model, value_model


def make_trainer(job: dict[str, Any], output_dir: str, prompts: Dataset, **more: Any) -> Any:
    """The system's trainer with its models.

    Args:
        job: see above.
        output_dir: of the run.
        prompts: to train on.
        more: arguments of both trainers.
    """
    if job["system"] == "trl":
        # With those of torch 2.11 its first update on prompts that are padded leaves nothing but NaN.
        torch.backends.cuda.enable_cudnn_sdp(False)
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    else:
        from side_by_side import model_args_of

        from fourscore import PPOConfig, PPOTrainer, load_models

    args = PPOConfig(
        output_dir=output_dir,
        sft_model_path=job["policy"],
        reward_model_path=job["reward"],
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=job["batch"] // job["microbatch"],
        total_episodes=job["batch"] * job["updates"],
        num_sample_generations=0,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=job["device"] == "cpu",
        **job["flags"],
    )
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    peft_config = None
    if job["loading"] == "separate":
        policy, ref_policy, reward_model, value_model = load_separately(job)
        if job["lora"] is not None:
            peft_config = LoraConfig(task_type="CAUSAL_LM", **job["lora"])
    else:
        models = load_models(model_args_of(job), args)
        policy, ref_policy, reward_model, value_model = (
            models.policy,
            models.ref_policy,
            models.reward_model,
            models.value_model,
        )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(8)) if job["system"] == "trl" else None,
        peft_config=peft_config,
        **more,
    )


def main() -> None:
    """Measure, print."""
    job = json.loads(sys.argv[1])
    if job["system"] == "trl":
        import trl.experimental.ppo  # noqa: F401
    else:
        import fourscore.models.loading
        import fourscore.ppo.trainer  # noqa: F401
    before = memory()
    probe = MemoryProbe()
    with tempfile.TemporaryDirectory() as output_dir:
        probe.phase("load")
        trainer = make_trainer(job | {"flags": FLAGS | job["flags"]}, output_dir, prompts_of(64, 24, 32))
        probe.phase("train")
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        probe.stop()
    result = {
        "anon": probe.peak("anon"),
        "anon_above_imports": probe.peak("anon") - before["anon"],
        "load_anon": probe.peaks["load"]["anon"],
        "file": probe.peak("file") - before["file"],
        "device": probe.peak("device"),
        "update_s": seconds / job["updates"],
        "phases": probe.peaks,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Loads the models of one system in this process and runs every role once: started by `load.py`.

Its argument is JSON: `system`, `policy`, `reward` and `warm_up` (two tiny checkpoints), `dtype`, `lora` (None for full
fine-tuning), `batch` (rows, columns) and `device`.
"""

import gc
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

from file_openings import FileOpenings

OPENINGS = FileOpenings()  # before transformers is imported

import torch  # noqa: E402
from memory_probe import MemoryProbe, memory  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402


def load_as_trl(job: dict[str, Any], policy_path: str, reward_path: str) -> dict[str, Any]:
    """The calls of TRL 1.12's ppo.py in their order, and the adapter that its trainer adds."""
    options = {"revision": "main", "attn_implementation": None, "dtype": _dtype(job["dtype"])}
    tokenizer = AutoTokenizer.from_pretrained(policy_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    classifier = AutoModelForSequenceClassification
    value_model = classifier.from_pretrained(reward_path, num_labels=1, **options)
    reward_model = classifier.from_pretrained(reward_path, num_labels=1, **options)
    policy = AutoModelForCausalLM.from_pretrained(policy_path, **options)
    ref_policy = None
    if job["lora"] is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(policy_path, **options)
    else:
        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **job["lora"]))
    return {"value": value_model, "reward": reward_model, "policy": policy, "ref": ref_policy}


def load_with_fourscore(job: dict[str, Any], policy_path: str, reward_path: str) -> dict[str, Any]:
    """`load_models`."""
    from side_by_side import model_args_of

    from fourscore import PPOConfig, load_models

    args = PPOConfig(sft_model_path=policy_path, reward_model_path=reward_path, use_cpu=job["device"] == "cpu")
    models = load_models(model_args_of(job), args)
    return {
        "value": models.value_model,
        "reward": models.reward_model,
        "policy": models.policy,
        "ref": models.ref_policy,
    }


def run_roles(models: dict[str, Any], batch: tuple[int, int], device: str) -> None:
    """One forward of each role; where there is no reference model, the policy's with its adapter off."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 3000, tuple(batch), generator=generator).to(device)
    for model in models.values():
        without_adapter = models["policy"].disable_adapter() if model is None else nullcontext()
        with torch.no_grad(), without_adapter:
            (models["policy"] if model is None else model)(input_ids=ids, use_cache=False)


def measure(job: dict[str, Any], policy: str, reward: str, probe: MemoryProbe) -> tuple[float, float]:
    """Seconds until the models are there, and until every role has run."""
    load = {"trl": load_as_trl, "fourscore": load_with_fourscore}[job["system"]]
    start = time.perf_counter()
    probe.phase("load")
    models = {name: model and model.to(job["device"]) for name, model in load(job, policy, reward).items()}
    loaded = time.perf_counter()
    probe.phase("forward")
    run_roles(models, job["batch"], job["device"])
    if job["device"] != "cpu":
        torch.cuda.synchronize()
    return loaded - start, time.perf_counter() - start


def main() -> None:
    """Measure, print."""
    job = json.loads(sys.argv[1])
    # Imports that happen on first use are not what is measured: have them now.
    warm_up = MemoryProbe()
    measure(job, *job["warm_up"], warm_up)
    warm_up.stop()
    gc.collect()
    OPENINGS.reset()

    probe, before = MemoryProbe(), memory()
    load_s, total_s = measure(job, job["policy"], job["reward"], probe)
    probe.stop()
    result = {
        "anon": probe.peak("anon") - before["anon"],
        "file": probe.peak("file") - before["file"],
        "device": probe.peak("device"),
        "load_s": load_s,
        "total_s": total_s,
        "openings": max(OPENINGS.weights.values(), default=0),
        "other_openings": max(OPENINGS.others.values(), default=0),
        "openings_by_file": OPENINGS.weights,
        "phases": probe.peaks,
    }
    print(json.dumps(result))


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


if __name__ == "__main__":
    main()

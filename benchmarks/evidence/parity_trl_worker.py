"""Runs TRL's own PPOTrainer for one update and records what it computes: started by `trl_parity.py`.

TRL is looked at from outside and nothing of it is replaced: a hook of the optimizer reads the local variables of
`PPOTrainer.train` before every step, and what `masked_whiten` is given is kept.

Its argument is JSON, `jobs`: a list of what to run, each with `policy` and `reward` (folders), `recording` (the
.safetensors file to write), `dtype`, `lora` (None for full fine-tuning), `noise` (added to all that trains, so that
policy and reference differ), `flags` (fields of `PPOConfig`), `prompts` (lists of token ids), `pad` (a token to pad
with; "[PAD]" is added as TRL's script does), `config` and `generation_config` (changes to the policy's).
"""

import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from in_float64 import transformers_in_float64
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

ROLLOUT = ("queries", "responses", "logprobs", "ref_logprobs", "values", "scores", "kl", "rewards", "advantages")
ROLLOUT += ("returns",)


class Recorder:
    """Keeps what `PPOTrainer.train` has computed by the time of each optimizer step.

    Attributes:
        tensors: those of `ROLLOUT`; `lengths` (tokens of each completion); `unwhitened_...`; and for every step `k`
            `k/policy_loss`, `k/value_loss`, `k/weights/NAME` and `k/gradient/NAME` of all that trains.
        metrics: what was logged.
        ratios_off: at the first step, mean of `|ratio - 1|` over completion tokens.
        steps: optimizer steps so far.
    """

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self.tensors: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}
        self.ratios_off = 0.0
        self.steps = 0
        self._whitened: list[Tensor] = []
        whiten, log = ppo_trainer.masked_whiten, trainer.log

        def masked_whiten(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._whitened.append(values.clone())
            return whiten(values, *args, **kwargs)

        def keep(metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
            self.metrics |= metrics
            log(metrics, *args, **kwargs)

        self._masked_whiten, self._own = masked_whiten, whiten
        trainer.log = keep
        trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: self.look())

    def __enter__(self) -> "Recorder":
        ppo_trainer.masked_whiten = self._masked_whiten
        return self

    def __exit__(self, *_: object) -> None:
        ppo_trainer.masked_whiten = self._own

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """By name: `policy.` or `value_model.`, and the name in that model."""
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def look(self) -> None:
        """Before a step."""
        seen = _locals_of_train()
        if not self.steps:
            self._keep_rollout(seen)
        k = self.steps
        self.tensors[f"{k}/policy_loss"] = seen["pg_loss"]
        self.tensors[f"{k}/value_loss"] = seen["vf_loss"]
        for name, p in self.trained().items():
            self.tensors[f"{k}/weights/{name}"] = p.detach().clone()
            self.tensors[f"{k}/gradient/{name}"] = p.grad.clone()
        self.steps += 1

    def _keep_rollout(self, seen: dict[str, Any]) -> None:
        self.tensors |= {name: seen[name].clone() for name in ROLLOUT}
        self.tensors["lengths"] = seen["sequence_lengths"] + 1
        *rewards, advantages = self._whitened
        self.tensors["unwhitened_advantages"] = advantages
        self.tensors["unwhitened_rewards"] = rewards[0] if rewards else seen["rewards"].clone()
        on = ~seen["padding_mask"][seen["micro_batch_inds"]]
        self.ratios_off = (seen["ratio"].detach()[on] - 1).abs().mean().item()


def _locals_of_train() -> dict[str, Any]:
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code is not PPOTrainer.train.__code__:
        frame = frame.f_back
    assert frame is not None
    return frame.f_locals


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of what torch makes without being told a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_trainer(job: dict[str, Any], output_dir: str) -> PPOTrainer:
    """TRL's trainer with its four models, loaded and wired as TRL's script does."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": job["pad"]})
    classifier = AutoModelForSequenceClassification
    value_model = classifier.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32)
    reward_model = classifier.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32, **job["config"])
    for name, value in job["generation_config"].items():
        setattr(policy.generation_config, name, value)
    ref_policy = None
    if job["lora"] is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)
    prompts = Dataset.from_list([{"input_ids": ids} for ids in job["prompts"]])
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=output_dir, **job["flags"]),
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=prompts,
        eval_dataset=prompts,
        peft_config=None if job["lora"] is None else LoraConfig(task_type="CAUSAL_LM", **job["lora"]),
    )
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += job["noise"] * torch.randn_like(parameter)
    if job["dtype"] == "float64":
        for model in (trainer.model, trainer.ref_model, trainer.reward_model):
            if model is not None:
                model.double()
    return trainer


def record(job: dict[str, Any]) -> dict[str, Any]:
    """One update; writes the recording and returns what there is to say of it."""
    double = job["dtype"] == "float64"
    with tempfile.TemporaryDirectory() as output_dir, transformers_in_float64() if double else nullcontext():
        trainer = make_trainer(job, output_dir)
        with Recorder(trainer) as recorder, default_dtype(getattr(torch, job["dtype"])):
            trainer.train()
    tensors = recorder.tensors
    for name, parameter in recorder.trained().items():
        tensors[f"end/weights/{name}"] = parameter.detach()
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, job["recording"])

    eos, lengths, responses = trainer.processing_class.eos_token_id, tensors["lengths"], tensors["responses"]
    in_loss = torch.arange(responses.shape[1]) < lengths[:, None]
    norms = [
        torch.cat([t.flatten() for name, t in tensors.items() if name.startswith(f"{k}/gradient/")]).norm().item()
        for k in range(recorder.steps)
    ]
    return {
        "pad_id": trainer.processing_class.pad_token_id,
        "metrics": recorder.metrics,
        "steps": recorder.steps,
        "ratios_off": recorder.ratios_off,
        "gradient_norms": norms,
        "completions_with_eos": int((responses == eos).any(1).sum()),
        "eos_tokens_in_loss": int((in_loss & (responses == eos)).sum()),
    }


def main() -> None:
    """Record each, print."""
    results = []
    for job in json.loads(sys.argv[1])["jobs"]:
        # Accelerate keeps the settings of the first Accelerator of a process.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        results.append(record(job))
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()

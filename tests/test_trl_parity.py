"""The comparison with TRL's trainer, on a recording that a straight-line implementation of TRL's conventions makes.

TRL is not among what tests install. The conventions: a rectangle with prompts padded on the left; the score one
position past the end where there is room, with a value there that trains; whitening and means over masks.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "evidence"))

from in_float64 import transformers_in_float64
from parity_fourscore_worker import Recording, arguments, compare, differences, load_roles
from trl_parity import CASES, LIMITS, VOCABULARY, Case, job_of

PAD, EOS = VOCABULARY, VOCABULARY - 1
OTHER = Case(tied=False, lora=True, flags={"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9})


def whitened(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    mean, deviation = x[mask].mean(), (x[mask].var() + 1e-8).sqrt()
    return torch.where(mask, (x - mean) / deviation + (0 if shift_mean else mean), 0.0)


def record_as_trl(job: dict[str, Any]) -> tuple[Recording, dict[str, float]]:
    """One update of four optimizer steps in TRL's conventions, and the metrics that it would log."""
    flags = {"kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
    flags |= {"kl_estimator": "k1", "whiten_rewards": False} | job["flags"]
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(job["policy"]).double()
    ref_policy = AutoModelForCausalLM.from_pretrained(job["policy"]).double()
    reward_model = AutoModelForSequenceClassification.from_pretrained(job["reward"]).double()
    value_model = AutoModelForSequenceClassification.from_pretrained(job["reward"]).double()
    if job["lora"] is not None:
        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **job["lora"])).double()
    models = {"policy": policy, "value_model": value_model}
    trained = {f"{role}.{n}": p for role, m in models.items() for n, p in m.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += job["noise"] * torch.randn_like(parameter)

    n, width, room = len(job["prompts"]), max(map(len, job["prompts"])), flags["response_length"]
    queries = torch.tensor([[PAD] * (width - len(p)) + p for p in job["prompts"]])
    responses = torch.randint(0, VOCABULARY - 1, (n, room))
    lens = torch.tensor([(3 + 5 * i) % room + 1 for i in range(n)])
    lens[::3] = room
    ended = lens < room
    ended[0] = True  # with the last token that there is room for
    for i in ended.nonzero()[:, 0]:
        responses[i, lens[i] - 1 :] = EOS  # generation fills with it, too
    at = torch.arange(room)
    mask, mask_with_extra = at < lens[:, None], at <= lens[:, None]
    ids = torch.cat([queries, responses], 1)
    attended = ids != PAD
    inputs = {
        "input_ids": ids.masked_fill(~attended, 0),
        "attention_mask": attended,
        "position_ids": attended.cumsum(1) - attended.long(),
        "use_cache": False,
    }

    def logprobs_of(model: Any) -> Tensor:
        logits = model(**inputs).logits[:, width - 1 : -1] / (flags["temperature"] + 1e-7)
        return logits.log_softmax(-1).gather(2, responses[:, :, None])[:, :, 0]

    def heads_of(model: Any) -> Tensor:
        return model.score(model.model(**inputs).last_hidden_state)[:, :, 0]

    with torch.no_grad():
        logprobs = logprobs_of(policy).where(mask, 1.0)
        ref_logprobs = logprobs_of(ref_policy).where(mask, 1.0)
        values = heads_of(value_model)[:, width - 1 : -1].where(mask_with_extra, 0.0)
        scores = heads_of(reward_model)[torch.arange(n), width + lens - 1] - flags["missing_eos_penalty"] * ~ended
    log_ratio = ref_logprobs - logprobs
    kl = -log_ratio if flags["kl_estimator"] == "k1" else log_ratio.exp() - 1 - log_ratio
    rewards = -flags["kl_coef"] * kl
    rewards[torch.arange(n), torch.where(lens < room, lens, room - 1)] += scores
    recorded = {"unwhitened_rewards": rewards}
    if flags["whiten_rewards"]:
        rewards = whitened(rewards, mask_with_extra, shift_mean=False)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros(n, dtype=torch.float64)
    for t in reversed(range(room)):
        following = values[:, t + 1] if t + 1 < room else 0.0
        running = rewards[:, t] + flags["gamma"] * following - values[:, t] + flags["gamma"] * flags["lam"] * running
        advantages[:, t] = running
    recorded |= {"unwhitened_advantages": advantages, "returns": (returns := advantages + values)}
    advantages = whitened(advantages, mask)
    recorded |= {"queries": queries, "responses": responses, "lengths": lens, "logprobs": logprobs, "values": values}
    recorded |= {"ref_logprobs": ref_logprobs, "scores": scores, "kl": kl, "rewards": rewards}
    recorded |= {"advantages": advantages}

    optimizer = torch.optim.AdamW(trained.values(), lr=flags["learning_rate"], weight_decay=0.0)
    sums = dict.fromkeys(("policy/approxkl_avg", "val/ratio", "policy/entropy_avg"), 0.0)
    for step in range(flags["num_ppo_epochs"]):
        recorded |= {f"{step}/weights/{name}": p.detach().clone() for name, p in trained.items()}
        ratio = (logprobs_of(policy) - logprobs).exp()
        clipped = ratio.clamp(1 - flags["cliprange"], 1 + flags["cliprange"])
        policy_loss = -torch.minimum(advantages * ratio, advantages * clipped)[mask].mean()
        now = heads_of(value_model)[:, width - 1 : -1]
        near = values + (now - values).clamp(-flags["cliprange_value"], flags["cliprange_value"])
        squares = torch.maximum((now - returns) ** 2, (near - returns) ** 2)
        value_loss = 0.5 * squares[mask_with_extra].mean()
        optimizer.zero_grad()
        (policy_loss + flags["vf_coef"] * value_loss).backward()
        recorded |= {f"{step}/gradient/{name}": p.grad.clone() for name, p in trained.items()}
        recorded |= {f"{step}/policy_loss": policy_loss.detach(), f"{step}/value_loss": value_loss.detach()}
        optimizer.step()
    recorded |= {f"end/weights/{name}": p.detach().clone() for name, p in trained.items()}
    means = {"kl": kl.sum(1).mean(), "entropy": -logprobs[mask].sum() / n, "scores": scores.mean()}
    means["non_score_reward"] = -flags["kl_coef"] * means["kl"]
    means["rlhf_reward"] = means["scores"] + means["non_score_reward"]
    logged = {f"objective/{name}": float(mean) for name, mean in means.items()} | sums | {"val/num_eos_tokens": 0.0}
    return Recording(recorded, PAD, EOS), logged


@pytest.mark.parametrize("case", [CASES["full, tied"], OTHER], ids=["full", "LoRA"])
def test_every_quantity_agrees(case: Case, tmp_path: Path) -> None:
    job = job_of(case, "float64", tmp_path, "case")
    with transformers_in_float64():
        recording, logged = record_as_trl(job)
        args = arguments(job)
        roles = load_roles(job, args)
        found = compare(roles, recording, args, logged)
        assert all(error <= LIMITS["float64"] for error in found.errors.values()), found.errors
        changed = differences(roles, recording, args, found, logged)
    assert changed["score on the last token: advantages"] > 1e-3
    assert changed["score on the last token: value_model gradient"] > 1e-3
    assert modeling_llama.torch is torch, "float64 was to end with its context"


def test_a_wrong_number_is_seen(tmp_path: Path) -> None:
    job = job_of(CASES["full, tied"], "float64", tmp_path, "case")
    with transformers_in_float64():
        recording, logged = record_as_trl(job)
        args = arguments(job)
        roles = load_roles(job, args)
        for wrong, seen_in in {
            ("logprobs",): {"logprobs", "policy loss", "policy gradient"},
            ("values",): {"values", "advantages", "returns", "whitened advantages", "value loss", "value gradient"},
            ("kl", "scores", "unwhitened_rewards", "2/policy_loss"): {"kl", "scores", "rewards", "policy loss"},
        }.items():
            tensors = recording.tensors | {name: recording.tensors[name] * (1 + 1e-5) for name in wrong}
            errors = compare(roles, replace(recording, tensors=tensors), args, logged).errors
            assert {name for name, error in errors.items() if error > LIMITS["float64"]} >= seen_in, errors

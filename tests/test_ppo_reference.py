"""fourscore's pipeline against an independent padded-and-masked PPO, number by number, in float64."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from reference_ppo import Hyper, Reference, reference_ppo
from tiny import make_model, make_tokenizer
from together import Together
from torch import Tensor, nn
from torch.testing import assert_close

import fourscore.ppo.roles as roles_module
import fourscore.ppo.update as update_module
import fourscore.rollout.transformers as rollout_module
from fourscore.config import PPOConfig
from fourscore.errors import RatioError
from fourscore.models.adapters import add_policy_adapter, add_value_adapter, reference
from fourscore.parallel import Parallel
from fourscore.ppo.advantages import gae, kl_estimate, length_adaptive_lambda, shaped_rewards, whiten
from fourscore.ppo.experience import Experience
from fourscore.ppo.scoring import logprobs_of, values_of
from fourscore.ppo.targets import Targets
from fourscore.ppo.trainer import PPOTrainer
from fourscore.ppo.update import UpdateSettings, update
from fourscore.rewards.model import score
from fourscore.runs.metrics import read_json_lines

ALONE = Parallel(torch.device("cpu"), rank=0, world_size=1, sharded=False)
TOKENIZER = make_tokenizer("own")
PAD = TOKENIZER.pad_token_id
PROMPTS = [[5, 6, 7, 8, 9], [20], [30, PAD, 31], [40, 41], [50, 51, 52, 53], [60, 61, 62, 63, 64, 65, 66], [70, 71]]
COMPLETIONS = [[80, 81, 0], [82], [83, 84, 85, 86, 87, 88], [89, 0], [90, 91, 92, 93], [94, 95, 0], [96, 97, 98, 99, 3]]
TIGHT: dict[str, float] = {"rtol": 1e-9, "atol": 1e-11}


@dataclass
class Four:
    """The four roles, in float64."""

    policy: Any
    ref_policy: Any
    reward_model: Any
    value_model: Any

    def copy(self) -> "Four":
        return copy.deepcopy(self)


def float64(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: transformers' norms would compute in fp32."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def four_models(seed: int = 0) -> Four:
    policy, ref = (float64(make_model("llama", TOKENIZER, "policy", seed=seed + k)) for k in (0, 1))
    reward, value = (float64(make_model("llama", TOKENIZER, "reward", seed=seed + k)) for k in (2, 3))
    for frozen in (ref, reward):
        frozen.requires_grad_(False)
    return Four(policy, ref, reward, value)


def samples(prompts: list[list[int]] = PROMPTS, completions: list[list[int]] = COMPLETIONS) -> Experience:
    return Experience(
        input_ids=torch.tensor([t for p, c in zip(prompts, completions, strict=True) for t in p + c]),
        prompt_lens=torch.tensor([len(p) for p in prompts]),
        completion_lens=torch.tensor([len(c) for c in completions]),
        has_eos=torch.tensor([TOKENIZER.eos_token_id in c for c in completions]),
    )


def padded(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask; the padding is the pad token, which is also in a prompt."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


def minibatch_order(n: int, epochs: int, size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [part.tolist() for _ in range(epochs) for part in torch.randperm(n, generator=generator).split(size)]


def run_reference(
    models: Four,
    order: list[list[int]],
    hyper: Hyper,
    prompts: list[list[int]] = PROMPTS,
    completions: list[list[int]] = COMPLETIONS,
    earlier: list[Reference] | None = None,
) -> Reference:
    plain = [m.get_base_model() if hasattr(m, "get_base_model") else m for m in (models.policy, models.value_model)]
    queries, query_mask = padded(prompts, left=True)
    responses, response_mask = padded(completions, left=False)
    return reference_ppo(
        plain[0],
        models.ref_policy,
        models.reward_model,
        plain[1],
        queries,
        query_mask,
        responses,
        response_mask,
        order,
        hyper,
        earlier or [],
    )


def score_and_shape(models: Four, e: Experience, hyper: Hyper, batch_size: int, reduce: Any = ALONE.sum) -> Experience:
    """What the trainer does between rollout and update."""
    e.logprobs = logprobs_of(models.policy, e, hyper.temperature, batch_size, nullcontext)
    under_peft = hasattr(models.policy, "peft_config")
    with reference(models.policy) if under_peft else nullcontext(models.ref_policy) as ref:
        e.ref_logprobs = logprobs_of(ref, e, hyper.temperature, batch_size, nullcontext)
    e.values = values_of(models.value_model, e, batch_size, nullcontext)
    with torch.no_grad():
        e.scores = score(models.reward_model, e, batch_size)
    e.kl = kl_estimate(e.logprobs, e.ref_logprobs, hyper.kl_estimator)  # type: ignore[arg-type]
    e.rewards = shaped_rewards(e.kl, e.scores, e.completion_lens, 0.0 if hyper.use_kl_loss else hyper.kl_coef)
    if hyper.whiten_rewards:
        e.rewards = whiten(e.rewards, shift_mean=False, reduce=reduce)
    lam: Any = hyper.lam
    if hyper.lam_alpha:
        lam = length_adaptive_lambda(e.completion_lens, hyper.lam_alpha, torch.float64)
    advantages, e.returns = gae(e.rewards, e.values, e.completion_lens, hyper.gamma, lam)
    if hyper.lam_value is not None:
        e.returns = gae(e.rewards, e.values, e.completion_lens, hyper.gamma, hyper.lam_value)[1]
    e.advantages = whiten(advantages, reduce=reduce) if hyper.whiten_advantages else advantages
    return e


def settings(hyper: Hyper, *, epochs: int = 2, minibatch: int = 7, microbatch: int = 3) -> UpdateSettings:
    return UpdateSettings(
        epochs=epochs,
        minibatch=minibatch,
        microbatch=microbatch,
        temperature=hyper.temperature,
        cliprange=hyper.cliprange,
        cliprange_value=hyper.cliprange_value,
        vf_coef=hyper.vf_coef,
        max_grad_norm=hyper.max_grad_norm,
        value_max_grad_norm=hyper.value_max_grad_norm,
        cliprange_high=hyper.cliprange_high,
        dual_clip=hyper.dual_clip,
        kl_coef=hyper.kl_coef if hyper.use_kl_loss else 0.0,
        kl_estimator=hyper.kl_estimator,  # type: ignore[arg-type]
        entropy_coef=hyper.entropy_coef,
        positive_lm_coef=hyper.positive_lm_coef,
        positive_lm_threshold=hyper.positive_lm_threshold,
        loss_aggregation=hyper.loss_aggregation,  # type: ignore[arg-type]
        early_stop_kl=hyper.early_stop_kl if hyper.early_stop_kl < math.inf else None,
        value_only=hyper.value_only,
    )


def adamw(model: nn.Module, hyper: Hyper) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=hyper.learning_rate, betas=hyper.betas, eps=hyper.eps, weight_decay=0.0)


def adamw_each(models: Four, hyper: Hyper) -> dict[str, torch.optim.Optimizer]:
    return {"policy": adamw(models.policy, hyper), "value": adamw(models.value_model, hyper)}


def assert_same_experience(e: Experience, expected: Reference) -> None:
    _, mask = padded(e.completions(), left=False)
    assert e.scores is not None
    assert_close(e.scores, expected.scores, **TIGHT)
    for name in ("logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns"):
        got, padded_rows = getattr(e, name), getattr(expected, name)
        assert got.dtype == torch.float64
        assert_close(got, padded_rows[mask.bool()], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_weights(got: Four, expected: Four, *, moved_from: Four) -> None:
    for role in ("policy", "value_model"):
        before = dict(getattr(moved_from, role).named_parameters())
        ours = dict(getattr(got, role).named_parameters())
        moved = 0.0
        for name, parameter in getattr(expected, role).named_parameters():
            assert_close(ours[name], parameter, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
            change = (parameter - before[name]).abs().max().item()
            assert parameter.requires_grad or change == 0
            moved = max(moved, change)
        assert moved > 1e-4, f"{role} did not train: the comparison says nothing"


CASES = {
    "one minibatch": ({}, 7, 7),
    "microbatches": ({}, 7, 2),
    "two minibatches": ({}, 4, 3),
    "whitened rewards": ({"whiten_rewards": True}, 7, 3),
    "k3": ({"kl_estimator": "k3"}, 4, 2),
    "discount and temperature": ({"gamma": 0.9, "lam": 0.5, "temperature": 0.7, "kl_coef": 0.3}, 7, 4),
    "tight clipping": ({"cliprange": 0.01, "cliprange_value": 0.02, "vf_coef": 0.5}, 4, 2),
    "asymmetric clipping": ({"cliprange": 0.002, "cliprange_high": 0.01}, 4, 2),
    "dual clip": ({"cliprange": 0.002, "dual_clip": 1.003}, 4, 2),
    "k1 in the loss": ({"use_kl_loss": True, "kl_coef": 0.5}, 4, 2),
    "k3 in the loss": ({"use_kl_loss": True, "kl_coef": 0.5, "kl_estimator": "k3"}, 4, 3),
    "entropy": ({"entropy_coef": 0.3, "temperature": 0.7}, 4, 2),
    "mean over samples": ({"loss_aggregation": "sequence", "use_kl_loss": True, "entropy_coef": 0.1}, 4, 3),
    "positive samples": ({"positive_lm_coef": 0.5, "positive_lm_threshold": 0.3}, 4, 2),
    "lambda by length": ({"lam_alpha": 0.5, "lam_value": 1.0, "gamma": 0.95}, 7, 3),
    "advantages as they are": ({"whiten_advantages": False}, 7, 3),
    "clipping of each": ({"max_grad_norm": 0.5, "value_max_grad_norm": 0.05}, 7, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_pipeline_equals_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, minibatch, microbatch = CASES[case]
    hyper = replace(Hyper(), **changes)
    start = four_models()
    ours, theirs = start.copy(), start.copy()
    expected = run_reference(theirs, minibatch_order(7, 2, minibatch, seed=11), hyper)

    e = score_and_shape(ours, samples(), hyper, batch_size=3)
    assert_same_experience(e, expected)

    per_pass: list[dict[str, float]] = []
    accumulate = update_module._accumulate

    def recorded(backward: Any, batch: Experience, *rest: Any) -> dict[str, Tensor]:
        sums = accumulate(backward, batch, *rest)
        per_pass.append({name: (each / batch.completion_lens.sum()).item() for name, each in sums.items()})
        return sums

    monkeypatch.setattr(update_module, "_accumulate", recorded)
    metrics = update(
        ours.policy,
        ours.value_model,
        e,
        settings(hyper, minibatch=minibatch, microbatch=microbatch),
        adamw_each(ours, hyper),
        ALONE,
        torch.Generator().manual_seed(11),
        nullcontext,
    )
    assert len(per_pass) == 2 * len(expected.steps) == 4 * -(-7 // minibatch)
    for pg, vf, step in zip(per_pass[::2], per_pass[1::2], expected.steps, strict=True):
        got = {name: value for name, value in (pg | vf).items() if "first_ratio" not in name}
        assert got == pytest.approx({name: step[name] for name in got}, rel=1e-9, abs=1e-11)
    for name in expected.steps[0]:
        mean = sum(step[name] for step in expected.steps) / len(expected.steps)
        assert metrics[name] == pytest.approx(mean, rel=1e-9, abs=1e-11), name
    ratios = torch.tensor([step["val/ratio"] for step in expected.steps], dtype=torch.float64)
    assert metrics["val/ratio_var"] == pytest.approx(ratios.var().item(), rel=1e-6, abs=1e-14)
    if case == "tight clipping":
        assert metrics["policy/clipfrac_avg"] > 0 and metrics["val/clipfrac_avg"] > 0
    if case in ("asymmetric clipping", "dual clip"):
        symmetric = run_reference(start.copy(), minibatch_order(7, 2, 4, seed=11), Hyper(cliprange=0.002))
        assert abs(symmetric.steps[-1]["loss/policy_avg"] - expected.steps[-1]["loss/policy_avg"]) > 1e-6
    if case == "positive samples":
        assert 0 < (expected.scores > 0.3).sum() < 7
    assert metrics["policy/epochs"] == 2
    assert metrics["policy/first_ratio_mean"] < 1e-12 and metrics["policy/first_ratio_max"] < 1e-12
    assert_same_weights(ours, theirs, moved_from=start)


def without_values(e: Experience) -> Experience:
    return replace(e, values=None, advantages=None, returns=None)


def targets_of(hyper: Hyper) -> Targets:
    lam_value = hyper.lam if hyper.lam_value is None else hyper.lam_value
    return Targets(hyper.gamma, hyper.lam, lam_value, hyper.lam_alpha, hyper.whiten_advantages)


@pytest.mark.parametrize("way", ["an optimizer each", "one optimizer", "stop on ratio"])
@pytest.mark.parametrize("case", [name for name, (_, minibatch, _) in CASES.items() if minibatch == 7])
def test_values_out_of_the_first_step_equal_the_reference(case: str, way: str) -> None:
    changes, _, microbatch = CASES[case]
    hyper, start = replace(Hyper(), **changes), four_models()
    ours, theirs = start.copy(), start.copy()
    expected = run_reference(theirs, minibatch_order(7, 2, 7, seed=11), hyper)
    e = without_values(score_and_shape(ours, samples(), hyper, batch_size=3))
    optimizers = adamw_each(ours, hyper)
    if way == "one optimizer":
        both = nn.ParameterList([*ours.policy.parameters(), *ours.value_model.parameters()])
        # The reference clips each by itself and steps them apart, which for AdamW is the same.
        optimizers = {"policy": adamw(both, hyper)}
    passes: list[str] = []
    held: list[bool] = []
    for role, model in (("policy", ours.policy), ("value", ours.value_model)):
        model.register_forward_pre_hook(lambda *_, role=role: passes.append(role))
    ours.policy.register_forward_pre_hook(
        lambda *_: held.append(any(p.grad is not None for p in ours.value_model.parameters()))
    )
    metrics = update(
        ours.policy,
        ours.value_model,
        e,
        replace(settings(hyper, microbatch=microbatch), stop_on_ratio=way == "stop on ratio"),
        optimizers,
        ALONE,
        torch.Generator().manual_seed(11),
        nullcontext,
        targets=targets_of(hyper),
    )
    assert_same_experience(e, expected)
    for name in expected.steps[0]:
        mean = sum(step[name] for step in expected.steps) / len(expected.steps)
        assert metrics[name] == pytest.approx(mean, rel=1e-9, abs=1e-11), name
    assert_same_weights(ours, theirs, moved_from=start)
    # No pass is made for the values alone, and the gradients of one role are gone before the other's are made.
    assert passes.count("value") == passes.count("policy") > 0
    assert held[0] == (way != "an optimizer each")


def test_nothing_has_moved_where_first_ratios_stop_the_run() -> None:
    start = four_models()
    ours = start.copy()
    e = without_values(score_and_shape(ours, samples(), Hyper(), batch_size=3))

    def stop(mean: float, largest: float) -> None:
        raise RatioError("off")

    with pytest.raises(RatioError):
        update(
            ours.policy,
            ours.value_model,
            e,
            replace(settings(Hyper()), stop_on_ratio=True),
            adamw_each(ours, Hyper()),
            ALONE,
            torch.Generator(),
            nullcontext,
            stop,
            targets_of(Hyper()),
        )
    for role in ("policy", "value_model"):
        for a, b in zip(getattr(ours, role).parameters(), getattr(start, role).parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("joint", [False, True], ids=["an optimizer each", "one optimizer"])
def test_early_stop_ends_the_epochs_of_the_policy_alone(joint: bool) -> None:
    hyper, start = Hyper(learning_rate=1e-3), four_models()
    order = minibatch_order(7, 4, 4, seed=2)
    free = [step["policy/approxkl_avg"] for step in run_reference(start.copy(), order, hyper).steps]
    hyper = replace(hyper, early_stop_kl=1.01 * max(free[:3]))
    assert max(free) > hyper.early_stop_kl, "the distance does not grow: there is nothing to stop at"
    ours, theirs = start.copy(), start.copy()
    expected = run_reference(theirs, order, hyper)
    e = score_and_shape(ours, samples(), hyper, batch_size=7)
    optimizers = adamw_each(ours, hyper)
    if joint:
        optimizers = {
            "policy": adamw(nn.ParameterList([*ours.policy.parameters(), *ours.value_model.parameters()]), hyper)
        }
    plan = settings(hyper, epochs=4, minibatch=4, microbatch=2)
    generator = torch.Generator().manual_seed(2)
    metrics = update(ours.policy, ours.value_model, e, plan, optimizers, ALONE, generator, nullcontext)
    assert 0 < expected.taken["policy"] < 8 and expected.taken["value"] == 8
    assert metrics["policy/epochs"] == expected.taken["policy"] / 2
    seen = [step["policy/approxkl_avg"] for step in expected.steps if "policy/approxkl_avg" in step]
    assert len(seen) == expected.taken["policy"] + 1 and seen[-1] > hyper.early_stop_kl  # type: ignore[operator]
    assert metrics["policy/approxkl_avg"] == pytest.approx(sum(seen) / len(seen), rel=1e-9)
    assert_same_weights(ours, theirs, moved_from=start)


@pytest.mark.parametrize(("share", "epochs"), [(0.999, 1), (1.001, 2)])
def test_early_stop_is_one_decision_of_all_processes(share: float, epochs: int) -> None:
    """The limit is next to the mean over both, far from that of either."""
    hyper, start = Hyper(learning_rate=1e-3), four_models()
    halves = [torch.tensor([0, 1, 3, 5]), torch.tensor([2, 4, 6])]
    distances = [step["policy/approxkl_avg"] for step in run_reference(start.copy(), 3 * [list(range(7))], hyper).steps]
    limit = share * distances[1]
    assert distances[2] > 1.1 * distances[1]

    def run(models: Four, e: Experience, parallel: Parallel, limit: float) -> dict[str, float]:
        score_and_shape(models, e, hyper, batch_size=3, reduce=parallel.sum)
        plan = replace(settings(hyper, epochs=3, minibatch=len(e), microbatch=2), early_stop_kl=limit)
        generator = torch.Generator().manual_seed(0)
        return update(
            models.policy, models.value_model, e, plan, adamw_each(models, hyper), parallel, generator, nullcontext
        )

    alone, copies, group = start.copy(), [start.copy(), start.copy()], Together(2)
    expected = run(alone, samples(), ALONE, limit)
    assert expected["policy/epochs"] == epochs
    got = group.run(lambda rank: run(copies[rank], samples().select(halves[rank]), OneOfTwo(group, rank), limit))
    for models, metrics in zip(copies, got, strict=True):
        assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for role in ("policy", "value_model"):
            for ours, theirs in zip(getattr(models, role).parameters(), getattr(alone, role).parameters(), strict=True):
                assert_close(ours, theirs, **TIGHT)


def lora_models() -> Four:
    """Adapters that are not at their zero start; the reference is a copy of the base."""
    models = four_models()
    models.ref_policy = copy.deepcopy(models.policy).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    models.policy = add_policy_adapter(models.policy, config).double()
    models.value_model = add_value_adapter(models.value_model, config).double()
    generator = torch.Generator().manual_seed(3)
    for model in (models.policy, models.value_model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return models


def test_lora_with_the_adapter_off_as_reference_equals_the_reference() -> None:
    hyper = Hyper(cliprange=0.05)
    start = lora_models()
    ours, theirs = start.copy(), start.copy()
    ours.ref_policy = None
    expected = run_reference(theirs, minibatch_order(7, 2, 4, seed=5), hyper)
    assert expected.kl.abs().max() > 0.05, "policy and reference are the same: the comparison says nothing"

    e = score_and_shape(ours, samples(), hyper, batch_size=4)
    assert_same_experience(e, expected)
    update(
        ours.policy,
        ours.value_model,
        e,
        settings(hyper, minibatch=4, microbatch=2),
        adamw_each(ours, hyper),
        ALONE,
        torch.Generator().manual_seed(5),
        nullcontext,
    )
    trained = {name for name, p in ours.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert_same_weights(ours, theirs, moved_from=start)


def test_lora_moves_the_value_head() -> None:
    hyper = Hyper()
    models = lora_models()
    before = models.value_model.get_base_model().score.modules_to_save["default"].weight.detach().clone()
    e = score_and_shape(models, samples(), hyper, batch_size=7)
    gradients(models, e, microbatch=7)
    head = models.value_model.get_base_model().score
    assert not torch.equal(head.modules_to_save["default"].weight, before)
    assert torch.equal(head.original_module.weight, before)


# ------------------------------------------------------------------ properties


ALL_TERMS = Hyper(vf_coef=0.7, max_grad_norm=0.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "asymmetric and dual clip": {"cliprange": 0.002, "cliprange_high": 0.004, "dual_clip": 1.006},
    "entropy": {"entropy_coef": 0.3},
    "KL loss": {"use_kl_loss": True, "kl_coef": 0.4, "kl_estimator": "k3"},
    "positive samples": {"positive_lm_coef": 0.5, "positive_lm_threshold": 0.3},
    "mean over samples of all terms": {
        "loss_aggregation": "sequence",
        "cliprange_high": 0.3,
        "dual_clip": 3.0,
        "entropy_coef": 0.1,
        "use_kl_loss": True,
        "positive_lm_coef": 0.5,
        "positive_lm_threshold": 0.3,
        "lam_alpha": 0.5,
        "lam_value": 1.0,
    },
}


def gradients(
    models: Four, e: Experience, microbatch: int, parallel: Any = ALONE, hyper: Hyper = ALL_TERMS
) -> dict[str, Tensor]:
    """Gradients of one minibatch: what plain gradient descent with rate 1 takes away."""
    named = {
        f"{role}.{name}": p
        for role in ("policy", "value_model")
        for name, p in getattr(models, role).named_parameters()
        if p.requires_grad
    }
    before = {name: p.detach().clone() for name, p in named.items()}
    one = replace(settings(hyper), epochs=1, minibatch=len(e), microbatch=microbatch)
    sgd = {
        "policy": torch.optim.SGD(models.policy.parameters(), lr=1.0),
        "value": torch.optim.SGD(models.value_model.parameters(), lr=1.0),
    }
    update(models.policy, models.value_model, e, one, sgd, parallel, torch.Generator().manual_seed(0), nullcontext)
    return {name: before[name] - p.detach() for name, p in named.items()}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        assert_close(got[name], gradient, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def moved_since(models: Four) -> Four:
    """The models after some steps, so that ratios differ from 1."""
    generator = torch.Generator().manual_seed(9)
    for model in (models.policy, models.value_model):
        for parameter in model.parameters():
            parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return models


@pytest.fixture(scope="module", params=OPTIONS)
def scored(request: pytest.FixtureRequest) -> tuple[Four, Experience, Hyper, dict[str, Tensor]]:
    """Models that have moved since the rollout; samples; the options; the gradient of all samples at once."""
    hyper = replace(ALL_TERMS, **OPTIONS[request.param])
    models = four_models()
    e = score_and_shape(models, samples(), hyper, batch_size=7)
    moved_since(models)
    whole = gradients(models.copy(), e, microbatch=7, hyper=hyper)
    assert all(g.abs().max() > 0 for g in whole.values())
    if request.param != "plain":
        plain = gradients(models.copy(), e, microbatch=7)
        name = "policy.lm_head.weight"
        assert (whole[name] - plain[name]).abs().max() > 1e-5, "the option does nothing"
    return models, e, hyper, whole


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_gradient_does_not_depend_on_the_microbatch_size(scored: Any, microbatch: int) -> None:
    models, e, hyper, whole = scored
    assert_same_gradients(gradients(models.copy(), e, microbatch, hyper=hyper), whole)


def test_gradient_does_not_depend_on_the_order_of_samples(scored: Any) -> None:
    models, e, hyper, whole = scored
    shuffled = e.select(torch.randperm(7, generator=torch.Generator().manual_seed(1)))
    assert_same_gradients(gradients(models.copy(), shuffled, microbatch=2, hyper=hyper), whole)


def test_gradients_of_policy_and_value_model_are_never_held_together() -> None:
    models, hyper = four_models(), Hyper()
    e = score_and_shape(models, samples(), hyper, batch_size=7)
    optimizers, held = adamw_each(models, hyper), []

    def look(*_: Any) -> None:
        held.append([any(p.grad is not None for p in m.parameters()) for m in (models.policy, models.value_model)])

    for optimizer in optimizers.values():
        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)
    run = settings(hyper, epochs=1, minibatch=7, microbatch=2)
    update(models.policy, models.value_model, e, run, optimizers, ALONE, torch.Generator(), nullcontext)
    assert held == [[True, False], [True, False], [False, True], [False, True]]


def test_one_optimizer_for_both_steps_once_and_as_two_would() -> None:
    start, hyper = four_models(), Hyper()
    results, steps = [], []
    for joint in (False, True):
        models = start.copy()
        e = score_and_shape(models, samples(), hyper, batch_size=7)
        optimizers = adamw_each(models, hyper)
        if joint:
            parameters = [*models.policy.parameters(), *models.value_model.parameters()]
            optimizers = {"policy": adamw(nn.ParameterList(parameters), hyper)}
            optimizers["policy"].register_step_post_hook(lambda *_: steps.append(1))
        run = settings(hyper, minibatch=4, microbatch=2)
        metrics = update(
            models.policy, models.value_model, e, run, optimizers, ALONE, torch.Generator().manual_seed(0), nullcontext
        )
        results.append((models, metrics))
    assert len(steps) == 4
    assert results[0][1] == results[1][1]
    assert_same_weights(results[1][0], results[0][0], moved_from=start)


class OneOfTwo(Parallel):
    """A process that is a thread: sums wait for the other one."""

    def __init__(self, group: Together, rank: int) -> None:
        super().__init__(torch.device("cpu"), rank, 2, False)
        self.group = group

    def sum(self, x: Tensor) -> Tensor:
        return self.group.sum(x)

    def max(self, x: float) -> float:
        return max(self.group.all(x))

    def reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = self.group.sum(parameter.grad)


@pytest.mark.parametrize("first", [[0], [2, 4, 6, 5]])
def test_gradient_does_not_depend_on_the_split_over_two_processes(scored: Any, first: list[int]) -> None:
    models, e, hyper, whole = scored
    halves = [first, [i for i in range(7) if i not in first]]
    group = Together(2)
    copies = [models.copy(), models.copy()]

    def work(rank: int) -> dict[str, Tensor]:
        part = e.select(torch.tensor(halves[rank]))
        return gradients(copies[rank], part, 2, OneOfTwo(group, rank), hyper)

    for got in group.run(work):
        assert_same_gradients(got, whole)


def test_the_loss_of_a_process_without_a_positive_sample() -> None:
    """Its share of the language model loss is 0, not 0 / 0."""
    hyper = replace(ALL_TERMS, positive_lm_coef=0.5, positive_lm_threshold=100.0)
    models = four_models()
    e = score_and_shape(models, samples(), hyper, batch_size=7)
    moved_since(models)
    none = gradients(models.copy(), e, microbatch=3, hyper=hyper)
    assert_same_gradients(none, gradients(models.copy(), e, microbatch=3))


def test_whole_update_on_two_processes_equals_one() -> None:
    """Scores, whitening, losses, metrics and AdamW: ragged halves of a batch against the whole of it."""
    hyper = Hyper(
        whiten_rewards=True,
        cliprange=0.02,
        cliprange_high=0.03,
        dual_clip=1.5,
        loss_aggregation="sequence",
        use_kl_loss=True,
        entropy_coef=0.1,
        positive_lm_coef=0.2,
        lam_alpha=0.5,
        lam_value=1.0,
    )
    start = four_models()
    alone, copies = start.copy(), [start.copy(), start.copy()]

    def run(models: Four, e: Experience, parallel: Parallel) -> dict[str, float]:
        score_and_shape(models, e, hyper, batch_size=3, reduce=parallel.sum)
        optimizers = adamw_each(models, hyper)
        generator = torch.Generator().manual_seed(0)
        plan = settings(hyper, minibatch=len(e), microbatch=2)
        return update(models.policy, models.value_model, e, plan, optimizers, parallel, generator, nullcontext)

    expected = run(alone, samples(), ALONE)
    group = Together(2)
    halves = [torch.tensor([0, 1, 2, 5]), torch.tensor([3, 4, 6])]
    got = group.run(lambda rank: run(copies[rank], samples().select(halves[rank]), OneOfTwo(group, rank)))
    for models, metrics in zip(copies, got, strict=True):
        assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert_same_weights(models, alone, moved_from=start)


# ------------------------------------------------------------------ the trainer


TRAINER_CASES: dict[str, dict[str, Any]] = {
    "one minibatch": {"num_mini_batches": 1, "per_device_train_batch_size": 2},
    "two minibatches": {"num_mini_batches": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
    "rewards": {"whiten_rewards": True, "kl_estimator": "k3", "missing_eos_penalty": 1.0, "kl_coef": 0.2},
    "numbers": {
        "gamma": 0.95,
        "lam": 0.6,
        "temperature": 0.8,
        "cliprange": 0.05,
        "cliprange_value": 0.1,
        "vf_coef": 0.4,
    },
    "optimizer": {
        "weight_decay": 0.1,
        "adam_beta1": 0.7,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
    },
    "lora": {"num_mini_batches": 2},
    "vapo": {
        "preset": "vapo",
        "num_generations": 1,
        "value_warmup_updates": 1,
        "value_learning_rate": 3e-4,
        "value_max_grad_norm": 0.2,
        "num_mini_batches": 2,
        "positive_lm_threshold": 0.3,
        "lam_alpha": 0.5,
    },
    "KL loss, adaptive": {
        "use_kl_loss": True,
        "kl_coef": 0.5,
        "kl_target": 0.7,
        "kl_horizon": 12,
        "entropy_coef": 0.1,
        "loss_aggregation": "sequence",
        "cliprange_high": 0.3,
        "dual_clip": 3.0,
        "whiten_advantages": False,
        "value_lr_scheduler_type": "constant",
    },
    "KL reward, adaptive": {
        "kl_coef": 0.5,
        "kl_target": 100.0,
        "kl_horizon": 12,
        "early_stop_kl": 1e-4,
        "vf_coef": 1.0,
    },
}


def assert_same_value_metrics(row: dict[str, Any], e: Experience, expected: Reference) -> None:
    real, errors, thirds = [], [], {"first": [], "middle": [], "last": []}  # type: ignore[var-annotated]
    for b, length in enumerate(e.completion_lens.tolist()):
        for t in range(length):
            real.append(expected.monte_carlo[b, t].item())
            errors.append((expected.values[b, t] - expected.monte_carlo[b, t]).item())
            thirds["first" if 3 * t + 1.5 < length else "middle" if 3 * t + 1.5 < 2 * length else "last"].append(
                errors[-1]
            )
    variance = lambda xs: sum((x - sum(xs) / len(xs)) ** 2 for x in xs)  # noqa: E731
    assert row["value/explained_variance"] == pytest.approx(1 - variance(errors) / variance(real), rel=1e-8)
    for name, part in thirds.items():
        assert row[f"value/bias_{name}"] == pytest.approx(sum(part) / len(part), rel=1e-8), name


@pytest.mark.parametrize("case", TRAINER_CASES)
def test_trainer_equals_the_reference(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three updates of `PPOTrainer` on fixed samples, learning rate falling: weights, metrics, intermediates."""
    completion_of = {tuple(p): c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)}
    drawn: list[Experience] = []

    def fixed_samples(policy: Any, prompts: list[list[int]], sampling: Any, **_: Any) -> Experience:
        drawn.append(samples(prompts, [completion_of[tuple(p)] for p in prompts]))
        return drawn[-1]

    monkeypatch.setattr(rollout_module, "generate", fixed_samples)
    # What trains is made fp32 otherwise.
    monkeypatch.setattr(roles_module, "train_in_fp32", lambda model: None)
    args = PPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        num_ppo_epochs=2,
        learning_rate=2e-4,
        seed=5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        **(
            {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_grad_norm": 1.0}
            | TRAINER_CASES[case]
        ),
    )
    start = lora_models() if case == "lora" else four_models()
    ours, theirs = start.copy(), start.copy()
    trainer = PPOTrainer(
        args=args,
        processing_class=TOKENIZER,
        model=ours.policy,
        ref_model=None if case == "lora" else ours.ref_policy,
        reward_model=ours.reward_model,
        value_model=ours.value_model,
        train_dataset=Dataset.from_dict({"input_ids": PROMPTS}),
    )
    trainer.train()
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == len(drawn) == 3

    updates: list[Reference] = []
    kl_coef, warmup = args.kl_coef, args.value_warmup_updates
    for k, (e, row) in enumerate(zip(drawn, rows, strict=True)):
        falling = 1 - max(0, k - warmup) / (3 - warmup)
        hyper = Hyper(
            temperature=args.temperature,
            kl_coef=kl_coef,
            kl_estimator=args.kl_estimator,
            missing_eos_penalty=args.missing_eos_penalty or 0.0,
            whiten_rewards=args.whiten_rewards,
            gamma=args.gamma,
            lam=args.lam,
            cliprange=args.cliprange,
            cliprange_value=args.cliprange_value,
            vf_coef=args.vf_coef,
            max_grad_norm=args.max_grad_norm,
            learning_rate=2e-4 * falling,
            value_learning_rate=args.value_learning_rate
            * (1.0 if args.value_lr_scheduler_type == "constant" else 1 - k / 3),
            value_max_grad_norm=args.value_max_grad_norm,
            cliprange_high=args.cliprange_high,
            dual_clip=args.dual_clip,
            use_kl_loss=args.use_kl_loss,
            entropy_coef=args.entropy_coef,
            loss_aggregation=args.loss_aggregation,
            positive_lm_coef=args.positive_lm_coef,
            positive_lm_threshold=args.positive_lm_threshold,
            lam_value=args.lam_value,
            lam_alpha=args.lam_alpha,
            whiten_advantages=args.whiten_advantages,
            early_stop_kl=args.early_stop_kl or math.inf,
            value_only=k < warmup,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        order = minibatch_order(len(e), 2, len(e) // args.num_mini_batches, seed=5 + 1_000_003 * k)
        expected = run_reference(theirs, order, hyper, e.prompts(), e.completions(), updates)
        updates.append(expected)
        assert_same_experience(e, expected)
        n, close = len(e), {"rel": 1e-8, "abs": 1e-10}
        assert row["lr"] == pytest.approx(0.0 if hyper.value_only else hyper.learning_rate)
        assert row["value/lr"] == pytest.approx(hyper.value_learning_rate)
        assert row["objective/kl_coef"] == pytest.approx(kl_coef, **close)
        assert row["objective/kl"] == pytest.approx(expected.kl.sum().item() / n, **close)
        assert row["objective/entropy"] == pytest.approx(-expected.logprobs.sum().item() / n, **close)
        assert row["objective/scores"] == pytest.approx(expected.scores.mean().item(), **close)
        shaping = -hyper.kl_coef * expected.kl.sum().item() / n
        assert row["objective/non_score_reward"] == pytest.approx(shaping, **close)
        assert row["objective/rlhf_reward"] == pytest.approx(expected.scores.mean().item() + shaping, **close)
        for name in expected.steps[0]:
            seen = [step[name] for step in expected.steps if name in step]
            assert row[name] == pytest.approx(sum(seen) / len(seen), **close), name
        assert_same_value_metrics(row, e, expected)
        assert any(name.startswith("policy/") for name in row) != hyper.value_only
        if args.kl_target is not None:
            error = expected.kl.sum().item() / n / args.kl_target - 1
            kl_coef *= 1 + max(-0.2, min(0.2, error)) * 6 / args.kl_horizon
    assert args.kl_target is None or kl_coef != pytest.approx(args.kl_coef)
    assert len({tuple(map(tuple, e.prompts())) for e in drawn}) == 3
    assert_same_weights(Four(trainer.model, None, None, trainer.value_model), theirs, moved_from=start)

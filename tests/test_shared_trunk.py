"""`--share_value_backbone`: the value head on the policy's trunk."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_ppo import Hyper
from safetensors.torch import load_file
from test_ppo_reference import ALONE, TOKENIZER, float64, samples, settings
from test_trainer import config, trainer_on
from tiny import ARCHITECTURES, make_model
from torch import Tensor
from torch.testing import assert_close

from fourscore import FourscoreError, ModelConfig, PPOTrainer, get_peft_config, load_models
from fourscore.models.adapters import add_policy_adapter, reference
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import completion_values, rectangle, score_head
from fourscore.models.trunk import share_trunk, shares_trunk
from fourscore.ppo.experience import Experience
from fourscore.ppo.scoring import logprobs_of, policy_of, values_of
from fourscore.ppo.update import update

LORA = get_peft_config(ModelConfig(use_peft=True))
HYPER = Hyper(vf_coef=0.7, cliprange=0.05, cliprange_value=0.1, max_grad_norm=0.0, temperature=0.7)


def with_head(model: Any) -> Any:
    """The policy's value model, its head away from zero."""
    value_model = share_trunk(model).to(next(model.parameters()).dtype)
    value_model.score.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return value_model


def filled(policy: Any, value_model: Any) -> Experience:
    """Samples whose old logprobs and values differ from what the models say now."""
    e, generator = samples(), torch.Generator().manual_seed(1)
    e.logprobs = logprobs_of(policy, e, HYPER.temperature, 7, nullcontext)
    e.values = values_of(value_model, e, 7, nullcontext)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(e.logprobs.shape, generator=generator, dtype=torch.float64)

    e.logprobs += noise(0.05)
    e.values += noise(0.1)
    e.advantages, e.returns = noise(1.0), noise(1.0)
    return e


def by_hand(policy: Any, head: Any, e: Experience) -> Tensor:
    """Both losses from whole, unpadded forwards of the trunk: the mean over tokens."""
    assert e.logprobs is not None and e.values is not None and e.advantages is not None and e.returns is not None
    logprobs, values = [], []
    for sample, start in zip(e.samples(), e.prompt_lens.tolist(), strict=True):
        hidden = policy.base_model(input_ids=sample[None], use_cache=False).last_hidden_state[0, start - 1 : -1]
        distribution = (policy.lm_head(hidden) / HYPER.temperature).log_softmax(-1)
        logprobs.append(distribution.gather(1, sample[start:, None])[:, 0])
        values.append(head(hidden)[:, 0])
    ratio = (torch.cat(logprobs) - e.logprobs).exp()
    clipped = ratio.clamp(1 - HYPER.cliprange, 1 + HYPER.cliprange)
    pg = torch.maximum(-e.advantages * ratio, -e.advantages * clipped)
    value = torch.cat(values)
    near = torch.clamp(value, e.values - HYPER.cliprange_value, e.values + HYPER.cliprange_value)
    vf = 0.5 * torch.maximum((value - e.returns) ** 2, (near - e.returns) ** 2)
    return (pg + HYPER.vf_coef * vf).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joint", [False, True], ids=["two optimizers", "one optimizer"])
def test_update_follows_the_sum_of_both_losses(joint: bool, checkpointing: bool) -> None:
    policy = float64(make_model("llama", TOKENIZER, "policy"))
    value_model = with_head(policy)
    head = score_head(value_model)
    if checkpointing:
        policy.train().gradient_checkpointing_enable({"use_reentrant": False})
    e = filled(policy, value_model)
    named = dict(policy.named_parameters()) | {"score": head.weight}
    expected = dict(zip(named, torch.autograd.grad(by_hand(policy, head, e), list(named.values())), strict=True))
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizers = {
        "policy": torch.optim.SGD(policy.parameters(), lr=1.0),
        "value": torch.optim.SGD(head.parameters(), lr=1.0),
    }
    if joint:
        optimizers = {"policy": torch.optim.SGD(named.values(), lr=1.0)}
    ran: list[int] = []
    policy.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: ran.append(1))
    run = settings(HYPER, epochs=1, minibatch=7, microbatch=4)
    metrics = update(policy, value_model, e, run, optimizers, ALONE, torch.Generator(), nullcontext)
    for name, p in named.items():
        assert_close(
            before[name] - p.detach(), expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert expected["score"].norm().item() == pytest.approx(metrics["value/grad_norm"])
    trunk = [g for name, g in expected.items() if name != "score"]
    assert torch.stack([g.norm() for g in trunk]).norm().item() == pytest.approx(metrics["policy/grad_norm"])
    assert len(ran) == (4 if checkpointing else 2), "one forward of the trunk a microbatch"
    assert metrics["loss/value_avg"] > 0 and metrics["val/clipfrac_avg"] > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_values_and_logprobs_of_one_forward(arch: str) -> None:
    policy = make_model(arch, TOKENIZER, "policy").train()
    disable_dropout(policy)
    value_model = with_head(policy)
    e = samples()
    logprobs, values, none = policy_of(policy, e, 0.7, 3, nullcontext, head=score_head(value_model))
    assert none is None and values is not None
    assert torch.equal(logprobs, logprobs_of(policy, e, 0.7, 3, nullcontext))
    # The value model is a whole one: by itself it says the same.
    assert_close(values, values_of(value_model, e, 3, nullcontext), rtol=1e-6, atol=1e-6)
    assert values.std() > 0.05
    alone = value_model(input_ids=e.samples()[0][None]).logits
    assert alone.shape == (1, 1)


def test_trunk_modules_are_the_policys() -> None:
    policy = make_model("llama", TOKENIZER, "policy")
    value_model = share_trunk(policy)
    assert shares_trunk(policy, value_model)
    assert not shares_trunk(policy, make_model("llama", TOKENIZER, "reward"))
    assert type(value_model).__name__ == "LlamaForSequenceClassification" and value_model.config.num_labels == 1
    assert policy.config.num_labels != 1 or policy.config is not value_model.config
    ours = {id(p) for p in policy.parameters()}
    assert [name for name, p in value_model.named_parameters() if id(p) not in ours] == ["score.weight"]
    assert not value_model.score.weight.any()
    assert not any(p.is_meta for p in value_model.parameters())


def test_an_adapters_trunk() -> None:
    policy = add_policy_adapter(make_model("llama", TOKENIZER, "policy").bfloat16(), LORA)
    value_model = share_trunk(policy)
    assert any("lora_A" in name for name, _ in value_model.named_parameters())
    assert value_model.score.weight.dtype == torch.float32
    value_model.score.weight.data.fill_(0.1)
    batch = rectangle(samples().samples(), samples().prompt_lens)
    assert completion_values(value_model, batch).dtype == torch.float32
    assert value_model(input_ids=batch.input_ids[:1]).logits.dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True])
def test_a_run(lora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"share_value_backbone": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    peft = LORA if lora else None

    def new(out: str, **parts: Any) -> PPOTrainer:
        args = config(tmp_path / out, gradient_checkpointing=lora, **changes)
        return trainer_on(args, peft_config=peft, **({"value_model": None} | parts))

    trainer = new("a")
    head = trainer.roles.value_head
    assert head is not None and shares_trunk(trainer.model, trainer.value_model)
    own = {id(p) for group in trainer.optimizers["value"].param_groups for p in group["params"]}
    assert own == {id(p) for p in head.parameters()}
    frozen = [p for m in (trainer.ref_model, trainer.reward_model) if m is not None for p in m.parameters()]
    before = [p.clone() for p in frozen]
    metrics = trainer.train().metrics
    trainer.save_model()
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    assert head.weight.any()

    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    for folder in (tmp_path / "a", tmp_path / "a" / "checkpoint-2"):
        assert [p.name for p in (folder / "value_model").iterdir()] == ["score.safetensors"]
        assert torch.equal(load_file(folder / "value_model" / "score.safetensors")["score.weight"], head.weight)
        assert not any("score" in key for key in load_file(folder / weights))
    assert "holds the value head" in (tmp_path / "a" / "README.md").read_text()

    resumed = new("a")
    again = resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")).metrics
    for name in ("objective/kl", "loss/policy_avg", "loss/value_avg", "policy/grad_norm", "value/grad_norm"):
        assert again[name] == metrics[name], name
    assert torch.equal(resumed.roles.value_head.weight, head.weight)

    given = make_model("llama", TOKENIZER, "reward", seed=1)
    with caplog.at_level("WARNING"):
        assert new("b", value_model=given).value_model is not given
    assert "value_model that was given is not used" in caplog.text


def test_values_start_at_zero(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path, share_value_backbone=True), value_model=None)
    e = samples()
    trainer._score(e)
    assert e.values is not None and not e.values.any()
    assert e.logprobs is not None and torch.equal(e.logprobs, e.ref_logprobs)


def test_the_reference_is_the_policy_with_its_adapter_off(tmp_path: Path) -> None:
    args = config(tmp_path, share_value_backbone=True)
    trainer = trainer_on(args, value_model=None, peft_config=LORA)
    e = samples()
    with reference(trainer.model):
        start = logprobs_of(trainer.model, e, 0.7, 7, nullcontext)
    trainer.train()
    with reference(trainer.model):
        assert torch.equal(logprobs_of(trainer.model, e, 0.7, 7, nullcontext), start)
    assert not torch.equal(logprobs_of(trainer.model, e, 0.7, 7, nullcontext), start)


@pytest.mark.parametrize("lora", [False, True])
def test_load_models_reads_no_value_model(lora: bool, llama_policy: Path, llama_reward: Path, tmp_path: Path) -> None:
    paths = {"sft_model_path": str(llama_policy), "reward_model_path": str(llama_reward)}
    args = config(tmp_path, share_value_backbone=True, freeze_layers=0 if lora else 1, **paths)
    models = load_models(ModelConfig(use_peft=lora), args)
    assert shares_trunk(models.policy, models.value_model)
    parts = {"model": models.policy, "ref_model": models.ref_policy, "reward_model": models.reward_model}
    trainer = trainer_on(args, processing_class=models.tokenizer, value_model=models.value_model, **parts)
    assert trainer.value_model is models.value_model
    assert trainer.roles.replays_policy == (0 if lora else 1) and trainer.roles.replays_value == 0
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["value/grad_norm"] > 0


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="--share_value_backbone with --value_training full"):
        config(tmp_path, share_value_backbone=True, value_training="full")
    with pytest.raises(FourscoreError, match="--share_value_backbone with FSDP"):
        config(tmp_path, share_value_backbone=True, fsdp=True)
    with pytest.raises(FourscoreError, match="value_model is missing"):
        trainer_on(config(tmp_path), value_model=None)

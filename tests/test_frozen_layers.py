"""`--freeze_layers`: what does not train is held once, computed once, and changes no number."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import config, trainer_on
from tiny import ARCHITECTURES, make_checkpoint, make_model, make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from fourscore import FourscoreError, ModelConfig, get_peft_config, load_models
from fourscore.models.dropout import disable_dropout
from fourscore.models.frozen_layers import bottom_parameters, freeze_bottom, same_bottom
from fourscore.ppo.experience import Experience
from fourscore.ppo.scoring import logprobs_of, policy_of, values_and_scores_of, values_of
from fourscore.rewards.model import score

TOKENIZER = make_tokenizer()
SAMPLES = [[5, 6, 7, 80, 81, 0], [20, 82], [30, 31, 83, 84, 85, 86, 87, 88, 0], [40, 41, 42, 89, 0]]
LAYERS = {"num_hidden_layers": 3}


def experience() -> Experience:
    prompt_lens = torch.tensor([3, 1, 2, 2])
    return Experience(
        input_ids=torch.tensor([t for s in SAMPLES for t in s]),
        prompt_lens=prompt_lens,
        completion_lens=torch.tensor([len(s) for s in SAMPLES]) - prompt_lens,
        has_eos=torch.tensor([True, False, True, True]),
    )


def pair(arch: str, kind: Any, n: int) -> tuple[Any, Any]:
    """A model whose top has moved away from that of its frozen twin, and the twin; they stand on one bottom."""
    layers = {"n_layer": 3} if arch == "gpt2" else LAYERS
    frozen, trained = (make_model(arch, TOKENIZER, kind, seed=1, **layers) for _ in range(2))
    frozen.requires_grad_(False)
    freeze_bottom(trained, n)
    theirs = dict(frozen.named_parameters(remove_duplicate=False))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in list(trained.named_parameters(remove_duplicate=False)):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        else:
            owner, _, attribute = name.rpartition(".")
            setattr(trained.get_submodule(owner), attribute, theirs[name])
    for model in (trained, frozen):
        disable_dropout(model)
    return trained.train(), frozen


def layers_run(model: nn.Module) -> tuple[list[str], Any]:
    """Names of the attention projections that compute, as they do."""
    names: list[str] = []
    stack = contextlib.ExitStack()
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "c_attn", "query_key_value")):
            handle = module.register_forward_hook(lambda *_, name=name: names.append(name))
            stack.callback(handle.remove)
    return names, stack


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_bottom_computed_once_changes_no_bit(arch: str, n: int) -> None:
    e = experience()
    policy, ref = pair(arch, "policy", n)
    value, reward = pair(arch, "reward", n)
    assert same_bottom(policy, ref, n) and same_bottom(value, reward, n)
    if arch == "llama":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    apart = [
        logprobs_of(policy, e, 0.7, 2, contextlib.nullcontext),
        logprobs_of(ref, e, 0.7, 2, contextlib.nullcontext),
        values_of(value, e, 2, contextlib.nullcontext),
        score(reward, e, 2),
    ]
    assert not torch.allclose(apart[0], apart[1])
    ran, stack = layers_run(ref)
    with stack:
        ours, none, theirs = policy_of(policy, e, 0.7, 2, contextlib.nullcontext, reference=ref, shared_layers=n)
    assert none is None
    assert len(ran) == 2 * (3 - n), "two microbatches, and in each only the layers of the top"
    together = [ours, theirs, *values_and_scores_of(value, reward, e, 2, n)]
    for got, expected in zip(together, apart, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(logprobs_of(ref, e, 0.7, 2, contextlib.nullcontext), apart[1]), "the layers compute again"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_bottom_is_embedding_positions_and_layers(arch: str) -> None:
    model = make_model(arch, TOKENIZER, "policy")
    ids = {id(p) for p in bottom_parameters(model, 1)}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ids}
    tops = ("layers.1.", ".h.1.", "ln_f", ".norm.", "final_layer_norm")
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        top = any(part in name for part in tops) or (parameter is head and not tied)
        assert (name in frozen) != top, name
    assert bottom_parameters(model, 0) == []
    with pytest.raises(FourscoreError, match=r"--freeze_layers 2: .* has 2 layers.* at most 1"):
        bottom_parameters(model, 2)


def storages(parameters: Any) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in parameters}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_loaded_roles_hold_the_bottom_once(dtype: str, tied: bool, tmp_path: Path) -> None:
    sft = make_checkpoint("llama", tmp_path / "sft", "policy", tie_word_embeddings=tied)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", seed=1)
    args = config(tmp_path / "run", sft_model_path=str(sft), reward_model_path=str(reward), freeze_layers=1)
    models = load_models(ModelConfig(dtype=dtype), args)
    for trained, frozen in ((models.policy, models.ref_policy), (models.value_model, models.reward_model)):
        bottom = bottom_parameters(trained, 1)
        assert all(a is b for a, b in zip(bottom, bottom_parameters(frozen, 1), strict=True))
        top = [p for p in trained.parameters() if id(p) not in {id(q) for q in bottom}]
        assert storages(top).isdisjoint(storages(frozen.parameters()))
        assert all(p.requires_grad and p.dtype == torch.float32 for p in top)
        assert not any(p.requires_grad or p.dtype != getattr(torch, dtype) for p in bottom)
    head = models.policy.lm_head.weight
    assert head.requires_grad != tied


def trained_by(trainer: Any) -> set[int]:
    return {id(p) for o in trainer.optimizers.values() for group in o.param_groups for p in group["params"]}


def test_a_trainer_given_four_models_shares_the_bottoms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = {
        "model": make_model("llama", TOKENIZER, tie_word_embeddings=True),
        "ref_model": make_model("llama", TOKENIZER, tie_word_embeddings=True),
    }
    with caplog.at_level("INFO"):
        trainer = trainer_on(config(tmp_path, freeze_layers=1), **parts)
    assert "lm_head, which is tied" in caplog.text
    assert same_bottom(trainer.model, trainer.ref_model, 1)
    assert same_bottom(trainer.value_model, trainer.reward_model, 1)
    assert (trainer.roles.replays_policy, trainer.roles.replays_value) == (1, 1)
    frozen = {id(p) for m in (trainer.ref_model, trainer.reward_model) for p in m.parameters()}
    assert trained_by(trainer).isdisjoint(frozen)
    ran, stack = layers_run(trainer.ref_model)
    with stack:
        trainer.train()
    assert set(ran) == {"model.layers.1.self_attn.q_proj"}


def test_models_with_other_bottoms_are_not_taken_for_one(tmp_path: Path) -> None:
    other = make_model("llama", TOKENIZER, seed=7)
    trainer = trainer_on(config(tmp_path, freeze_layers=1), ref_model=other)
    assert not same_bottom(trainer.model, trainer.ref_model, 1)
    assert trainer.roles.replays_policy == 0
    trainer.train()


def test_autocast_keeps_value_and_reward_model_apart(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path, freeze_layers=1, bf16=True))
    assert same_bottom(trainer.value_model, trainer.reward_model, 1)
    assert (trainer.roles.replays_policy, trainer.roles.replays_value) == (1, 0)


@pytest.mark.parametrize("minibatches", [1, 2])  # the value model's pass of scoring is there in the second case only
def test_metrics_are_those_of_a_run_that_shares_nothing(tmp_path: Path, minibatches: int) -> None:
    shared = trainer_on(config(tmp_path / "a", freeze_layers=1, num_mini_batches=minibatches))
    apart = trainer_on(config(tmp_path / "b", freeze_layers=1, num_mini_batches=minibatches))
    apart.roles.replays_policy = apart.roles.replays_value = 0
    ours, theirs = ({k: v for k, v in t.train().metrics.items() if "/" in k} for t in (shared, apart))
    clocks = ("time/", "memory/")
    assert {k: v for k, v in ours.items() if not k.startswith(clocks)} == {
        k: v for k, v in theirs.items() if not k.startswith(clocks)
    }
    for a, b in zip(shared.model.parameters(), apart.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_is_whole_and_resumes_without_writing_to_frozen_weights(tmp_path: Path) -> None:
    args = {"freeze_layers": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_on(config(tmp_path / "a", **args))
    metrics = whole.train().metrics
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), whole.model.parameters(), strict=True))

    resumed = trainer_on(config(tmp_path / "a", **args))
    versions = [p._version for p in resumed.ref_model.parameters()]
    again = resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")).metrics
    assert [p._version for p in resumed.ref_model.parameters()] == versions
    for name in ("objective/kl", "loss/policy_avg", "loss/value_avg", "policy/grad_norm"):
        assert again[name] == metrics[name]


def test_what_cannot_be_frozen_is_refused(tmp_path: Path, llama_policy: Path, llama_reward: Path) -> None:
    with pytest.raises(FourscoreError, match="--freeze_layers -1: must not be negative"):
        config(tmp_path, freeze_layers=-1)
    lora = get_peft_config(ModelConfig(use_peft=True))
    with pytest.raises(FourscoreError, match="--freeze_layers 1 with an adapter"):
        trainer_on(config(tmp_path, freeze_layers=1), peft_config=lora)
    with pytest.raises(FourscoreError, match=r"has 2 layers.* at most 1"):
        trainer_on(config(tmp_path, freeze_layers=2))
    paths = {"sft_model_path": str(llama_policy), "reward_model_path": str(llama_reward)}
    with pytest.raises(FourscoreError, match="--freeze_layers 1 with --use_peft"):
        load_models(ModelConfig(use_peft=True), config(tmp_path, freeze_layers=1, **paths))
    with pytest.raises(FourscoreError, match=r"--freeze_layers 2: .*has 2 layers.* at most 1"):
        load_models(ModelConfig(), config(tmp_path, freeze_layers=2, **paths))

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig
from tiny import ARCHITECTURES, make_model, make_tokenizer

from fourscore.errors import FourscoreError
from fourscore.models.adapters import add_policy_adapter, add_value_adapter, freeze, reference, train_in_fp32

IDS = torch.arange(3, 21).reshape(2, 9)


def _trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, use_cache=False).logits.float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_policy_and_value_train_adapters_in_fp32_on_a_bf16_base(arch):
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    policy = make_model(arch, make_tokenizer()).to(torch.bfloat16)
    value = make_model(arch, make_tokenizer(), "reward").to(torch.bfloat16)
    for model in (add_policy_adapter(policy, config), add_value_adapter(value, config)):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n and not p.requires_grad} == {
            torch.bfloat16
        }
        model(IDS, use_cache=False).logits.float().sum().backward()
        assert all(p.grad is not None for p in trained)
    assert any("score" in name for name in _trained(model))
    assert config.target_modules == "all-linear" and config.lora_dropout == 0.1 and config.task_type is None


def test_lora_dropout_is_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        policy = add_policy_adapter(make_model("llama", make_tokenizer()), LoraConfig(lora_dropout=0.1))
        add_value_adapter(make_model("llama", make_tokenizer(), "reward"), LoraConfig(lora_dropout=0.1))
    assert [record.getMessage() for record in caplog.records] == [
        "lora_dropout 0.1 is taken as 0: PPO needs the policy that was sampled"
    ]
    policy.train()
    assert torch.equal(policy(IDS, use_cache=False).logits, policy(IDS, use_cache=False).logits)


@pytest.mark.parametrize("targets", ["lm_head", ["lm_head"]])
def test_value_model_of_a_head_only_policy_trains_its_head_and_can_be_saved(tmp_path, targets):
    value = add_value_adapter(make_model("llama", make_tokenizer(), "reward"), LoraConfig(target_modules=targets))
    assert [name.rsplit(".", 3)[-1] for name in _trained(value)] == ["weight"]
    _step(value)
    value.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model("llama", make_tokenizer(), "reward"), tmp_path)
    assert torch.equal(again(IDS).logits, value(IDS).logits)


def test_output_layers_among_the_targets_are_left_out_of_the_value_model():
    config = LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head", "embed_tokens"])
    value = add_value_adapter(make_model("llama", make_tokenizer(), "reward"), config)
    assert {name.split(".")[-1] for name, m in value.named_modules() if hasattr(m, "lora_A")} == {"q_proj"}
    assert any("embed_tokens" in name for name in _trained(value))
    assert config.target_modules == {"q_proj", "lm_head"} and config.modules_to_save == ["lm_head", "embed_tokens"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(init_lora_weights="pissa"), "rewrites the base"),
        (LoraConfig(bias="all"), "bias"),
        (LoraConfig(target_modules=["nothing"]), "--lora_target_modules"),
        (PrefixTuningConfig(num_virtual_tokens=2), "use LoRA"),
    ],
)
def test_what_would_change_the_shared_base_is_refused(config, message):
    with pytest.raises(FourscoreError, match=message):
        add_policy_adapter(make_model("llama", make_tokenizer()), config)


def test_second_adapter_is_refused():
    policy = add_policy_adapter(make_model("llama", make_tokenizer()), LoraConfig())
    with pytest.raises(FourscoreError, match="has an adapter already"):
        add_policy_adapter(policy, LoraConfig())


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_reference_is_the_base_and_leaves_no_trace(modules_to_save):
    base = make_model("llama", make_tokenizer())
    expected = base(IDS).logits.detach().clone()
    policy = add_policy_adapter(base, LoraConfig(modules_to_save=modules_to_save))
    _step(policy)
    trained, after = _trained(policy), policy(IDS).logits.detach().clone()
    assert not torch.equal(after, expected)
    with reference(policy), torch.no_grad():
        assert torch.equal(policy(IDS).logits, expected)
    assert _trained(policy) == trained
    assert torch.equal(policy(IDS).logits, after)


def test_reference_restores_a_frozen_adapter():
    # PEFT alone would turn gradients on for an adapter that was frozen on purpose.
    policy = add_policy_adapter(make_model("llama", make_tokenizer()), LoraConfig())
    freeze(policy)
    with policy.disable_adapter():
        pass
    assert _trained(policy)
    freeze(policy)
    with reference(policy):
        pass
    assert not _trained(policy)


def test_reference_can_be_an_adapter_of_its_own():
    policy = add_policy_adapter(make_model("llama", make_tokenizer()), LoraConfig(init_lora_weights=False))
    policy.add_adapter("sft", LoraConfig(init_lora_weights=False))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".default" in name)
    trained, mine = _trained(policy), policy(IDS).logits.detach().clone()
    policy.set_adapter("sft")
    sft = policy(IDS).logits.detach().clone()
    policy.set_adapter("default")
    with reference(policy, "sft", "default"), torch.no_grad():
        assert policy.active_adapter == "sft"
        assert torch.equal(policy(IDS).logits, sft)
    assert policy.active_adapter == "default" and _trained(policy) == trained
    assert torch.equal(policy(IDS).logits, mine)
    with pytest.raises(FourscoreError, match="--ref_adapter_name other"), reference(policy, "other"):
        pass


def test_reference_restores_after_an_error():
    policy = add_policy_adapter(make_model("llama", make_tokenizer()), LoraConfig())
    trained = _trained(policy)
    with pytest.raises(RuntimeError), reference(policy):
        raise RuntimeError
    assert _trained(policy) == trained


def test_train_in_fp32_keeps_ties_and_frozen_weights():
    model = make_model("llama", make_tokenizer(), tie_word_embeddings=True).to(torch.bfloat16)
    model.model.norm.requires_grad_(False)
    train_in_fp32(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.bfloat16

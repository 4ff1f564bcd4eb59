from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import ARCHITECTURES, EOS, make_checkpoint, make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fourscore.config import ModelConfig, PPOConfig
from fourscore.models import loading
from fourscore.models.adapters import reference
from fourscore.models.forward import sample_scores
from fourscore.models.loading import load_models

IDS = torch.arange(3, 21).reshape(2, 9)


def _load(policy, reward, value_training="adapter", **model_args):
    args = PPOConfig(sft_model_path=str(policy), reward_model_path=str(reward), value_training=value_training)
    return load_models(ModelConfig(**model_args), args)


def _dtypes(model, trained):
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


def _storages(model):
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def _learn(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, use_cache=False).logits.float().square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.fixture
def reads(monkeypatch):
    """What from_pretrained of the two auto classes was called with."""
    calls = []
    for auto in (loading.AutoModelForCausalLM, loading.AutoModelForSequenceClassification):

        def record(*args, _read=auto.from_pretrained, _name=auto.__name__, **kwargs):
            calls.append((_name, args[0], kwargs))
            return _read(*args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", record)
    return calls


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_learns_and_keeps_its_frozen_roles(arch, use_peft, tmp_path, reads):
    policy = make_checkpoint(arch, tmp_path / "policy", "policy", pad="spare")
    reward = make_checkpoint(arch, tmp_path / "reward", "reward", pad="spare", seed=1)
    models = _load(policy, reward, use_peft=use_peft, lora_target_modules="all-linear", lora_dropout=0.0)
    assert [name for name, *_ in reads] == ["AutoModelForCausalLM", "AutoModelForSequenceClassification"]

    before = models.policy(IDS, use_cache=False).logits.detach().clone()
    score = models.reward_model(IDS, use_cache=False).logits.clone()
    torch.testing.assert_close(models.value_model(IDS, use_cache=False).logits, score)
    _learn(models.policy)
    _learn(models.value_model)
    assert not torch.equal(models.policy(IDS, use_cache=False).logits, before)
    assert torch.equal(models.reward_model(IDS, use_cache=False).logits, score)
    if use_peft:
        assert models.ref_policy is None and isinstance(models.policy, PeftModel)
        with reference(models.policy):
            assert torch.equal(models.policy(IDS, use_cache=False).logits, before)
        owned = {
            name
            for name, p in models.value_model.named_parameters()
            if p.untyped_storage().data_ptr() not in _storages(models.reward_model)
        }
        assert owned == {name for name, p in models.value_model.named_parameters() if p.requires_grad}
        assert any("score" in name for name in owned)
    else:
        assert torch.equal(models.ref_policy(IDS, use_cache=False).logits, before)
        assert not _storages(models.policy) & _storages(models.ref_policy)
        assert not _storages(models.value_model) & _storages(models.reward_model)
    assert not _dtypes(models.reward_model, trained=True)
    assert models.policy.training and models.value_model.training


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("mode", ["full", "peft", "peft, value in full"])
def test_what_trains_is_fp32_and_the_rest_as_asked(mode, asked, stored, tmp_path, reads):
    policy = make_checkpoint("llama", tmp_path / "policy", "policy", dtype=stored)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", dtype=stored)
    value_training = "full" if mode == "peft, value in full" else "adapter"
    models = _load(policy, reward, value_training, dtype=asked, use_peft=mode != "full")
    frozen = {stored if asked == "auto" else getattr(torch, asked)}
    assert len(reads) == 2
    assert _dtypes(models.policy, trained=True) == _dtypes(models.value_model, trained=True) == {torch.float32}
    assert _dtypes(models.reward_model, trained=False) == frozen and not _dtypes(models.reward_model, trained=True)
    if mode == "full":
        assert _dtypes(models.ref_policy, trained=False) == frozen and not _dtypes(models.ref_policy, trained=True)
    else:
        assert models.ref_policy is None and _dtypes(models.policy, trained=False) == frozen
    if mode == "peft":
        assert _dtypes(models.value_model, trained=False) == frozen
    else:
        assert not _dtypes(models.value_model, trained=False)


def test_trained_weights_are_not_rounded_to_the_frozen_dtype(llama_policy, llama_reward):
    exact, rounded = _load(llama_policy, llama_reward), _load(llama_policy, llama_reward, dtype="bfloat16")
    for mine, theirs in zip(rounded.policy.parameters(), exact.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_frozen_roles_stay_memory_mapped(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512}
    policy = make_checkpoint("llama", tmp_path / "policy", "policy", **wide)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", **wide)
    models = _load(policy, reward)
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith("model.safetensors")]

    def mapped(model):
        return all(any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in spans) for p in model.parameters())

    assert mapped(models.ref_policy) and mapped(models.reward_model)
    assert not mapped(models.policy) and not mapped(models.value_model)


def test_arguments_reach_every_model(llama_policy, llama_reward, reads):
    _load(
        llama_policy, llama_reward, model_revision="abc", attn_implementation="eager", trust_remote_code=True,
        use_peft=True, load_in_4bit=True, dtype="bfloat16",
    )  # fmt: skip
    assert len(reads) == 2
    for _, _, kwargs in reads:
        assert kwargs["revision"] == "abc" and kwargs["attn_implementation"] == "eager"
        assert kwargs["dtype"] == torch.bfloat16 and kwargs["trust_remote_code"] is True
        assert (
            kwargs["quantization_config"].load_in_4bit
            and "score" in kwargs["quantization_config"].llm_int8_skip_modules
        )
        assert "device_map" in kwargs


def test_attention_implementation_is_that_of_every_role(llama_policy, llama_reward):
    models = _load(llama_policy, llama_reward, attn_implementation="eager")
    for model in (models.policy, models.ref_policy, models.reward_model, models.value_model):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantized_bases_are_shared_and_their_adapters_learn(flag, llama_policy, llama_reward):
    models = _load(llama_policy, llama_reward, use_peft=True, lora_target_modules="all-linear", **{flag: True})
    quantized = {torch.uint8 if flag == "load_in_4bit" else torch.int8}
    assert _dtypes(models.reward_model.model.layers[0].mlp, trained=False) == quantized
    assert models.reward_model.score.weight.dtype == torch.float32
    assert models.policy.get_output_embeddings().weight.dtype == torch.float32
    score = models.reward_model(IDS).logits.clone()
    first = models.value_model.eval()(IDS).logits  # bitsandbytes computes 8 bits in another way in train mode
    torch.testing.assert_close(first, score)
    _learn(models.policy)
    _learn(models.value_model.train())
    assert not torch.equal(models.value_model.eval()(IDS).logits, first)
    assert torch.equal(models.reward_model(IDS).logits, score)
    owned = _storages(models.value_model) - _storages(models.reward_model)
    assert len(owned) == sum(p.requires_grad for p in models.value_model.parameters())


@pytest.mark.parametrize("use_peft", [False, True])
def test_dropout_is_off_everywhere_and_kept_in_what_is_saved(use_peft, tmp_path):
    dropout = {"attention_dropout": 0.3}
    policy = make_checkpoint("llama", tmp_path / "policy", "policy", **dropout)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", **dropout)
    models = _load(policy, reward, use_peft=use_peft, lora_dropout=0.3)
    for model in (models.policy, models.ref_policy, models.reward_model, models.value_model):
        if model is not None:
            model.train()
            assert torch.equal(model(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
            assert model.config.attention_dropout == 0.3


@pytest.mark.parametrize("pad_is", ["own", "eos", "none"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_score_equals_the_checkpoints_own_forward(arch, pad_is, tmp_path):
    policy = make_checkpoint(arch, tmp_path / "policy", "policy")
    eos = make_tokenizer().eos_token_id
    pads = {"own": {}, "eos": {"pad_token_id": eos}, "none": {"pad_token_id": None}}
    reward = make_checkpoint(arch, tmp_path / "reward", "reward", **pads[pad_is])
    samples = [torch.tensor([40, 50, 60, eos]), torch.tensor([41, 51, eos]), torch.tensor([9, 8, 7, 6, 5])]
    original = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    with torch.no_grad():
        expected = torch.cat([original(ids[None], use_cache=False).logits[0] for ids in samples])
        torch.testing.assert_close(sample_scores(_load(policy, reward).reward_model, samples), expected)


def test_untrained_head_is_taken_when_allowed(llama_policy):
    models = _load(llama_policy, llama_policy, allow_untrained_reward_head=True)
    assert models.reward_model.score.weight.shape[0] == 1
    assert torch.equal(models.reward_model(IDS).logits, models.value_model(IDS).logits)


def test_bin_checkpoints_load(tmp_path):
    policy = make_checkpoint("llama", tmp_path / "policy", "policy", safe_serialization=False)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", safe_serialization=False)
    _load(policy, reward, allow_pickle=True)


def test_pad_ids_outside_the_embedding_are_dropped(tmp_path):
    policy = make_checkpoint("llama", tmp_path / "policy", "policy", pad="none")
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", pad="none")
    for path in (policy, reward):
        config = (path / "config.json").read_text()
        assert '"pad_token_id": null' in config
        (path / "config.json").write_text(config.replace('"pad_token_id": null', '"pad_token_id": 300'))
    models = _load(policy, reward)
    assert models.tokenizer.pad_token_id == 300
    for model in (models.policy, models.ref_policy, models.reward_model, models.value_model):
        assert model.config.pad_token_id is None


def test_tokenizer_of_another_place(tmp_path, llama_policy, llama_reward):
    tokenizer = AutoTokenizer.from_pretrained(llama_policy)
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(tmp_path)
    models = _load(llama_policy, llama_reward, model_name_or_path=str(tmp_path))
    assert models.tokenizer.chat_template == "mine" and models.tokenizer.eos_token == EOS

import json
import time

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from tiny import make_checkpoint, make_model, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fourscore.config import ModelConfig, PPOConfig
from fourscore.errors import FourscoreError
from fourscore.models import checkpoint, loading
from fourscore.models.loading import load_models


def _refused(monkeypatch, policy, reward, match, value_training="adapter", **model_args):
    """The flags are refused with this message, on one line, before a weight is read."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(loading.AutoModelForSequenceClassification, "from_pretrained", read)
    args = PPOConfig(sft_model_path=str(policy), reward_model_path=str(reward), value_training=value_training)
    with pytest.raises(FourscoreError, match=match) as error:
        load_models(ModelConfig(**model_args), args)
    assert "\n" not in str(error.value)


def test_missing_folder(monkeypatch, llama_policy, llama_reward, tmp_path):
    _refused(monkeypatch, tmp_path / "none", llama_reward, r"--sft_model_path \S+/none: no such folder")
    _refused(monkeypatch, llama_policy, "./none", r"--reward_model_path \./none: no such folder")
    _refused(monkeypatch, llama_policy / "config.json", llama_reward, "is a file")


def test_unreachable_hub_id(monkeypatch, llama_reward):
    _refused(monkeypatch, "owner/name", llama_reward, r"--sft_model_path owner/name: .*HF_HUB_OFFLINE is set")
    _refused(monkeypatch, "not an id/at all", llama_reward, r"not a hub id")


def test_unreachable_hub_answers_quickly(monkeypatch, llama_policy):
    # A hub that nothing listens at; transformers alone would retry for more than 20 seconds a file.
    monkeypatch.setattr(checkpoint.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    start = time.time()
    _refused(monkeypatch, llama_policy, "owner/name", r"--reward_model_path owner/name: .*the hub cannot be reached")
    assert time.time() - start < 6


def test_folder_without_config_or_weights(monkeypatch, llama_policy, llama_reward, tmp_path):
    _refused(monkeypatch, tmp_path, llama_reward, "no config.json")
    (tmp_path / "config.json").write_text((llama_policy / "config.json").read_text())
    _refused(monkeypatch, tmp_path, llama_reward, "no weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    _refused(monkeypatch, tmp_path, llama_reward, "config.json cannot be used")


def test_damaged_and_missing_shards(monkeypatch, llama_policy, llama_reward, tmp_path):
    (tmp_path / "config.json").write_text((llama_policy / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no header here")
    _refused(monkeypatch, tmp_path, llama_reward, "damaged")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(monkeypatch, tmp_path, llama_reward, "names model-00002-of-00002.safetensors, which is not there")


def test_adapter_only_checkpoint(monkeypatch, llama_reward, tmp_path):
    get_peft_model(make_model("llama", make_tokenizer()), LoraConfig()).save_pretrained(tmp_path)
    _refused(monkeypatch, tmp_path, llama_reward, "names no base_model_name_or_path")


def test_roles_swapped(monkeypatch, llama_policy, llama_reward):
    _refused(monkeypatch, llama_reward, llama_reward, "is a LlamaForSequenceClassification, not a causal LM")
    _refused(monkeypatch, llama_policy, llama_policy, r"no trained `score` head.*--allow_untrained_reward_head")


def test_untrained_head_of_a_bin_checkpoint(monkeypatch, llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "policy", safe_serialization=False)
    _refused(monkeypatch, llama_policy, path, "no trained `score` head")


def test_several_labels(monkeypatch, llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "reward", num_labels=3)
    _refused(monkeypatch, llama_policy, path, "num_labels=3")


def test_encoder_reward(monkeypatch, llama_policy, tmp_path):
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=1, **size)).save_pretrained(tmp_path)
    _refused(monkeypatch, llama_policy, tmp_path, "'bert' keeps its head in 'classifier.*policy's tokenizer")


def test_other_vocabulary_size(monkeypatch, llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "reward", vocab_size=280)
    _refused(monkeypatch, llama_policy, path, "vocabulary of 280, --sft_model_path .* one of 300")


def test_same_size_other_tokens(monkeypatch, llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "reward")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(path)
    _refused(monkeypatch, llama_policy, path, r"id 2 is 'w2' there and .* the policy's tokenizer")


def test_tokenizer_longer_than_the_embedding(monkeypatch, llama_reward, tmp_path):
    path = make_checkpoint("llama", tmp_path / "sft", "policy", vocab_size=290)
    _refused(monkeypatch, path, llama_reward, "beyond its 290 embedding rows.*--model_name_or_path")


def test_added_pad_beyond_the_embedding_is_fine(llama_reward, tmp_path):
    path = make_checkpoint("llama", tmp_path, "policy", pad="none", vocab_size=300)
    tokenizer = make_tokenizer("none")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", pad="none")
    models = load_models(ModelConfig(), PPOConfig(sft_model_path=str(path), reward_model_path=str(reward)))
    assert models.tokenizer.pad_token_id == 300


def test_quantization_needs_adapters(monkeypatch, llama_policy, llama_reward):
    for flag in ("load_in_4bit", "load_in_8bit"):
        _refused(monkeypatch, llama_policy, llama_reward, f"--{flag}.*--use_peft", **{flag: True})
        _refused(
            monkeypatch,
            llama_policy,
            llama_reward,
            "--value_training",
            value_training="full",
            use_peft=True,
            **{flag: True},
        )


def test_quantized_checkpoint_needs_adapters(monkeypatch, llama_reward, llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "policy")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (path / "config.json").write_text(json.dumps(config))
    _refused(monkeypatch, path, llama_reward, "is quantized.*--use_peft")


def test_weights_missing_from_the_policy(llama_reward, tmp_path):
    path = make_checkpoint("llama", tmp_path, "policy")
    model = make_model("llama", make_tokenizer())
    state = {name: tensor for name, tensor in model.state_dict().items() if "up_proj" not in name}
    model.save_pretrained(path, state_dict=state)
    with pytest.raises(FourscoreError, match=r"--sft_model_path .*2 weights are missing.*up_proj"):
        load_models(ModelConfig(), PPOConfig(sft_model_path=str(path), reward_model_path=str(llama_reward)))


def test_checks_take_no_time(llama_policy, llama_reward):
    from fourscore.models.checks import check_models

    start = time.time()
    policy, reward = check_models(
        ModelConfig(), PPOConfig(sft_model_path=str(llama_policy), reward_model_path=str(llama_reward))
    )
    assert time.time() - start < 2
    assert policy.dtype == reward.dtype == torch.float32 and policy.embedding_rows == 300

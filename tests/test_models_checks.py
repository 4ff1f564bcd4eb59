import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, TaskType, get_peft_model
from tiny import make_checkpoint, make_model, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fourscore.config import ModelConfig, PPOConfig
from fourscore.errors import FourscoreError
from fourscore.models import checkpoint, checks, loading
from fourscore.models.checkpoint import inspect_checkpoint
from fourscore.models.loading import load_models


def _refused(monkeypatch, policy, reward, match, value_training="adapter", **model_args):
    """The flags are refused with this message, on a line that starts with a flag, before a weight is read."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(loading.AutoModelForSequenceClassification, "from_pretrained", read)
    args = PPOConfig(sft_model_path=str(policy), reward_model_path=str(reward), value_training=value_training)
    with pytest.raises(FourscoreError, match=match) as error:
        load_models(ModelConfig(**model_args), args)
    assert all(line.startswith("--") for line in error.value.lines)


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
    _refused(monkeypatch, llama_policy, path, "no trained `score` head", allow_pickle=True)


def test_several_labels(monkeypatch, llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "reward", num_labels=3)
    _refused(monkeypatch, llama_policy, path, "num_labels=3")


def test_encoder_reward(monkeypatch, llama_policy, tmp_path):
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=1, **size)).save_pretrained(tmp_path)
    _refused(
        monkeypatch, llama_policy, tmp_path, "has no linear head named 'score'.*no tokenizer of its own is with it"
    )


def test_other_vocabulary_size(monkeypatch, llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "reward", vocab_size=280)
    for file in path.glob("*token*"):
        file.unlink()
    _refused(monkeypatch, llama_policy, path, "vocabulary of 280, and --sft_model_path .* one of 300")


def test_same_size_other_tokens(llama_policy, tmp_path):
    path = make_checkpoint("llama", tmp_path, "reward")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1").save_pretrained(path)
    args = PPOConfig(sft_model_path=str(llama_policy), reward_model_path=str(path))
    assert checks.check_models(ModelConfig(), args).reward_tokenizer.eos_token == "w1"


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
    start = time.time()
    found = checks.check_models(
        ModelConfig(), PPOConfig(sft_model_path=str(llama_policy), reward_model_path=str(llama_reward))
    )
    assert time.time() - start < 2
    assert found.sft.dtype == found.reward.dtype == torch.float32 and found.sft.embedding_rows == 300


def test_all_that_is_wrong_is_said_at_once(monkeypatch, llama_policy, tmp_path):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", num_labels=3)
    args = PPOConfig(sft_model_path=str(tmp_path / "none"), reward_model_path=str(reward))
    model_args = ModelConfig(use_peft=True, lora_target_modules=["q_prj"], attn_implementation="fast")
    with pytest.raises(FourscoreError) as error:
        load_models(model_args, args)
    named = [line.split()[0] for line in error.value.lines]
    assert named == ["--sft_model_path", "--reward_model_path", "--attn_implementation"]
    model_args.attn_implementation = None
    with pytest.raises(FourscoreError) as error:
        load_models(model_args, args)
    assert [line.split()[0] for line in error.value.lines] == [*named[:2], "--lora_target_modules"]
    assert "did you mean q_proj?" in str(error.value)


def test_one_name_of_a_module_is_a_name(llama_policy, llama_reward):
    args = PPOConfig(sft_model_path=str(llama_policy), reward_model_path=str(llama_reward))
    models = load_models(ModelConfig(use_peft=True, lora_target_modules=["q_proj"]), args)
    adapted = {name.split(".")[-4] for name, p in models.policy.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj"}


# ------------------------------------------------------------------------------------------------ the hub and its cache


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Puts a folder into a hub cache as `owner/name` and returns the copy."""

    def put(folder):
        home = tmp_path / "hub" / "models--owner--name"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("abc")
        monkeypatch.setattr(checkpoint.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return shutil.copytree(folder, home / "snapshots" / "abc")

    return put


def test_cached_shards_are_checked_one_by_one(cached, tmp_path):
    model = make_model("llama", make_tokenizer())
    model.save_pretrained(tmp_path / "whole", max_shard_size="200KB")
    copy = cached(tmp_path / "whole")
    found = inspect_checkpoint("--sft_model_path", "owner/name", ModelConfig())
    assert found.weights >= set(model.state_dict()) and found.identity != ("owner/name", "main")
    same = inspect_checkpoint("--sft_model_path", str(copy), ModelConfig())
    assert same.identity == found.identity
    shard = sorted(copy.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(FourscoreError, match=f"owner/name: .* names {shard.name}, which is not there"):
        inspect_checkpoint("--sft_model_path", "owner/name", ModelConfig())


def test_cached_config_without_weights(cached, llama_policy):
    (cached(llama_policy) / "model.safetensors").unlink()
    with pytest.raises(FourscoreError, match="owner/name: no weights in the hub cache"):
        inspect_checkpoint("--sft_model_path", "owner/name", ModelConfig())


def test_adapter_in_the_hub_cache(cached, llama_reward, llama_policy, tmp_path):
    adapted = get_peft_model(make_model("llama", make_tokenizer()), LoraConfig(task_type=TaskType.CAUSAL_LM))
    adapted.peft_config["default"].base_model_name_or_path = str(llama_policy)
    adapted.save_pretrained(tmp_path / "adapter")
    cached(tmp_path / "adapter")
    found = inspect_checkpoint("--sft_model_path", "owner/name", ModelConfig())
    assert found.path == str(llama_policy) and found.adapter.path == "owner/name"
    assert any("lora_A" in name for name in found.adapter.tensors)
    assert found.named == "--sft_model_path owner/name"


def test_pickles_on_the_hub(monkeypatch):
    files = ("config.json", "pytorch_model-00001-of-00002.bin", "tokenizer.json")
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(checkpoint.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint, "HfApi", lambda: SimpleNamespace(model_info=lambda *args, **kwargs: info))
    with pytest.raises(FourscoreError, match=r"a, b = 'owner/name', 'name-safetensors'; .*revision='v1'"):
        inspect_checkpoint("--sft_model_path", "owner/name", ModelConfig(model_revision="v1"))


def test_reward_adapter_with_its_head(llama_policy, tmp_path):
    adapted = get_peft_model(make_model("llama", make_tokenizer(), "reward"), LoraConfig(task_type=TaskType.SEQ_CLS))
    adapted.peft_config["default"].base_model_name_or_path = str(llama_policy)
    adapted.save_pretrained(tmp_path)
    reward = checks.check_models(
        ModelConfig(), PPOConfig(sft_model_path=str(llama_policy), reward_model_path=str(tmp_path))
    ).reward
    assert reward.adapter is not None and reward.path == str(llama_policy)

"""Which storages the loaded roles stand on, case by case, and that sharing changes no number."""

import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from fourscore.config import ModelConfig, PPOConfig
from fourscore.models import loading
from fourscore.models.adapters import reference
from fourscore.models.loading import load_models
from fourscore.models.quantized import stay_trainable
from fourscore.ppo.trainer import PPOTrainer

IDS = torch.arange(3, 21).reshape(2, 9)
LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "init_lora_weights": False}


def load(policy, reward, value_training="adapter", **model_args):
    args = PPOConfig(sft_model_path=str(policy), reward_model_path=str(reward), value_training=value_training)
    return load_models(ModelConfig(**model_args), args)


def storages(*models):
    return {t.untyped_storage().data_ptr() for m in models for t in m.parameters()}


def frozen_backbone(model):
    """Storages of the frozen weights that are no adapter's and no head's."""
    names = [n for n, p in model.named_parameters() if not p.requires_grad]
    backbone = [n for n in names if "lora_" not in n and "score" not in n and "lm_head" not in n]
    own = dict(model.named_parameters())
    return {own[n].untyped_storage().data_ptr() for n in backbone}


def own_adapter(model, **config):
    return get_peft_model(model, LoraConfig(**(LORA | config)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("base"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def sft_adapter(base, tmp_path_factory):
    """A LoRA trained on the base, as a folder that holds nothing else but the tokenizer."""
    path = tmp_path_factory.mktemp("sft_adapter")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    own_adapter(model, task_type=TaskType.CAUSAL_LM).save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward_adapter(base, tmp_path_factory):
    """A LoRA reward model on the same base, its head in `modules_to_save`."""
    path = tmp_path_factory.mktemp("reward_adapter")
    torch.manual_seed(6)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = own_adapter(model, task_type=TaskType.SEQ_CLS, modules_to_save=["score"])
    adapted.save_pretrained(path)
    return path


@pytest.fixture
def opened(monkeypatch):
    """Weight files that from_pretrained or a head was read from, by real path."""
    found = []
    for auto in (loading.AutoModelForCausalLM, loading.AutoModelForSequenceClassification):

        def record(path, *args, _read=auto.from_pretrained, **kwargs):
            found.append(os.path.realpath(path))
            return _read(path, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", record)
    return found


def expected(path, ids, kind, adapter=None, dtype=torch.float32, **kwargs):
    """What transformers and PEFT compute of the checkpoint when it is loaded alone."""
    auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    labels = {} if kind == "policy" else {"num_labels": 1}
    model = auto.from_pretrained(path, dtype=dtype, **labels, **kwargs)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    stay_trainable(model)  # else some CPUs compute 4-bit layers in bf16
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_full_with_two_checkpoints(llama_policy, llama_reward, opened):
    models = load(llama_policy, llama_reward)
    assert len(opened) == 2
    roles = (models.policy, models.ref_policy, models.reward_model, models.value_model)
    # Four models of as many parameters, and nothing beside them.
    assert len(storages(*roles)) == sum(len(storages(m)) for m in roles)
    assert torch.equal(logits(models.policy), expected(llama_policy, IDS, "policy"))
    assert torch.equal(logits(models.ref_policy), expected(llama_policy, IDS, "policy"))
    assert torch.equal(logits(models.reward_model), expected(llama_reward, IDS, "reward"))
    assert torch.equal(logits(models.value_model), expected(llama_reward, IDS, "reward"))


@pytest.mark.parametrize("spelling", ["same", "relative", "symlink", "linked files"])
def test_full_with_one_checkpoint(spelling, llama_policy, tmp_path, opened, monkeypatch):
    other = {
        "same": lambda: llama_policy,
        "relative": lambda: Path(os.path.relpath(llama_policy)),
        "symlink": lambda: tmp_path / "link",
        "linked files": lambda: tmp_path / "files",
    }[spelling]()
    if spelling == "symlink":
        other.symlink_to(llama_policy)
    elif spelling == "linked files":
        other.mkdir()
        for file in llama_policy.iterdir():
            (other / file.name).symlink_to(file)
    models = load(llama_policy, other, allow_untrained_reward_head=True)
    assert len(opened) == 1
    assert frozen_backbone(models.ref_policy) == frozen_backbone(models.reward_model)
    assert not storages(models.policy) & storages(models.value_model, models.ref_policy, models.reward_model)
    assert not storages(models.value_model) & storages(models.ref_policy, models.reward_model)
    assert torch.equal(logits(models.reward_model), logits(models.value_model))
    assert torch.equal(logits(models.policy), expected(llama_policy, IDS, "policy"))


def test_a_copy_of_the_files_is_another_checkpoint(llama_policy, tmp_path, opened):
    other = make_checkpoint("llama", tmp_path, "reward")
    load(llama_policy, other)
    assert len(opened) == 2


def test_one_checkpoint_that_holds_both_heads(tmp_path, opened):
    path = make_checkpoint("llama", tmp_path, "policy")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = torch.randn(1, 64)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"num_labels": 1}
    (path / "config.json").write_text(json.dumps(config))
    models = load(path, path)
    assert len(opened) == 1
    assert torch.equal(models.reward_model.score.weight, tensors["score.weight"])
    assert torch.equal(logits(models.reward_model), expected(path, IDS, "reward"))


def test_lora_stands_on_two_backbones(llama_policy, llama_reward, opened):
    models = load(llama_policy, llama_reward, use_peft=True)
    assert len(opened) == 2 and models.ref_policy is None
    assert frozen_backbone(models.reward_model) == frozen_backbone(models.value_model)
    assert not frozen_backbone(models.policy) & frozen_backbone(models.value_model)
    with reference(models.policy):
        assert torch.equal(logits(models.policy), expected(llama_policy, IDS, "policy"))
    assert torch.equal(logits(models.reward_model), expected(llama_reward, IDS, "reward"))


def test_lora_with_sft_and_reward_adapters_stands_on_one_base(base, sft_adapter, reward_adapter, opened):
    models = load(sft_adapter, reward_adapter, use_peft=True)
    assert opened == [os.path.realpath(base)]
    one = frozen_backbone(models.policy)
    assert one == frozen_backbone(models.reward_model) == frozen_backbone(models.value_model)
    # Base once (its head is tied), what trains, and the two frozen adapters with the reward model's head.
    roles = (models.policy, models.reward_model, models.value_model)
    trained = {p.data_ptr() for m in roles for p in m.parameters() if p.requires_grad}
    kept = [n for m in roles for n, p in m.named_parameters() if ".sft." in n or (".reward." in n and m is roles[1])]
    assert len(storages(*roles)) == len(one) + len(trained) + len(kept) + 1

    sft = expected(base, IDS, "policy", sft_adapter)
    assert not torch.equal(sft, expected(base, IDS, "policy"))
    assert torch.equal(logits(models.policy), sft)
    with reference(models.policy):
        assert torch.equal(logits(models.policy), sft)
    score = expected(base, IDS, "reward", reward_adapter)
    assert torch.equal(logits(models.reward_model), score)
    assert torch.equal(logits(models.value_model), score)
    with reference(models.value_model):
        assert torch.equal(logits(models.value_model), score)


def test_what_trains_is_the_same_after_any_number_of_switches(sft_adapter, reward_adapter):
    models = load(sft_adapter, reward_adapter, use_peft=True)
    for model in (models.policy, models.value_model):
        before = [n for n, p in model.named_parameters() if p.requires_grad]
        assert before and not any(".sft." in n or ".reward." in n for n in before)
        for _ in range(3):
            with reference(model):
                pass
        assert [n for n, p in model.named_parameters() if p.requires_grad] == before


def test_roles_on_one_base_learn_apart(base, sft_adapter, reward_adapter):
    models = load(sft_adapter, reward_adapter, use_peft=True)
    score = logits(models.reward_model)
    sft = logits(models.policy)
    for model in (models.policy, models.value_model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(10):
            model(IDS, use_cache=False).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(logits(models.policy), sft)
    assert not torch.equal(logits(models.value_model), score)
    assert torch.equal(logits(models.reward_model), score)
    with reference(models.policy):
        assert torch.equal(logits(models.policy), sft)


@pytest.mark.parametrize("value_training", ["adapter", "full"])
def test_reward_adapter_beside_another_sft_model(value_training, llama_policy, base, reward_adapter, opened):
    models = load(llama_policy, reward_adapter, value_training, use_peft=True)
    assert len(opened) == 2
    score = expected(base, IDS, "reward", reward_adapter)
    torch.testing.assert_close(logits(models.reward_model), score)
    assert torch.equal(logits(models.value_model), logits(models.reward_model))
    shared = storages(models.reward_model) & storages(models.value_model)
    assert bool(shared) == (value_training == "adapter")


def test_full_fine_tuning_from_an_adapter_trains_the_merged_model(base, sft_adapter, llama_reward, opened):
    models = load(sft_adapter, llama_reward)
    assert len(opened) == 2
    torch.testing.assert_close(logits(models.policy), expected(base, IDS, "policy", sft_adapter))
    assert torch.equal(logits(models.policy), logits(models.ref_policy))
    assert not isinstance(models.policy, PeftModel) and all(p.requires_grad for p in models.policy.parameters())
    assert models.policy.get_output_embeddings().weight is models.policy.get_input_embeddings().weight


def test_modules_that_an_sft_adapter_saved_are_its_own(base, tmp_path, reward_adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(7)
    adapted = own_adapter(model, task_type=TaskType.CAUSAL_LM, modules_to_save=["norm"])
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    models = load(tmp_path, reward_adapter, use_peft=True)
    assert torch.equal(logits(models.policy), expected(base, IDS, "policy", tmp_path))
    assert torch.equal(logits(models.reward_model), expected(base, IDS, "reward", reward_adapter))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_one_quantized_base(bits, base, sft_adapter, reward_adapter, opened):
    models = load(sft_adapter, reward_adapter, use_peft=True, **{bits: True})
    assert len(opened) == 1
    one = frozen_backbone(models.policy)
    assert one == frozen_backbone(models.reward_model) == frozen_backbone(models.value_model)
    options = {bits: True, "llm_int8_skip_modules": ["lm_head", "score"]}
    if bits == "load_in_4bit":
        options |= {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4"}
    alone = {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}}
    for model in (models.policy, models.reward_model):
        model.eval()
    assert torch.equal(logits(models.policy), expected(base, IDS, "policy", sft_adapter, **alone))
    assert torch.equal(logits(models.reward_model), expected(base, IDS, "reward", reward_adapter, **alone))


def test_shards_are_read_once_and_stay_mapped(tmp_path, opened):
    paths = []
    for kind in ("policy", "reward"):
        path = make_checkpoint("llama", tmp_path / kind, kind, seed=len(paths))
        auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
        auto.from_pretrained(path).save_pretrained(path, max_shard_size="100KB")
        (path / "model.safetensors").unlink(missing_ok=True)
        assert len(list(path.glob("model-*.safetensors"))) > 1
        paths.append(path)
    opened.clear()
    models = load(*paths, use_peft=True)
    assert len(opened) == 2
    assert frozen_backbone(models.reward_model) == frozen_backbone(models.value_model)
    assert torch.equal(logits(models.reward_model), expected(paths[1], IDS, "reward"))
    with safe_open(sorted(paths[0].glob("model-*.safetensors"))[0], "pt") as shard:
        name = next(iter(shard.keys()))
        assert torch.equal(models.policy.get_base_model().get_parameter(name), shard.get_tensor(name))


@pytest.mark.parametrize("use_peft", [False, True])
def test_tied_embeddings_stay_one_tensor(use_peft, tmp_path):
    policy = make_checkpoint("llama", tmp_path / "policy", tie_word_embeddings=True)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", tie_word_embeddings=True)
    models = load(policy, reward, use_peft=use_peft)
    for model in (models.policy, models.ref_policy):
        if model is not None:
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("saved", [None, ["norm"]])
def test_the_saved_policy_carries_the_sft_adapter_and_its_own(saved, base, tmp_path, reward_adapter, monkeypatch):
    torch.manual_seed(8)
    sft = tmp_path / "sft"
    model = own_adapter(AutoModelForCausalLM.from_pretrained(base), task_type=TaskType.CAUSAL_LM, modules_to_save=saved)
    model.save_pretrained(sft)
    AutoTokenizer.from_pretrained(base).save_pretrained(sft)
    args = PPOConfig(
        sft_model_path=str(sft),
        reward_model_path=str(reward_adapter),
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=1,
        learning_rate=1e-2,
        response_length=4,
        num_sample_generations=0,
        report_to="none",
        disable_tqdm=True,
    )
    peft = {"lora_target_modules": ["k_proj", "down_proj"], "lora_r": 3, "lora_alpha": 5}

    def trainer():
        models = load_models(ModelConfig(use_peft=True, **peft), args)
        data = Dataset.from_dict({"prompt": ["the film", "a good", "plot", "it was"]})
        return PPOTrainer(args, models.tokenizer, models.policy, None, models.reward_model, data, models.value_model)

    first = trainer()
    before = logits(first.model)
    with reference(first.model):
        assert torch.equal(logits(first.model), before)
    first.train()
    first.save_model()
    trained = logits(first.model)
    assert not torch.equal(trained, before)
    with reference(first.model):
        assert torch.equal(logits(first.model), before)
    # One adapter of the base is the whole policy, and the value model likewise.
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    torch.testing.assert_close(logits(alone.eval()), trained)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    value = PeftModel.from_pretrained(classifier, tmp_path / "run" / "value_model")
    torch.testing.assert_close(logits(value.eval()), logits(first.value_model))
    # And a checkpoint takes up where it was, with both adapters in their places.
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(logits(again.model), trained)


@pytest.mark.parametrize("case", ["full", "two backbones", "one base", "one base, 4-bit", "one base, 8-bit"])
def test_ten_updates_leave_the_frozen_roles_as_they_were(
    case, llama_policy, llama_reward, sft_adapter, reward_adapter, tmp_path
):
    paths = (sft_adapter, reward_adapter) if "one base" in case else (llama_policy, llama_reward)
    args = PPOConfig(
        sft_model_path=str(paths[0]),
        reward_model_path=str(paths[1]),
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=10,
        num_ppo_epochs=1,
        learning_rate=1e-2,
        response_length=3,
        num_sample_generations=0,
        report_to="none",
        disable_tqdm=True,
    )
    bits = {"load_in_4bit": "4-bit" in case, "load_in_8bit": "8-bit" in case}
    models = load_models(ModelConfig(use_peft=case != "full", **bits), args)
    data = Dataset.from_dict({"prompt": ["the film", "a good", "plot", "it was"]})
    trainer = PPOTrainer(
        args, models.tokenizer, models.policy, models.ref_policy, models.reward_model, data, models.value_model
    )

    def frozen_outputs():
        # bitsandbytes computes 8 bits in another way in train mode.
        trainer.model.eval()
        with trainer.roles.as_reference() as ref_policy, trainer.roles.as_reward() as reward_model:
            outputs = logits(ref_policy), logits(reward_model.eval())
        trainer.model.train()
        return outputs

    def trained():
        return {
            name: {n for n, p in m.named_parameters() if p.requires_grad} for name, m in trainer.roles.trained.items()
        }

    before, names, policy = frozen_outputs(), trained(), logits(trainer.model)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen_outputs(), strict=True))
    assert names == trained() and not torch.equal(policy, logits(trainer.model))


def test_roles_that_were_loaded_one_by_one_share_what_is_frozen(llama_policy, llama_reward, tmp_path):
    policy = make_checkpoint("llama", tmp_path / "policy", dtype=torch.bfloat16)
    reward = make_checkpoint("llama", tmp_path / "reward", "reward", dtype=torch.bfloat16)

    def four():
        classifier = AutoModelForSequenceClassification
        return (
            AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
            classifier.from_pretrained(reward, num_labels=1, dtype=torch.float32),
            classifier.from_pretrained(reward, num_labels=1, dtype=torch.float32),
        )

    model, reward_model, value_model = four()
    before = logits(reward_model)
    args = PPOConfig(output_dir=str(tmp_path / "run"), per_device_train_batch_size=1, report_to="none")
    data = Dataset.from_dict({"prompt": ["the film"]})
    tokenizer = AutoTokenizer.from_pretrained(policy)
    trainer = PPOTrainer(
        args, tokenizer, model, None, reward_model, data, value_model, peft_config=LoraConfig(task_type="CAUSAL_LM")
    )
    assert frozen_backbone(trainer.value_model) == frozen_backbone(reward_model)
    assert torch.equal(logits(reward_model), before) and torch.equal(logits(trainer.value_model), before)

    # One base under the policy, too: all of it is one storage.
    model, reward_model, value_model = four()
    other = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    trainer = PPOTrainer(
        args, tokenizer, model, None, other, data, value, peft_config=LoraConfig(task_type="CAUSAL_LM")
    )
    assert frozen_backbone(trainer.model) == frozen_backbone(other) == frozen_backbone(trainer.value_model)

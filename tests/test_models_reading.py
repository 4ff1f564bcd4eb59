"""Reading without from_pretrained gives what from_pretrained gives, or nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, make_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from fourscore.config import ModelConfig
from fourscore.models.checkpoint import inspect_checkpoint
from fourscore.models.reading import read_plain

LEFT = {("gpt_neox", "policy")} | {(arch, kind) for arch in ("gemma2", "gemma3_text") for kind in ("policy", "reward")}
"""Models whose tensors transformers renames on reading, or keeps beside what it computes."""
AUTO = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}


def read(path, kind, dtype=torch.float32, **model_args):
    args = ModelConfig(**model_args)
    return read_plain(inspect_checkpoint("--a_flag", str(path), args), AUTO[kind], dtype, args)


def state(model):
    buffers = dict(model.named_buffers())
    return {n: (t.dtype, t.requires_grad, t) for n, t in (dict(model.state_dict(keep_vars=True)) | buffers).items()}


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_read_as_by_from_pretrained(arch, kind, tmp_path):
    path = make_checkpoint(arch, tmp_path, kind, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        mine = read(path, kind, dtype)
        if (arch, kind) in LEFT:
            assert mine is None
            continue
        theirs = AUTO[kind].from_pretrained(path, dtype=dtype)
        assert type(mine) is type(theirs) and mine.training == theirs.training
        assert mine.config.to_dict() == theirs.config.to_dict()
        assert mine.config._attn_implementation == theirs.config._attn_implementation
        assert getattr(mine, "generation_config", None) == getattr(theirs, "generation_config", None)
        assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]  # tied as there
        for name, (got, expected) in {n: (s, state(theirs)[n]) for n, s in state(mine).items()}.items():
            assert got[:2] == expected[:2] and torch.equal(got[2], expected[2]), name
        assert state(mine).keys() == state(theirs).keys()


def test_generation_settings_beside_the_weights_are_kept(llama_policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_policy)
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(tmp_path)
    assert read(tmp_path, "policy").generation_config.repetition_penalty == 1.3


def test_shards_are_read(llama_policy, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama_policy).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, parameter in read(tmp_path, "policy").named_parameters():
        assert torch.equal(parameter, AutoModelForCausalLM.from_pretrained(llama_policy).get_parameter(name))


def test_what_is_not_the_models_exactly_is_left_to_from_pretrained(llama_policy, tmp_path):
    assert read(llama_policy, "policy") is not None
    assert read(llama_policy, "reward") is None  # it has no head
    weights = load_file(Path(llama_policy) / "model.safetensors")
    first = min(weights)
    AutoModelForCausalLM.from_pretrained(llama_policy).save_pretrained(tmp_path)
    for changed in (
        weights | {"another": torch.zeros(1)},
        {name: tensor for name, tensor in weights.items() if name != first},
        weights | {first: weights[first][:-1].contiguous()},
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert read(tmp_path, "policy") is None


def test_what_transformers_changes_on_reading_is_left_to_it(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert read(tmp_path, "policy") is None


def test_quantized_checkpoints_are_left_to_from_pretrained(llama_policy, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama_policy).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": 1}}
    file.write_text(json.dumps(config))
    assert read(tmp_path, "policy") is None

import pytest
import torch
from tiny import ARCHITECTURES, make_model, make_tokenizer
from transformers import FalconConfig, FalconForCausalLM

from fourscore.models.dropout import disable_dropout

DROPOUT = {
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "gpt_neox": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
}


def _same_twice(model: torch.nn.Module) -> bool:
    ids = torch.arange(20).reshape(2, 10)
    model.train()
    return torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_train_mode_is_deterministic(arch, kind):
    # attention_dropout is a float that the attention function reads in train mode: no nn.Dropout is involved.
    fields = DROPOUT.get(arch, {"attention_dropout": 0.3})
    model = make_model(arch, make_tokenizer(), kind, **fields)
    assert not _same_twice(model)
    found = disable_dropout(model)
    assert found and set(found.values()) == {0.3}
    assert _same_twice(model)
    assert all(getattr(model.config, name) == 0.3 for name in fields), "the saved config keeps its values"
    assert disable_dropout(model) == {}


def test_dropout_read_from_the_config_in_the_forward():
    config = FalconConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.3,
        attention_dropout=0.3,
    )
    model = FalconForCausalLM(config)
    assert not _same_twice(model)
    disable_dropout(model)
    assert _same_twice(model)
    assert model.config.hidden_dropout == 0.3

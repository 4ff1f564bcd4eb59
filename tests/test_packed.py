"""The packed copy that rollouts multiply with: same numbers, adapters folded in, nothing left behind."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, make_model, make_tokenizer
from torch import nn

from fourscore.models.packed import packable, packed, packed_bytes

TOKENIZER = make_tokenizer("own")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25]])

pytestmark = pytest.mark.skipif(
    not packable(nn.Linear(2, 2)), reason="this CPU has no packed products (AVX2 and oneDNN)"
)


def adapted(**lora: Any) -> Any:
    """A policy with an adapter that does something."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **lora)
    return get_peft_model(make_model("llama", TOKENIZER, "policy"), config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_those_of_the_model(arch: str) -> None:
    policy = make_model(arch, TOKENIZER, "policy").eval()
    plain = logits(policy)
    with packed(policy):
        copied = logits(policy)
    torch.testing.assert_close(copied, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(policy), plain)


def test_the_copy_is_one_of_the_linear_layers_and_what_happens_to_the_policy_does_not_change_it() -> None:
    policy = make_model("llama", TOKENIZER, "policy", tie_word_embeddings=False).eval()
    linear = [m for m in policy.modules() if isinstance(m, nn.Linear)]
    assert packed_bytes(policy) == sum(4 * m.weight.numel() for m in linear)
    plain = logits(policy)
    with packed(policy):
        with torch.no_grad():
            for module in linear:
                module.weight.zero_()
        torch.testing.assert_close(logits(policy), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(policy), plain)


def test_adapters_are_folded_in_and_the_adapter_itself_is_left_alone() -> None:
    policy = adapted()
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    plain = logits(policy)
    with policy.disable_adapter():
        base = logits(policy)
        with packed(policy):
            torch.testing.assert_close(logits(policy), base, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, base, atol=1e-3), "the adapter does nothing: the comparison says nothing"
    called: list[str] = []
    for name, module in policy.named_modules():
        if ".lora_A." in name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with packed(policy):
        torch.testing.assert_close(logits(policy), plain, rtol=1e-4, atol=1e-5)
    assert not called
    assert torch.equal(logits(policy), plain) and called
    assert all(torch.equal(before[name], p) for name, p in policy.state_dict().items())
    assert not any("forward" in vars(module) for module in policy.modules())


def test_a_second_adapter_on_a_frozen_one_is_folded_in_too() -> None:
    policy = adapted()
    policy.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    policy.base_model.set_adapter(["default", "second"])
    plain = logits(policy)
    policy.base_model.set_adapter(["default"])
    assert not torch.allclose(plain, logits(policy), atol=1e-3)
    policy.base_model.set_adapter(["default", "second"])
    with packed(policy):
        torch.testing.assert_close(logits(policy), plain, rtol=1e-4, atol=1e-5)


def test_dora_and_adapters_with_a_bias_stay_as_they_are() -> None:
    assert not any("q_proj" in name for name in packable(adapted(use_dora=True)))
    layers = nn.Sequential()
    layers.fc = nn.Linear(8, 8)
    biased = get_peft_model(layers, LoraConfig(r=2, target_modules=["fc"], lora_bias=True))
    assert not packable(biased)


def test_nothing_is_packed_where_it_would_be_another_computation() -> None:
    policy = make_model("llama", TOKENIZER, "policy").eval()
    assert packable(policy)
    with torch.autocast("cpu", torch.bfloat16):
        assert not packable(policy)
    assert not packable(policy.to(torch.bfloat16))


def test_the_copy_is_dropped_when_a_rollout_fails() -> None:
    policy = make_model("llama", TOKENIZER, "policy").eval()
    with pytest.raises(RuntimeError, match="in between"), packed(policy):
        raise RuntimeError("in between")
    assert not any("forward" in vars(module) for module in policy.modules())

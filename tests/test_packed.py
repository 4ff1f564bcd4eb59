"""How layers multiply in rollouts, by the kernel or in blocks: same numbers, adapters folded in, nothing left over."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, make_model, make_tokenizer
from torch import nn

from fourscore.models import few_rows, kernels
from fourscore.models.packed import packable, packed, packed_bytes

TOKENIZER = make_tokenizer("own")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25]])

pytestmark = pytest.mark.skipif(
    not packable(nn.Linear(2, 2)), reason="this CPU has no packed products (AVX2 and oneDNN)"
)


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "are_there", lambda: False)


@pytest.fixture
def with_kernel(kernels_are_there: None, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Weights that the kernel multiplies with, by shape."""
    seen: list[torch.Size] = []
    own = few_rows.product

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(weight.shape)
        return own(x, weight, bias)

    monkeypatch.setattr(few_rows, "product", product)
    return seen


each_way = pytest.mark.parametrize("way", ["with_kernel", "without_kernel"])


def adapted(**lora: Any) -> Any:
    """A policy with an adapter that does something."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **lora)
    return get_peft_model(make_model("llama", TOKENIZER, "policy"), config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@each_way
@pytest.mark.parametrize("copy", [True, False], ids=["copy", "no copy"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_those_of_the_model(arch: str, copy: bool, way: str, request: pytest.FixtureRequest) -> None:
    multiplied = request.getfixturevalue(way)
    policy = make_model(arch, TOKENIZER, "policy").eval()
    plain = logits(policy)
    with packed(policy, copy=copy):
        fast = logits(policy)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(policy), plain)
    if multiplied is not None:
        assert multiplied == [m.weight.shape for m in policy.modules() if isinstance(m, nn.Linear)]


def test_the_kernel_takes_weights_as_they_lie(with_kernel: list[torch.Size]) -> None:
    policy = make_model("llama", TOKENIZER, "policy").eval()
    assert packed_bytes(policy) == 0
    with packed(policy):
        before = logits(policy)
        with torch.no_grad():
            policy.lm_head.weight.mul_(2)
        torch.testing.assert_close(logits(policy), before * 2, rtol=1e-4, atol=1e-5)


def test_with_the_kernel_the_layers_under_an_adapter_alone_are_copied(with_kernel: list[torch.Size]) -> None:
    policy = adapted()
    under = [m.base_layer.weight for m in policy.modules() if hasattr(m, "base_layer")]
    assert packed_bytes(policy) == sum(4 * weight.numel() for weight in under) > 0
    plain = logits(policy)
    with packed(policy):
        torch.testing.assert_close(logits(policy), plain, rtol=1e-4, atol=1e-5)
    once = len(with_kernel)
    with packed(policy, copy=False):
        torch.testing.assert_close(logits(policy), plain, rtol=1e-4, atol=1e-5)
    # Without a copy each of them has its adapter's two products, too.
    assert len(with_kernel) - once == once + 2 * len(under)


def test_with_the_kernel_many_rows_are_multiplied_elsewhere(with_kernel: list[torch.Size]) -> None:
    policy = make_model("llama", TOKENIZER, "policy").eval()
    ids = IDS.repeat(1 + few_rows.MOST_ROWS // IDS.numel(), 1)
    with torch.no_grad():
        plain = policy(input_ids=ids).logits
        with packed(policy):
            torch.testing.assert_close(policy(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
    assert not with_kernel


def test_a_copy_in_blocks_is_of_all_linear_layers_and_what_happens_to_the_policy_does_not_change_it(
    without_kernel: None,
) -> None:
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


@each_way
def test_adapters_are_folded_in_and_the_adapter_itself_is_left_alone(way: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(way)
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


@each_way
def test_a_second_adapter_on_a_frozen_one_is_folded_in_too(way: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(way)
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

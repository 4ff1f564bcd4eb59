"""Products by oneDNN: same numbers and gradients as torch's own, where they are made and where they are not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_forward import EOS, PROMPT_LENS, SAMPLES, TOKENIZER, in_training
from tiny import make_encoder, make_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from fourscore.models import onednn
from fourscore.models.adapters import add_policy_adapter
from fourscore.models.forward import completion_logprobs, completion_values, rectangle, sample_scores
from fourscore.models.onednn import by_onednn, has_products
from fourscore.rewards.text_model import text_scores
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate

pytestmark = pytest.mark.skipif(not has_products(), reason="this CPU has no such products (AVX2 and oneDNN)")


@pytest.fixture(autouse=True)
def other_vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor on which these products are made, of all weights."""
    monkeypatch.setattr(onednn, "cpu_info", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    onednn._least_weights.cache_clear()
    yield
    onednn._least_weights.cache_clear()


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights that oneDNN has multiplied with."""
    seen: list[torch.Size] = []
    own = onednn.product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(weight.shape)
        return own(x, weight, bias)

    monkeypatch.setattr(onednn, "product", product)
    return seen


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 3, 6), (4, 6), (1, 0, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_outputs_and_gradients_are_those_of_linear(shape: tuple[int, ...], bias: bool, trained: bool) -> None:
    layer = nn.Linear(6, 3, bias=bias).requires_grad_(trained)
    x = torch.randn(shape, requires_grad=True)
    wanted_from = [x, *(layer.parameters() if trained else [])]
    plain = F.linear(x, layer.weight, layer.bias)
    factors = torch.randn(plain.shape)
    wanted = torch.autograd.grad(plain, wanted_from, factors)
    with by_onednn(layer):
        y = layer(x)
    assert type(y.grad_fn).__name__ == "_MultiplyBackward"
    assert_close(y, plain)
    # Out of the context, as a backward pass is.
    assert_close(torch.autograd.grad(y, wanted_from, factors), wanted)


def test_a_frozen_layer_keeps_no_inputs() -> None:
    layer = nn.Linear(6, 3).requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    with by_onednn(layer):
        saved = layer(x * 2).grad_fn.saved_tensors
    assert saved[0] is None and saved[1].shape == (3, 6)


def test_every_linear_layer_of_a_pass_multiplies_so_and_is_itself_again_afterwards(
    multiplied: list[torch.Size], tmp_path: Path
) -> None:
    policy = add_policy_adapter(make_model("llama", TOKENIZER, "policy"), LoraConfig(r=4, target_modules=["q_proj"]))
    critic = in_training(make_model("llama", TOKENIZER, "reward"))
    encoder = AutoModelForSequenceClassification.from_pretrained(make_encoder(tmp_path)).eval()
    batch = rectangle(SAMPLES, PROMPT_LENS)
    sampling = Sampling(2, 1.0, (), EOS, 4)
    passes: list[tuple[Any, Any]] = [
        (policy, lambda: completion_logprobs(policy, batch, 0.7)),
        (critic, lambda: completion_values(critic, batch)),
        (critic, lambda: sample_scores(critic, SAMPLES)),
        (policy, lambda: generate(policy, [[5, 6, 7]], sampling, pack=False)),
        (encoder, lambda: text_scores(encoder, [{"input_ids": [5, 6, 7]}], 1)),
    ]
    for model, run in passes:
        linear = [m for m in model.modules() if type(m) is nn.Linear]
        multiplied.clear()
        with torch.no_grad():
            run()
        assert {m.weight.shape for m in linear} <= set(multiplied)
        assert len(multiplied) >= len(linear)
        assert not any("forward" in vars(m) for m in linear)


@pytest.mark.parametrize("why", ["Intel", "autocast", "bfloat16", "checkpointing"])
def test_torch_multiplies_as_ever_where_it_would_not_fit(
    why: str, multiplied: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = in_training(make_model("llama", TOKENIZER, "reward"))
    if why == "Intel":
        monkeypatch.setattr(onednn, "cpu_info", lambda: "vendor_id : GenuineIntel")
    if why == "bfloat16":
        model.to(torch.bfloat16)
    if why == "checkpointing":
        model.gradient_checkpointing_enable()
    batch = rectangle(SAMPLES, PROMPT_LENS)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        values = completion_values(model, batch)
    values.sum().backward()
    assert not multiplied
    if why == "checkpointing":  # a pass without gradients makes nothing again
        with torch.no_grad():
            completion_values(model, batch)
        assert multiplied


@pytest.mark.parametrize("inputs", [1024, 1023])
def test_without_avx512_only_large_weights_multiply_so(
    inputs: int, multiplied: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    onednn._least_weights.cache_clear()
    layer = nn.Linear(inputs, 4096)
    x = torch.randn(3, inputs)
    with torch.no_grad(), by_onednn(layer):
        y = layer(x)
    assert len(multiplied) == (inputs == 1024)
    assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)

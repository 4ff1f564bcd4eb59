"""Products by OpenBLAS and oneDNN: numbers and gradients of torch's own, where they are made and where they are not."""

import sys
from dataclasses import replace
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

from fourscore.models import kernels, openblas, products
from fourscore.models.adapters import add_policy_adapter
from fourscore.models.forward import completion_logprobs, completion_values, rectangle, sample_scores
from fourscore.models.onednn import has_products
from fourscore.models.products import fast_products
from fourscore.rewards.text_model import text_scores
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate

LIBRARIES = {"openblas": products.OPENBLAS, "onednn": products.ONEDNN}


@pytest.fixture
def multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights with which the library has multiplied, of one of the two on which all layers are."""
    there = has_products() if request.param == "onednn" else kernels.library() and openblas.sgemm()
    if not there:
        pytest.skip(f"no {request.param} here")
    own = LIBRARIES[request.param]
    seen: list[torch.Size] = []

    def outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(weight.shape)
        return own.outputs(x, weight, bias)

    watched = replace(own, outputs=outputs)
    monkeypatch.setattr(products, "library", lambda: watched)
    monkeypatch.setattr(kernels, "are_there", lambda: False)  # few rows have another way then
    return seen


by_each = pytest.mark.parametrize("multiplied", LIBRARIES, indirect=True)


@by_each
@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 3, 6), (4, 6), (1, 0, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_outputs_and_gradients_are_those_of_linear(
    multiplied: list[torch.Size], shape: tuple[int, ...], bias: bool, trained: bool
) -> None:
    layer = nn.Linear(6, 3, bias=bias).requires_grad_(trained)
    x = torch.randn(shape, requires_grad=True)
    wanted_from = [x, *(layer.parameters() if trained else [])]
    plain = F.linear(x, layer.weight, layer.bias)
    factors = torch.randn(plain.shape)
    wanted = torch.autograd.grad(plain, wanted_from, factors)
    with fast_products(layer):
        y = layer(x)
    assert type(y.grad_fn).__name__ == "_MultiplyBackward"
    assert_close(y, plain)
    # Out of the context, as a backward pass is.
    assert_close(torch.autograd.grad(y, wanted_from, factors), wanted)
    assert multiplied == [layer.weight.shape]


@by_each
def test_a_frozen_layer_keeps_no_inputs(multiplied: list[torch.Size]) -> None:
    layer = nn.Linear(6, 3).requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    with fast_products(layer):
        saved = layer(x * 2).grad_fn.saved_tensors
    assert saved[0] is None and saved[1].shape == (3, 6)


@by_each
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


@by_each
@pytest.mark.parametrize("why", ["autocast", "bfloat16", "checkpointing"])
def test_torch_multiplies_as_ever_where_it_would_not_fit(why: str, multiplied: list[torch.Size]) -> None:
    model: Any = in_training(make_model("llama", TOKENIZER, "reward"))
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


@pytest.mark.parametrize("multiplied", ["openblas"], indirect=True)
def test_inputs_that_do_not_fit_are_told_as_ever(multiplied: list[torch.Size]) -> None:
    layer = nn.Linear(6, 3)
    with fast_products(layer):
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(torch.randn(4, 6, dtype=torch.bfloat16))
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.randn(4, 5))


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (100, 33, 17), (17, 900, 40), (0, 5, 3), (5, 3, 0)], ids=str)
def test_openblas_makes_the_same_of_turned_matrices_with_any_threads(
    threads: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels.library() is None or openblas.sgemm() is None:
        pytest.skip("no openblas here")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    m, n, k = shape
    a, b, bias = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    turned_a, turned_b = a.t().contiguous(), b.t().contiguous()
    assert_close(openblas.product(a, b), a @ b)
    assert_close(openblas.product(turned_a, b, bias, a_turned=True), a @ b + bias)
    assert_close(openblas.product(a, turned_b, bias, b_turned=True), a @ b + bias)
    assert_close(openblas.product(turned_a, turned_b, a_turned=True, b_turned=True), a @ b)


@pytest.mark.parametrize(
    ("vendor", "capability", "there", "taken"),
    [
        ("AuthenticAMD", "AVX2", True, {1024: "openblas", 1023: "openblas"}),
        ("AuthenticAMD", "AVX2", False, {1024: "onednn", 1023: "torch"}),
        ("AuthenticAMD", "AVX512", False, {1024: "onednn", 1023: "onednn"}),
        ("GenuineIntel", "AVX2", True, {1024: "torch", 1023: "torch"}),
    ],
)
def test_the_library_is_that_of_the_processor(
    vendor: str, capability: str, there: bool, taken: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "cpu_info", lambda: f"vendor_id : {vendor}")
    monkeypatch.setattr(openblas, "is_there", lambda: there)
    monkeypatch.setattr(products.onednn, "has_products", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = products.library()
    for inputs, by in taken.items():
        takes = found is not None and found.takes(torch.empty(4096, inputs), None)
        name = next((name for name, one in LIBRARIES.items() if takes and one.outputs is found.outputs), "torch")
        assert name == by


def test_without_openblas_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "scipy_openblas32", None)
    assert openblas.sgemm.__wrapped__() is None
    assert "pip install scipy-openblas32" in caplog.text

"""Attention within samples that stand back to back: torch's numbers and gradients, and where it is not the kernel's."""

from typing import Any

import pytest
import torch
from test_forward import PROMPT_LENS, SAMPLES
from test_one_token import Layer, called  # noqa: F401
from test_unpadded import policy_of
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from fourscore.models import openblas, within_samples
from fourscore.models.forward import completion_logprobs, microbatches, rectangle
from fourscore.models.unpadded import Layout, _attention, _layout
from fourscore.models.within_samples import attend

LENS = [5, 1, 64, 130, 65, 7]


@pytest.fixture(autouse=True)
def openblas_is_there(kernels_are_there: None) -> None:
    if not openblas.is_there():
        pytest.skip("no OpenBLAS")


def states(heads: int, kept: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value as a model has them."""
    whole = [torch.randn(1, sum(LENS), h, size, dtype=dtype) for h in (heads, kept, kept)]
    return [x.transpose(1, 2).requires_grad_() for x in whole]


def exact(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    each = (x.double().split(LENS, 2) for x in (query, *(x.repeat_interleave(groups, 1) for x in (key, value))))
    outputs = [
        F.scaled_dot_product_attention(*sample, is_causal=True, scale=scaling) for sample in zip(*each, strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2)


def begins() -> Tensor:
    return F.pad(torch.tensor(LENS).cumsum(0), (1, 0))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 20, 64])
@pytest.mark.parametrize("scaling", [None, 0.5], ids=["own scale", "scale"])
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_and_gradients_are_those_of_each_sample_alone(
    groups: int, size: int, scaling: float | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = states(2 * groups, 2, size)
    wanted = exact(*inputs, scaling)
    back = torch.randn(wanted.shape)
    y = attend(*inputs, begins(), max(LENS), scaling)
    assert_close(y, wanted.float(), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(wanted, inputs, back.double())
    assert_close(torch.autograd.grad(y, inputs, back), gradients, rtol=1e-4, atol=2e-5)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = states(2, 2, 16)
    query, key = 10 * query.detach(), 10 * key.detach()
    y = attend(query, key, value, begins(), max(LENS), None)
    assert_close(y, exact(query, key, value, None).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("why", ["dtype", "value's size", "not causal", "asked not to be causal", "softcap", "dropout"])
def test_all_else_is_torchs(why: str, called: list[str]) -> None:  # noqa: F811
    layer, kwargs = Layer(2), {}
    query, key, value = states(4, 2, 16, torch.double if why == "dtype" else torch.float32)
    if why == "value's size":
        value = torch.randn(1, 2, sum(LENS), 8)
    if why == "not causal":
        layer.is_causal = False
    more: dict[str, Any] = {"asked not to be causal": {"is_causal": False}, "softcap": {"softcap": 3.0}}
    kwargs = more.get(why, {"dropout": 0.1} if why == "dropout" else {})
    assert not within_samples.fits(layer, query, key, value, kwargs)
    if why in ("dtype", "not causal"):
        lens = torch.tensor(LENS)
        token = _layout.set(Layout.of(lens, microbatches(lens, len(LENS))))
        y, _ = _attention(layer, query, key, value, None)
        _layout.reset(token)
        assert y.shape == (1, sum(LENS), 4, 16)
    assert not [name for name in called if name.startswith("attend")]


def test_passes_of_a_model_attend_so(called: list[str]) -> None:  # noqa: F811
    policy = policy_of("llama")
    logprobs, _ = completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 0.7)
    logprobs.sum().backward()
    assert called.count("attend_within") == called.count("attend_within_backward") == policy.config.num_hidden_layers


def test_without_openblas_samples_are_in_rectangles(
    called: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openblas, "is_there", lambda: False)
    completion_logprobs(policy_of("llama"), rectangle(SAMPLES, PROMPT_LENS), 0.7)[0].sum().backward()
    assert not [name for name in called if name.startswith("attend")]

"""The kernel for products of few rows: the numbers of linear layers, and what there is without a compiler."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close

from fourscore.models import few_rows
from fourscore.models.few_rows import MOST_ROWS, fits, product
from fourscore.models.onednn import has_products
from fourscore.models.packed import packed_bytes
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor on which it is used."""
    if not has_products():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    few_rows._kernel.cache_clear()
    yield
    few_rows._kernel.cache_clear()


@pytest.fixture
def kernel() -> None:
    if not few_rows.can_multiply():
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("inputs", [1, 7, 8, 40, 41])
@pytest.mark.parametrize("outputs", [1, 5, 6, 7, 33])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_are_those_of_linear_for_each_number_of_rows(inputs: int, outputs: int, bias: bool) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    exact = nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    for rows in range(1, MOST_ROWS + 1):
        x = torch.randn(rows, inputs)
        assert fits(x, layer.weight)
        wanted = exact(x.double()).float().detach()
        assert_close(product(x, layer.weight, layer.bias), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [3, 20])
def test_inputs_and_weights_may_begin_anywhere_and_inputs_have_any_order(rows: int) -> None:
    weight, x = torch.randn(1 + 12 * 10)[1:].view(12, 10), torch.randn(10, rows, 1).transpose(0, 2)
    y = product(x, weight, None)
    assert y.shape == (1, rows, 12)
    assert_close(y, F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [5, 12, 20])
def test_numbers_hang_neither_on_threads_nor_on_other_rows(rows: int) -> None:
    x, weight = torch.randn(rows, 40), torch.randn(50, 40)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(product(x, weight, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    x[-1] = torch.inf
    spoilt = product(x, weight, None)
    assert torch.equal(spoilt[:-1], results[0][:-1]) and not spoilt[-1].isfinite().any()


@pytest.mark.usefixtures("kernel")
def test_what_does_not_fit() -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert fits(x, weight) and fits(x, nn.Parameter(weight))
    assert not fits(torch.randn(MOST_ROWS + 1, 3), weight)
    assert not fits(torch.randn(0, 3), weight)
    assert not fits(x.bfloat16(), weight.bfloat16()) and not fits(x.double(), weight.double())
    assert not fits(x, torch.randn(3, 4).t())
    assert not fits(x.to("meta"), weight.to("meta"))
    with FakeTensorMode() as fake:
        assert not fits(fake.from_tensor(x), fake.from_tensor(weight))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "no c++ on the PATH"),
        ("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n", "c++ failed: fatal error: no headers"),
        ("#!/bin/sh\nexit 0\n", "few_rows.so"),  # says that all is well, and makes nothing
        ("#!/nowhere/sh\n", "c++"),
    ],
    ids=["none", "fails", "makes nothing", "cannot run"],
)
def test_without_a_working_compiler_there_is_one_warning_and_rollouts_go_on_with_a_copy(
    script: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = make_model("llama", make_tokenizer("own"), "policy").eval()
    sampling = Sampling(6, 0.0, (), None, 2)
    prompts = [[5, 6, 7], [8, 9]]
    wanted = generate(policy, prompts, sampling).completions()
    few_rows._kernel.cache_clear()
    if script is not None:
        (tmp_path / "c++").write_text(script)
        (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not few_rows.can_multiply()
        assert packed_bytes(policy) > 0
        assert generate(policy, prompts, sampling).completions() == wanted
    (warning,) = caplog.messages
    assert said in warning and "--pack_rollout_weights" in warning


@pytest.mark.usefixtures("kernel")
def test_it_shares_the_threads_of_torch() -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split()[-1] for line in maps if Path(line.split()[-1]).name.startswith(few_rows._OPENMP)}
    assert len(loaded) == 1

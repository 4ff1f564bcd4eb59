"""Products of few rows: the numbers of linear layers."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.testing import assert_close

from fourscore.models.few_rows import MOST_ROWS, fits, product, takes
from fourscore.models.packed import packed

pytestmark = pytest.mark.usefixtures("kernels_are_there")


@pytest.mark.parametrize("inputs", [1, 7, 8, 40, 41])
@pytest.mark.parametrize("outputs", [1, 5, 6, 7, 33])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_are_those_of_linear_for_each_number_of_rows(inputs: int, outputs: int, bias: bool) -> None:
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    exact = nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    for rows in range(1, MOST_ROWS + 1):
        x = torch.randn(rows, inputs)
        assert takes(layer.weight, layer.bias) and fits(x, layer.weight)
        wanted = exact(x.double()).float().detach()
        assert_close(product(x, layer.weight, layer.bias), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 20])
def test_inputs_and_weights_may_begin_anywhere_and_inputs_have_any_order(rows: int) -> None:
    weight, x = torch.randn(1 + 12 * 10)[1:].view(12, 10), torch.randn(10, rows, 1).transpose(0, 2)
    y = product(x, weight, None)
    assert y.shape == (1, rows, 12)
    assert_close(y, F.linear(x, weight), rtol=1e-5, atol=1e-5)


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


def test_what_does_not_fit() -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert fits(x, weight)
    assert not fits(torch.randn(MOST_ROWS + 1, 3), weight)
    assert not fits(torch.randn(0, 3), weight)
    assert not fits(torch.randn(2, 4), weight) and not fits(torch.randn(2, 6), weight)
    assert not fits(x.bfloat16(), weight) and not fits(x.double(), weight)
    assert not fits(x.to("meta"), weight)
    with FakeTensorMode() as fake:
        assert not fits(fake.from_tensor(x), weight)


class Other(Tensor):
    """What says that it is fp32 on a CPU, and may have no numbers."""


def test_weights_that_it_does_not_take() -> None:
    weight, bias = torch.randn(4, 3), torch.randn(4)
    assert takes(weight, None) and takes(nn.Parameter(weight), nn.Parameter(bias))
    assert not takes(torch.randn(3, 4).t(), None)
    assert not takes(weight, torch.randn(8)[::2]) and not takes(weight, torch.randn(1).expand(4))
    assert not takes(weight.double(), bias) and not takes(weight, bias.double())
    assert not takes(weight.to("meta"), None)
    assert not takes(weight.as_subclass(Other), None)
    with FakeTensorMode() as fake:
        assert not takes(fake.from_tensor(weight), None)


def test_inputs_of_the_wrong_size_are_told_as_ever() -> None:
    layer = nn.Linear(8, 6)
    for size in (4, 16):
        with packed(layer), torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.randn(3, size))

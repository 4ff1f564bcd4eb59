"""Tokens that a kernel draws: those that the shares fall on, with the distribution's logprobs."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fourscore.errors import FourscoreError
from fourscore.models import kernels
from fourscore.rollout import sampling

pytestmark = pytest.mark.usefixtures("kernels_are_there")


def drawn(scores: Tensor, shares: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], Tensor]:
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: torch.tensor(shares, dtype=dtype))
    tokens, logprobs = sampling._drawn_by_kernel(scores)
    return tokens.tolist(), logprobs


def test_hand_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3]).log().repeat(7, 1)
    tokens, logprobs = drawn(scores, [0, 0.09, 0.11, 0.29, 0.31, 0.71, 1 - 2**-53], monkeypatch)
    assert tokens == [0, 0, 1, 1, 3, 4, 4]
    assert_close(logprobs, torch.tensor([0.1, 0.1, 0.2, 0.2, 0.4, 0.3, 0.3]).log())


@pytest.mark.parametrize("vocabulary", [1, 7, 512, 513, 49152])
@pytest.mark.parametrize("threads", [1, 3])
def test_tokens_are_where_the_cumulative_distribution_passes_the_share(
    vocabulary: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    scores = 4 * torch.randn(40, vocabulary)
    scores[::2].masked_fill_(torch.rand(20, vocabulary) < 0.5, -torch.inf)
    scores[:, vocabulary // 2] = 0  # something is left
    shares = torch.rand(40).tolist()
    tokens, logprobs = drawn(scores, shares, monkeypatch)
    exact = scores.double().softmax(1)
    chosen = torch.tensor(tokens)[:, None]
    assert (exact.gather(1, chosen) > 0).all()
    upto = exact.cumsum(1).gather(1, chosen)[:, 0]
    before = upto - exact.gather(1, chosen)[:, 0]
    given = torch.tensor(shares, dtype=torch.double)
    # Sums of fp32 numbers.
    assert (before - 1e-6 <= given).all() and (given <= upto + 1e-6).all()
    assert_close(logprobs, exact.gather(1, chosen)[:, 0].log().float(), rtol=1e-6, atol=2e-6)


def test_unlikely_tokens_are_drawn_as_often_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million tokens of 1e-9 each beside one of nearly all: sums in fp32 would round them away."""
    scores = torch.full((1, 1_000_001), 1e-9).log()
    scores[0, 0] = 0.0
    total = 1 + 1e-3
    for share in (1.0001 / total, 1.0005 / total, 1.0009 / total):
        tokens, _ = drawn(scores, [share], monkeypatch)
        assert tokens[0] == pytest.approx((share * total - 1) * 1e9, rel=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_an_error(value: float) -> None:
    scores = torch.zeros(2, 5)
    scores[1, 3] = value
    with pytest.raises(FourscoreError, match=r"NaN.*--learning_rate"):
        sampling._drawn_by_kernel(scores)


def test_it_draws_as_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(500, 300)
    how = sampling.Sampling(1, 1.0, (), 0, 500)
    torch.manual_seed(0)
    tokens, logprobs = sampling.draw(scores, how)
    monkeypatch.setattr(kernels, "are_there", lambda: False)
    torch.manual_seed(0)
    wanted, of_wanted = sampling.draw(scores, how)
    same = tokens == wanted
    assert same.sum() > 497  # a share can be so near to where a token begins that rounding decides
    assert logprobs is not None and of_wanted is not None
    assert_close(logprobs[same], of_wanted[same], rtol=1e-5, atol=1e-5)

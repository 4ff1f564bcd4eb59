"""Logprobs of chosen tokens by the kernel: exact numbers and gradients, in passes that it is for."""

import pytest
import torch
from test_forward import PROMPT_LENS, SAMPLES
from test_one_token import called  # noqa: F401
from test_unpadded import policy_of
from torch.testing import assert_close

from fourscore.models.chosen import fits, logprobs_of
from fourscore.models.forward import completion_logprobs, rectangle
from fourscore.models.support import Support

pytestmark = pytest.mark.usefixtures("kernels_are_there")


@pytest.mark.parametrize("vocabulary", [1, 7, 512, 515, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("threads", [1, 3])
def test_exact(vocabulary: int, temperature: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits = 5 * torch.randn(5, vocabulary) - 40
    chosen, given = torch.randint(0, vocabulary, (5,)), torch.randn(5)
    exact = logits.double().requires_grad_()
    logp = (exact / temperature).log_softmax(1)
    wanted = logp.gather(1, chosen[:, None])[:, 0]
    (slopes,) = torch.autograd.grad(wanted, exact, given.double())
    before = logits.clone()
    for with_slopes in (False, True):
        found = logprobs_of(logits, chosen, temperature, None, given if with_slopes else None)
        assert_close(found[0], wanted.float(), rtol=1e-6, atol=3e-6)
        assert_close(found[1], -(logp.exp() * logp).sum(1).float(), rtol=1e-5, atol=1e-5)
        if with_slopes:
            assert found[2] is not None
            assert_close(found[2], slopes.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("barred", [-torch.inf, 5.0])
def test_tokens_that_cannot_be_are_left_out(barred: float) -> None:
    logits = torch.tensor([[0.0, barred, 3.0, -1e9]])
    support = Support.of(torch.tensor([[True, False, True, True]])) if barred > 0 else None
    logprobs, entropies, slopes = logprobs_of(logits, torch.tensor([2]), 1.0, support, torch.ones(1))
    p = torch.tensor([0.0, 3.0]).softmax(0)
    assert_close(logprobs, p[1:].log())
    assert_close(entropies, -(p * p.log()).sum()[None])
    assert_close(slopes, torch.tensor([[-p[0], 0.0, 1 - p[1], 0.0]]))


def test_passes_have_it_with_and_without_gradients(called: list[str]) -> None:  # noqa: F811
    policy = policy_of("llama")
    with torch.no_grad():
        completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 0.7)
    assert called.count("logprobs") == 1
    called.clear()
    completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 0.7)[0].sum().backward()
    assert called.count("logprobs") == 2, "the head trains, so its logits are made again"
    called.clear()
    policy.lm_head.weight.requires_grad_(False)
    completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 0.7)[0].sum().backward()
    assert called.count("logprobs") == 1


def test_other_numbers_are_torchs() -> None:
    assert not fits(torch.zeros(1, 2, dtype=torch.double))
    assert not fits(torch.zeros(1, 2, device="meta"))

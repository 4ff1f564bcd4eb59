"""Sets of ids as words, and logprobs within them: against sets in Python, and whole logits in float64."""

from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer
from torch import Tensor
from torch.testing import assert_close

from fourscore.models import forward
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import completion_logprobs, completion_logprobs_and_values, rectangle
from fourscore.models.support import ALLOWED, BARRED, PACKED, Support, packed_words, ragged_indices
from fourscore.ppo.experience import Experience

TOKENIZER = make_tokenizer("own")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def sets(vocabulary: int, sizes: list[int], seed: int = 0) -> Tensor:
    """`[len(sizes), vocabulary]`, a random set of each size."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.zeros(len(sizes), vocabulary, dtype=torch.bool)
    for row, size in zip(allowed, sizes, strict=True):
        row[torch.randperm(vocabulary, generator=generator)[:size]] = True
    return allowed


def test_items_of_chosen_groups() -> None:
    assert ragged_indices(ints(2, 0, 3, 1), ints(3, 2, 1, 2)).tolist() == [5, 2, 3, 4, 2, 3, 4]
    assert ragged_indices(ints(2, 3), ints()).tolist() == []


@pytest.mark.parametrize("vocabulary", [1, 7, 32, 100, 300])
def test_every_set_comes_back(vocabulary: int) -> None:
    sizes = [n for n in range(1, vocabulary + 1) if vocabulary < 50 or n % 7 == 1 or n == vocabulary]
    allowed = sets(vocabulary, sizes)
    support = Support.of(allowed)
    assert torch.equal(~support.barred(vocabulary), allowed)
    assert torch.equal(~torch.cat([part.barred(vocabulary) for part in support.split(3)]), allowed)
    shuffled = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(1))[: len(sizes) - 1]
    assert torch.equal(~support.select(shuffled).barred(vocabulary), allowed[shuffled])
    both = Support.join([support, support.select(shuffled)])
    assert torch.equal(~both.barred(vocabulary), torch.cat([allowed, allowed[shuffled]]))
    wider = both.barred(vocabulary + 40)
    assert wider[:, vocabulary:].all() and torch.equal(wider[:, :vocabulary], both.barred(vocabulary))
    # Another model may know fewer.
    assert torch.equal(both.barred(vocabulary)[:, : vocabulary - 1], both.barred(vocabulary - 1))


def test_a_set_takes_the_least_of_three_forms() -> None:
    support = Support.of(sets(320, [1, 10, 11, 160, 309, 310, 319, 320]))
    assert packed_words(320) == 10
    assert support.lens.tolist() == [1, 10, 10, 10, 10, 10, 1, 0]
    assert support.kinds.tolist() == [ALLOWED] * 2 + [PACKED] * 3 + [BARRED] * 3
    assert support.words.dtype == torch.int32 and len(support.words) == 52
    assert support.nbytes == 52 * 4 + 8 * 8 + 8


def test_experience_hands_on_the_sets_of_its_samples() -> None:
    lens = ints(2, 1, 3)
    allowed = sets(40, [1, 39, 20, 3, 40, 7])
    e = Experience(torch.arange(9), torch.ones(3, dtype=torch.long), lens, torch.ones(3, dtype=torch.bool))
    assert e.support_of(ints(0, 2)) is None and e.select(ints(0, 2)).support is None
    e.support = Support.of(allowed)
    twice = e.select(ints(2, 0)).select(ints(1, 0, 0))
    assert twice.support is not None
    assert torch.equal(~twice.support.barred(40), allowed[[0, 1, 3, 4, 5, 3, 4, 5]])


# ------------------------------------------------------------------ logprobs

SAMPLES = [ints(5, 6, 7, 80, 81, 0), ints(20, 82), ints(30, 1, 31, 0, 83, 84, 85, 86, 87, 88, 0)]
PROMPT_LENS = ints(3, 1, 4)
COUNT = 11


def support_of_samples() -> tuple[Support, Tensor]:
    """Sets of all three forms that hold the completion tokens."""
    allowed = sets(300, [1, 2, 5, 9, 30, 150, 200, 290, 295, 299, 300], seed=3)
    targets = torch.cat([s[p:] for s, p in zip(SAMPLES, PROMPT_LENS.tolist(), strict=True)])
    allowed[torch.arange(COUNT), targets] = True
    allowed[0] = torch.arange(300) == targets[0]
    return Support.of(allowed), allowed


def whole(policy: Any, allowed: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies from all logits, one sample after the other, masked and renormalised in float64."""
    rows, targets = [], []
    for sample, prompt in zip(SAMPLES, PROMPT_LENS.tolist(), strict=True):
        rows.append(policy(input_ids=sample[None], use_cache=False).logits[0, prompt - 1 : -1])
        targets.append(sample[prompt:])
    logits = torch.cat(rows).double() / temperature
    distribution = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
    entropy = -(distribution.exp() * distribution.masked_fill(~allowed, 0)).sum(1)
    return distribution.gather(1, torch.cat(targets)[:, None])[:, 0], entropy


@pytest.fixture(params=["one chunk", "chunks of two tokens"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one chunk":
        monkeypatch.setattr(forward, "CHUNK_BYTES", 2 * 4 * 300)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.usefixtures("chunks")
def test_logprobs_and_their_gradients_within_a_support(arch: str) -> None:
    support, allowed = support_of_samples()
    policy = make_model(arch, TOKENIZER)
    disable_dropout(policy)
    weights = torch.linspace(-1, 1, COUNT)

    expected, entropy = whole(policy, allowed, 0.7)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    got, got_entropy = completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS, support), 0.7)
    (got * weights).sum().backward()
    assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert_close(got_entropy.double(), entropy.detach(), rtol=0, atol=1e-5)
    for name, parameter in policy.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)

    assert got[0] == 0 and got_entropy[0] == 0, "one token that could be drawn: it is certain"
    plain, _ = completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS), 0.7)
    assert (got[1:-1] > plain[1:-1]).all() and got[-1] == plain[-1]


def test_values_come_with_logprobs_within_a_support() -> None:
    support, _ = support_of_samples()
    policy = make_model("llama", TOKENIZER)
    head = torch.nn.Linear(64, 1)
    with torch.no_grad():
        alone, _ = completion_logprobs(policy, rectangle(SAMPLES, PROMPT_LENS, support), 1.0)
        both, _, values = completion_logprobs_and_values(policy, head, rectangle(SAMPLES, PROMPT_LENS, support), 1.0)
    assert torch.equal(alone, both) and values.shape == (COUNT,)


def test_a_wider_vocabulary_has_nothing_beyond_the_support() -> None:
    """A reference whose embedding has spare rows."""
    support, allowed = support_of_samples()
    wide = make_model("llama", TOKENIZER, vocab_size=320)
    with torch.no_grad():
        got, _ = completion_logprobs(wide, rectangle(SAMPLES, PROMPT_LENS, support), 1.0)
        expected, _ = whole(wide, torch.nn.functional.pad(allowed, (0, 20)), 1.0)
    assert_close(got.double(), expected, rtol=0, atol=1e-5)

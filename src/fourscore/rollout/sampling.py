"""The distribution that tokens are drawn from."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fourscore.errors import FourscoreError
from fourscore.models import kernels
from fourscore.models.support import Support
from fourscore.rollout.stopping import StopStrings

_CANDIDATES = 1024
"""So many of the likeliest tokens are sorted first; nearly always they hold the nucleus."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_new_tokens: longest completion, in tokens.
        temperature: logits are divided by it; greedy decoding when 0.
        stop_ids: a completion ends with the first of these, which is kept.
        eos_id: what counts as ended when nothing stops a completion but its length.
        batch_size: samples generated at once on this process.
        top_k: draw from so many of the likeliest tokens; 0: from all.
        top_p: then from the likeliest of these that together have this probability.
        min_new_tokens: shortest completion, in tokens; no stop id is drawn before, no stop string ends it before.
        stop_strings: a completion ends with the token that completes one of these, which is kept.
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    eos_id: int | None
    batch_size: int
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    stop_strings: StopStrings | None = None

    @classmethod
    def of(cls, args: Any, tokenizer: Any, stop_ids: tuple[int, ...], temperature: float) -> Self:
        """What the flags say.

        Args:
            args: a `PPOConfig`.
            tokenizer: the policy's.
            stop_ids: those of `stop_token` and `stop_token_id`.
            temperature: the flag's, or another one.
        """
        return cls(
            max_new_tokens=args.response_length,
            temperature=temperature,
            stop_ids=stop_ids,
            eos_id=tokenizer.eos_token_id,
            batch_size=args.local_rollout_forward_batch_size,
            top_k=args.top_k,
            top_p=args.top_p,
            min_new_tokens=args.min_response_length,
            stop_strings=StopStrings(args.stop_strings, tokenizer) if args.stop_strings else None,
        )

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leave something out; greedily the likeliest token is drawn whatever they say."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    @property
    def restricted(self) -> bool:
        """Whether some token may be drawn from a part of the vocabulary only."""
        return self.truncates or (self.min_new_tokens > 1 and bool(self.stop_ids))


@dataclass
class Completed:
    """What came of a batch of prompts.

    Attributes:
        completions: token ids, in the order of the prompts.
        ended: whether by itself, with a stop id or a text.
        kept: where it is kept, index of the prompt and support of each token, a step after the other.
        logprobs: nats, of every token of the completions; None where they are not known, or there are none because
            decoding is greedy.
    """

    completions: list[list[int]]
    ended: list[bool]
    kept: list[tuple[Tensor, Support]]
    logprobs: list[list[float]] | None = None


def draw(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Draw a token a row; the likeliest one if greedy.

    Args:
        scores: `[b, vocabulary]`, what `restrict_` made of logits.
        sampling: how to draw.

    Returns:
        the tokens `[b]`, and their logprobs `[b]` in nats; None if greedy.
    """
    if sampling.temperature == 0:
        return scores.argmax(1), None
    if kernels.can_read(scores) and kernels.are_there():
        return _drawn_by_kernel(scores.contiguous())
    probabilities = scores.softmax(1)
    tokens = _drawn(probabilities)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()


def _drawn_by_kernel(scores: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocabulary = scores.shape
    shares = torch.rand(rows, dtype=torch.double, device="cpu")
    tokens, logprobs = torch.empty(rows, dtype=torch.long, device="cpu"), scores.new_empty(rows)
    scratch = scores.new_empty(torch.get_num_threads() * vocabulary)
    kernels.call("draw", scores, shares, tokens, logprobs, scratch, rows, vocabulary)
    if logprobs.isnan().any():
        raise FourscoreError(
            "the policy's logits are no numbers (NaN), so no token can be drawn: training may have diverged; resume "
            "from an earlier checkpoint with a lower --learning_rate or --max_grad_norm."
        )
    return tokens, logprobs


def _drawn(probabilities: Tensor) -> Tensor:
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1)[:, 0]
    # multinomial draws a number for every token of the vocabulary, which takes a CPU longer than the model's attention.
    # This draws one a row. In double, or the rounding of sums near 1 would be more than an unlikely token has.
    below = probabilities.cumsum(1, dtype=torch.double)
    total = below[:, -1:]
    at = torch.minimum(torch.rand_like(total) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(below, at, right=True)[:, 0]


def has_ended(completion: list[int], sampling: Sampling) -> bool:
    """Whether a completion ends with its last token, by a stop id or a text."""
    if completion[-1] in sampling.stop_ids:
        return True
    strings = sampling.stop_strings
    return strings is not None and len(completion) >= sampling.min_new_tokens and strings.completed_by_last(completion)


def restrict_(logits: Tensor, sampling: Sampling, drawn: list[int]) -> Tensor:
    """Turn a policy's logits into those of the distribution that is drawn from.

    In this order: what is barred before the shortest completion, temperature, top-k, top-p (Holtzman et al. 2020, arXiv
    1904.09751, section 3.1: the smallest set of likeliest tokens that together have at least the probability). Tokens
    as likely as the last one of a set are in it, too.

    Args:
        logits: `[b, vocabulary]` fp32; overwritten.
        sampling: how to draw.
        drawn: tokens of each completion that are there already, `b` numbers.

    Returns:
        `logits`, minus infinity outside of the support.
    """
    short = [row for row, n in enumerate(drawn) if n + 1 < sampling.min_new_tokens]
    if short and sampling.stop_ids:
        logits[torch.tensor(short, device=logits.device)[:, None], list(sampling.stop_ids)] = -torch.inf
    if sampling.temperature > 0:
        logits /= sampling.temperature
    if not sampling.truncates:
        return logits
    vocabulary = logits.shape[1]
    if 0 < sampling.top_k < vocabulary:
        logits.masked_fill_(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        total = logits.logsumexp(1, keepdim=True)
        for size in (min(_CANDIDATES, vocabulary), vocabulary):
            best = logits.topk(size).values
            above = (best - total).exp().cumsum(1)
            if (above[:, -1] >= sampling.top_p).all():
                break
        # The first token stays, and every one before which the probability is not reached yet.
        last = (above[:, :-1] < sampling.top_p).sum(1, keepdim=True)
        logits.masked_fill_(logits < best.gather(1, last), -torch.inf)
    return logits

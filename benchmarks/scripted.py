"""Samples whose lengths are laid down, the same for whatever system draws them. Runs where fourscore is not installed.

A prompt ends in a token of its sample, and a hook on the policy makes the model draw that token over and over until the
completion has its length, and EOS then. What a model computes costs the same whatever the tokens are.
"""

import math
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

EOS, FIRST = 0, 1000
"""What ends a completion, and the token that sample 0 consists of; sample 1 consists of the next one, and so on."""
_MOST = 64
"""Samples of a batch."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths, in tokens: from `least` to `most`, uniform or, with `log`, log-uniform."""

    least: int
    most: int
    log: bool = False

    def of_batch(self, count: int) -> list[int]:
        """What a batch has in the mean: its shortest length, its second shortest, and so on.

        The k-th smallest of n uniform numbers is k / (n + 1) in the mean. So every batch has the same lengths, and
        medians over batches are not those of a lucky draw.
        """
        least, most = (math.log(x) if self.log else x for x in (self.least, self.most))
        at = [least + (most - least) * k / (count + 1) for k in range(1, count + 1)]
        return [round(math.exp(x) if self.log else x) for x in at]


@dataclass(frozen=True)
class Batch:
    """Prompts, each with the number of tokens that its completion is to have, and whether EOS is the last of those."""

    prompts: list[list[int]]
    completion_lens: list[int]
    ends: bool = True

    def prompt_lens(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class Workload:
    """What an update works on.

    Attributes:
        batch: samples.
        epochs: of PPO.
        prompts: lengths of prompts.
        response_length: most tokens of a completion.
        completions: lengths of completions, EOS included; None: all have `response_length` tokens, without EOS.
    """

    batch: int
    epochs: int
    prompts: Lengths
    response_length: int
    completions: Lengths | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Workload":
        """From `dataclasses.asdict`."""
        lengths = {k: v and Lengths(**v) for k, v in fields.items() if k in ("prompts", "completions")}
        return cls(**(fields | lengths))

    def batch_of(self, number: int) -> Batch:
        """The batch of an update: which prompt goes with which completion is drawn, from this number."""
        drawn = random.Random(number)
        lens = self.prompts.of_batch(self.batch)
        drawn.shuffle(lens)
        prompts = [prompt(drawn, length, sample) for sample, length in enumerate(lens)]
        if self.completions is None:
            return Batch(prompts, [self.response_length] * self.batch, ends=False)
        return Batch(prompts, self.completions.of_batch(self.batch))

    def small_batch(self) -> Batch:
        """As many samples, of few tokens."""
        prompts = [prompt(random.Random(sample), 8, sample) for sample in range(self.batch)]
        return Batch(prompts, [4] * self.batch)


WORKLOADS = {
    "even": Workload(16, 4, Lengths(24, 32), 32),
    "ragged": Workload(16, 1, Lengths(8, 128, log=True), 64, Lengths(1, 64)),
    "long": Workload(4, 1, Lengths(8, 64, log=True), 512, Lengths(1, 512)),
    "tldr": Workload(4, 1, Lengths(128, 512), 53, Lengths(24, 53)),
    # So much that a GPU is not kept waiting.
    "large": Workload(64, 1, Lengths(256, 512), 512, Lengths(256, 512)),
}


def prompt(drawn: random.Random, length: int, sample: int) -> list[int]:
    """Random tokens, and at the end the sample's own."""
    return [*(drawn.randrange(2000, 3000) for _ in range(length - 1)), FIRST + sample]


class Script:
    """Makes a policy draw sample i's own token until its completion has a given length, and EOS then.

    On a GPU it waits for nothing in a step, and counts on the GPU itself: a step may be a CUDA graph.

    Attributes:
        read: `time.perf_counter()` when the prompts had been read.
    """

    def __init__(self, policy: Any) -> None:
        """Follow a causal LM, without PEFT around it."""
        self.read = 0.0
        self._left = torch.zeros(_MOST + 1, dtype=torch.long, device=next(policy.parameters()).device)
        policy.register_forward_hook(self, with_kwargs=True)

    def begin(self, batch: Batch) -> None:
        """Before each rollout."""
        lens = torch.tensor([length + (not batch.ends) for length in batch.completion_lens])
        self._left[: len(lens)] = lens.to(self._left.device)

    def __call__(self, module: Any, args: Any, named: dict[str, Any], output: Any) -> None:
        """The hook. Only generation has a cache; forwards for training and scoring are left alone."""
        if named.get("cache", named.get("past_key_values")) is None:  # `cache` from transformers 5.24 on
            return
        last = named["input_ids"][:, -1]
        samples = last - FIRST
        ours = (samples >= 0) & (samples < _MOST)
        samples = torch.where(ours, samples, _MOST)  # a place of its own for rows that are no one's
        self._left.index_add_(0, samples, torch.full_like(samples, -1))
        tokens = torch.where(self._left[samples] > 0, last, EOS)[:, None]
        logits = output.logits[:, -1]
        forced = torch.where(ours[:, None], 1e4, logits.gather(1, tokens).float())
        logits.scatter_(1, tokens, forced.to(logits.dtype))
        if named["input_ids"].shape[1] > 1:
            if last.is_cuda:
                torch.cuda.synchronize()
            self.read = time.perf_counter()

"""From the sum of the rewards to the score that PPO sees: center, normalize, clip, then the penalties.

Pure functions on tensors of `n` samples; `fourscore.rewards.scorer` keeps the one state there is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


@dataclass(frozen=True)
class Shaping:
    """The flags of the same names.

    Attributes:
        missing_eos_penalty: taken off where no stop token ended the completion; None: nothing.
        length_penalty: taken off for each completion token.
        response_length: most tokens of a completion.
        overlong_buffer: tokens before `response_length` over which the next one grows.
        overlong_penalty: taken off at `response_length`.
        score_clip: bound of the score's magnitude before the penalties; None: none.
        normalize: divide by the running standard deviation.
        center: subtract the mean score of the SFT policy's samples.
    """

    missing_eos_penalty: float | None = None
    length_penalty: float = 0.0
    response_length: int = 1
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    score_clip: float | None = None
    normalize: bool = False
    center: int = 0

    @classmethod
    def of(cls, args: Any) -> "Shaping":
        """The settings in a `PPOConfig`."""
        return cls(
            missing_eos_penalty=args.missing_eos_penalty,
            length_penalty=args.length_penalty,
            response_length=args.response_length,
            overlong_buffer=args.overlong_buffer,
            overlong_penalty=args.overlong_penalty,
            score_clip=args.score_clip,
            normalize=args.normalize_scores,
            center=args.center_scores,
        )


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of all scores seen so far, in float64.

    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation (of the population seen); 1 while all scores were the same."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation or 1.0

    def with_scores(self, scores: Tensor, reduce: Reduce) -> "Moments":
        """The moments with those of a batch added.

        Args:
            scores: `[n]`, this process's; may be empty.
            reduce: sums over all processes.
        """
        wide = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64)  # MPS has no float64
        count, total = reduce(torch.stack([torch.ones_like(wide).sum(), wide.sum()])).tolist()
        if not count:
            return self
        mean = total / count
        squares = float(reduce((wide - mean).square().sum()[None]))
        both, gap = self.count + count, mean - self.mean
        return Moments(
            both,
            self.mean + gap * count / both,
            self.squares + squares + gap * gap * self.count * count / both,
        )


def shaped_scores(
    scores: Tensor, applies: Tensor, lens: Tensor, has_eos: Tensor, settings: Shaping, offset: float, std: float
) -> Tensor:
    """Center, normalize and clip the weighted sum of the rewards, then take off the penalties.

    `clip((score - offset) / std) - missing_eos - length - overlong`. A sample that no reward applies to starts from 0,
    not from `-offset`. Penalties come last, so that their size is what the flags say in the unit that PPO sees.

    Args:
        scores: `[n]` weighted sums.
        applies: `[n]` bool, at least one reward applies to the sample.
        lens: `[n]` completion tokens.
        has_eos: `[n]` bool.
        settings: the flags.
        offset: mean score of the SFT policy, 0 without `center`.
        std: running standard deviation, 1 without `normalize`.

    Returns:
        `[n]`.
    """
    shaped = torch.where(applies, (scores - offset) / std, torch.zeros_like(scores))
    if settings.score_clip is not None:
        shaped = shaped.clamp(-settings.score_clip, settings.score_clip)
    return shaped - penalties(lens, has_eos, settings).to(shaped.dtype)


def penalties(lens: Tensor, has_eos: Tensor, settings: Shaping) -> Tensor:
    """What is taken off for a missing stop token, for length and for running into the limit; `[n]`, fp32.

    Args:
        lens: `[n]` completion tokens.
        has_eos: `[n]` bool.
        settings: the flags.
    """
    total = settings.length_penalty * lens.float()
    if settings.missing_eos_penalty is not None:
        total = total + settings.missing_eos_penalty * ~has_eos
    if settings.overlong_buffer:
        over = overlong(lens, settings.response_length, settings.overlong_buffer)
        total = total + settings.overlong_penalty * over
    return total


def overlong(lens: Tensor, response_length: int, buffer: int) -> Tensor:
    """How far completions reach into the last `buffer` tokens: 0 up to there, 1 at `response_length`; `[n]`.

    Source: Yu et al. 2025, "DAPO" (arXiv 2503.14476), equation 13, with its sign turned: there the reward is
    `((L_max - L_cache) - |y|) / L_cache` between the two.

    Args:
        lens: `[n]` completion tokens.
        response_length: most tokens of a completion, DAPO's `L_max`.
        buffer: DAPO's `L_cache`, at least 1.
    """
    return ((lens - (response_length - buffer)) / buffer).clamp(0.0, 1.0)

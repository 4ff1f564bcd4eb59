"""What a few seeds say: Welch's interval for the difference of two means, and scores at equal KL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, variance
from typing import Any


@dataclass(frozen=True)
class Difference:
    """Of two means.

    Attributes:
        mean: first minus second.
        low: lower end of the two-sided 95 % interval.
        high: its upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The 95 % interval for the difference of two means whose samples are independent and may spread differently.

    B. L. Welch, "The generalization of 'Student's' problem when several different population variances are involved",
    Biometrika 34 (1947), with the degrees of freedom of Satterthwaite.

    Args:
        first: a figure of each seed, at least two.
        second: likewise.
    """
    parts = [variance(values) / len(values) for values in (first, second)]
    difference = mean(first) - mean(second)
    if not sum(parts):
        return Difference(difference, difference, difference)
    pairs = zip(parts, (first, second), strict=True)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in pairs)
    half = student_quantile(0.975, freedom) * math.sqrt(sum(parts))
    return Difference(difference, difference - half, difference + half)


def student_quantile(probability: float, freedom: float) -> float:
    """The value that Student's t stays below with this probability (above a half)."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, freedom) < probability else (low, middle)
    return low


def _student_below(value: float, freedom: float, steps: int = 400) -> float:
    """The distribution function, for values from 0 on.

    With t = sqrt(freedom) tan(angle) the density is a constant times cos(angle)^(freedom - 1), which Simpson's rule
    integrates well.
    """
    angle = math.atan(value / math.sqrt(freedom))
    width = angle / steps
    heights = [math.cos(i * width) ** (freedom - 1) for i in range(steps + 1)]
    area = width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    log_constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    return 0.5 + math.exp(log_constant) * area


def score_at_kl(points: Sequence[dict[str, Any]], level: float) -> float:
    """The score when a run first has a KL of `level`.

    Args:
        points: `kl` and `score` in the order of training, the SFT policy (KL 0) first.
        level: nats a completion, at most the largest KL of the run.

    Returns:
        on the straight line between the last point below the level and the first that is not.
    """
    for before, after in pairwise(points):
        if after["kl"] >= level:
            share = (level - before["kl"]) / (after["kl"] - before["kl"])
            return before["score"] + share * (after["score"] - before["score"])
    raise ValueError(f"the run's KL stays below {level}")

"""Statistics of samples, two models on the same prompts: pure functions.

Values are arrays `[p, g]`: of `p` prompts, `g` samples each; NaN where there is none. Samples of one prompt resemble
each other, so prompts are what is counted: means are means of the prompts' means, and errors are over prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        mean: of the prompts' means; NaN without any.
        standard_error: of that mean; NaN with fewer than two prompts.
        prompts: how many were counted.
    """

    mean: float
    standard_error: float
    prompts: int


@dataclass(frozen=True)
class Interval:
    """A number between two bounds, which hold it with 95 % confidence; NaN where there is nothing to count.

    Attributes:
        value: the estimate.
        low: lower bound.
        high: upper bound.
        method: how the bounds were computed.
    """

    value: float
    low: float
    high: float
    method: str


def prompt_means(values: np.ndarray) -> np.ndarray:
    """The mean of each prompt's samples; prompts without any are left out.

    Args:
        values: `[p, g]`.

    Returns:
        `[m]`, m at most p.
    """
    known = ~np.isnan(values)
    counts = known.sum(1)
    return np.where(known, values, 0.0).sum(1)[counts > 0] / counts[counts > 0]


def estimate(values: np.ndarray) -> Estimate:
    """Mean and standard error over prompts.

    Args:
        values: `[p, g]`.
    """
    means = prompt_means(values)
    n = len(means)
    error = float(means.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(means.mean()) if n else math.nan, error, n)


def paired_difference(reference: np.ndarray, policy: np.ndarray) -> Interval:
    """Mean of policy minus reference on the same prompt, with Student's interval over prompts.

    Args:
        reference: `[p, g]`.
        policy: `[p, g]`, of the same prompts.
    """
    found = estimate(policy - reference)
    reach = (
        t_quantile((1 + CONFIDENCE) / 2, found.prompts - 1) * found.standard_error if found.prompts > 1 else math.nan
    )
    return Interval(found.mean, found.mean - reach, found.mean + reach, "t, by prompt")


def outcomes(reference: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """1 where the policy's number is the larger one, 0 where the reference's is, 0.5 where they are the same; `[p, g]`.

    Args:
        reference: `[p, g]`.
        policy: `[p, g]`, of the same prompts.
    """
    return np.where(np.isnan(policy - reference), np.nan, 0.5 + 0.5 * np.sign(policy - reference))


def win_rate(won: np.ndarray, seed: int) -> Interval:
    """Share of pairs that the policy wins, ties counting half, with its interval.

    With one pair a prompt the pairs are independent, and the interval is Wilson's; pairs of one prompt are not, so with
    several of them it is a bootstrap over prompts.

    Args:
        won: outcomes `[p, g]`.
        seed: of the bootstrap.
    """
    means = prompt_means(won)
    if won.shape[1] > 1:
        return bootstrap(means, seed)
    return wilson(float(means.sum()), len(means))


def wilson(successes: float, n: int) -> Interval:
    """Wilson's interval of a proportion (Wilson 1927; Newcombe 1998, method 3).

    `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`. A tie as half a success makes it a little wider than it has
    to be: an outcome of 0.5 varies less than one of 0 or 1.

    Args:
        successes: 0 to `n`.
        n: trials.
    """
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, "Wilson")
    z, p = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), successes / n
    middle = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(p, max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale), "Wilson")


def bootstrap(values: np.ndarray, seed: int) -> Interval:
    """Percentile interval of a mean (Efron 1979): the middle 95 % of the means of samples drawn with replacement.

    Args:
        values: `[m]`, a number a prompt.
        seed: of the draws; the same gives the same interval.
    """
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan, "bootstrap by prompt")
    generator = np.random.default_rng(seed)
    n = len(values)
    means = np.array([values[generator.integers(n, size=n)].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high), "bootstrap by prompt")


def t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t distribution.

    Exact for 1 and 2 degrees of freedom, else the expansion around the normal quantile (Abramowitz and Stegun 1972,
    26.7.5), which at 97.5 % is short by 0.12 % for 3 degrees and by less for more.

    Args:
        p: above 0 and below 1.
        degrees: of freedom, at least 1.
    """
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**i for i, term in enumerate(terms))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all texts (Li et al. 2016, arXiv 1510.03055); 0 without any."""
    grams = [
        tuple(words[i : i + n]) for words in (text.lower().split() for text in texts) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0

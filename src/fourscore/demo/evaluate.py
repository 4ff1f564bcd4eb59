"""How samples are measured before and after the demo's training."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from fourscore.evaluation.stats import distinct_n


@dataclass(frozen=True)
class Measures:
    """What some samples are like.

    Attributes:
        score: mean score of the reward model.
        score_std: standard deviation of the scores over samples.
        judge_positive: share of samples that VADER, whose scores the reward model never saw, calls positive.
        kl: mean nats between policy and reference, a completion.
        distinct_2: different pairs of neighbouring words over all such pairs, among all completions.
        length: mean tokens of a completion.
    """

    score: float
    score_std: float
    judge_positive: float
    kl: float
    distinct_2: float
    length: float


def measure(rows: Sequence[dict[str, Any]]) -> Measures:
    """Measure samples.

    Args:
        rows: what `PPOTrainer.complete_eval_prompts(..., with_kl=True)` returns, at least two.
    """
    scores = [row["scores"] for row in rows]
    return Measures(
        score=mean(scores),
        score_std=stdev(scores),
        judge_positive=mean(vader([row["prompt"] for row in rows], [row["completion"] for row in rows])),
        kl=mean(row["kl"] for row in rows),
        distinct_2=distinct_n([row["completion"] for row in rows], 2),
        length=mean(row["completion_length"] for row in rows),
    )


def positive(texts: Sequence[str]) -> list[bool]:
    """Whether VADER calls each text positive: a compound score of at least 0.05, its authors' threshold.

    Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    return [judge.polarity_scores(text)["compound"] >= 0.05 for text in texts]


def vader(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A judge for `fourscore eval --judge`: 1 where VADER calls prompt and completion positive, else 0.

    Args:
        prompts: texts.
        completions: texts, which go on where the prompts end.
    """
    return [float(yes) for yes in positive([p + c for p, c in zip(prompts, completions, strict=True)])]

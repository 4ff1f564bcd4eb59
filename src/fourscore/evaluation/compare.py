"""Policy and reference on the same prompts: completions of both, and what rewards and judge say of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from torch import nn

from fourscore.evaluation.judge import PairJudge
from fourscore.evaluation.stats import Estimate, Interval, distinct_n, estimate, outcomes, paired_difference, win_rate
from fourscore.parallel import Parallel
from fourscore.ppo.experience import Experience, sum_per_sample
from fourscore.ppo.scoring import logprobs_of
from fourscore.rewards.function import Function
from fourscore.rewards.samples import Reward, Samples
from fourscore.rewards.scorer import Scorer
from fourscore.rewards.shaping import Shaping
from fourscore.rollout.sampling import Sampling
from fourscore.rollout.transformers import generate

SIDES = ("reference", "policy")
JUDGE = "judge"
"""Under which the scores of a judge stand beside those of the rewards."""


@dataclass(frozen=True)
class Settings:
    """How completions are drawn.

    Attributes:
        sampling: of both models.
        num_generations: completions of each prompt.
        batch_size: samples at a time.
        logprob_temperature: at which the divergence is measured: that of the sampling, or of the run where it is
            greedy.
        seed: of both models' draws.
    """

    sampling: Sampling
    num_generations: int
    batch_size: int
    logprob_temperature: float
    seed: int


@dataclass
class Side:
    """Samples of one model; each list has an entry a sample, those of one prompt next to each other.

    Attributes:
        completions: texts.
        answers: completions as rewards and judges get them: texts, or conversations of one message.
        lengths: tokens.
        ended: 1 where the completion stopped by itself, else 0.
        scores: of each reward by name; NaN where it does not apply.
        totals: the weighted sum of the rewards, without penalties; NaN where none applies.
        log_ratios: nats by which the policy likes the completion better than the reference does; the policy's only.
    """

    completions: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    totals: list[float] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One measure of both models, None where it does not apply.

    Attributes:
        reference: mean over prompts.
        policy: mean over prompts.
        difference: policy minus reference, paired by prompt.
        win_rate: share of pairs in which the policy has the larger number or the judge's favour; ties count half.
        wins: such pairs.
        ties: pairs that count half.
        losses: the others.
    """

    reference: Estimate | None = None
    policy: Estimate | None = None
    difference: Interval | None = None
    win_rate: Interval | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything that was found.

    Attributes:
        num_generations: completions of each prompt.
        prompts: texts, one a sample.
        sides: `reference` and `policy`.
        rewards: a row for each reward.
        score: weighted sum of the rewards.
        judge: the judge's row, if there is one.
        verdicts: of a judge that compares, one a pair.
        kl: nats from the reference, a completion.
        length: tokens.
        ended: share that stopped by itself.
        distinct: (reference, policy) for words and for pairs of them.
    """

    num_generations: int
    prompts: list[str]
    sides: dict[str, Side]
    rewards: dict[str, Row]
    score: Row
    judge: Row | None
    verdicts: list[float | None] | None
    kl: Estimate
    length: Row
    ended: Row
    distinct: dict[int, tuple[float, float]]


def compare(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    tokenizer: Any,
    rewards: Mapping[str, tuple[Reward, float]],
    judge: "Function | PairJudge | None",
    settings: Settings,
    autocast: Callable[[], AbstractContextManager],
    parallel: Parallel,
) -> Comparison:
    """Complete every prompt with both models and measure the samples.

    Args:
        models: `reference` and `policy`, causal LMs.
        dataset: tokenized prompts, with the columns that rewards ask for.
        tokenizer: of both.
        rewards: sources of scores by name, each with its weight.
        judge: one more source of scores, which is in no sum, or one of verdicts.
        settings: how completions are drawn.
        autocast: makes the context of the models' forward passes.
        parallel: this process.
    """
    sources: dict[str, Reward] = {name: reward for name, (reward, _) in rewards.items()}
    if isinstance(judge, Function):
        sources[JUDGE] = judge
    scorers = {name: Scorer([source], None, Shaping(), parallel) for name, source in sources.items()}
    sides = {name: Side(scores={source: [] for source in scorers}) for name in SIDES}
    texts: list[str] = []
    prompts: list[Any] = []
    for name, side in sides.items():
        torch.manual_seed(settings.seed)  # the same for both: equal models draw equal samples
        for experience, columns in _completed(models[name], name, dataset, settings, autocast):
            samples = Samples(experience, tokenizer, partial(dict, columns))
            _note(side, samples, scorers)
            if name == "policy":
                texts += tokenizer.batch_decode(experience.prompts(), skip_special_tokens=True)
                prompts += samples.prompts
                side.log_ratios += _log_ratios(models, experience, settings, autocast)
    return _measured(sides, texts, prompts, {name: weight for name, (_, weight) in rewards.items()}, judge, settings)


def _completed(
    model: nn.Module,
    name: str,
    dataset: Dataset,
    settings: Settings,
    autocast: Callable[[], AbstractContextManager],
) -> Iterator[tuple[Experience, dict[str, list[Any]]]]:
    """Samples of one model, and the rows of the dataset that they belong to, batch by batch."""
    indices = [i for i in range(len(dataset)) for _ in range(settings.num_generations)]
    starts = range(0, len(indices), settings.batch_size)
    console = Console(stderr=True)
    for start in track(starts, name, console=console, transient=True, disable=not console.is_terminal):
        rows = dataset[indices[start : start + settings.batch_size]]
        with autocast():
            # What a token was drawn from is for its logprobs alone, and the reference's samples have none here.
            experience = generate(model, rows["input_ids"], settings.sampling, keep_support=name == "policy")
        yield experience, rows


def _note(side: Side, samples: Samples, scorers: Mapping[str, Scorer]) -> None:
    side.completions += samples.completions
    side.answers += samples.answers
    side.lengths += samples.experience.completion_lens.tolist()
    side.ended += samples.experience.has_eos.float().tolist()
    for name, scorer in scorers.items():
        rated = scorer.rate(samples)
        side.scores[name] += torch.where(rated.applies, rated.totals, math.nan).tolist()


def _log_ratios(
    models: Mapping[str, nn.Module],
    experience: Experience,
    settings: Settings,
    autocast: Callable[[], AbstractContextManager],
) -> list[float]:
    size, temperature = settings.sampling.batch_size, settings.logprob_temperature
    ours, theirs = (
        logprobs_of(models[name], experience, temperature, size, autocast) for name in ("policy", "reference")
    )
    return sum_per_sample(ours - theirs, experience.completion_lens).tolist()


def _measured(
    sides: dict[str, Side],
    texts: list[str],
    prompts: list[Any],
    weights: Mapping[str, float],
    judge: "Function | PairJudge | None",
    settings: Settings,
) -> Comparison:
    """The statistics of the samples; a judge that compares is asked here."""
    reference, policy = sides["reference"], sides["policy"]
    g, seed = settings.num_generations, settings.seed

    def row(ours: Sequence[float], theirs: Sequence[float], *, competes: bool = True) -> Row:
        one, other = by_prompt(theirs, g), by_prompt(ours, g)
        measured = Row(estimate(one), estimate(other), paired_difference(one, other))
        return replace(measured, **_wins(outcomes(one, other), seed)) if competes else measured

    rewards = {name: row(policy.scores[name], reference.scores[name]) for name in weights}
    for side in (policy, reference):
        side.totals = _weighted(side, weights)
    judged, verdicts = None, None
    if isinstance(judge, Function):
        judged = row(policy.scores[JUDGE], reference.scores[JUDGE])
    elif judge is not None:
        verdicts = judge.outcomes(prompts, reference.answers, policy.answers, seed)
        won = by_prompt([math.nan if verdict is None else verdict for verdict in verdicts], g)
        judged = Row(**_wins(won, seed))
    return Comparison(
        num_generations=g,
        prompts=texts,
        sides=sides,
        rewards=rewards,
        score=row(policy.totals, reference.totals),
        judge=judged,
        verdicts=verdicts,
        kl=estimate(by_prompt(policy.log_ratios, g)),
        length=row(policy.lengths, reference.lengths, competes=False),
        ended=row(policy.ended, reference.ended, competes=False),
        distinct={n: (distinct_n(reference.completions, n), distinct_n(policy.completions, n)) for n in (1, 2)},
    )


def by_prompt(values: Sequence[float], num_generations: int) -> np.ndarray:
    """One number a sample as `[p, g]`."""
    return np.array(values, dtype=np.float64).reshape(-1, num_generations)


def _weighted(side: Side, weights: Mapping[str, float]) -> list[float]:
    """The weighted sum of a side's rewards, as in training: one that does not apply to a sample adds nothing."""
    total = np.zeros(len(side.completions))
    applies = np.zeros(len(side.completions), dtype=bool)
    for name, weight in weights.items():
        scores = np.array(side.scores[name])
        total += weight * np.nan_to_num(scores)
        applies |= ~np.isnan(scores)
    return np.where(applies, total, math.nan).tolist()


def _wins(won: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        "win_rate": win_rate(won, seed),
        "wins": int((won > 0.5).sum()),
        "ties": int((won == 0.5).sum()),
        "losses": int((won < 0.5).sum()),
    }

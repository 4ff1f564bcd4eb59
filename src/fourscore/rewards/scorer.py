"""All rewards of a run together: rated, checked, weighted and summed, and shaped into the score that PPO sees."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fourscore.errors import FourscoreError, RewardError
from fourscore.parallel import Parallel
from fourscore.ppo.experience import Experience, sum_per_sample
from fourscore.rewards.function import Function, failure
from fourscore.rewards.samples import Loop, Notes, Reward, Samples, label
from fourscore.rewards.shaping import Moments, Shaping, shaped_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rated:
    """What all rewards together say of `n` samples of `C` completion tokens.

    Attributes:
        scores: `[n]` weighted sum of the rewards of whole samples, 0 where none applies.
        token_rewards: `[C]` weighted sum of the rewards of single tokens; None without any.
        totals: `[n]` both of them.
        whole: `[n]` bool, at least one reward of the whole sample applies.
        applies: `[n]` bool, at least one reward applies, to the sample or to its tokens.
        metrics: means over the samples of all processes.
        columns: what rewards have noted of each sample.
    """

    scores: Tensor
    token_rewards: Tensor | None
    totals: Tensor
    whole: Tensor
    applies: Tensor
    metrics: dict[str, float]
    columns: dict[str, list[Any]]


class Scorer:
    """The rewards of a run, and the running numbers that shape their sum.

    Attributes:
        rewards: sources, in the order of their weights.
        offset: mean score of the SFT policy, which is subtracted from all scores; None before it is known.
        moments: of all scores seen so far.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None,
        shaping: Shaping,
        parallel: Parallel,
    ) -> None:
        """Put rewards together.

        Args:
            rewards: at least one.
            weights: one each; None: 1 each.
            shaping: the flags.
            parallel: the processes.

        Raises:
            FourscoreError: there is no reward, or another number of weights.
        """
        check_weights(len(rewards), weights)
        self.rewards = list(rewards)
        for reward, name in zip(self.rewards, distinct([r.name for r in rewards]), strict=True):
            reward.name = name
        self.offset: float | None = None
        self.moments = Moments()
        self._weights = list(weights) if weights is not None else [1.0] * len(rewards)
        self._shaping = shaping
        self._parallel = parallel
        self._loop = Loop()
        self._abstained = False

    def check(self, columns: Iterable[str]) -> None:
        """Hold the signatures of functions against the columns of the prompts.

        Raises:
            FourscoreError: a function asks for something else.
        """
        columns = list(columns)
        for reward in self.rewards:
            if isinstance(reward, Function):
                reward.check(columns)

    def rate(self, samples: Samples, state: Any = None) -> Rated:
        """Ask all rewards. Every process calls it, each with samples of its own.

        Args:
            samples: this process's.
            state: transformers' trainer state.

        Raises:
            RewardError: one of them failed or gave what is no reward, on whatever process; raised on all.
        """
        notes = Notes(state)
        error: RewardError | None = None
        ratings: list[Rating] = []
        try:
            given = self._ask(samples, notes)
            ratings = [parse(label(r), each, samples) for r, each in zip(self.rewards, given, strict=True)]
            notes.check(len(samples))
        except RewardError as caught:
            error = caught
        # Nobody goes on to the next exchange between processes where another one has stopped.
        if (first := next((e for e in self._parallel.gather([error]) if e is not None), None)) is not None:
            raise first

        e = samples.experience
        n, device = len(samples), e.input_ids.device
        scores, whole = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.bool, device=device)
        applies = whole
        tokens: Tensor | None = None
        for weight, rating in zip(self._weights, ratings, strict=True):
            scores = scores + weight * rating.scores
            whole, applies = whole | rating.whole, applies | rating.applies
            if rating.tokens is not None:
                tokens = weight * rating.tokens + (0 if tokens is None else tokens)
        any_tokens = self._parallel.max(float(tokens is not None)) > 0
        if any_tokens and tokens is None:
            tokens = torch.zeros(int(e.completion_lens.sum()), device=device)
        if not self._abstained and (alone := int((~applies).sum())):
            self._abstained = True
            logger.warning("no reward applies to %d of %d samples: their score is 0 before penalties", alone, n)
        totals = scores if tokens is None else scores + sum_per_sample(tokens, e.completion_lens)
        metrics = self._metrics(ratings, notes)
        return Rated(scores, tokens, totals, whole, applies, metrics, notes.columns)

    def shape(self, rated: Rated, experience: Experience) -> tuple[Tensor, dict[str, float]]:
        """The scores that PPO sees, `[n]`, and the numbers they were shaped with; every process calls it.

        With `normalize_scores` the batch is first added to the running moments.
        """
        offset = self.offset or 0.0
        metrics = {}
        if self._shaping.center:
            metrics["rewards/offset"] = offset
        std = 1.0
        if self._shaping.normalize:
            self.moments = self.moments.with_scores(rated.scores[rated.whole], self._parallel.sum)
            std = metrics["rewards/running_std"] = self.moments.std
        e = experience
        scores = shaped_scores(
            rated.scores, rated.whole, e.completion_lens, e.has_eos, self._shaping, offset=offset, std=std
        )
        return scores, metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"offset": self.offset, "moments": asdict(self.moments)}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        if state:
            self.offset, self.moments = state["offset"], Moments(**state["moments"])

    def _ask(self, samples: Samples, notes: Notes) -> list[Any]:
        """What each reward says; what is async runs beside the rest."""
        pending: dict[int, Any] = {}
        given: list[Any] = [None] * len(self.rewards)
        first: RewardError | None = None
        # Those that only wait go first, and models are asked whatever functions do: other processes wait for them.
        for i in sorted(range(len(self.rewards)), key=lambda i: not self.rewards[i].is_async):
            try:
                answer = self.rewards[i].rate(samples, notes.of(label(self.rewards[i])))
                if hasattr(answer, "__await__"):
                    pending[i] = self._loop.start(answer)
                else:
                    given[i] = answer
            except RewardError as error:
                first = first or error
        for i, future in pending.items():
            try:
                given[i] = future.result()
            except Exception as error:
                first = first or failure(label(self.rewards[i]), error)
        if first is not None:
            raise first
        return given

    def _metrics(self, ratings: "list[Rating]", notes: Notes) -> dict[str, float]:
        rows = [
            [float(rating.applies.sum()), float(rating.totals.double().sum()), float(len(rating.totals))]
            for rating in ratings
        ]
        counts = self._total(rows)
        means = [total / count if count else 0.0 for count, total, _ in counts]
        squares = self._total(
            [
                [float((rating.totals.double() - mean)[rating.applies].square().sum())]
                for rating, mean in zip(ratings, means, strict=True)
            ]
        )
        metrics: dict[str, float] = {}
        for reward, (count, _, n), mean, (square,) in zip(self.rewards, counts, means, squares, strict=True):
            if count:
                metrics[f"rewards/{reward.name}/mean"] = mean
                metrics[f"rewards/{reward.name}/std"] = math.sqrt(square / (count - 1)) if count > 1 else 0.0
            if reward.may_abstain:
                metrics[f"rewards/{reward.name}/share"] = count / n
        noted = self._parallel.gather([{name: sum(v) / len(v) for name, v in notes.metrics.items()}])
        for name in sorted({name for each in noted for name in each}):
            values = [each[name] for each in noted if name in each]
            metrics[name] = sum(values) / len(values)
        return metrics

    def _total(self, rows: list[list[float]]) -> list[list[float]]:
        """The sum over all processes."""
        if self._parallel.world_size == 1:
            return rows
        each = torch.tensor(self._parallel.gather([rows]), dtype=torch.float64)
        summed: list[list[float]] = each.sum(0).tolist()
        return summed


def check_weights(count: int, weights: Sequence[float] | None) -> None:
    """Refuse a run without rewards, and weights that are not one each.

    Raises:
        FourscoreError: names the flag.
    """
    if not count:
        raise FourscoreError("there is no reward: give --reward_model_path, --reward_funcs or --reward_url")
    if weights is not None and len(weights) != count:
        shown = " ".join(f"{weight:g}" for weight in weights)
        raise FourscoreError(
            f"--reward_weights {shown}: there are {count} rewards (reward model, reward_funcs, reward_url, in this "
            "order); give a weight for each"
        )


def distinct(names: Sequence[str]) -> list[str]:
    """Names with a number after those that came before."""
    found: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in found:
            number, candidate = number + 1, f"{name}_{number}"
        found.append(candidate)
    return found


# --------------------------------------------------------------------------------------------------- what rewards give


@dataclass(frozen=True)
class Rating:
    """What one reward says of `n` samples of `C` completion tokens.

    Attributes:
        scores: `[n]` of the whole sample, else 0.
        whole: `[n]` bool, it is of the whole sample.
        applies: `[n]` bool, it is of the whole sample or of its tokens.
        tokens: `[C]`, 0 where it is of whole samples; None where it nowhere is of tokens.
        totals: `[n]` of the sample or the sum over its tokens.
    """

    scores: Tensor
    whole: Tensor
    applies: Tensor
    tokens: Tensor | None
    totals: Tensor


def parse(reward: str, given: Any, samples: Samples) -> Rating:
    """Check and take apart what a reward gave.

    Args:
        reward: how messages call it.
        given: an entry a sample: a number, a number for each completion token, or None.
        samples: that it is about.

    Raises:
        RewardError: it is something else; with the sample's text.
    """
    n, device = len(samples), samples.experience.input_ids.device
    if isinstance(given, Tensor) and given.shape == (n,) and given.is_floating_point() and _fit(given):
        scores, everywhere = given.to(device), torch.ones(n, dtype=torch.bool, device=device)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return Rating(scores, everywhere, everywhere, None, scores)
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, list | tuple):
        raise RewardError(f"{reward} gave a {type(given).__name__}: it must give a list, one entry a sample")
    if len(given) != n:
        raise RewardError(f"{reward} gave {len(given)} rewards for {n} samples: it must give one for each")
    lens = samples.experience.completion_lens.tolist()
    whole_scores, whole, applies, tokens = [0.0] * n, [False] * n, [False] * n, {}
    for i, entry in enumerate(given):
        entry = entry.tolist() if hasattr(entry, "tolist") else entry
        if entry is None:
            continue
        applies[i] = True
        if isinstance(entry, list | tuple):
            length = lens[i]
            if len(entry) != length:
                _refuse(reward, f"{len(entry)} token rewards for a completion of {length} tokens", samples, i)
            tokens[i] = [
                _number(reward, value, samples, i, f"{value!r} for token {t}") for t, value in enumerate(entry)
            ]
        else:
            whole_scores[i], whole[i] = _number(reward, entry, samples, i, repr(entry)), True
    totals = [sum(tokens[i]) if i in tokens else whole_scores[i] for i in range(n)]
    flat: Tensor | None = None
    if tokens:
        flat = torch.tensor([v for i in range(n) for v in tokens.get(i, [0.0] * lens[i])], device=device)
    return Rating(
        torch.tensor(whole_scores, device=device),
        torch.tensor(whole, device=device),
        torch.tensor(applies, device=device),
        flat,
        torch.tensor(totals, device=device),
    )


def _fit(numbers: Tensor) -> bool:
    """Whether all are finite, in the fp32 that training computes in as well."""
    return bool(numbers.float().isfinite().all())


def _number(reward: str, value: Any, samples: Samples, i: int, shown: str) -> float:
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        _refuse(reward, f"{shown[:80]}, which is no number", samples, i)
    if not math.isfinite(value):
        _refuse(reward, f"{shown}, which is not finite", samples, i)
    if not abs(value) <= _LARGEST:
        _refuse(reward, f"{shown[:80]}, which is more than fp32 holds", samples, i)
    return float(value)


_LARGEST = torch.finfo(torch.float32).max


def _refuse(reward: str, what: str, samples: Samples, i: int) -> None:
    text = " ".join(samples.texts[i].split())
    shown = text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"
    raise RewardError(f"{reward} gave {what}, for the sample {shown!r}")

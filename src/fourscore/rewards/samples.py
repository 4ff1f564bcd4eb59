"""What a reward is told of a batch of samples, and what it may say beside the rewards."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from fourscore.errors import RewardError
from fourscore.ppo.experience import Experience


class Samples:
    """A batch as rewards see it; every list has an entry a sample. What no reward looks at is never made.

    Attributes:
        experience: the tokens.
        model_scores: `[n]` what a reward model of the policy's tokens has said of them already, in a forward pass that
            it shares with the value model.
    """

    def __init__(
        self,
        experience: Experience,
        tokenizer: Any,
        rows: Callable[[], dict[str, list[Any]]] = dict,
        model_scores: Tensor | None = None,
    ) -> None:
        """Put a batch together.

        Args:
            experience: the tokens.
            tokenizer: the policy's.
            rows: gives the samples' rows of the dataset, by column.
            model_scores: as above.
        """
        self.experience = experience
        self.model_scores = model_scores
        self._tokenizer = tokenizer
        self._rows = rows

    def __len__(self) -> int:
        return len(self.experience)

    @cached_property
    def prompts(self) -> list[Any]:
        """Texts, or conversations (lists of messages), as the dataset has them; else what the prompts' tokens say."""
        if "prompt" in self._all_columns:
            return self._all_columns["prompt"]
        return self._decoded(self.experience.prompts())

    @cached_property
    def texts(self) -> list[str]:
        """Prompt and completion decoded together, without special tokens."""
        # Not one after the other: many tokenizers take the space off the start of a text.
        return self._decoded([sample.tolist() for sample in self.experience.samples()])

    @cached_property
    def with_special_tokens(self) -> tuple[list[str], list[str]]:
        """Prompts and completions decoded together, and the prompts alone, with all their special tokens."""
        decode = self._tokenizer.batch_decode
        whole = decode([sample.tolist() for sample in self.experience.samples()], skip_special_tokens=False)
        return whole, decode(self.experience.prompts(), skip_special_tokens=False)

    @cached_property
    def completions(self) -> list[str]:
        """Texts, without special tokens."""
        return self._decoded(self.completion_ids)

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        """Tokens of each completion, the EOS that ends it included."""
        return self.experience.completions()

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The other columns of the dataset, by name."""
        return {name: values for name, values in self._all_columns.items() if name not in _OWN}

    @property
    def conversational(self) -> bool:
        """Whether the prompts are conversations."""
        return bool(self.prompts) and isinstance(self.prompts[0], list)

    @property
    def answers(self) -> list[Any]:
        """The completions in the form of the prompts: texts, or conversations of one assistant message."""
        if not self.conversational:
            return list(self.completions)
        return [[{"role": "assistant", "content": text}] for text in self.completions]

    @cached_property
    def _all_columns(self) -> dict[str, list[Any]]:
        return self._rows()

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        decoded: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return decoded


_OWN = ("prompt", "completion", "completion_ids", "input_ids", "attention_mask")


@dataclass
class Notes:
    """What rewards write down while they are at it, and what they may look up.

    Attributes:
        state: transformers' trainer state.
        metrics: name -> values; their mean becomes a metric.
        columns: name -> one value a sample, for `samples.jsonl`.
        owners: name of a column -> who began it.
        reward: whose notes they are, as messages call it.
    """

    state: Any = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    reward: str = ""

    def of(self, reward: str) -> "Notes":
        """The same, to be written by one reward."""
        return replace(self, reward=reward)

    def log_metric(self, name: str, value: float) -> None:
        """Note a number.

        Raises:
            RewardError: it is none, or the name is one of the run's own.
        """
        if is_the_runs(name):
            raise RewardError(f"{self.reward}: log_metric({name!r}, ...): the run logs under that name; give another")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RewardError(f"{self.reward}: log_metric({name!r}, {value!r}): that is no number") from None
        self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Note a value for each sample.

        Raises:
            RewardError: the name is one of the run's own.
        """
        if column in _COLUMNS:
            raise RewardError(f"{self.reward}: log_extra({column!r}, ...): samples have that; give another name")
        self.owners.setdefault(column, self.reward)
        self.columns.setdefault(column, []).extend(values)

    def check(self, n: int) -> None:
        """Hold columns against the number of samples.

        Raises:
            RewardError: one has another.
        """
        for name, values in self.columns.items():
            if len(values) != n:
                raise RewardError(
                    f"{self.owners[name]}: log_extra({name!r}, ...) was given {len(values)} values for {n} samples"
                )


def is_the_runs(metric: str) -> bool:
    """Whether a run logs under that name itself."""
    return metric.startswith(_METRICS) or metric in _LOGGED


_METRICS = (
    *("objective/", "policy/", "value/", "val/", "loss/"),
    *("rewards/", "rollout/", "time/", "tokens/", "memory/", "eval/"),
)
_LOGGED = ("step", "episode", "epoch", "eps", "lr")
_COLUMNS = ("step", "split", "prompt", "completion", "score")


class Reward(Protocol):
    """One source of rewards.

    Attributes:
        kind: what messages call it, before its name.
        name: under which it is logged.
        is_async: `rate` gives an awaitable.
        may_abstain: it may give None.
    """

    kind: str
    name: str
    is_async: bool
    may_abstain: bool

    def rate(self, samples: Samples, notes: Notes) -> Any:
        """Rate samples.

        Returns:
            a number a sample, or a list with a number for each of its completion tokens, or None where the reward does
            not apply; or an awaitable of such a list.
        """
        ...


def label(reward: Reward) -> str:
    """How messages call it."""
    return f"{reward.kind} {reward.name!r}"


class Loop:
    """An event loop in a thread of its own, which stays the same one: async clients are bound to theirs."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, work: Awaitable[Any] | Callable[[], Awaitable[Any]]) -> "Future[Any]":
        """Begin to await `work`."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(_awaited(work), self._loop)


def _awaited(work: Awaitable[Any] | Callable[[], Awaitable[Any]]) -> Coroutine[Any, Any, Any]:
    async def wait() -> Any:
        try:
            return await (work() if callable(work) else work)
        except SystemExit as error:  # it would end the loop's thread, and nobody would hear of it
            raise RuntimeError(f"SystemExit: {error}").with_traceback(error.__traceback__) from None

    return wait()

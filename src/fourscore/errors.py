"""The one error type that users of fourscore see for bad input, and what collects such errors."""

from collections.abc import Iterator
from contextlib import contextmanager


class FourscoreError(ValueError):
    """Bad input: each line names the flag or the file, its value, and the way out.

    It is a `ValueError`, so that code which catches what TRL raised still does.

    Args:
        lines: what is wrong, one message each.
    """

    @property
    def lines(self) -> tuple[str, ...]:
        """The messages, each on a line of its own."""
        return tuple(" ".join(str(line).split()) for line in self.args)

    def __str__(self) -> str:
        return "\n".join(str(line) for line in self.args)


class Findings:
    """What checks have found so far, so that a user sees all of it at once.

    Attributes:
        errors: what stops the run, one line each.
        warnings: what does not.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def error(self, message: str) -> None:
        """Note what stops the run; what is known already is not said twice."""
        if message not in self.errors:
            self.errors.append(message)

    def warn(self, message: str) -> None:
        """Note what a user should know, and can ignore."""
        if message not in self.warnings:
            self.warnings.append(message)

    @contextmanager
    def collect(self, about: str = "") -> Iterator[None]:
        """Note the `FourscoreError` that ends the block, instead of raising it.

        Args:
            about: flag and value, put before messages that do not start with a flag.
        """
        try:
            yield
        except FourscoreError as error:
            for line in error.lines:
                self.error(line if line.startswith("--") or not about else f"{about}: {line}")

    def raise_errors(self) -> None:
        """Raise all errors as one, if there are any.

        Raises:
            FourscoreError: one line an error.
        """
        if self.errors:
            raise FourscoreError(*self.errors)


class StoppedRun(FourscoreError):
    """What ends a run that is under way; the updates before are worth a checkpoint."""


class RatioError(StoppedRun):
    """Rollout and update do not compute the same logprobs."""


class RolloutError(StoppedRun):
    """Completions that could not be had from a rollout engine: names the engine, and the way out."""


class RewardError(StoppedRun):
    """A reward that could not be had, or is no number: names the reward, and where it is about one, the sample."""

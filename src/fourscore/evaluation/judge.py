"""A judge of the user's choice: a function that says which of two completions it prefers, or one that scores them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fourscore.errors import FourscoreError
from fourscore.rewards.function import Function, failure, load_function

PAIR = ("completions_a", "completions_b")


def load_judge(spec: str) -> "Function | PairJudge":
    """What `--judge` names: by its arguments a function that compares, or a reward function, which scores.

    Args:
        spec: `package.module:name` or `path/file.py:name`.

    Raises:
        FourscoreError: there is no such function, or it takes neither `completions` nor `completions_a` and
            `completions_b`.
    """
    function = load_function(spec, "--judge")
    parameters = inspect.signature(function).parameters
    if all(name in parameters for name in PAIR):
        return PairJudge(function, f"--judge {spec}")
    if "completions" not in parameters:
        raise FourscoreError(
            f"--judge {spec}: takes neither completions, to score them, nor {' and '.join(PAIR)}, to compare them"
        )
    return Function(function, f"--judge {spec}", kind="judge")


class PairJudge:
    """A function that compares, called with equally long lists `prompts`, `completions_a` and `completions_b`.

    It returns for each pair how far it prefers b: 1, 0, 0.5 for neither, or None where it will not say.

    Attributes:
        name: of the function.
    """

    def __init__(self, function: Callable[..., Any], named: str) -> None:
        """Wrap a function.

        Args:
            function: takes at least `completions_a` and `completions_b`.
            named: how messages call it: the flag and its value.

        Raises:
            FourscoreError: it asks for something else, too.
        """
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._named = named
        parameters = inspect.signature(function).parameters
        for name, parameter in parameters.items():
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not variadic and parameter.default is parameter.empty and name not in ("prompts", *PAIR):
                raise FourscoreError(f"{named}: asks for {name!r}, and is given prompts, {' and '.join(PAIR)}")
        self._takes_prompts = "prompts" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def outcomes(
        self, prompts: Sequence[Any], reference: Sequence[Any], policy: Sequence[Any], seed: int
    ) -> list[float | None]:
        """How far it prefers the policy's completion of each pair: 1, 0, 0.5, or None.

        Which side is a is drawn for each pair, so that a judge with a liking for a place favours neither. Equal
        completions are ties, and not shown.

        Args:
            prompts: texts or conversations.
            reference: the reference's completions.
            policy: the policy's.
            seed: of the draws.

        Raises:
            FourscoreError: it fails, or returns anything but numbers from 0 to 1 and None, one a pair.
        """
        found: list[float | None] = [0.5] * len(prompts)
        differ = [i for i in range(len(prompts)) if reference[i] != policy[i]]
        if not differ:
            return found
        swapped = np.random.default_rng(seed).random(len(differ)) < 0.5
        pairs = [
            (policy[i], reference[i]) if swap else (reference[i], policy[i])
            for i, swap in zip(differ, swapped, strict=True)
        ]
        asked = {PAIR[0]: [a for a, _ in pairs], PAIR[1]: [b for _, b in pairs]}
        if self._takes_prompts:
            asked["prompts"] = [prompts[i] for i in differ]
        try:
            said = list(self._function(**asked))
        except (Exception, SystemExit) as error:  # a judge does whatever it likes
            raise failure(f"judge {self.name!r}", error) from error
        if len(said) != len(differ):
            raise FourscoreError(
                f"{self._named}: gave {len(said)} verdicts on {len(differ)} pairs; it must give one each"
            )
        for i, verdict, swap in zip(differ, said, swapped, strict=True):
            prefers_b = self._checked(verdict)
            found[i] = 1.0 - prefers_b if swap and prefers_b is not None else prefers_b
        return found

    def _checked(self, verdict: Any) -> float | None:
        if verdict is None:
            return None
        try:
            number = float(verdict)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number <= 1:
            raise FourscoreError(f"{self._named}: gave {verdict!r}; a verdict is from 0 (for a) to 1 (for b), or None")
        return number

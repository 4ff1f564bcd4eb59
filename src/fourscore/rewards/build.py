"""The rewards of a run, from its flags and from what Python code hands over."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fourscore.errors import Findings, FourscoreError
from fourscore.parallel import Parallel
from fourscore.ppo.roles import Roles
from fourscore.ppo.scoring import scores_of
from fourscore.rewards.function import Function, load_function, names_function
from fourscore.rewards.model import TokenModel
from fourscore.rewards.samples import Reward
from fourscore.rewards.scorer import Scorer
from fourscore.rewards.shaping import Shaping


def build_scorer(args: Any, roles: Roles, reward_funcs: Any, parallel: Parallel) -> Scorer:
    """All rewards in the order of their weights: reward model, reward functions, servers.

    Args:
        args: `PPOConfig`.
        roles: with the reward model, if there is one.
        reward_funcs: beside those of `args`: one or a list of functions and strings; or None.
        parallel: the processes.

    Raises:
        FourscoreError: there is none, or one of them cannot be had.
    """
    size = args.local_rollout_forward_batch_size
    model = None
    if roles.reward_model is not None:
        model = TokenModel(lambda experience: scores_of(roles, experience, size))
    return Scorer(build_rewards(args, model, reward_funcs), args.reward_weights, Shaping.of(args), parallel)


def build_rewards(args: Any, model: TokenModel | None, reward_funcs: Any = None) -> list[Reward]:
    """The sources that flags name, in the order of their weights.

    Args:
        args: `PPOConfig`.
        model: the reward model, if there is one.
        reward_funcs: beside those of `args`: one or a list of functions and strings; or None.

    Raises:
        FourscoreError: one of them cannot be had.
    """
    rewards: list[Reward] = [] if model is None else [model]
    given = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    findings = Findings()
    for each in [*(args.reward_funcs or ()), *given]:
        with findings.collect():
            rewards.append(_reward(each))
    findings.raise_errors()
    return rewards


def _reward(given: str | Callable[..., Any]) -> Reward:
    if isinstance(given, str):
        if names_function(given):
            return Function(load_function(given), f"--reward_funcs {given}")
    elif callable(given) and not isinstance(given, nn.Module):
        return Function(given, f"reward_funcs: {getattr(given, '__name__', given)}")
    raise FourscoreError(f"reward_funcs: {given!r} is neither a function nor the place of one")

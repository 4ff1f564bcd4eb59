"""The rewards of a run, from its flags and from what Python code hands over."""

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fourscore.errors import Findings, FourscoreError
from fourscore.models.adapters import freeze
from fourscore.models.checkpoint import find_checkpoint
from fourscore.models.checks import check_reward, tokenizer_of
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import without_peft
from fourscore.parallel import Parallel
from fourscore.ppo.roles import Roles
from fourscore.ppo.scoring import scores_of
from fourscore.rewards.function import Function, function_name, load_function, names_function
from fourscore.rewards.model import TokenModel
from fourscore.rewards.samples import Reward
from fourscore.rewards.scorer import Scorer, check_weights
from fourscore.rewards.server import Server, check_server
from fourscore.rewards.shaping import Shaping
from fourscore.rewards.text_model import TextModel

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig

logger = logging.getLogger(__name__)


def check_rewards(args: "PPOConfig", model_args: "ModelConfig", columns: Iterable[str] | None) -> None:
    """Hold the flags of the rewards against what is there: files, modules, functions, their signatures, checkpoints.

    Args:
        args: `PPOConfig`.
        model_args: for checkpoints.
        columns: of the prompts, beside the prompt; None where they are not known.

    Raises:
        FourscoreError: a line for each thing that is wrong.
    """
    findings = Findings()
    for spec in args.reward_funcs or ():
        with findings.collect():
            if names_function(spec):
                function = Function(load_function(spec), f"--reward_funcs {spec}")
                if columns is not None:
                    function.check(columns)
            else:
                _check_checkpoint(spec, model_args, findings)
    for url in args.reward_url or ():
        with findings.collect():
            check_server(url, args.reward_timeout)
    count = (args.reward_model_path is not None) + len(args.reward_funcs or ()) + len(args.reward_url or ())
    with findings.collect():
        check_weights(count, args.reward_weights)
    findings.raise_errors()


def _check_checkpoint(spec: str, model_args: "ModelConfig", findings: Findings) -> None:
    checkpoint = find_checkpoint("--reward_funcs", spec, model_args, findings)
    if checkpoint is None:
        return
    if checkpoint.adapter is not None:
        raise FourscoreError(f"{checkpoint.named}: is an adapter; merge it into its base, and give that")
    check_reward(checkpoint, model_args, findings)
    if tokenizer_of(checkpoint, model_args) is None:
        raise FourscoreError(f"{checkpoint.named}: reads text, but no tokenizer is with it; copy that there")


def build_scorer(
    args: Any, roles: Roles, reward_funcs: Any, reward_tokenizer: Any | None, parallel: Parallel
) -> Scorer:
    """All rewards in the order of their weights: reward model, reward functions, servers.

    Args:
        args: `PPOConfig`.
        roles: with the reward model, if there is one.
        reward_funcs: beside those of `args`: one or a list of functions, classifiers and strings; or None.
        reward_tokenizer: of a reward model that reads text.
        parallel: the processes.

    Raises:
        FourscoreError: there is none, or one of them cannot be had.
    """
    size = args.local_rollout_forward_batch_size
    model: Reward | None = None
    if roles.reads_text:
        model = TextModel(roles.reward_model, reward_tokenizer, size)
    elif roles.reward_model is not None:
        model = TokenModel(lambda experience: scores_of(roles, experience, size))
    rewards = build_rewards(args, model, parallel.device, reward_funcs)
    return Scorer(rewards, args.reward_weights, Shaping.of(args), parallel)


def build_rewards(args: Any, model: Reward | None, device: torch.device, reward_funcs: Any = None) -> list[Reward]:
    """The sources that flags name, in the order of their weights.

    Args:
        args: `PPOConfig`.
        model: the reward model, if there is one.
        device: for further classifiers.
        reward_funcs: beside those of `args`: one or a list of functions, classifiers and strings; or None.

    Raises:
        FourscoreError: one of them cannot be had.
    """
    rewards: list[Reward] = [] if model is None else [model]
    size = args.local_rollout_forward_batch_size
    given = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    findings = Findings()
    for each in [*(args.reward_funcs or ()), *(each for each in given if each is not None)]:
        with findings.collect():
            rewards.append(_reward(each, size, device))
    findings.raise_errors()
    for url in args.reward_url or ():
        rewards.append(
            Server(
                url,
                timeout=args.reward_timeout,
                retries=args.reward_retries,
                concurrency=args.reward_concurrency,
                batch_size=args.reward_batch_size,
            )
        )
    return rewards


def _reward(given: str | Callable[..., Any] | nn.Module, batch_size: int, device: torch.device) -> Reward:
    if isinstance(given, str) and names_function(given):
        return Function(load_function(given), f"--reward_funcs {given}")
    if isinstance(given, str):
        return _classifier(_load_classifier(given, device), given, batch_size, device)
    if isinstance(given, nn.Module):
        config: Any = without_peft(given).config
        place = str(config._name_or_path)
        if config.num_labels != 1:
            raise FourscoreError(
                f"reward_funcs: {place or type(given).__name__} has num_labels={config.num_labels}, not 1"
            )
        return _classifier(given, place, batch_size, device)
    if callable(given):
        return Function(given, f"reward_funcs: {function_name(given)}")
    raise FourscoreError(f"reward_funcs: {given!r} is neither a function, nor a classifier, nor the place of one")


def _classifier(model: Any, place: str, batch_size: int, device: torch.device) -> TextModel:
    freeze(model)
    disable_dropout(model)
    return TextModel(model.to(device).eval(), _tokenizer(place), batch_size, _last_part(place))


def _load_classifier(place: str, device: torch.device) -> Any:
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=1, dtype=torch.float32 if device.type == "cpu" else "auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FourscoreError(
            f"--reward_funcs {place}: cannot be loaded ({' '.join(str(error).split())[:300]})"
        ) from error
    if missing := report["missing_keys"]:
        raise FourscoreError(f"--reward_funcs {place}: weights are missing from it, such as {min(missing)}")
    return model


def _tokenizer(place: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise FourscoreError(f"reward_funcs: there is no tokenizer with {place!r}, which reads text") from error


def _last_part(place: str) -> str:
    return place.rstrip("/").rsplit("/", 1)[-1] or "classifier"

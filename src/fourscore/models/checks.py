"""What can be known of checkpoints before a byte of weights is read: from configs, safetensors headers, tokenizers."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from fourscore.errors import FourscoreError
from fourscore.models.checkpoint import Checkpoint, inspect_checkpoint

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig

_OTHER_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "RewardModel")


def check_models(model_args: "ModelConfig", training_args: "PPOConfig") -> tuple[Checkpoint, Checkpoint]:
    """Looks at the SFT and the reward checkpoint and refuses what cannot be trained.

    Returns:
        The SFT checkpoint and the reward checkpoint.

    Raises:
        FourscoreError: names the flag, its value and the way out.
    """
    check_quantization(model_args, training_args)
    policy = inspect_checkpoint("--sft_model_path", str(training_args.sft_model_path), model_args)
    reward = inspect_checkpoint("--reward_model_path", str(training_args.reward_model_path), model_args)
    check_policy(policy)
    check_reward(reward, allow_untrained_head=model_args.allow_untrained_reward_head)
    for checkpoint in (policy, reward):
        full = checkpoint is reward and training_args.value_training == "full"
        if getattr(checkpoint.config, "quantization_config", None) and (full or not model_args.use_peft):
            way_out = "use --value_training adapter" if model_args.use_peft else "add --use_peft"
            raise FourscoreError(f"{checkpoint.named}: is quantized, so that adapters alone can train; {way_out}")
    check_freeze_layers(model_args, training_args, [policy, reward])
    return policy, reward


def check_freeze_layers(model_args: "ModelConfig", training_args: "PPOConfig", checkpoints: list[Checkpoint]) -> None:
    """Refuses to freeze layers under adapters, or so many that none is left to train."""
    n = training_args.freeze_layers
    if n and model_args.use_peft:
        raise FourscoreError(f"--freeze_layers {n} with --use_peft: every layer is frozen under adapters; drop one")
    for checkpoint in checkpoints:
        layers = getattr(checkpoint.config.get_text_config(), "num_hidden_layers", None)
        if n and layers is not None and n >= layers:
            raise FourscoreError(
                f"--freeze_layers {n}: {checkpoint.named} has {layers} layers, and the last one must train; "
                f"give at most {layers - 1}"
            )


def check_quantization(model_args: "ModelConfig", training_args: "PPOConfig") -> None:
    """Refuses 4 and 8 bits where nothing could be trained on top."""
    flag = "--load_in_4bit" if model_args.load_in_4bit else "--load_in_8bit" if model_args.load_in_8bit else None
    if flag is None:
        return
    if not model_args.use_peft:
        raise FourscoreError(f"{flag}: quantized weights cannot be trained; add --use_peft to train adapters on them")
    if training_args.value_training == "full":
        raise FourscoreError(f"--value_training full with {flag}: quantized weights cannot be trained; use adapter")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FourscoreError(f"{flag} needs bitsandbytes: pip install 'fourscore[quantization]'")


def check_policy(policy: Checkpoint) -> None:
    """Refuses what is not a causal LM."""
    config = policy.config
    architectures = config.architectures or []
    wrong = [name for name in architectures if name.endswith(_OTHER_TASKS)]
    if wrong and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise FourscoreError(f"{policy.named}: is a {wrong[0]}, not a causal LM; give the SFT checkpoint")
    auto_map = getattr(config, "auto_map", None) or {}
    if config.is_encoder_decoder or (
        config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in auto_map
    ):
        raise FourscoreError(f"{policy.named}: model type {config.model_type!r} is not a causal LM; give one")


def check_reward(reward: Checkpoint, allow_untrained_head: bool) -> None:
    """Refuses what is not a decoder with a trained `score` head of one label."""
    config = reward.config
    auto_map = getattr(config, "auto_map", None) or {}
    if (
        config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and "AutoModelForSequenceClassification" not in auto_map
    ):
        raise FourscoreError(
            f"{reward.named}: model type {config.model_type!r} has no sequence classifier in transformers; "
            "give a reward model that AutoModelForSequenceClassification loads"
        )
    if reward.adapter is not None and has_score(set(reward.adapter.tensors or ())):
        return
    weights = reward.weights
    if weights is not None and not has_score(weights):
        head = next(
            (name for name in sorted(weights) if name.split(".")[0] in ("classifier", "classification_head")), None
        )
        if head is not None:
            raise FourscoreError(
                f"{reward.named}: model type {config.model_type!r} keeps its head in {head!r}, as encoders with a "
                "tokenizer of their own do; give a decoder reward model with the policy's tokenizer and a `score` head"
            )
        if not allow_untrained_head:
            raise FourscoreError(untrained_head_message(reward.named))
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if weights is None and not classifier and not allow_untrained_head:
        raise FourscoreError(untrained_head_message(reward.named))
    if (has_score(weights) if weights is not None else classifier) and config.num_labels != 1:
        raise FourscoreError(
            f"{reward.named}: has num_labels={config.num_labels}, a reward model has 1; give one that was trained so"
        )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, source: str, policy: Checkpoint, reward: Checkpoint, model_args: "ModelConfig"
) -> None:
    """Refuses ids that would mean different tokens to policy and reward model, or have no embedding.

    Args:
        tokenizer: before a pad token is added to it.
        source: where it came from.
        policy: the SFT checkpoint.
        reward: the reward checkpoint.
        model_args: revision and trust_remote_code of the reward checkpoint's tokenizer.
    """
    rows = policy.embedding_rows
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
    if beyond and beyond != [tokenizer.pad_token]:
        raise FourscoreError(
            f"{policy.flag} {policy.path}: {len(beyond)} tokens of the tokenizer {source} ({beyond[0]!r}, ...) are "
            f"beyond its {rows} embedding rows; give the tokenizer it was trained with (--model_name_or_path)"
        )
    other = None if reward.path == source else _tokenizer_of(reward, model_args)
    if other is not None and (conflict := _first_conflict(tokenizer, other)) is not None:
        theirs, mine = other.convert_ids_to_tokens(conflict), tokenizer.convert_ids_to_tokens(conflict)
        raise FourscoreError(
            f"{reward.named}: id {conflict} is {theirs!r} there and {mine!r} in {source}; "
            "give a reward model with the policy's tokenizer"
        )
    if reward.embedding_rows != rows:
        raise FourscoreError(
            f"{reward.named}: has a vocabulary of {reward.embedding_rows}, {policy.named} one of {rows}; "
            "give a reward model with the policy's tokenizer"
        )


def has_score(names: frozenset[str] | set[str]) -> bool:
    """Whether a `score` head is among tensor names."""
    return any(f".{name}".endswith(".score.weight") for name in names)


def untrained_head_message(named: str) -> str:
    """What is said of a reward checkpoint without a head."""
    return (
        f"{named}: has no trained `score` head, its scores would be noise; give a trained reward model, or pass "
        "--allow_untrained_reward_head true"
    )


def _tokenizer_of(reward: Checkpoint, model_args: "ModelConfig") -> PreTrainedTokenizerBase | None:
    """The reward checkpoint's own tokenizer, if it has one."""
    if os.path.isdir(reward.path) and not any(Path(reward.path).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            reward.path, revision=model_args.model_revision, trust_remote_code=model_args.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None


def _first_conflict(mine: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> int | None:
    """The lowest id that is another token in `other`; names of added tokens (a pad, a reserved one) may differ."""
    added = mine.added_tokens_decoder.keys() | other.added_tokens_decoder.keys()
    theirs = {index: token for token, index in other.get_vocab().items()}
    conflicts = [
        index
        for token, index in mine.get_vocab().items()
        if index not in added and theirs.get(index, token if index >= len(theirs) else None) != token
    ]
    return min(conflicts, default=None)

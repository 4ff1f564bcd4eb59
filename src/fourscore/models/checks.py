"""What can be known of checkpoints before a byte of weights is read: from configs, safetensors headers, tokenizers."""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, constants, get_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from fourscore.errors import FourscoreError

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_OTHER_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "RewardModel")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as its config and headers describe it.

    Attributes:
        flag: the flag that named it, for messages.
        path: folder or hub id.
        config: its config, with a pad id that is outside the embedding taken out (it would crash the loading).
        weights: names of the tensors in it, None where that takes reading (`.bin` files).
        dtype: of its weights, None if unknown or mixed.
    """

    flag: str
    path: str
    config: Any
    weights: frozenset[str] | None
    dtype: torch.dtype | None

    @property
    def embedding_rows(self) -> int:
        """Rows of the input embedding."""
        return int(self.config.get_text_config().vocab_size)


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
            raise FourscoreError(f"{_named(checkpoint)}: is quantized, so that adapters alone can train; {way_out}")
    return policy, reward


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


def inspect_checkpoint(flag: str, path: str, model_args: "ModelConfig") -> Checkpoint:
    """Reads config and headers of a checkpoint.

    Raises:
        FourscoreError: it is missing, unreachable, only an adapter, or not a checkpoint.
    """
    revision = model_args.model_revision
    path = os.path.expanduser(path)
    named = f"{flag} {path}"
    if os.path.isdir(path):
        _check_folder(named, Path(path))
    elif os.path.exists(path):
        raise FourscoreError(f"{named}: is a file; give the folder with config.json in it")
    elif _looks_local(path):
        raise FourscoreError(f"{named}: no such folder; give a checkpoint folder or a hub id (owner/name)")
    else:
        _check_hub(named, path, revision)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise FourscoreError(
                f"{named}: comes with its own code; if you trust it, add --trust_remote_code"
            ) from error
        raise FourscoreError(f"{named}: config.json cannot be used ({_line(error)})") from error
    _drop_unusable_pad(config)
    weights, dtype = _headers(path, revision)
    return Checkpoint(flag, path, config, weights, dtype)


def check_policy(policy: Checkpoint) -> None:
    """Refuses what is not a causal LM."""
    config = policy.config
    architectures = config.architectures or []
    wrong = [name for name in architectures if name.endswith(_OTHER_TASKS)]
    if wrong and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise FourscoreError(f"{_named(policy)}: is a {wrong[0]}, not a causal LM; give the SFT checkpoint")
    auto_map = getattr(config, "auto_map", None) or {}
    if config.is_encoder_decoder or (
        config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in auto_map
    ):
        raise FourscoreError(f"{_named(policy)}: model type {config.model_type!r} is not a causal LM; give one")


def check_reward(reward: Checkpoint, allow_untrained_head: bool) -> None:
    """Refuses what is not a decoder with a trained `score` head of one label."""
    config = reward.config
    auto_map = getattr(config, "auto_map", None) or {}
    if (
        config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and "AutoModelForSequenceClassification" not in auto_map
    ):
        raise FourscoreError(
            f"{_named(reward)}: model type {config.model_type!r} has no sequence classifier in transformers; "
            "give a reward model that AutoModelForSequenceClassification loads"
        )
    weights = reward.weights
    if weights is not None and not has_score(weights):
        head = next(
            (name for name in sorted(weights) if name.split(".")[0] in ("classifier", "classification_head")), None
        )
        if head is not None:
            raise FourscoreError(
                f"{_named(reward)}: model type {config.model_type!r} keeps its head in {head!r}, as encoders with a "
                "tokenizer of their own do; give a decoder reward model with the policy's tokenizer and a `score` head"
            )
        if not allow_untrained_head:
            raise FourscoreError(untrained_head_message(_named(reward)))
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if weights is None and not classifier and not allow_untrained_head:
        raise FourscoreError(untrained_head_message(_named(reward)))
    if (has_score(weights) if weights is not None else classifier) and config.num_labels != 1:
        raise FourscoreError(
            f"{_named(reward)}: has num_labels={config.num_labels}, a reward model has 1; give one that was trained so"
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
            f"{_named(reward)}: id {conflict} is {theirs!r} there and {mine!r} in {source}; "
            "give a reward model with the policy's tokenizer"
        )
    if reward.embedding_rows != rows:
        raise FourscoreError(
            f"{_named(reward)}: has a vocabulary of {reward.embedding_rows}, {_named(policy)} one of {rows}; "
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


def _named(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.flag} {checkpoint.path}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def _check_folder(named: str, folder: Path) -> None:
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    adapter_only = not [file for file in _weight_files(folder) if not file.name.startswith("adapter_")]
    if (folder / "adapter_config.json").exists() and adapter_only:
        raise FourscoreError(
            f"{named}: is a PEFT adapter, not a whole model; "
            "merge it first (PeftModel.merge_and_unload, then save_pretrained)"
        )
    if not (folder / "config.json").exists():
        raise FourscoreError(f"{named}: no config.json in that folder; give a folder that save_pretrained wrote")
    if not has_weights:
        raise FourscoreError(f"{named}: no weights in that folder (*.safetensors); give a folder with them")


def _weight_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("*.bin")]


def _check_hub(named: str, repo: str, revision: str) -> None:
    """One quick question to the hub, where transformers alone would retry for most of a minute."""
    try:
        if isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
            return
    except HFValidationError as error:
        raise FourscoreError(f"{named}: no such folder, and not a hub id (owner/name) either") from error
    if constants.HF_HUB_OFFLINE:
        raise FourscoreError(
            f"{named}: no such folder, not in the hub cache, and HF_HUB_OFFLINE is set; "
            "give a local checkpoint folder, or unset it"
        )
    try:
        HfApi().model_info(repo, revision=revision, timeout=5)
    except RevisionNotFoundError as error:
        raise FourscoreError(f"{named}: has no revision {revision!r} on the hub; check --model_revision") from error
    except RepositoryNotFoundError as error:
        raise FourscoreError(
            f"{named}: no such folder, and no such model on the hub (or it is gated or private: hf auth login)"
        ) from error
    except Exception as error:  # whatever the network brings
        raise FourscoreError(
            f"{named}: no such folder, not in the hub cache, and the hub cannot be reached ({_line(error)}); "
            "give a local checkpoint folder, or go online"
        ) from error


def _drop_unusable_pad(config: Any) -> None:
    text = config.get_text_config()
    for part in (config, text):
        pad = getattr(part, "pad_token_id", None)
        if pad is not None and not 0 <= pad < text.vocab_size:
            part.pad_token_id = None


def _headers(path: str, revision: str) -> tuple[frozenset[str] | None, torch.dtype | None]:
    """Tensor names and common dtype from safetensors headers, as far as they can be had without the weights."""
    files = _safetensors_files(path, revision)
    if files is None:
        return None, None
    try:
        if files:
            dtypes: dict[str, str] = {}
            for file in files:
                with safe_open(file, "pt") as header:
                    dtypes |= {name: header.get_slice(name).get_dtype() for name in header.keys()}  # noqa: SIM118
        else:
            metadata = get_safetensors_metadata(path, revision=revision)
            dtypes = {name: t.dtype for file in metadata.files_metadata.values() for name, t in file.tensors.items()}
    except SafetensorError as error:
        raise FourscoreError(f"{path}: a safetensors file is damaged ({_line(error)}); fetch it again") from error
    except Exception:  # the hub has no safetensors of it, or went away: the loader reports what is missing
        return None, None
    floats = {dtype for dtype in dtypes.values() if dtype in _DTYPES}
    return frozenset(dtypes), _DTYPES[floats.pop()] if len(floats) == 1 else None


def _safetensors_files(path: str, revision: str) -> list[str] | None:
    """Local or cached safetensors files; empty if they are on the hub only; None if there are none."""
    if not os.path.isdir(path):
        cached = try_to_load_from_cache(path, "model.safetensors", revision=revision)
        return [cached] if isinstance(cached, str) else []
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [str(folder / "model.safetensors")]
    if not index.exists():
        return None
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise FourscoreError(f"{index}: is damaged ({_line(error)}); fetch it again") from error
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FourscoreError(f"{index}: names {missing[0]}, which is not there; fetch the whole checkpoint")
    return [str(folder / name) for name in names]


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

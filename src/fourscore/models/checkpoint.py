"""What configs and safetensors headers say of a checkpoint; no weights are read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, constants, get_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from fourscore.errors import FourscoreError

if TYPE_CHECKING:
    from fourscore.config import ModelConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as a safetensors header describes it; `dtype` is None for types that torch lacks."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter that lies beside no model of its own.

    Attributes:
        path: its folder or hub id.
        config: its PEFT config.
        tensors: headers by name, None if they could not be had.
    """

    path: str
    config: PeftConfig
    tensors: Mapping[str, TensorHeader] | None


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as its config and headers describe it. Of an adapter: its base, and the adapter beside it.

    Attributes:
        flag: the flag that named it, for messages.
        path: folder or hub id of the whole model.
        revision: of a hub id.
        config: its config, with a pad id that is outside the embedding taken out (it would crash the loading).
        tensors: headers of the tensors in it by name, None where that takes reading.
        identity: equal for two spellings of the same files (symlinks, relative paths) and for no others.
        adapter: what the flag named, when that was an adapter on this model.
    """

    flag: str
    path: str
    revision: str
    config: Any
    tensors: Mapping[str, TensorHeader] | None
    identity: tuple[Any, ...]
    adapter: Adapter | None = None

    @property
    def given(self) -> str:
        """The path that the flag named: the adapter's, if it is one."""
        return self.adapter.path if self.adapter is not None else self.path

    @property
    def named(self) -> str:
        """Flag and value, for messages."""
        return f"{self.flag} {self.given}"

    @property
    def weights(self) -> frozenset[str] | None:
        """Names of the tensors, None where that takes reading."""
        return None if self.tensors is None else frozenset(self.tensors)

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """Of its floating point weights, None if unknown or mixed."""
        found = {t.dtype for t in (self.tensors or {}).values() if t.dtype is not None and t.dtype.is_floating_point}
        return found.pop() if len(found) == 1 else None

    @property
    def embedding_rows(self) -> int:
        """Rows of the input embedding."""
        return int(self.config.get_text_config().vocab_size)


def inspect_checkpoint(flag: str, path: str, model_args: "ModelConfig") -> Checkpoint:
    """Reads config and headers of a checkpoint, or of an adapter and its base.

    Raises:
        FourscoreError: it is missing, unreachable, or not a checkpoint.
    """
    return _inspect(f"{flag} {path}", flag, os.path.expanduser(path), model_args.model_revision, model_args, None)


def _inspect(
    named: str, flag: str, path: str, revision: str, model_args: "ModelConfig", adapter: Adapter | None
) -> Checkpoint:
    if os.path.isdir(path):
        found = None if adapter is not None else _adapter_in(named, Path(path))
        if found is not None:
            base = os.path.expanduser(str(found.config.base_model_name_or_path))
            # A relative base is meant from where the adapter was trained, which is rarely here: beside it, too.
            if not os.path.isdir(base) and os.path.isdir(os.path.join(path, base)):
                base = os.path.join(path, base)
            its_revision = getattr(found.config, "revision", None) or "main"
            return _inspect(f"{named}: its base model {base}", flag, base, its_revision, model_args, found)
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
    return Checkpoint(flag, path, revision, config, _headers(path, revision), _identity(path, revision), adapter)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def _check_folder(named: str, folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise FourscoreError(f"{named}: no config.json in that folder; give a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise FourscoreError(f"{named}: no weights in that folder (*.safetensors); give a folder with them")


def _adapter_in(named: str, folder: Path) -> Adapter | None:
    """The adapter in a folder that holds no whole model."""
    whole = [file for file in _weight_files(folder) if not file.name.startswith("adapter_")]
    if whole or not (folder / ADAPTER_CONFIG).exists():
        return None
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FourscoreError(f"{named}: {ADAPTER_CONFIG} cannot be used ({_line(error)})") from error
    if not config.base_model_name_or_path:
        raise FourscoreError(f"{named}: its {ADAPTER_CONFIG} names no base_model_name_or_path; add it")
    file = folder / ADAPTER_WEIGHTS
    return Adapter(str(folder), config, _read_headers(str(folder), [str(file)]) if file.exists() else None)


def _identity(path: str, revision: str) -> tuple[Any, ...]:
    """Device and inode of config and weights, which spellings and links share; of what is not here, its name."""
    if os.path.isdir(path):
        files = [os.path.join(path, "config.json"), *map(str, _weight_files(Path(path)))]
    else:
        files = [try_to_load_from_cache(path, "config.json", revision=revision)]
        files += safetensors_files(path, revision) or []
        if len(files) < 2 or not all(isinstance(file, str) for file in files):
            return (path, revision)
    return tuple(sorted((stat.st_dev, stat.st_ino) for stat in map(os.stat, files)))


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


def _headers(path: str, revision: str) -> Mapping[str, TensorHeader] | None:
    """Headers of all tensors, as far as they can be had without the weights."""
    files = safetensors_files(path, revision)
    if files is None:
        return None
    if files:
        return _read_headers(path, files)
    try:
        metadata = get_safetensors_metadata(path, revision=revision)
    except Exception:  # the hub has no safetensors of it, or went away: the loader reports what is missing
        return None
    return {
        name: TensorHeader(_DTYPES.get(tensor.dtype), tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def _read_headers(path: str, files: list[str]) -> Mapping[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    headers[name] = TensorHeader(_DTYPES.get(tensor.get_dtype()), tuple(tensor.get_shape()))
    except SafetensorError as error:
        raise FourscoreError(f"{path}: a safetensors file is damaged ({_line(error)}); fetch it again") from error
    return headers


def safetensors_files(path: str, revision: str) -> list[str] | None:
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

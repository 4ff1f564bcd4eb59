"""What configs and safetensors headers say of a checkpoint; no weights are read."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import HfApi, constants, get_safetensors_metadata, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftConfig
from transformers import AutoConfig

from fourscore.errors import Findings, FourscoreError

if TYPE_CHECKING:
    from fourscore.config import ModelConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_WEIGHTS = (".safetensors", ".bin")
_LONGEST_HEADER = 100_000_000

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
        revision: of a hub id.
    """

    path: str
    config: PeftConfig
    tensors: Mapping[str, TensorHeader] | None
    revision: str = "main"


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
        FourscoreError: it is missing, unreachable, incomplete, or not a checkpoint; a line for each reason.
    """
    findings = Findings()
    checkpoint = find_checkpoint(flag, path, model_args, findings)
    findings.raise_errors()
    assert checkpoint is not None
    return checkpoint


def find_checkpoint(flag: str, path: str, model_args: "ModelConfig", findings: Findings) -> Checkpoint | None:
    """What `inspect_checkpoint` does, with every error noted.

    Args:
        flag: the flag that names it.
        path: its value, a folder or a hub id.
        model_args: revision, `trust_remote_code` and `allow_pickle`.
        findings: takes the errors.

    Returns:
        None where there is no config to go on with. Where weights are damaged or missing, `tensors` is None.
    """
    checkpoint = None
    with findings.collect():
        path = os.path.expanduser(path)
        checkpoint = _inspect(f"{flag} {path}", flag, path, model_args.model_revision, model_args, None, findings)
    return checkpoint


def _inspect(
    named: str,
    flag: str,
    path: str,
    revision: str,
    model_args: "ModelConfig",
    adapter: Adapter | None,
    findings: Findings,
) -> Checkpoint:
    files = _locate(named, path, revision)
    found = None if adapter is not None else _adapter_in(named, path, revision, files, model_args, findings)
    if found is not None:
        base = os.path.expanduser(str(found.config.base_model_name_or_path))
        # A relative base is meant from where the adapter was trained, which is rarely here: beside it, too.
        if not os.path.isdir(base) and os.path.isdir(os.path.join(path, base)):
            base = os.path.join(path, base)
        its_revision = getattr(found.config, "revision", None) or "main"
        return _inspect(f"{named}: its base model {base}", flag, base, its_revision, model_args, found, findings)
    if "config.json" not in files.names:
        where = "in that folder" if os.path.isdir(path) else "on the hub"
        raise FourscoreError(f"{named}: no config.json {where}; give a folder that save_pretrained wrote")
    tensors = None
    with findings.collect(named):
        tensors = _tensors(named, flag, path, revision, files, model_args)
    config = _config(named, path, revision, model_args)
    return Checkpoint(flag, path, revision, config, tensors, _identity(path, revision, files), adapter)


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint: where those that are here lie, and the names of all."""

    folder: Path | None
    names: frozenset[str]

    def here(self, name: str) -> Path | None:
        path = None if self.folder is None else self.folder / name
        return path if path is not None and path.exists() else None


def _locate(named: str, path: str, revision: str) -> _Files:
    if os.path.isdir(path):
        return _Files(Path(path), frozenset(os.listdir(path)))
    if os.path.exists(path):
        raise FourscoreError(f"{named}: is a file; give the folder with config.json in it")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise FourscoreError(f"{named}: no such folder; give a checkpoint folder or a hub id (owner/name)")
    return _on_hub(named, path, revision)


def _on_hub(named: str, repo: str, revision: str) -> _Files:
    """One quick question to the hub, and none for a whole snapshot in its cache: transformers alone would retry."""
    try:
        cached = [try_to_load_from_cache(repo, name, revision=revision) for name in ("config.json", ADAPTER_CONFIG)]
    except HFValidationError as error:
        raise FourscoreError(f"{named}: no such folder, and not a hub id (owner/name) either") from error
    folder = next((Path(file).parent for file in cached if isinstance(file, str)), None)
    names = frozenset() if folder is None else frozenset(os.listdir(folder))
    if folder is not None and (constants.HF_HUB_OFFLINE or any(name.endswith(_WEIGHTS) for name in names)):
        return _Files(folder, names)
    if constants.HF_HUB_OFFLINE:
        raise FourscoreError(
            f"{named}: no such folder, not in the hub cache, and HF_HUB_OFFLINE is set; "
            "give a local checkpoint folder, or unset it"
        )
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=5)
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
    return _Files(folder, frozenset(sibling.rfilename for sibling in info.siblings or ()))


def _config(named: str, path: str, revision: str, model_args: "ModelConfig") -> Any:
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=model_args.trust_remote_code)
        _drop_unusable_pad(config)
    except Exception as error:  # config classes check values in ways of their own
        if "trust_remote_code" in str(error):
            raise FourscoreError(
                f"{named}: comes with its own code; if you trust it, add --trust_remote_code"
            ) from error
        if match := re.search(r"model type `([^`]*)`", str(error)):
            raise FourscoreError(
                f"{named}: transformers {transformers.__version__} does not know its model type {match[1]!r}; upgrade "
                "transformers, or give another model"
            ) from error
        raise FourscoreError(
            f"{named}: config.json cannot be used ({_line(error)}); mend it, or fetch it again"
        ) from error
    return config


def _drop_unusable_pad(config: Any) -> None:
    text = config.get_text_config()
    for part in (config, text):
        pad = getattr(part, "pad_token_id", None)
        if pad is not None and not 0 <= pad < text.vocab_size:
            part.pad_token_id = None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------------------------- adapters


def _adapter_in(
    named: str, path: str, revision: str, files: _Files, model_args: "ModelConfig", findings: Findings
) -> Adapter | None:
    """The adapter in a folder that holds no whole model."""
    whole = any(name.endswith(_WEIGHTS) and not name.startswith("adapter_") for name in files.names)
    if whole or ADAPTER_CONFIG not in files.names:
        return None
    try:
        config = PeftConfig.from_pretrained(path, revision=revision)
    except Exception as error:  # as for config.json
        raise FourscoreError(f"{named}: {ADAPTER_CONFIG} cannot be used ({_line(error)}); mend it") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        findings.error(
            f"{named}: is an adapter of PEFT type {config.peft_type.value}, which changes the prompt, so that old and "
            "new logprobs would not be of the same text; give a LoRA adapter or a whole model"
        )
    tensors = None
    with findings.collect(named):
        tensors = _adapter_tensors(named, path, revision, files, model_args)
    if not config.base_model_name_or_path:
        raise FourscoreError(f"{named}: its {ADAPTER_CONFIG} names no base_model_name_or_path; add it")
    return Adapter(path, config, tensors, revision)


def _adapter_tensors(
    named: str, path: str, revision: str, files: _Files, model_args: "ModelConfig"
) -> Mapping[str, TensorHeader] | None:
    file = files.here(ADAPTER_WEIGHTS)
    if file is not None:
        return read_header(file)
    if ADAPTER_WEIGHTS in files.names:
        return _remote_tensors([HfApi().parse_safetensors_file_metadata(path, ADAPTER_WEIGHTS, revision=revision)])
    if ADAPTER_PICKLE not in files.names:
        raise FourscoreError(f"{named}: has an {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}; copy it there, too")
    if not model_args.allow_pickle:
        # Weights alone are unpickled by the command that is shown, which runs no code of the file.
        old, new = os.path.join(path, ADAPTER_PICKLE), os.path.join(path, ADAPTER_WEIGHTS)
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"w = torch.load({old!r}, weights_only=True); "
            f"save_file({{k: t.contiguous().clone() for k, t in w.items()}}, {new!r})"
        )
        raise FourscoreError(_pickle_message(named, ADAPTER_PICKLE, code))
    return None


# ----------------------------------------------------------------------------------------------------------- weights


def _tensors(
    named: str, flag: str, path: str, revision: str, files: _Files, model_args: "ModelConfig"
) -> Mapping[str, TensorHeader] | None:
    """Headers of all tensors, as far as they can be had without the weights."""
    if files.here(WEIGHTS) is not None or files.here(INDEX) is not None:
        present, missing = _safetensors_files(files)
        if not missing:
            return _read_headers(present, files)
        if os.path.isdir(path) or constants.HF_HUB_OFFLINE:
            raise FourscoreError(
                f"{named}: {INDEX} names {missing[0]}, which is not there ({len(missing)} of "
                f"{len(missing) + len(present)} files are missing); fetch the whole checkpoint"
            )
    if {WEIGHTS, INDEX} & files.names:
        try:
            return _remote_tensors(get_safetensors_metadata(path, revision=revision).files_metadata.values())
        except Exception:  # the hub went away: the loader reports what is missing
            return None
    pickles = sorted(name for name in files.names if name.startswith("pytorch_model") and name.endswith(".bin"))
    if not pickles:
        where = "in that folder" if os.path.isdir(path) else "in the hub cache" if files.folder else "on the hub"
        raise FourscoreError(f"{named}: no weights {where} (*.safetensors); give a folder with them")
    if not model_args.allow_pickle:
        auto = "AutoModelForSequenceClassification" if "reward" in flag else "AutoModelForCausalLM"
        copy = f"{path.rstrip('/').rsplit('/', 1)[-1] if files.folder is None else path.rstrip('/')}-safetensors"
        tokenizer = any("token" in name for name in files.names)
        at = "" if os.path.isdir(path) or revision == "main" else f", revision={revision!r}"
        code = (
            f"from transformers import {auto} as M{', AutoTokenizer as T' * tokenizer}; a, b = {path!r}, {copy!r}; "
            f"M.from_pretrained(a, dtype='auto'{at}).save_pretrained(b)"
            + f"; T.from_pretrained(a{at}).save_pretrained(b)"
            * tokenizer
        )
        raise FourscoreError(_pickle_message(named, pickles[0], code))
    return None


def _pickle_message(named: str, file: str, code: str) -> str:
    command = shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'
    return (
        f"{named}: {file} is a pickle, which can run code when it is read; convert it to safetensors: "
        f"python -c {command} (or trust it: --allow_pickle)"
    )


def safetensors_files(path: str, revision: str) -> list[Path]:
    """The safetensors files of a checkpoint that are on this machine."""
    files = _locate(path, path, revision)
    if files.here(WEIGHTS) is None and files.here(INDEX) is None:
        return []
    return _safetensors_files(files)[0]


def _safetensors_files(files: _Files) -> tuple[list[Path], list[str]]:
    """Files of a checkpoint that are here, and the names of those that its index names in vain."""
    assert files.folder is not None
    if files.here(WEIGHTS) is not None:
        return [files.folder / WEIGHTS], []
    names = sorted(set(_weight_map(files.folder / INDEX).values()))
    return [files.folder / n for n in names if files.here(n)], [n for n in names if not files.here(n)]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FourscoreError(f"{index}: is damaged ({_line(error)}); fetch it again") from error


def _read_headers(paths: list[Path], files: _Files) -> Mapping[str, TensorHeader]:
    findings, headers, place = Findings(), {}, {}
    for path in paths:
        with findings.collect():
            header = read_header(path)
            headers.update(header)
            place.update(dict.fromkeys(header, path.name))
    findings.raise_errors()
    if paths[0].name != WEIGHTS:
        index = paths[0].parent / INDEX
        for name, file in sorted(_weight_map(index).items()):
            if place.get(name) != file:
                raise FourscoreError(f"{index}: says that {name} is in {file}, which lacks it; fetch both files again")
    return headers


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Tensors of a safetensors file by name, from its header; the weights are left alone.

    The format: 8 bytes with the length of the header, the header as JSON, the tensors back to back.

    Raises:
        FourscoreError: the file is damaged, or shorter or longer than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise FourscoreError(f"{file}: is a pointer of git-lfs, not the weights; fetch them with: git lfs pull")
        raw = opened.read(length) if length <= min(size, _LONGEST_HEADER) else b""
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        tensors = {
            name: TensorHeader(_DTYPES.get(tensor["dtype"]), tuple(map(int, tensor["shape"])))
            for name, tensor in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FourscoreError(f"{file}: is damaged, it has no safetensors header; fetch it again") from error
    expected = 8 + length + end
    if size != expected:
        why = "the download was cut off" if size < expected else "something was added to it"
        raise FourscoreError(f"{file}: has {size} bytes, its header says {expected}: {why}; fetch it again")
    return tensors


def _remote_tensors(metadata: Iterable[Any]) -> Mapping[str, TensorHeader]:
    """What the hub answers when asked for headers."""
    return {
        name: TensorHeader(_DTYPES.get(tensor.dtype), tuple(tensor.shape))
        for file in metadata
        for name, tensor in file.tensors.items()
    }


def _identity(path: str, revision: str, files: _Files) -> tuple[Any, ...]:
    """Device and inode of config and weights, which spellings and links share; of what is not here, its name."""
    names = sorted(name for name in files.names if name.endswith(_WEIGHTS) or name == "config.json")
    here = [files.here(name) for name in names]
    if len(here) < 2 or not all(here):
        return (path, revision)
    return tuple(sorted((stat.st_dev, stat.st_ino) for stat in (file.stat() for file in here if file is not None)))

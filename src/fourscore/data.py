"""Prompts: from a file, a folder or the hub to lists of token ids.

A prompt is a text, or a conversation (a list of messages with `role` and `content`) that the tokenizer's chat template
turns into one. Prompts stay lists of different lengths: nothing here pads.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from fourscore import demo
from fourscore.errors import Findings, FourscoreError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fourscore.config import PPOConfig, ScriptArguments

logger = logging.getLogger(__name__)

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_TIMEOUT_S = 10.0


def load_prompts(
    script_args: "ScriptArguments", training_args: "PPOConfig", tokenizer: "PreTrainedTokenizerBase"
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Read and tokenize the prompts that the flags name.

    `dataset_name` is a `.jsonl`, `.json`, `.parquet` or `.csv` file, a folder of such files (names with `train`, `test`
    or `validation` in them make the splits, otherwise every file is `train`), a folder written by
    `Dataset.save_to_disk`, a dataset on the Hugging Face Hub, or None for the prompts that ship with fourscore. What
    exists on disk is read from disk, and the network is left alone.

    Evaluation prompts come from `eval_dataset_name`, or else, when `eval_strategy` is not "no", from the
    `dataset_test_split` of `dataset_name`.

    Args:
        script_args: Where the prompts are: names, splits, column.
        training_args: `max_prompt_length`, `max_prompt_length_action`, `dataset_num_proc` and `eval_strategy` are used.
        tokenizer: The policy's tokenizer.

    Returns:
        Training prompts, and evaluation prompts or None: the column `input_ids`, and for reward functions the prompt as
        it was read (`prompt`) and every other column.

    Raises:
        FourscoreError: A file, dataset, split or column is not there, the hub cannot be reached, or `tokenize_prompts`
            refuses what was read; a line for each dataset.
    """
    findings = Findings()
    # One process fills the cache on disk, the others read it.
    with training_args.main_process_first(desc="reading the prompts"):
        tokenized: list[datasets.Dataset | None] = []
        eval_flag = "eval_dataset_name" if script_args.eval_dataset_name is not None else "dataset_name"
        for flag, dataset in zip(("dataset_name", eval_flag), read_prompts(script_args, training_args), strict=True):
            name = getattr(script_args, flag)
            with findings.collect(f"--{flag} {name}" if name is not None else ""):
                tokenized.append(None if dataset is None else _tokenize(dataset, script_args, training_args, tokenizer))
    findings.raise_errors()
    train, held_out = tokenized
    assert train is not None
    return train, held_out


def read_prompts(
    script_args: "ScriptArguments", training_args: "PPOConfig"
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """What `load_prompts` reads, before it is tokenized.

    Raises:
        FourscoreError: A file, dataset or split is not there, or the hub cannot be reached; a line for each dataset.
    """
    evaluates = training_args.eval_strategy != "no"
    findings = Findings()
    train = held_out = None
    with findings.collect(f"--dataset_name {script_args.dataset_name}"):
        if script_args.dataset_name is None:
            splits = _read_files([demo.PROMPTS_TRAIN])
            train = splits["train"]
        else:
            splits = _read(script_args.dataset_name, script_args.dataset_config, "--dataset_name")
            if evaluates and script_args.eval_dataset_name is None:
                with findings.collect():
                    held_out = _test_split(splits, script_args, "or --eval_strategy no")
            train = _take_split(splits, script_args.dataset_train_split, "--dataset_train_split")
    with findings.collect(f"--eval_dataset_name {script_args.eval_dataset_name}"):
        if script_args.eval_dataset_name is not None:
            held_out = _eval_split(script_args)
        elif evaluates and script_args.dataset_name is None:
            held_out = _read_files([demo.PROMPTS_HELDOUT])["train"]
    findings.raise_errors()
    assert train is not None
    return train, held_out


def load_held_out(
    script_args: "ScriptArguments", training_args: "PPOConfig", tokenizer: "PreTrainedTokenizerBase"
) -> datasets.Dataset:
    """Read and tokenize the prompts to evaluate on, and none to train on.

    They are `eval_dataset_name`, or else the `dataset_test_split` of `dataset_name`, or else what ships with fourscore.

    Returns:
        Prompts with the one column `input_ids`.

    Raises:
        FourscoreError: As for `load_prompts`.
    """
    findings = Findings()
    flag = "dataset_name" if script_args.eval_dataset_name is None else "eval_dataset_name"
    name = getattr(script_args, flag)
    dataset = None
    with findings.collect("" if name is None else f"--{flag} {name}"):
        dataset = _tokenize(_read_held_out(script_args), script_args, training_args, tokenizer)
    findings.raise_errors()
    assert dataset is not None
    return dataset


def _read_held_out(script_args: "ScriptArguments") -> datasets.Dataset:
    if script_args.eval_dataset_name is not None:
        return _eval_split(script_args)
    if script_args.dataset_name is None:
        return _read_files([demo.PROMPTS_HELDOUT])["train"]
    return _test_split(_read(script_args.dataset_name, script_args.dataset_config, "--dataset_name"), script_args)


def _test_split(
    splits: Mapping[str, datasets.Dataset], script_args: "ScriptArguments", otherwise: str = ""
) -> datasets.Dataset:
    """The test split of `dataset_name`; the error names what else there is to do, and `otherwise`."""
    wanted = script_args.dataset_test_split
    if wanted not in splits and wanted.partition("[")[0] not in splits:
        ways_out = ", ".join(filter(None, ("name some with --eval_dataset_name", otherwise)))
        raise FourscoreError(
            f"--dataset_name {script_args.dataset_name}: has no split {wanted} of prompts that were not trained on, "
            f"only {', '.join(splits)}; {ways_out}"
        )
    return _take_split(splits, wanted, "--dataset_test_split")


def _tokenize(
    dataset: datasets.Dataset,
    script_args: "ScriptArguments",
    training_args: "PPOConfig",
    tokenizer: "PreTrainedTokenizerBase",
) -> datasets.Dataset:
    return tokenize_prompts(
        dataset,
        tokenizer,
        prompt_column=script_args.prompt_column,
        max_prompt_length=training_args.max_prompt_length,
        action=training_args.max_prompt_length_action,
        num_proc=training_args.dataset_num_proc,
    )


def tokenize_prompts(
    dataset: datasets.Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    prompt_column: str = "prompt",
    max_prompt_length: int | None = None,
    action: Literal["drop", "truncate"] = "drop",
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Turn a dataset of prompts into one of token ids, beside what it has of each prompt.

    A column `input_ids` is used as it is, but for positions that a column `attention_mask` marks as padding: those are
    taken out. Otherwise `prompt_column` holds texts, tokenized with the tokenizer's default special tokens, or
    conversations, rendered by its chat template up to where the assistant's answer starts.

    Args:
        dataset: One prompt a row.
        tokenizer: The policy's tokenizer.
        prompt_column: Column of texts or conversations; not looked at when there are `input_ids`.
        max_prompt_length: Longest prompt to keep, in tokens. None keeps all.
        action: What happens to a longer prompt: "drop" leaves it out, "truncate" cuts tokens off its left end, which
            may be a BOS token or the start of a chat template.
        num_proc: Processes to tokenize with.

    Returns:
        A dataset in the order of `dataset`, with a column `input_ids`, a list of at least one int per row. The other
        columns are those of `dataset`, not copied; the one with the prompts is called `prompt`.

    Raises:
        FourscoreError: The dataset or a prompt is empty, the column is missing or of another type, a conversation meets
            a tokenizer without a chat template, an id lies outside the vocabulary, or every prompt was dropped.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise FourscoreError(f"prompts must be a datasets.Dataset that is not streamed, not {type(dataset).__name__}")
    if len(dataset) == 0:
        raise FourscoreError("the prompt dataset is empty")
    # A format set by the caller (torch, numpy) would change the types of the rows.
    dataset = dataset.with_format(None)

    columns = dataset.column_names
    if "input_ids" in columns:
        tokenized = dataset.select_columns([name for name in _TOKENS if name in columns])
        if "attention_mask" in columns:
            tokenized = tokenized.map(
                _without_padding, remove_columns="attention_mask", num_proc=num_proc, desc="Removing padding"
            )
    elif prompt_column in columns:
        tokenized = dataset.map(
            _tokenize_row,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "column": prompt_column},
            remove_columns=columns,
            # Without it, ids would be read back as whatever type pyarrow infers from the first batch.
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))}),
            num_proc=num_proc,
            desc="Tokenizing prompts",
        )
    else:
        raise FourscoreError(_no_column(dataset, prompt_column))

    lengths = _check_ids(tokenized, len(tokenizer))
    if max_prompt_length is None or (lengths <= max_prompt_length).all():
        return _beside(tokenized, dataset, prompt_column)

    too_long = int((lengths > max_prompt_length).sum())
    if action == "truncate":
        _log_once(f"{too_long} of {len(lengths)} prompts cut to their last {max_prompt_length} tokens")
        tokenized = tokenized.map(
            _keep_last, fn_kwargs={"length": max_prompt_length}, num_proc=num_proc, desc="Truncating prompts"
        )
        return _beside(tokenized, dataset, prompt_column)
    if too_long == len(lengths):
        raise FourscoreError(
            f"all {too_long} prompts are longer than --max_prompt_length {max_prompt_length} (the shortest has "
            f"{lengths.min()} tokens): raise it, or pass --max_prompt_length_action truncate"
        )
    _log_once(f"{too_long} of {len(lengths)} prompts dropped: longer than {max_prompt_length} tokens")
    return _beside(tokenized, dataset, prompt_column).select(np.flatnonzero(lengths <= max_prompt_length))


_TOKENS = ("input_ids", "attention_mask")


def _no_column(dataset: datasets.Dataset, wanted: str) -> str:
    columns = dataset.column_names
    said = f"the prompt dataset has no column {wanted!r}; its columns are {', '.join(columns)}: "
    if len(dataset) == 1 and len(columns) == 1 and isinstance(dataset[0][columns[0]], list):
        return f"{said}it is one row that holds a list: write its items a row each"
    return f"{said}name the one with the prompts with --prompt_column"


def _beside(tokenized: datasets.Dataset, dataset: datasets.Dataset, prompt_column: str) -> datasets.Dataset:
    """The tokens, and beside them what the dataset has of each prompt: both stay where they are, on disk mostly."""
    others = dataset.select_columns([name for name in dataset.column_names if name not in _TOKENS])
    if not others.column_names:
        return tokenized
    if prompt_column != "prompt" and prompt_column in others.column_names:
        if "prompt" in others.column_names:
            others = others.remove_columns("prompt")
        others = others.rename_column(prompt_column, "prompt")
    return datasets.concatenate_datasets([tokenized, others], axis=1)


def other_columns(dataset: datasets.Dataset) -> list[str]:
    """Columns of a tokenized dataset beside the prompt, which reward functions are given."""
    return [name for name in dataset.column_names if name not in ("input_ids", "prompt")]


def longest_prompt(dataset: datasets.Dataset) -> int:
    """Tokens of the longest prompt of a tokenized dataset."""
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return max(pc.max(pc.list_value_length(batch["input_ids"].combine_chunks())).as_py() for batch in batches)


def prompt_ids(
    dataset: datasets.Dataset, indices: list[int], collator: Callable[[list[dict[str, Any]]], Any] | None = None
) -> list[list[int]]:
    """The tokens of prompts of a tokenized dataset.

    Args:
        dataset: rows with `input_ids`.
        indices: the rows.
        collator: called on a list of rows; its `input_ids` are the prompts, where its `attention_mask` is 1.
    """
    rows = dataset.select_columns("input_ids")[indices]
    if collator is None:
        return rows["input_ids"]
    batch = collator([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
    mask = batch.get("attention_mask")
    ids = batch["input_ids"]
    return [row[mask[i].bool()].tolist() if mask is not None else list(row) for i, row in enumerate(ids)]


class PromptOrder:
    """Which prompts each update takes: all of them in a random order, then all again in another, and so on.

    The order follows from the seed alone and has no position, so a resumed run takes the prompts that the run it goes
    on from would have taken, and every process of a run agrees on them.
    """

    def __init__(self, num_prompts: int, seed: int):
        """Make the order.

        Args:
            num_prompts: Size of the dataset, at least 1.
            seed: Seed of the order.
        """
        self._num_prompts = num_prompts
        self._seed = seed
        self._pass = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def batch(self, update: int, batch_size: int) -> list[int]:
        """Indices of the prompts of one update.

        A batch goes on into the next pass where one ends.

        Args:
            update: Counts from 0.
            batch_size: Samples an update.

        Returns:
            `batch_size` indices into the dataset.
        """
        indices: list[int] = []
        for position in range(update * batch_size, (update + 1) * batch_size):
            number, offset = divmod(position, self._num_prompts)
            if number != self._pass:
                self._pass = number
                self._permutation = np.random.default_rng((self._seed, number)).permutation(self._num_prompts)
            indices.append(int(self._permutation[offset]))
        return indices


def _read(name: str, config: str | None, flag: str) -> Mapping[str, datasets.Dataset]:
    """Splits of a file, a folder or a hub dataset, by name."""
    path = Path(name).expanduser()
    if path.is_file():
        if config is not None:
            raise FourscoreError(f"--dataset_config {config}: {name} is a single file, which has no configurations")
        return _read_files([path])
    if path.is_dir():
        return _read_folder(path, config)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in _READERS or name.count("/") > 1:
        raise FourscoreError(f"{flag} {name}: no such file or folder{_neighbours(path)}")
    return _read_hub(name, config, flag)


def _read_files(paths: list[Path]) -> Mapping[str, datasets.Dataset]:
    path = paths[0]
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise FourscoreError(f"{path}: not a file type that holds prompts; those are {', '.join(_READERS)}")
    if not path.exists():
        raise FourscoreError(f"{path}: no such file{_neighbours(path)}")
    if path.stat().st_size == 0:
        raise FourscoreError(f"{path} is empty")
    try:
        return _load(reader, data_files=[str(p) for p in paths])
    except Exception as error:
        raise FourscoreError(f"{path} cannot be read as {path.suffix}: {_cause(error)}") from error


def _load(*args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset` of files, which logs errors that it then raises."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        return datasets.load_dataset(*args, **kwargs)
    finally:
        datasets.logging.set_verbosity(verbosity)


def _read_folder(path: Path, config: str | None) -> Mapping[str, datasets.Dataset]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if not any(file.suffix in _READERS for file in path.rglob("*")):
        raise FourscoreError(f"{path} holds no {', '.join(_READERS)} file{_contents(path)}")
    try:
        return _load(str(path), name=config)
    except Exception as error:
        raise FourscoreError(f"{path} cannot be read as a dataset: {_cause(error)}") from error


def _read_hub(name: str, config: str | None, flag: str) -> Mapping[str, datasets.Dataset]:
    # load_dataset retries for half a minute before it says that there is no network: ask once first. In offline mode it
    # goes to its cache at once.
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
        except GatedRepoError as error:
            raise FourscoreError(f"{flag} {name}: this dataset is gated; ask for access and log in") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise FourscoreError(
                f"{flag} {name}: no file or folder of that name here, and no dataset on the Hugging Face Hub that you "
                "can see"
            ) from error
        except HfHubHTTPError as error:
            raise FourscoreError(f"{flag} {name}: the Hugging Face Hub answered with an error: {error}") from error
        except Exception as error:
            raise FourscoreError(
                f"{flag} {name}: no file or folder of that name here, and the Hugging Face Hub cannot be reached; give "
                "a local path, or set HF_HUB_OFFLINE=1 if the dataset is in the local cache"
            ) from error
    try:
        return datasets.load_dataset(name, name=config)
    except Exception as error:
        raise FourscoreError(f"{flag} {name}: {_cause(error)}") from error


def _take_split(splits: Mapping[str, datasets.Dataset], spec: str, flag: str) -> datasets.Dataset:
    """The split of that name, or a slice of it such as `train[:1000]`."""
    if spec in splits:
        return splits[spec]
    base = re.match(r"[^\[]*", spec)
    if base is not None and base[0] in splits:
        split = splits[base[0]]
        try:
            [part] = datasets.ReadInstruction.from_spec(spec).to_absolute({base[0]: len(split)})
            return split.select(range(part.from_ or 0, len(split) if part.to is None else part.to))
        except (ValueError, AssertionError) as error:
            raise FourscoreError(f"{flag} {spec}: not a slice of a split: {error}") from error
    raise FourscoreError(f"{flag} {spec}: no such split; the dataset has {', '.join(splits)}")


def _eval_split(script_args: "ScriptArguments") -> datasets.Dataset:
    """The only split of `eval_dataset_name`, or else its test split."""
    assert script_args.eval_dataset_name is not None
    splits = _read(script_args.eval_dataset_name, None, "--eval_dataset_name")
    if len(splits) > 1:
        return _take_split(splits, script_args.dataset_test_split, "--dataset_test_split")
    [(name, only)] = splits.items()
    places = {os.path.realpath(str(place)) for place in (script_args.eval_dataset_name, script_args.dataset_name)}
    if name == script_args.dataset_train_split.partition("[")[0] and len(places) == 1:
        _log_once(f"--eval_dataset_name {script_args.eval_dataset_name}: the policy trains on these; hold some out")
    return only


def _tokenize_row(
    row: dict[str, Any], index: int, tokenizer: "PreTrainedTokenizerBase", column: str
) -> dict[str, list[int]]:
    prompt = row[column]
    where = f"prompt {index} (column {column!r})"
    if prompt is None or prompt == "" or prompt == []:
        raise FourscoreError(f"{where} is empty")
    if isinstance(prompt, str):
        return {"input_ids": tokenizer(prompt)["input_ids"]}
    if isinstance(prompt, list) and all(isinstance(part, str) for part in prompt):
        raise FourscoreError(f"{where} is a list of {len(prompt)} texts: write each as a row")
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt):
        raise FourscoreError(
            f"{where} is neither a text nor a list of messages with 'role' and 'content': {str(prompt)[:80]}"
        )
    if not all(isinstance(message["content"], str) for message in prompt):
        raise FourscoreError(f"{where} has a message whose content is not text")
    if prompt[-1]["role"] == "assistant":
        raise FourscoreError(f"{where} ends with an assistant message: take the answer off, the policy writes its own")
    if tokenizer.chat_template is None:
        raise FourscoreError(
            f"{where} is a conversation, and the tokenizer has no chat template: use prompts of text, or a tokenizer "
            "with a chat template"
        )
    # Parquet gives every message every key that any message has; templates take a null for a value.
    messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return {"input_ids": encoded["input_ids"]}


def _without_padding(row: dict[str, list[int]]) -> dict[str, list[int]]:
    ids, mask = row["input_ids"], row["attention_mask"]
    return {"input_ids": [token for token, kept in zip(ids, mask, strict=True) if kept]}


def _keep_last(row: dict[str, list[int]], length: int) -> dict[str, list[int]]:
    return {"input_ids": row["input_ids"][-length:]}


def _check_ids(dataset: datasets.Dataset, vocab_size: int) -> np.ndarray:
    """Check every id, and return the lengths of the prompts: `(len(dataset),)`."""
    lengths: list[np.ndarray] = []
    start = 0
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        ids = batch["input_ids"].combine_chunks()
        if not (pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type)) or not pa.types.is_integer(
            ids.type.value_type
        ):
            raise FourscoreError(f"column 'input_ids' must hold lists of ints, not {ids.type}")
        length = pc.fill_null(pc.list_value_length(ids), 0).to_numpy(zero_copy_only=False)
        if (length == 0).any():
            raise FourscoreError(f"prompt {start + int(np.argmin(length))} is empty")
        flat = pc.list_flatten(ids)
        low, high = pc.min_max(flat).as_py().values()
        if flat.null_count or low < 0 or high >= vocab_size:
            raise FourscoreError(
                f"column 'input_ids' has ids from {low} to {high}, and the tokenizer knows 0 to {vocab_size - 1}: the "
                "prompts were tokenized with another tokenizer"
            )
        lengths.append(length)
        start += len(length)
    return np.concatenate(lengths)


def _log_once(message: str) -> None:
    """Warn, once for all processes of a run."""
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning(message)


def _cause(error: BaseException) -> str:
    """The first error of a chain, on one line: `datasets` wraps what went wrong in one that does not say it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _contents(folder: Path, limit: int = 8) -> str:
    """What is in a folder, as the end of an error message."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"; {folder} holds {', '.join(names[:limit])}{more}" if names else f"; {folder} is empty"


def _neighbours(path: Path) -> str:
    return _contents(path.parent) if path.parent.is_dir() else f"; there is no folder {path.parent} either"

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from tiny import CHAT_TEMPLATE, EOS, make_tokenizer

from fourscore import data
from fourscore.config import PPOConfig, ScriptArguments
from fourscore.data import PromptOrder, load_prompts, tokenize_prompts
from fourscore.errors import FourscoreError

TEXTS = ["the film was", "a warm and funny", "I did"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(texts: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": text} for text in texts]


def load(tokenizer: Any, name: Any, tmp_path: Path, eval_strategy: str = "no", **script: Any) -> Any:
    args = PPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        eval_strategy=eval_strategy,
        eval_steps=1,
        **{key: script.pop(key) for key in ("max_prompt_length", "max_prompt_length_action") if key in script},
    )
    return load_prompts(ScriptArguments(dataset_name=None if name is None else str(name), **script), args, tokenizer)


def decoded(tokenizer: Any, dataset: datasets.Dataset) -> list[str]:
    return [tokenizer.decode(ids) for ids in dataset["input_ids"]]


# --- tokenizing


def test_text_gets_the_ids_the_tokenizer_gives(tokenizer: Any) -> None:
    dataset = tokenize_prompts(datasets.Dataset.from_dict({"prompt": TEXTS, "other": [1, 2, 3]}), tokenizer)
    assert dataset.column_names == ["input_ids", "prompt", "other"]
    assert dataset["prompt"][:] == TEXTS and dataset["other"][:] == [1, 2, 3]
    assert dataset["input_ids"][:] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_another_prompt_column(tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_dict({"query": TEXTS})
    tokenized = tokenize_prompts(dataset, tokenizer, prompt_column="query")
    assert decoded(tokenizer, tokenized) == TEXTS
    assert tokenized["prompt"][:] == TEXTS


def test_conversations_end_where_the_answer_starts() -> None:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    conversation = [{"role": "system", "content": "be good"}, {"role": "user", "content": "the film"}]
    [text] = decoded(tokenizer, tokenize_prompts(datasets.Dataset.from_list(prompts([conversation])), tokenizer))
    assert text == "system: be good\nuser: the film\nassistant: "


def test_nulls_that_parquet_adds_to_messages_stay_out_of_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m | length }}{{ 'name' in m }} {% endfor %}")
    conversation = [{"role": "system", "content": "a"}, {"role": "user", "content": "b", "name": "c"}]
    path = tmp_path / "prompts.parquet"
    datasets.Dataset.from_list(prompts([conversation])).to_parquet(path)
    train, _ = load(tokenizer, path, tmp_path)
    assert decoded(tokenizer, train) == ["2False 3True "]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "ends with an assistant message"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "content is not text"),
        ([{"role": "user", "text": "a"}], "neither a text nor a list of messages"),
        ([], "is empty"),
    ],
)
def test_conversations_that_are_refused(conversation: Any, message: str) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT_TEMPLATE)
    with pytest.raises(FourscoreError, match=message):
        tokenize_prompts(datasets.Dataset.from_list(prompts([conversation])), tokenizer)


def test_conversation_without_chat_template(tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_list(prompts([[{"role": "user", "content": "a"}]]))
    with pytest.raises(FourscoreError, match="no chat template"):
        tokenize_prompts(dataset, tokenizer)


def test_input_ids_are_used_as_they_are(tokenizer: Any) -> None:
    rows = [[5, 6, 7], [8], [9, tokenizer.eos_token_id]]
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "prompt": TEXTS, "lengths": [3, 1, 2]})
    dataset.set_format("torch")
    result = tokenize_prompts(dataset, tokenizer)
    assert result.column_names == ["input_ids", "prompt", "lengths"]
    assert result["input_ids"][:] == rows
    again = tokenize_prompts(result, tokenizer)
    assert again["input_ids"][:] == rows


def test_padding_is_taken_out_by_the_mask_not_by_the_id(tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id
    dataset = datasets.Dataset.from_dict(
        {"input_ids": [[pad, pad, 5], [pad, 6, 7]], "attention_mask": [[0, 0, 1], [1, 1, 1]]}
    )
    assert tokenize_prompts(dataset, tokenizer)["input_ids"][:] == [[5], [pad, 6, 7]]


def test_a_selection_is_checked_and_kept(tokenizer: Any) -> None:
    # Rows that select() hides still lie in the table below.
    dataset = datasets.Dataset.from_dict({"input_ids": [[5], [10**6], [7, 8]]}).select([2, 0])
    assert tokenize_prompts(dataset, tokenizer)["input_ids"][:] == [[7, 8], [5]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": []}, "dataset is empty"),
        ({"text": ["a"], "score": [1]}, "no column 'prompt'; its columns are text, score"),
        ({"prompt": ["a", ""]}, "prompt 1 .* is empty"),
        ({"prompt": ["a", None]}, "prompt 1 .* is empty"),
        ({"prompt": [1, 2]}, "neither a text nor a list of messages"),
        ({"input_ids": [[5], []]}, "prompt 1 is empty"),
        ({"input_ids": [[5], [6, -1]]}, "ids from -1 to 6"),
        ({"input_ids": [[5], [6, 10**6]]}, "tokenized with another tokenizer"),
        ({"input_ids": ["a"]}, "must hold lists of ints, not string"),
        ({"input_ids": [[0.5]]}, "must hold lists of ints"),
    ],
)
def test_datasets_that_are_refused(tokenizer: Any, columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(FourscoreError, match=message):
        tokenize_prompts(datasets.Dataset.from_dict(columns), tokenizer)


def test_a_streamed_dataset_is_refused(tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_dict({"prompt": TEXTS}).to_iterable_dataset()
    with pytest.raises(FourscoreError, match="not streamed, not IterableDataset"):
        tokenize_prompts(dataset, tokenizer)


def test_long_prompts_are_dropped(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": [[5], [6, 7, 8], [9, 10]]})
    with caplog.at_level(logging.WARNING):
        result = tokenize_prompts(dataset, tokenizer, max_prompt_length=2)
    assert result["input_ids"][:] == [[5], [9, 10]]
    assert "1 of 3 prompts dropped: longer than 2 tokens" in caplog.text


def test_long_prompts_are_truncated_on_the_left(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": [[5], [6, 7, 8], [9, 10]]})
    with caplog.at_level(logging.WARNING):
        result = tokenize_prompts(dataset, tokenizer, max_prompt_length=2, action="truncate")
    assert result["input_ids"][:] == [[5], [7, 8], [9, 10]]
    assert "1 of 3 prompts cut" in caplog.text


def test_dropping_every_prompt_is_an_error(tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]})
    with pytest.raises(FourscoreError, match=r"all 2 prompts are longer .*the shortest has 2 tokens"):
        tokenize_prompts(dataset, tokenizer, max_prompt_length=1)


def test_several_processes_give_the_same(tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_dict({"prompt": TEXTS * 3})
    assert (
        tokenize_prompts(dataset, tokenizer, num_proc=2)["input_ids"][:]
        == tokenize_prompts(dataset, tokenizer)["input_ids"][:]
    )


# --- reading


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_a_file(tokenizer: Any, tmp_path: Path, suffix: str, no_network: None) -> None:
    path = tmp_path / f"some{suffix}"
    dataset = datasets.Dataset.from_dict({"prompt": TEXTS})
    {".parquet": dataset.to_parquet, ".csv": dataset.to_csv}.get(suffix, dataset.to_json)(path)
    train, held_out = load(tokenizer, path, tmp_path)
    assert decoded(tokenizer, train) == TEXTS
    assert held_out is None


def test_a_json_file_that_is_one_list(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(prompts(TEXTS), indent=1))
    assert decoded(tokenizer, load(tokenizer, path, tmp_path)[0]) == TEXTS


def test_a_folder_with_splits_in_its_file_names(tokenizer: Any, tmp_path: Path, no_network: None) -> None:
    folder = tmp_path / "folder"
    write_jsonl(folder / "train-00.jsonl", prompts(TEXTS[:1]))
    write_jsonl(folder / "train-01.jsonl", prompts(TEXTS[1:2]))
    write_jsonl(folder / "test.jsonl", prompts(TEXTS[2:]))
    (folder / "README.md").write_text("about the prompts")
    train, held_out = load(tokenizer, folder, tmp_path, eval_strategy="steps")
    assert decoded(tokenizer, train) == TEXTS[:2]
    assert decoded(tokenizer, held_out) == TEXTS[2:]
    # Without evaluation nobody asked for the test split.
    assert load(tokenizer, folder, tmp_path)[1] is None


def test_a_folder_of_other_files_is_all_train(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_jsonl(folder / "a.jsonl", prompts(TEXTS[:1]))
    write_jsonl(folder / "b.jsonl", prompts(TEXTS[1:]))
    assert decoded(tokenizer, load(tokenizer, folder, tmp_path)[0]) == TEXTS


@pytest.mark.parametrize("split_names", [True, False])
def test_a_folder_of_save_to_disk(tokenizer: Any, tmp_path: Path, split_names: bool, no_network: None) -> None:
    dataset = datasets.Dataset.from_dict({"prompt": TEXTS})
    saved = datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}) if split_names else dataset
    saved.save_to_disk(str(tmp_path / "saved"))
    assert decoded(tokenizer, load(tokenizer, tmp_path / "saved", tmp_path)[0]) == TEXTS


def test_the_embedded_prompts(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.demo, "PROMPTS_TRAIN", write_jsonl(tmp_path / "a.jsonl", prompts(TEXTS[:2])))
    monkeypatch.setattr(data.demo, "PROMPTS_HELDOUT", write_jsonl(tmp_path / "b.jsonl", prompts(TEXTS[2:])))
    train, held_out = load(tokenizer, None, tmp_path, eval_strategy="steps")
    assert decoded(tokenizer, train) == TEXTS[:2]
    assert decoded(tokenizer, held_out) == TEXTS[2:]


def test_evaluation_prompts_from_another_file(tokenizer: Any, tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "a.jsonl", prompts(TEXTS[:2]))
    eval_file = write_jsonl(tmp_path / "b.jsonl", prompts(TEXTS[2:]))
    _, held_out = load(tokenizer, train_file, tmp_path, eval_dataset_name=str(eval_file))
    assert decoded(tokenizer, held_out) == TEXTS[2:]


def test_a_slice_of_a_split(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", prompts(TEXTS))
    assert decoded(tokenizer, load(tokenizer, path, tmp_path, dataset_train_split="train[1:]")[0]) == TEXTS[1:]
    assert decoded(tokenizer, load(tokenizer, path, tmp_path, dataset_train_split="train[:34%]")[0]) == TEXTS[:1]


def test_missing_splits_are_named(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", prompts(TEXTS))
    with pytest.raises(FourscoreError, match="--dataset_train_split nope: no such split; the dataset has train"):
        load(tokenizer, path, tmp_path, dataset_train_split="nope")
    with pytest.raises(FourscoreError, match=r"no split test .*, only train; .* --eval_dataset_name, or --eval_s"):
        load(tokenizer, path, tmp_path, eval_strategy="steps")
    with pytest.raises(FourscoreError, match="not a slice"):
        load(tokenizer, path, tmp_path, dataset_train_split="train[a:b]")


def test_missing_files_say_what_is_there(tokenizer: Any, tmp_path: Path, no_network: None) -> None:
    write_jsonl(tmp_path / "there.jsonl", prompts(TEXTS))
    with pytest.raises(FourscoreError, match=r"no such file or folder; .* holds there\.jsonl"):
        load(tokenizer, tmp_path / "nope.jsonl", tmp_path)
    with pytest.raises(FourscoreError, match=r"there is no folder .*no_folder either"):
        load(tokenizer, tmp_path / "no_folder" / "nope.jsonl", tmp_path)
    with pytest.raises(FourscoreError, match="no such file or folder"):
        load(tokenizer, "nope.jsonl", tmp_path)


def test_files_that_cannot_be_read(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(FourscoreError, match="is empty"):
        load(tokenizer, tmp_path / "empty.jsonl", tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(FourscoreError, match=r"broken\.jsonl cannot be read as \.jsonl: .*JSON"):
        load(tokenizer, tmp_path / "broken.jsonl", tmp_path)
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(FourscoreError, match=r"not a file type that holds prompts; those are \.jsonl"):
        load(tokenizer, tmp_path / "prompts.txt", tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("a")
    with pytest.raises(FourscoreError, match=r"holds no .*; .* holds notes\.md"):
        load(tokenizer, tmp_path / "folder", tmp_path)
    good = write_jsonl(tmp_path / "good.jsonl", prompts(TEXTS))
    with pytest.raises(FourscoreError, match=r"--dataset_config main: .* single file"):
        load(tokenizer, good, tmp_path, dataset_config="main")


def hub_answer(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def dataset_info(self: Any, name: str, timeout: float) -> Any:
        if error is not None:
            raise error
        return SimpleNamespace(id=name)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


def test_a_hub_that_cannot_be_reached(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answer(monkeypatch, ConnectionError("no route"))
    with pytest.raises(FourscoreError, match=r"--dataset_name org/prompts: .* cannot be reached"):
        load(tokenizer, "org/prompts", tmp_path)


def test_offline_mode_fails_at_once_when_the_cache_has_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FourscoreError, match="--dataset_name org/prompts: "):
        load(tokenizer, "org/prompts", tmp_path)


def test_a_hub_dataset(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answer(monkeypatch, None)
    asked = []

    def load_dataset(path: str, **kwargs: Any) -> datasets.DatasetDict:
        asked.append((path, kwargs))
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": TEXTS})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, _ = load(tokenizer, "org/prompts", tmp_path, dataset_config="main")
    assert decoded(tokenizer, train) == TEXTS
    assert asked == [("org/prompts", {"name": "main"})]


# --- order


def test_prompt_order_takes_every_prompt_once_a_pass() -> None:
    order = PromptOrder(10, seed=3)
    stream = [index for update in range(5) for index in order.batch(update, 4)]
    assert sorted(stream[:10]) == list(range(10)) == sorted(stream[10:])
    assert stream[:10] != stream[10:]


def test_prompt_order_has_no_position() -> None:
    order = PromptOrder(7, seed=1)
    batches = [order.batch(update, 3) for update in range(6)]
    assert PromptOrder(7, seed=1).batch(4, 3) == batches[4]
    assert order.batch(0, 3) == batches[0]
    assert [PromptOrder(7, seed=2).batch(update, 3) for update in range(6)] != batches


def test_prompt_order_with_fewer_prompts_than_a_batch() -> None:
    batch = PromptOrder(2, seed=0).batch(0, 5)
    assert len(batch) == 5
    assert sorted(batch[:2]) == sorted(batch[2:4]) == [0, 1]


def test_a_prompt_may_end_with_eos(tokenizer: Any) -> None:
    dataset = tokenize_prompts(datasets.Dataset.from_dict({"prompt": ["the film" + EOS]}), tokenizer)
    assert dataset["input_ids"][0][-1] == tokenizer.eos_token_id

import dataclasses
import io
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import HfArgumentParser, TrainerControl, TrainerState
from transformers.utils import logging as transformers_logging

from fourscore.config import DERIVED_FIELDS, ModelConfig, PPOConfig, ScriptArguments
from fourscore.errors import FourscoreError
from fourscore.runs import directory
from fourscore.runs.card import model_card
from fourscore.runs.metrics import JsonLines, read_json_lines, write_json_atomic
from fourscore.runs.progress import PPOProgress

# --- JSON lines


def test_lines_are_readable_while_the_file_is_open(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / "metrics.jsonl")
    lines.append({"step": 1, "x": 0.5})
    lines.append({"step": 2, "text": "a\nb\u2028c é"})
    assert read_json_lines(lines.path) == [{"step": 1, "x": 0.5}, {"step": 2, "text": "a\nb\u2028c é"}]


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1, "a": math.nan, "b": [math.inf], "c": torch.tensor(2.0), "d": torch.tensor(-math.inf)})
    lines.append({"step": 2, "half a character": "\ud83d"})
    text = lines.path.read_text()
    assert text.splitlines()[0] == '{"step": 1, "a": null, "b": [null], "c": 2.0, "d": null}'
    assert read_json_lines(lines.path)[1]["half a character"] == "\ud83d"


def test_a_torn_last_line_is_not_read_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "sco')
    assert read_json_lines(path) == [{"step": 1}]
    JsonLines(path).append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_truncate_after_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 2, 3)) + '{"step": 4')
    lines = JsonLines(path)
    lines.truncate_after(2)
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 2]
    lines.append({"step": 3})
    lines.truncate_after(2)
    lines.append({"step": 9})
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 2, 9]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_keeps_the_old_file_when_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        JsonLines(path).truncate_after(1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_writer_that_never_writes_touches_nothing(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    lines.truncate_after(0)
    lines.close()
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(FourscoreError, match="no such file"):
        read_json_lines(path)
    path.write_text('{"step": 1}\nnope\n')
    with pytest.raises(FourscoreError, match="line 2: not JSON"):
        read_json_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(FourscoreError, match="line 1: not a JSON object"):
        read_json_lines(path)


def test_write_json_atomic(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"old": True})
    write_json_atomic(path, {"score": math.nan, "folder": tmp_path, "list": (1, 2)})
    assert json.loads(path.read_text()) == {"score": None, "folder": str(tmp_path), "list": [1, 2]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


# --- directory


def make_run(path: Path, *checkpoints: int) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("seed: 1\n")
    for update in checkpoints:
        (path / f"checkpoint-{update}").mkdir()
    return path


@pytest.mark.parametrize("resume", [None, False])
def test_a_new_run_takes_a_new_or_an_empty_directory(tmp_path: Path, resume: bool | None) -> None:
    directory.check(tmp_path / "new", resume)
    directory.check(tmp_path, resume)
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_refuses_a_directory_in_use(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    with pytest.raises(FourscoreError, match=r"run is not empty \(checkpoint-1, config\.yaml\): .* true .* another"):
        directory.check(run, None)
    assert sorted(entry.name for entry in run.iterdir()) == ["checkpoint-1", "config.yaml"]
    with pytest.raises(FourscoreError, match=r"has not finished an update yet .* to start it over, or another"):
        directory.check(make_run(tmp_path / "begun"), None)


def test_resuming_takes_a_run(tmp_path: Path) -> None:
    directory.check(make_run(tmp_path / "one", 1), True)
    directory.check(make_run(tmp_path / "killed before its first checkpoint"), True)
    directory.check(tmp_path / "one", str(tmp_path / "one" / "checkpoint-1"))
    directory.check(tmp_path / "new", str(tmp_path / "one" / "checkpoint-1"))


def test_resuming_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match="holds no run to resume"):
        directory.check(tmp_path / "new", True)
    run = make_run(tmp_path / "run", 3, 12)
    with pytest.raises(FourscoreError, match=r"no such checkpoint; .*checkpoint-3, .*checkpoint-12"):
        directory.check(run, str(run / "checkpoint-4"))
    with pytest.raises(FourscoreError, match=r"is a run; name a checkpoint in it, such as .*checkpoint-12, or true"):
        directory.check(run, str(run))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    for resume in (True, str(run / "checkpoint-3")):
        with pytest.raises(FourscoreError, match="holds no run"):
            directory.check(tmp_path / "thesis", resume)


def test_a_file_is_no_output_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FourscoreError, match="is a file"):
        directory.check(tmp_path / "file", None)


def test_last_checkpoint_counts_in_numbers_and_skips_drafts(tmp_path: Path) -> None:
    assert directory.last_checkpoint(tmp_path / "nowhere") is None
    run = make_run(tmp_path / "run", 9, 10, 2)
    for name in (".checkpoint-11.part", "checkpoint-12.part", "checkpoint-best"):
        (run / name).mkdir()
    (run / "checkpoint-13").touch()
    assert directory.last_checkpoint(run) == run / "checkpoint-10"


def settings_of(args: PPOConfig) -> dict[str, Any]:
    # Not to_dict(): it masks every field whose name ends in _token, stop_token among them.
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}


def test_config_reads_back_equal(tmp_path: Path) -> None:
    script = ScriptArguments(dataset_name="prompts.jsonl", prompt_column="query")
    args = PPOConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        hub_token="hf_secret",
        resume_from_checkpoint="true",
        stop_token=None,
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 1},
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=1e-5,
        per_device_train_batch_size=4,
        max_steps=3,
        num_mini_batches=2,
    )
    args.resolve_batches(num_prompts=10, world_size=1)
    model = ModelConfig(use_peft=True, lora_target_modules=["q_proj", "v_proj"])
    path = tmp_path / "config.yaml"
    directory.write_config(path, script, args, model)

    assert "secret" not in path.read_text()
    written = yaml.safe_load(path.read_text())
    assert not set(DERIVED_FIELDS) & set(written)
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    script_again, args_again, model_again = parser.parse_yaml_file(str(path))
    assert script_again == script
    assert model_again == model
    args_again.resolve_batches(num_prompts=10, world_size=1)
    before, after = settings_of(args), settings_of(args_again)
    assert (before.pop("hub_token"), after.pop("hub_token")) == ("hf_secret", None)
    assert (before.pop("resume_from_checkpoint"), after.pop("resume_from_checkpoint")) == ("true", None)
    assert after == before


def test_the_default_config_reads_back_equal(tmp_path: Path) -> None:
    args = PPOConfig(use_cpu=True)
    directory.write_config(tmp_path / "config.yaml", args)
    again = PPOConfig(**yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert settings_of(again) == settings_of(args)


def test_settings_that_a_run_goes_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "link").symlink_to("sft")
    at = make_run(tmp_path / "run", 4) / "checkpoint-4"

    def settings(dataset: str = "a.jsonl", r: int = 16, **changes: Any) -> tuple[Any, ...]:
        options = {"sft_model_path": "sft", "reward_model_path": "a/b", "max_steps": 4, "use_cpu": True} | changes
        lora = ModelConfig(use_peft=True, lora_r=r)
        return ScriptArguments(dataset_name=dataset), PPOConfig(output_dir="run", **options), lora

    directory.write_config(at.parent / "config.yaml", *settings())
    assert directory.check_settings(at, *settings()) is None
    # Longer, saved more often, by another process, the same files by another name.
    assert directory.check_settings(at, *settings(max_steps=8, save_steps=2, reward_timeout=5.0)) is None
    for same in ("link", str(tmp_path / "sft"), "./sft/"):
        assert directory.check_settings(at, *settings(sft_model_path=same)) is None

    changed = directory.check_settings(at, *settings("b.jsonl", r=8, kl_coef=0.2, seed=1, missing_eos_penalty=1.0))
    assert changed == (
        f"the run in {at.parent} goes on with other settings than before: --dataset_name b.jsonl (was a.jsonl), "
        "--seed 1 (was 42), --missing_eos_penalty 1.0 (was None), --kl_coef 0.2 (was 0.05), --lora_r 8 (was 16)"
    )
    changed = directory.check_settings(at, *settings(value_model_path="a/b"))
    assert changed is not None and changed.endswith("before: --value_model_path a/b (was None)")  # read at first alone
    with pytest.raises(FourscoreError) as error:
        directory.check_settings(at, *settings(sft_model_path="other", reward_model_path="a/c"))
    first, second = error.value.lines
    assert first.startswith(f"--sft_model_path other: the run in {at.parent} began with sft, and would go on with")
    assert second.startswith("--reward_model_path a/c: ") and second.endswith(f"into {at.parent / 'config.yaml'}")

    directory.write_config(at.parent / "config.yaml", settings()[1])  # as a script's, which gives no ModelConfig
    script, args, lora = settings(r=8)
    assert directory.check_settings(at, dataclasses.replace(script, dataset_name=None), args, lora) is None
    (at.parent / "config.yaml").unlink()
    assert directory.check_settings(at, *settings(sft_model_path="other")) is None


# --- progress

LOGS = {
    "objective/scores": 1.234,
    "objective/kl": 4.56,
    "tokens/prompt": 300,
    "tokens/completion": 512,
    "time/total_s": 2.0,
}


def run_loop(
    callback: PPOProgress, updates: int = 3, start: int = 0, disable_tqdm: bool = False, is_main: bool = True
) -> TrainerState:
    args, control = PPOConfig(use_cpu=True, disable_tqdm=disable_tqdm), TrainerControl()
    state = TrainerState(max_steps=updates, global_step=start, is_world_process_zero=is_main)
    callback.on_train_begin(args, state, control)
    while state.global_step < updates:
        state.global_step += 1
        callback.on_step_end(args, state, control)
        callback.on_log(args, state, control, logs=LOGS)
        if state.global_step == 2:
            print("another callback prints")
            logging.getLogger("test_runs").warning("a log record")
            callback.on_log(args, state, control, logs={"eval/scores": -0.05, "eval/kl": 120.4})
    callback.on_train_end(args, state, control)
    return state


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run_loop(PPOProgress())
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "update 1/3 score 1.23 kl 4.56 406 tok/s 0:00:00 left",
        "update 2/3 score 1.23 kl 4.56 406 tok/s 0:00:00 left",
        "evaluation after update 2: score -0.0500 kl 120",
        "update 3/3 score 1.23 kl 4.56 406 tok/s 0:00:00 left",
    ]
    assert captured.out == "another callback prints\n"


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})


def test_a_live_line_on_a_terminal() -> None:
    console = terminal()
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("test_runs").addHandler(handler)
    before = (handler.stream, sys.stdout, sys.stderr)
    run_loop(PPOProgress(console))
    assert (handler.stream, sys.stdout, sys.stderr) == before
    logging.getLogger("test_runs").removeHandler(handler)

    assert isinstance(console.file, io.StringIO)
    output = console.file.getvalue()
    lines = output.split("\n")
    assert "a log record" in output
    assert "evaluation after update 2: score -0.0500 kl 120" in output
    assert "update 3/3 ━" in output
    assert "score 1.23 kl 4.56 406 tok/s in 0:00:00" in output
    # What others wrote stands on lines of its own.
    assert not any("a log record" in line and "update" in line.split("\x1b[2K")[-1] for line in lines)
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor is hidden and comes back


def test_stop_gives_the_terminal_back_after_an_exception() -> None:
    console = terminal()
    callback = PPOProgress(console)
    before = sys.stderr
    callback.on_train_begin(PPOConfig(use_cpu=True, disable_tqdm=False), TrainerState(max_steps=2), TrainerControl())
    callback.stop()
    callback.stop()
    assert sys.stderr is before
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[?25h" in console.file.getvalue()


def test_transformers_bars_are_off_meanwhile_and_on_again() -> None:
    transformers_logging.enable_progress_bar()  # whatever an earlier test has left
    callback = PPOProgress(terminal())
    callback.on_train_begin(PPOConfig(use_cpu=True), TrainerState(max_steps=2), TrainerControl())
    assert not transformers_logging.is_progress_bar_enabled()
    callback.stop()
    assert transformers_logging.is_progress_bar_enabled()


def test_disable_tqdm_gives_plain_lines() -> None:
    console = terminal()
    run_loop(PPOProgress(console), disable_tqdm=True)
    assert isinstance(console.file, io.StringIO)
    assert "\x1b" not in console.file.getvalue()
    assert console.file.getvalue().startswith("update 1/3 score 1.23")


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal()
    run_loop(PPOProgress(console), is_main=False)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
    assert capsys.readouterr().out == "another callback prints\n"


def test_time_left_counts_from_where_the_run_was_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 5))
    monkeypatch.setattr("fourscore.runs.progress.time.monotonic", lambda: float(next(now)))
    run_loop(PPOProgress(), start=7, updates=10)
    # One reading at the start, one a line: the first of 3 updates took 5 s, two are left.
    assert capsys.readouterr().err.splitlines()[0].endswith("update 8/10 score 1.23 kl 4.56 406 tok/s 0:00:10 left")


# --- card


def card(tmp_path: Path, info: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], str]:
    args = PPOConfig(output_dir=str(tmp_path / "my-run"), use_cpu=True, **settings)
    args.resolve_batches(num_prompts=10, world_size=1)
    text = model_card(args, info, {"objective/scores": 1.23456, "val/num_eos_tokens": 3, "note": "x", "eps": math.nan})
    assert text.startswith("---\n")
    _, front_matter, body = text.split("---\n", 2)
    return yaml.safe_load(front_matter), body


def test_card_of_hub_models(tmp_path: Path) -> None:
    settings = {"sft_model_path": "org/sft", "reward_model_path": "org/reward", "hub_model_id": "me/tuned"}
    head, body = card(tmp_path, {"dataset": "org/prompts"}, **settings)
    assert head["library_name"] == "transformers"
    assert head["base_model"] == "org/sft"
    assert head["datasets"] == ["org/prompts"]
    assert {"ppo", "rlhf", "fourscore"} <= set(head["tags"])
    assert "`org/sft` trained with PPO against the reward model `org/reward` on the prompts of `org/prompts`" in body
    assert "| kl_coef | 0.05 |" in body
    assert "| lr_scheduler_type | linear |" in body
    assert "| objective/scores | 1.235 |" in body
    assert "| val/num_eos_tokens | 3 |" in body
    assert "note" not in body
    assert "name = 'me/tuned'" in body


def test_card_of_a_run_with_other_rewards_and_settings(tmp_path: Path) -> None:
    settings = {"sft_model_path": "org/sft", "reward_funcs": ["/home/me/judges.py:length"], "reward_weights": [2.0]}
    settings |= {"preset": "vapo", "top_p": 0.9, "cliprange": 0.1, "num_generations": 2, "value_warmup_updates": 0}
    _, body = card(tmp_path, {"rewards": ["length"]}, **settings)
    assert "`org/sft` trained with PPO against `length`, by fourscore" in body
    for row in (
        "preset | vapo",
        "top_p | 0.9",
        "num_generations | 2",
        "cliprange_high | 0.28",
        "reward_weights | [2.0]",
    ):
        assert f"| {row} |" in body
    assert "/home/me" not in body
    assert "dual_clip" not in body and "reward_timeout" not in body and "| top_k" not in body


def test_card_of_local_models_tells_no_paths(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    info = {"base_model": str(tmp_path / "sft"), "dataset": str(tmp_path / "prompts.jsonl")}
    head, body = card(tmp_path, info)
    assert "base_model" not in head
    assert "datasets" not in head
    assert str(tmp_path / "sft") not in body
    assert (
        "`sft` trained with PPO against the reward model that ships with fourscore on the prompts of `prompts.jsonl`"
        in body
    )


@pytest.mark.parametrize(("adapter", "package"), [(False, "transformers"), (True, "peft")])
def test_card_example_is_python_with_the_right_class(tmp_path: Path, adapter: bool, package: str) -> None:
    head, body = card(tmp_path, {"adapter": adapter, "peft": {"lora_r": 16} if adapter else None})
    assert head["library_name"] == package
    example = body.split("```python\n")[1].split("```")[0]
    compile(example, "example", "exec")
    name = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    assert f"model = {name}.from_pretrained(name)" in example
    assert ("| lora_r | 16 |" in body) == adapter

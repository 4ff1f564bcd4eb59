"""fourscore eval: its statistics by hand, judges, and runs of three kinds held against what the trainer measured."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from tiny import CHAT_TEMPLATE, make_adapter, make_checkpoint, make_encoder, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fourscore import cli
from fourscore.config import ModelConfig, PPOConfig, ScriptArguments
from fourscore.data import load_held_out
from fourscore.demo.evaluate import vader
from fourscore.errors import FourscoreError
from fourscore.evaluation.compare import Row
from fourscore.evaluation.judge import PairJudge, load_judge
from fourscore.evaluation.report import _cells
from fourscore.evaluation.stats import (
    Estimate,
    Interval,
    bootstrap,
    distinct_n,
    estimate,
    outcomes,
    paired_difference,
    t_quantile,
    wilson,
    win_rate,
)
from fourscore.models import loading
from fourscore.models.checkpoint import inspect_checkpoint
from fourscore.models.loading import Frozen, load_frozen
from fourscore.runs.metrics import read_json_lines

NAN = math.nan


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_numbers(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert found.value == successes / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - successes, n)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_wilson_of_nothing() -> None:
    assert math.isnan(wilson(0, 0).value)


def test_t_quantiles_against_the_table() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 120: 1.9799}
    for degrees, value in table.items():
        assert t_quantile(0.975, degrees) == pytest.approx(value, rel=1.3e-3)
    assert t_quantile(0.975, 10**6) == pytest.approx(1.95996, abs=1e-4)


def test_estimate_counts_prompts() -> None:
    # Means of the prompts are 2 and 5, the third has none: 3.5, and a standard error of 2.1213 / sqrt(2).
    found = estimate(np.array([[1.0, 3.0], [5.0, NAN], [NAN, NAN]]))
    assert (found.mean, found.standard_error, found.prompts) == pytest.approx((3.5, 1.5, 2))
    one = estimate(np.array([[2.0, 4.0]]))
    assert one.mean == 3.0 and math.isnan(one.standard_error)
    assert math.isnan(estimate(np.array([[NAN]])).mean)


def test_paired_difference_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of two degrees of freedom 4.3027.
    found = paired_difference(np.array([[10.0], [20.0], [30.0]]), np.array([[11.0], [22.0], [33.0]]))
    assert (found.value, found.low, found.high) == pytest.approx(
        (2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4
    )
    # Pairing matters: of each side alone the error is 20 / sqrt(3), ten times as wide.
    assert estimate(np.array([[10.0], [20.0], [30.0]])).standard_error == pytest.approx(10 / 3**0.5)
    lonely = paired_difference(np.array([[1.0]]), np.array([[2.0]]))
    assert lonely.value == 1.0 and math.isnan(lonely.low)


def test_wins_and_ties() -> None:
    won = outcomes(np.array([[1.0], [1.0], [1.0], [NAN]]), np.array([[2.0], [1.0], [0.0], [5.0]]))
    assert won[:3, 0].tolist() == [1.0, 0.5, 0.0] and math.isnan(won[3, 0])
    found = win_rate(won, seed=0)
    assert found.method == "Wilson"
    assert (found.value, found.low, found.high) == pytest.approx((0.5, wilson(1.5, 3).low, wilson(1.5, 3).high))


def test_several_pairs_of_a_prompt_are_bootstrapped_by_prompt() -> None:
    # Two prompts with means 0 and 1: their resamples have means 0, 0.5 and 1 in 1, 2 and 1 of 4 cases.
    found = win_rate(np.array([[0.0, 0.0], [1.0, 1.0]]), seed=3)
    assert found.method == "bootstrap by prompt"
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_bootstrap_is_seeded_and_right() -> None:
    values = np.tile([0.0, 1.0], 100)
    found = bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) == found != bootstrap(values, seed=6)
    reach = 1.96 * 0.5 / 200**0.5
    assert (found.low, found.high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=0.01)
    assert bootstrap(np.full(4, 0.25), seed=0).high == 0.25


def test_distinct_n() -> None:
    # "a b a b" has pairs ab ba ab, "a c" has ac: 3 different ones of 4.
    assert distinct_n(["a b A b", "a c"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["one"], 2) == 0.0


# ------------------------------------------------------------------------------------------------------------ judges

JUDGES = """
seen = []

def longer(prompts, completions_a, completions_b):
    seen.append((prompts, completions_a, completions_b))
    return [0.5 if len(a) == len(b) else float(len(b) > len(a)) for a, b in zip(completions_a, completions_b)]

def second(completions_a, completions_b):
    return [True] * len(completions_a)

def shy(prompts, completions_a, completions_b, **kwargs):
    return [None] * len(prompts)

def length(prompts, completions, **kwargs):
    return [len(text) for text in completions]

def by_token(completion_ids, completions):
    return [[0.5] * len(ids) for ids in completion_ids]

def infinite(completions):
    return [float("inf")] * len(completions)

def rude(completions_a, completions_b):
    return ["b" for _ in completions_a]

def short(completions_a, completions_b):
    return [1]

def broken(completions_a, completions_b):
    return 1 / 0

def curious(completions_a, completions_b, price):
    return completions_a

def other(texts):
    return texts
"""


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judges") / "eval_judges.py"
    path.write_text(JUDGES)
    return path


def test_a_judge_that_compares(judges: Path) -> None:
    judge = load_judge(f"{judges}:longer")
    assert isinstance(judge, PairJudge)
    reference = ["a", "bbb", "same", *["x"] * 40]
    policy = ["aa", "b", "same", *["yy"] * 40]
    found = judge.outcomes([str(i) for i in range(43)], reference, policy, seed=1)
    assert found == [1.0, 0.0, 0.5, *[1.0] * 40]
    [(prompts, first, second)] = judge._function.__globals__["seen"]
    assert "2" not in prompts and len(prompts) == 42  # equal completions are not shown
    assert 10 < sum(text == "yy" for text in second) < 30  # which side is b was drawn
    assert sorted(first[2] + second[2]) == ["x", "y", "y"]


def test_a_judge_with_a_liking_for_a_place_favours_neither(judges: Path) -> None:
    judge = load_judge(f"{judges}:second")
    found = judge.outcomes([""] * 200, ["r"] * 200, ["p"] * 200, seed=0)
    assert set(found) == {0.0, 1.0}
    assert 70 < sum(found) < 130
    assert judge.outcomes([""] * 200, ["r"] * 200, ["p"] * 200, seed=0) == found


def test_judges_that_will_not_do(judges: Path) -> None:
    assert load_judge(f"{judges}:shy").outcomes(["a"], ["b"], ["c"], seed=0) == [None]
    for name, message in (
        ("rude", "gave 'b'; a verdict is from 0 (for a) to 1 (for b), or None"),
        ("short", "gave 1 verdicts on 2 pairs"),
        ("broken", "ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(FourscoreError) as raised:
            load_judge(f"{judges}:{name}").outcomes(["", ""], ["a", "b"], ["c", "d"], seed=0)
        assert message in str(raised.value)
    for place, message in (
        ("curious", "asks for 'price', and is given prompts, completions_a and completions_b"),
        ("other", "takes neither completions, to score them, nor completions_a and completions_b, to compare them"),
        ("lenght", "has no 'lenght'"),
    ):
        with pytest.raises(FourscoreError) as raised:
            load_judge(f"{judges}:{place}")
        assert f"--judge {judges}:{place}" in str(raised.value) and message in str(raised.value)


# ------------------------------------------------------------------------------------------------------- whole runs

FLAGS = """
    --max_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --response_length 8
    --learning_rate 0.01 --save_steps 2 --seed 3 --eval_strategy steps --eval_steps 2 --num_sample_generations 0
    --report_to none --use_cpu --disable_tqdm true --ema_decay 0.5
"""
KINDS = ("full", "lora", "lora on an adapter", "full from an adapter")
PROMPTS = ["the movie", "a film is", "this", "good acting and", "it was a plot", "the story", "a warm", "I did not"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return path


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def sft_adapter(sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(sft, tmp_path_factory.mktemp("sft_adapter"), target_modules=["q_proj", "v_proj"], r=4)


@pytest.fixture(scope="module")
def runs(sft, sft_adapter, prompts, llama_reward, tmp_path_factory) -> dict[str, Path]:
    """A finished run of two updates of each kind, evaluated by the trainer after the second."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for kind in KINDS:
        found[kind] = folder / kind.replace(" ", "-")
        argv = ["ppo", "--output_dir", found[kind], "--sft_model_path", sft_adapter if "adapter" in kind else sft]
        argv += ["--reward_model_path", llama_reward, "--dataset_name", prompts, "--eval_dataset_name", prompts]
        argv += FLAGS.split()
        argv += [] if "full" in kind else ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
        assert cli.main([str(word) for word in argv]) == 0
    return found


def evaluate(tmp_path: Path, *argv: object) -> dict:
    assert cli.main(["eval", *(str(word) for word in argv), "--json", str(tmp_path / "eval.json")]) == 0
    return json.loads((tmp_path / "eval.json").read_text())


def load(folder: Path) -> Any:
    """A policy as its users load it."""
    adapted = (folder / "adapter_config.json").exists()
    return (AutoPeftModelForCausalLM if adapted else AutoModelForCausalLM).from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_measured_as_its_trainer_did(runs, kind: str, tmp_path: Path, capsys) -> None:
    found = evaluate(tmp_path, runs[kind])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "8 prompts, 1 completion each, at temperature 0.7, seed 3" in printed
    trained = read_json_lines(runs[kind] / "metrics.jsonl")[-1]
    for ours, theirs in (
        (found["rewards"]["reward_model"]["policy"]["mean"], "scores"),
        (found["kl"]["mean"], "kl"),
        (found["length"]["policy"]["mean"], "completion_length"),
        (found["ended"]["policy"]["mean"], "ended"),
    ):
        assert ours == pytest.approx(trained[f"eval/{theirs}"], rel=1e-4, abs=1e-4)
    assert found["kl"]["mean"] > 0.01
    # And a checkpoint of the last update is the policy that was saved, for transformers, too.
    ids = torch.tensor([[1, 40, 41]])
    places = ("", "checkpoint-2", "policy_ema", "checkpoint-2/policy_ema")
    logits = [load(runs[kind] / place)(ids).logits for place in places]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], logits[3])
    assert not torch.allclose(logits[0], logits[2])
    assert not list(runs[kind].glob("checkpoint-2/**/README.md")), "PEFT's own, not filled in"
    assert ("| lora_r | 16 |" in (runs[kind] / "README.md").read_text()) == ("lora" in kind)
    assert (runs[kind] / "checkpoint-2" / "trained_adapter").is_dir() == (kind == "lora on an adapter")
    before = evaluate(tmp_path, runs[kind], "--checkpoint", "checkpoint-2")
    assert before["settings"].pop("policy") == str(runs[kind] / "checkpoint-2")
    found["settings"].pop("policy")
    assert before["rewards"]["reward_model"]["difference"]["value"] == pytest.approx(
        found["rewards"]["reward_model"]["difference"]["value"], rel=1e-4
    )
    assert before["kl"]["mean"] == pytest.approx(found["kl"]["mean"], rel=1e-3)


def test_sampling_is_that_of_the_run(runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["full"], run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"top_p": 1e-6, "min_response_length": 3, "stop_strings": ["e", "o"], "response_length": 24}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    cut = evaluate(tmp_path, run)
    rows = read_json_lines(tmp_path / "eval.samples.jsonl")
    greedy = evaluate(tmp_path, run, "--temperature", 0)
    # With one token to draw from, sampling is greedy; in a support of one token every model gives it all probability.
    assert cut["rewards"] == greedy["rewards"] and cut["length"] == greedy["length"]
    assert cut["kl"]["mean"] == 0.0 < abs(greedy["kl"]["mean"])
    for side in (row[name] for row in rows for name in ("reference", "policy")):
        assert 3 <= side["completion_length"] <= 24
        assert side["ended"] == (side["completion_length"] < 24) or side["completion"].endswith(("e", "o"))


def test_the_moving_average_is_nearer_to_the_reference(runs, tmp_path: Path) -> None:
    found = evaluate(tmp_path, runs["lora on an adapter"], "--checkpoint", "policy_ema", "--num_generations", 4)
    last = evaluate(tmp_path, runs["lora on an adapter"], "--num_generations", 4)
    assert 0.01 < found["kl"]["mean"] < last["kl"]["mean"]


def test_the_numbers_are_those_of_the_samples(runs, judges: Path, tmp_path: Path) -> None:
    found = evaluate(tmp_path, runs["full"], "--num_generations", 2, "--max_prompts", 5, "--judge", f"{judges}:length")
    pairs = read_json_lines(tmp_path / "eval.samples.jsonl")
    assert [(row["prompt"], row["sample"]) for row in pairs] == [(p, i) for p in PROMPTS[:5] for i in (0, 1)]
    assert found["prompts"] == 5
    for name in ("reference", "policy"):
        scores = [row[name]["scores"]["reward_model"] for row in pairs]
        assert found["rewards"]["reward_model"][name]["mean"] == pytest.approx(sum(scores) / 10)
        assert [row[name]["scores"]["judge"] for row in pairs] == [len(row[name]["completion"]) for row in pairs]
    reward = found["rewards"]["reward_model"]
    above = [row["policy"]["score"] > row["reference"]["score"] for row in pairs]
    assert (reward["wins"], reward["ties"], reward["losses"]) == (sum(above), 0, 10 - sum(above))
    assert reward["win_rate"]["value"] == pytest.approx(sum(above) / 10)
    assert reward["win_rate"]["method"] == "bootstrap by prompt"
    assert reward == found["score"]
    assert found["kl"]["mean"] == pytest.approx(sum(row["policy"]["kl"] for row in pairs) / 10)
    assert found["judge"]["policy"]["mean"] == pytest.approx(sum(len(r["policy"]["completion"]) for r in pairs) / 10)
    assert found["distinct_2"]["policy"] == pytest.approx(distinct_n([r["policy"]["completion"] for r in pairs], 2))
    assert found["settings"]["num_generations"] == 2 and found["settings"]["temperature"] == 0.7
    assert pairs[0]["policy"]["completion_length"] <= 8

    again = evaluate(tmp_path, runs["full"], "--num_generations", 2, "--max_prompts", 5, "--judge", f"{judges}:length")
    assert again == found
    other = evaluate(tmp_path, runs["full"], "--num_generations", 2, "--max_prompts", 5, "--seed", 4)
    assert other["kl"] != found["kl"] and other["judge"] is None


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_policy_against_itself(sft, llama_reward, prompts, judges, temperature: float, tmp_path: Path) -> None:
    models = ["--policy_path", sft, "--sft_model_path", sft, "--reward_model_path", llama_reward]
    settings = ["--eval_dataset_name", prompts, "--response_length", 8, "--temperature", temperature, "--use_cpu"]
    found = evaluate(tmp_path, *models, *settings, "--judge", f"{judges}:second")
    reward = found["rewards"]["reward_model"]
    for row in (reward, found["judge"]):
        assert (row["wins"], row["ties"], row["losses"]) == (0, 8, 0)
        assert row["win_rate"]["value"] == 0.5
        assert row["win_rate"]["low"] == pytest.approx(wilson(4, 8).low)
    assert reward["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "method": "t, by prompt"}
    assert (found["kl"]["mean"], found["kl"]["standard_error"]) == (0.0, 0.0)
    assert reward["policy"]["mean"] == reward["reference"]["mean"] != 0


def test_a_judge_that_compares_a_run(runs, judges: Path, tmp_path: Path, capsys) -> None:
    found = evaluate(tmp_path, runs["lora"], "--judge", f"{judges}:longer", "--samples", 2, "--temperature", 0)
    pairs = read_json_lines(tmp_path / "eval.samples.jsonl")
    lengths = [[len(row[side]["completion"]) for side in ("reference", "policy")] for row in pairs]
    expected = [0.5 if ours == theirs else float(ours > theirs) for theirs, ours in lengths]
    assert [row["judge_prefers_policy"] for row in pairs] == expected
    assert found["judge"]["win_rate"]["value"] == pytest.approx(sum(expected) / 8)
    assert "policy" not in found["judge"]
    printed = capsys.readouterr().out
    assert sum(prompt in printed for prompt in ("the movie", "good acting and")) == 1
    assert "no estimate of the divergence" in printed


def test_equal_weights_are_read_and_held_once(sft, sft_adapter, runs, llama_reward, monkeypatch) -> None:
    read = []

    def record(checkpoint, *args, _reader=loading._reader):
        read.append(Path(checkpoint.path).resolve())
        return _reader(checkpoint, *args)

    monkeypatch.setattr(loading, "_reader", record)
    model_args = ModelConfig()
    args = PPOConfig(sft_model_path=str(sft_adapter), reward_model_path=str(llama_reward), use_cpu=True)
    policies = [
        Frozen(inspect_checkpoint("--sft_model_path", str(path), model_args), torch.float32)
        for path in (sft, sft_adapter, runs["lora on an adapter"])
    ]
    reward = inspect_checkpoint("--reward_model_path", str(llama_reward), model_args)
    models, reward_model = load_frozen(policies, reward, model_args, args)
    assert read == [sft.resolve(), llama_reward.resolve()]
    base, *adapted = [{p.untyped_storage().data_ptr() for p in model.parameters()} for model in models]
    assert all(base < each for each in adapted)
    assert not any(p.requires_grad for model in [*models, reward_model] for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- bad inputs


@pytest.fixture
def failure(capsys, monkeypatch):
    """Run an evaluation that must fail before weights are read, and return its lines."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    def run(*argv: object) -> list[str]:
        monkeypatch.setattr("fourscore.evaluation.command.load_frozen", refuse)
        capsys.readouterr()
        assert cli.main(["eval", *(str(word) for word in argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]

    return run


def test_no_such_run(runs, tmp_path: Path, failure) -> None:
    assert failure() == ["there is nothing to evaluate: name a run directory, or a policy with --policy_path"]
    assert failure(tmp_path / "none") == [f"{tmp_path}/none: there is no such run directory"]
    [line] = failure(tmp_path)
    assert line == f"{tmp_path}: has no config.yaml, so it is no run; give the --output_dir of one, or --policy_path"
    assert "drop one of the two" in failure(runs["full"], "--policy_path", tmp_path)[0]
    assert "drop one of the two" in failure(runs["full"], "--config", "x.yaml")[0]
    assert "is one of a run" in failure("--policy_path", tmp_path, "--checkpoint", "checkpoint-2")[0]


def test_an_unfinished_run(runs, tmp_path: Path, failure) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["full"], run)
    (run / "model.safetensors").unlink()
    assert failure(run) == [
        f"{run}: the run has not saved its policy yet; evaluate its last checkpoint with --checkpoint checkpoint-2"
    ]
    assert failure(run, "--checkpoint", "checkpoint-3") == [f"--checkpoint checkpoint-3: {run} has checkpoint-2"]
    shutil.rmtree(run / "checkpoint-2")
    assert failure(run) == [f"{run}: the run has not saved its policy yet; let it come to its end"]


def test_bad_flags_and_files_are_said_at_once(runs, judges, tmp_path: Path, failure) -> None:
    run = runs["full"]
    assert failure(run, "--samples", -1, "--num_generations", 0, "--temperature", -0.5, "--json", tmp_path) == [
        "--samples -1: must be at least 0",
        "--num_generations 0: must be at least 1",
        "--temperature -0.5: must be at least 0",
        f"--json {tmp_path}: is a folder; give a file",
    ]
    assert "there is no folder" in failure(run, "--json", tmp_path / "none" / "eval.json")[0]
    assert "there is no flag --num_generation: did you mean --num_generations?" in failure(run, "--num_generation=2")[0]
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    lines = failure(run, "--eval_dataset_name", empty, "--judge", f"{judges}:other")
    assert [line.split(":")[0] for line in lines] == [f"--eval_dataset_name {empty}", f"--judge {judges}"]
    assert "is empty" in lines[0]
    assert "no such file or folder" in failure(run, "--eval_dataset_name", tmp_path / "none.jsonl")[0]
    assert "cannot be imported" in failure(run, "--judge", "no_such_module:judge")[0]
    lines = failure(run, "--reward_funcs", f"{judges}:length", "none.py:f", "--reward_weights", 1)
    assert "none.py:f: there is no such file" in lines[0] and "there are 3 rewards" in lines[1]


def test_prompts_that_were_trained_on_are_not_held_out(sft, llama_reward, prompts, failure) -> None:
    models = ["--policy_path", sft, "--sft_model_path", sft, "--reward_model_path", llama_reward]
    assert failure(*models) == ["--eval_dataset_name must be named too: the prompts for your models"]
    assert failure(*models, "--dataset_name", prompts) == [
        f"--dataset_name {prompts}: has no split test of prompts that were not trained on, only train; name some with "
        "--eval_dataset_name"
    ]


def test_prompts_that_were_trained_on_are_said_to_be(prompts, tmp_path: Path, caplog) -> None:
    tokenizer, args = make_tokenizer(), PPOConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    for dataset, said in ((prompts, True), (tmp_path / "other.jsonl", False), (None, False)):
        caplog.clear()
        script = ScriptArguments(dataset_name=dataset and str(dataset), eval_dataset_name=str(prompts))
        assert len(load_held_out(script, args, tokenizer)) == len(PROMPTS)
        assert (f"--eval_dataset_name {prompts}: the policy trains on these" in caplog.text) == said


def test_a_policy_of_another_vocabulary(llama_policy, llama_reward, prompts, tmp_path: Path, failure) -> None:
    other = make_checkpoint("llama", tmp_path / "other", vocab_size=320)
    models = ["--policy_path", other, "--sft_model_path", llama_policy, "--reward_model_path", llama_reward]
    [line] = failure(*models, "--eval_dataset_name", prompts)
    assert line.startswith(f"--policy_path {other}: has a vocabulary of 320")


def test_the_shipped_judge() -> None:
    assert vader(["It is", "It is"], [" wonderful.", " terrible."]) == [1.0, 0.0]


def test_held_out_prompts_of_a_dataset_with_a_test_split(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": PROMPTS}).train_test_split(2, seed=0).save_to_disk(tmp_path / "both")
    tokenizer = make_tokenizer()
    args = PPOConfig(use_cpu=True)
    found = load_held_out(ScriptArguments(dataset_name=str(tmp_path / "both")), args, tokenizer)
    assert len(found) == 2
    part = ScriptArguments(dataset_name=str(tmp_path / "both"), dataset_test_split="train[:4]")
    assert len(load_held_out(part, args, tokenizer)) == 4


def test_the_table_is_rounded_to_its_errors() -> None:
    row = Row(
        Estimate(-0.9710, 0.0844, 256), Estimate(1.2237, 0.1054, 256), Interval(2.1947, 1.9605, 2.4289, "t, by prompt")
    )
    assert _cells(row) == ("-0.97 ± 0.08", "1.22 ± 0.11", "+2.19 [+1.96, +2.43]")
    row = Row(Estimate(512.34, 12.7, 9), Estimate(512.31, 13.0, 9), Interval(-0.03, -30.4, 30.3, "t, by prompt"))
    assert _cells(row) == ("512 ± 13", "512 ± 13", "+0 [-30, +30]")
    assert _cells(Row(policy=Estimate(0.0, 0.0, 9))) == ("", "0.00 ± 0.00", "")
    assert _cells(Row(policy=Estimate(1.5, math.nan, 1))) == ("", "1.50", "")


def test_several_rewards_are_weighted_as_in_the_run(runs, judges: Path, tmp_path: Path, capsys) -> None:
    functions = ["--reward_funcs", f"{judges}:length", f"{judges}:by_token", "--reward_weights", "1", "0.1", "2"]
    judge = ["--judge", f"{judges}:by_token"]
    found = evaluate(tmp_path, runs["lora"], *functions, *judge, "--samples", 0)
    assert list(found["rewards"]) == ["reward_model", "length", "by_token"]
    assert found["judge"] == found["rewards"]["by_token"]
    first = read_json_lines(tmp_path / "eval.samples.jsonl")[0]["policy"]
    assert first["scores"]["length"] == len(first["completion"])
    assert first["scores"]["by_token"] == 0.5 * first["completion_length"]
    weighted = zip(first["scores"].values(), (1, 0.1, 2, 0), strict=True)  # the judge's is in no sum
    assert first["score"] == pytest.approx(sum(score * weight for score, weight in weighted))
    assert "weighted sum" in capsys.readouterr().out


def test_rewards_without_the_policys_tokens(sft, prompts, judges: Path, tmp_path: Path) -> None:
    """An encoder, which reads text, and a function with no reward model beside it."""
    other = make_checkpoint("llama", tmp_path / "other", seed=1)
    flags = ["--policy_path", other, "--sft_model_path", sft, "--eval_dataset_name", prompts, "--response_length", 6]
    encoder = make_encoder(tmp_path / "encoder")
    found = evaluate(tmp_path, *flags, "--reward_model_path", encoder, "--use_cpu")
    first = read_json_lines(tmp_path / "eval.samples.jsonl")[0]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(encoder)
    with torch.no_grad():
        inputs = tokenizer(first["prompt"] + first["policy"]["completion"], return_tensors="pt")
        assert first["policy"]["scores"] == {"reward_model": pytest.approx(model(**inputs).logits.item(), abs=1e-5)}
    assert list(found["rewards"]) == ["reward_model"]
    found = evaluate(tmp_path, *flags, "--reward_funcs", f"{judges}:length", "--use_cpu")
    assert list(found["rewards"]) == ["length"]
    assert found["rewards"]["length"] == found["score"]


def test_a_judge_that_gives_no_numbers(runs, judges: Path, capsys) -> None:
    assert cli.main(["eval", str(runs["full"]), "--judge", f"{judges}:infinite"]) == 2
    assert "error: judge 'infinite' gave inf, which is not finite, for the sample" in capsys.readouterr().err


def test_conversations(tmp_path: Path, llama_reward: Path, capsys) -> None:
    sft = make_checkpoint("llama", tmp_path / "sft", chat_template=CHAT_TEMPLATE)
    chats = tmp_path / "chats.jsonl"
    asked = [[{"role": "user", "content": text}] for text in PROMPTS[:2]]
    chats.write_text("".join(json.dumps({"prompt": chat, "label": i}) + "\n" for i, chat in enumerate(asked)))
    judge = tmp_path / "chat_judge.py"
    judge.write_text(
        "def score(prompts, completions, label, **kwargs):\n"
        "    assert [p[0]['content'] for p in prompts] == ['the movie', 'a film is']\n"
        "    assert all(c[0]['role'] == 'assistant' for c in completions)\n"
        "    return label\n"
        "def compare(prompts, completions_a, completions_b):\n"
        "    assert prompts[0][0]['role'] == 'user'\n"
        "    return [float(b[0]['content'] > a[0]['content']) for a, b in zip(completions_a, completions_b)]\n"
    )
    other = make_checkpoint("llama", tmp_path / "other", seed=1)
    flags = ["--policy_path", other, "--sft_model_path", sft, "--reward_model_path", llama_reward]
    flags += ["--eval_dataset_name", chats, "--response_length", 6, "--use_cpu", "--judge"]
    found = evaluate(tmp_path, *flags, f"{judge}:score")
    assert found["judge"]["policy"]["mean"] == 0.5 and found["judge"]["ties"] == 2
    found = evaluate(tmp_path, *flags, f"{judge}:compare")
    rows = read_json_lines(tmp_path / "eval.samples.jsonl")
    expected = sum(row["policy"]["completion"] > row["reference"]["completion"] for row in rows)
    assert found["judge"]["wins"] == expected

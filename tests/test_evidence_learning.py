"""What the learning curves and ablations of docs/evidence.md stand on: intervals, equal KL, and the evaluator."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fourscore import demo

EVIDENCE = Path(__file__).parents[1] / "benchmarks" / "evidence"
sys.path.insert(0, str(EVIDENCE))

import training  # noqa: E402
from evaluate_worker import evaluate, measure  # noqa: E402
from statistics_of_runs import score_at_kl, student_quantile, welch  # noqa: E402


@pytest.mark.parametrize(("freedom", "table"), [(1, 12.706), (4, 2.776), (8, 2.306), (30, 2.042)])
def test_student_quantile_is_that_of_the_tables(freedom: int, table: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(table, abs=5e-4)


def test_welch_by_hand() -> None:
    # Means 2 and 5, variances 1 and 4: s = sqrt(1/3 + 4/3), freedom (5/3)^2 / ((1/9 + 16/9) / 2) = 50/17.
    found = welch([1, 2, 3], [3, 5, 7])
    half = student_quantile(0.975, 50 / 17) * (5 / 3) ** 0.5
    assert (found.mean, found.low, found.high) == pytest.approx((-3, -3 - half, -3 + half))
    assert half == pytest.approx(4.16, abs=0.02)  # t is 4.303 with 2 degrees of freedom, 3.182 with 3
    # Two samples of one size that spread alike: Student's, with 2n - 2 degrees of freedom.
    assert welch([0, 2], [1, 3]).high == pytest.approx(-1 + 4.303 * 2**0.5, abs=1e-3)


def test_score_at_equal_kl_is_read_where_the_level_is_first_reached() -> None:
    points = [{"kl": kl, "score": score} for kl, score in ((0, -1.0), (2, 0.0), (1, 0.5), (4, 2.0))]
    assert score_at_kl(points, 1.0) == -0.5
    assert score_at_kl(points, 3.0) == pytest.approx(0.5 + 2 / 3 * 1.5)
    assert score_at_kl(points, 4.0) == 2.0
    with pytest.raises(ValueError, match="stays below"):
        score_at_kl(points, 4.1)


def test_padding_changes_nothing_that_is_measured() -> None:
    policy = AutoModelForCausalLM.from_pretrained(demo.POLICY, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(demo.POLICY, dtype=torch.float32).eval()
    with torch.no_grad():
        policy.get_input_embeddings().weight[5:50] *= 1.5  # another distribution
    reward_model = AutoModelForSequenceClassification.from_pretrained(demo.REWARD, dtype=torch.float32).eval()
    # Ids 0 and 1 are the end and the pad token: the latter may be part of a sample as well.
    samples = [([40, 12, 7], [9, 0]), ([33], [8, 41, 6, 21, 0]), ([15, 1, 16], [44, 1, 45])]
    tensors = [(torch.tensor(prompt), torch.tensor(completion)) for prompt, completion in samples]
    found = measure(policy, reference, reward_model, tensors, 0.5)

    for (prompt, completion), (score, kl, entropy) in zip(samples, found.tolist(), strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            p, q = (torch.softmax(model(ids).logits[0] / 0.5, -1).double() for model in (policy, reference))
            state = reward_model.model(ids).last_hidden_state[0, -1]
            assert score == pytest.approx(float(reward_model.score(state)), abs=1e-5)
        chosen = slice(len(prompt) - 1, -1)
        assert kl == pytest.approx(float((p * (p / q).log()).sum(-1)[chosen].sum()), abs=1e-4)
        assert entropy == pytest.approx(float((-p * p.log()).sum(-1)[chosen].sum()), abs=1e-4)
    assert found[:, 1].min() > 1e-3


def test_evaluator_finds_the_sft_policy_where_the_docs_say_it_is(tmp_path: Path) -> None:
    """docs/demo-checkpoints.md has mean -0.60 and standard deviation 1.57 at temperature 1."""
    policy = AutoModelForCausalLM.from_pretrained(demo.POLICY, dtype=torch.float32).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(demo.REWARD, dtype=torch.float32).eval()
    job = {"reference": str(demo.POLICY), "prompts": str(demo.PROMPTS_HELDOUT), "temperature": 1.0}
    found = evaluate(policy, policy, reward_model, 1, job | {"response_length": 32, "seed": 0})
    assert found["samples"] == 256
    assert found["kl"] == 0
    assert found["score"] == pytest.approx(-0.60, abs=0.3)
    assert found["score_std"] == pytest.approx(1.57, abs=0.2)
    assert found["length"] - found["ended"] == pytest.approx(12.2, abs=1)  # there the end token does not count
    assert found["ended"] > 0.98


def test_a_run_is_trained_measured_and_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout = tmp_path / "prompts.jsonl"
    heldout.write_text("".join(demo.PROMPTS_HELDOUT.read_text().splitlines(keepends=True)[:16]))
    monkeypatch.setattr(demo, "PROMPTS_HELDOUT", heldout)
    small = {"total_episodes": 32, "per_device_train_batch_size": 16, "num_mini_batches": 2, "learning_rate": 2e-3}
    run = training.Run("small", 3, changes=small, value="sft", points=(1, 2))
    folder = tmp_path / "results"
    folder.mkdir()
    result = training._result(run, sys.executable, folder)
    assert [point["update"] for point in result["points"]] == [1, 2]
    assert [point["samples"] for point in result["points"]] == [16 * training.OTHER_COPIES, 16 * training.FINAL_COPIES]
    assert all(point["kl"] > 0 for point in result["points"])
    assert len(result["history"]["objective/scores"]) == 2
    assert [path.name for path in folder.iterdir()] == ["small-3.json"]
    assert training._result(replace(run, changes={}), "no such python", folder) == result


def test_the_two_systems_get_the_recipe_in_steps_that_both_take() -> None:
    flags = training.recipe()
    assert flags["per_device_train_batch_size"] // flags["num_mini_batches"] == 32
    assert flags["gradient_accumulation_steps"] == 1
    assert flags["total_episodes"] == 20 * 128


@pytest.mark.parametrize("script", ["learning.py", "ablations.py"])
def test_kept_results_are_shown_without_running(script: str) -> None:
    name = script.removesuffix(".py")
    kept = EVIDENCE / "results" / f"{name}.json"
    command = [sys.executable, str(EVIDENCE / script), "--from_json", str(kept)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    deviation = json.loads(kept.read_text())[0]["points"][0]["score_std"]
    assert f"{deviation:.2f}" in shown

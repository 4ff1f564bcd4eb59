"""The embedded default: what ships, how it is measured, and a demo cut short."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fourscore import cli, demo
from fourscore.demo.evaluate import measure, positive
from fourscore.models.forward import sample_scores
from fourscore.runs.metrics import read_json_lines

SUMMARY = {
    "score_before",
    "score_after",
    "score_std_before",
    "judge_positive_before",
    "judge_positive_after",
    "kl",
    "distinct_2_before",
    "distinct_2_after",
    "length_before",
    "length_after",
    "train_seconds",
}


def test_measures_by_hand() -> None:
    rows = [
        {"prompt": "It is", "completion": " wonderful .", "scores": 1.0, "kl": 2.0, "completion_length": 3},
        {"prompt": "It is", "completion": " terrible .", "scores": 3.0, "kl": 4.0, "completion_length": 5},
    ]
    found = measure(rows)
    assert found.score == 2.0
    assert found.score_std == pytest.approx(2**0.5)
    assert found.judge_positive == 0.5
    assert found.kl == 3.0
    assert found.distinct_2 == 1.0
    assert found.length == 4.0


def test_the_judge_knows_good_from_bad() -> None:
    texts = ["The plot is great and the cast is lovely.", "The plot is awful and the cast is dull.", "It has a plot."]
    assert positive(texts) == [True, False, False]


def test_what_ships_is_small_and_prompts_are_held_out() -> None:
    files = [p for folder in (demo.POLICY, demo.REWARD) for p in folder.iterdir()]
    assert sum(p.stat().st_size for p in files) <= 16 * 2**20
    train, held_out = (
        {row["prompt"] for row in read_json_lines(path)} for path in (demo.PROMPTS_TRAIN, demo.PROMPTS_HELDOUT)
    )
    assert len(held_out) >= 200
    assert not train & held_out
    assert not any(positive(sorted(held_out)))


def test_the_checkpoints_are_ordinary_ones_and_do_their_job() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.POLICY, padding_side="left")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    policy = AutoModelForCausalLM.from_pretrained(demo.POLICY, dtype=torch.float32)
    batch = tokenizer(["The acting is", "This film"], padding=True, return_tensors="pt")
    torch.manual_seed(0)
    out = policy.generate(**batch, max_new_tokens=40, do_sample=True, temperature=0.7)
    assert (out == tokenizer.eos_token_id).any(1).all()

    reward = AutoModelForSequenceClassification.from_pretrained(demo.REWARD, dtype=torch.float32)
    texts = ["The acting is wonderful and the story is great.", "The acting is awful and the story is boring."]
    samples = [torch.tensor([*tokenizer(t)["input_ids"], tokenizer.eos_token_id]) for t in texts]
    good, bad = sample_scores(reward, samples).tolist()
    assert good > bad + 1
    # The token whose state is scored is the EOS that ended the training texts, not the one before it.
    assert good == pytest.approx(reward(samples[0][None]).logits.item(), abs=1e-5)


def test_a_demo_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One update of eight samples reaches no aim, and the exit status says so.
    short = "--max_steps 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --num_mini_batches 1"
    assert cli.main(["demo", "--output_dir", str(tmp_path / "demo"), *short.split()]) == 1
    printed = capsys.readouterr().out
    assert "NOT reached" in printed
    assert "256 held-out prompts" in printed
    run = tmp_path / "demo" / "seed-1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert 0.2 < summary["judge_positive_before"] < 0.6
    samples = read_json_lines(run / "samples.jsonl")
    assert [sum(row["split"] == split for row in samples) for split in ("before", "after")] == [256, 256]
    AutoModelForCausalLM.from_pretrained(run)
    assert cli.main(["demo", "--output_dir", str(tmp_path / "demo"), *short.split()]) == 2  # never written over

"""A script written for TRL 1.12 runs with its imports changed: in full, with LoRA, and on 4-bit weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import trl_style


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"{a} {b}"} for a in ("the film", "a movie") for b in ("is", "was", "and", "with")] * 3
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("training", ["", "--use_peft", "--load_in_4bit --use_peft"])
def test_trl_style_script(
    training: str,
    llama_policy: Path,
    llama_reward: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    flags = f"""--dataset_name {prompts} --output_dir {out} --model_name_or_path {llama_policy}
        --sft_model_path {llama_policy} --reward_model_path {llama_reward} --per_device_train_batch_size 4
        --gradient_accumulation_steps 2 --total_episodes 16 --response_length 8 --missing_eos_penalty 1.0
        --learning_rate 1e-3 {training}"""
    monkeypatch.setattr(sys, "argv", ["trl_style.py", *flags.split()])
    trl_style.main()

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    names = [
        "objective/kl",
        "objective/entropy",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "objective/scores",
    ]
    names += ["policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg"]
    names += ["val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "episode", "eps"]
    assert set(names) <= metrics[0].keys()
    assert metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert abs(metrics[1]["objective/kl"]) > 1e-4

    # What was saved is an ordinary checkpoint, which takes a padded batch.
    tokenizer = AutoTokenizer.from_pretrained(out, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(out)
    batch = tokenizer(["the film", "a movie that was"], padding=True, return_tensors="pt")
    with torch.no_grad():
        moved = policy(**batch).logits
        start = AutoModelForCausalLM.from_pretrained(llama_policy)(**batch).logits
    assert moved.isfinite().all()
    assert not torch.allclose(moved, start)
    assert (out / "value_model").is_dir()
    if training:
        assert (out / "adapter_model.safetensors").is_file()
        assert not isinstance(policy, PeftModel)

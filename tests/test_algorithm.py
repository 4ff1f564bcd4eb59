"""Every option of the algorithm through PPOTrainer: its effect, its metrics, its place in checkpoints."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourscore import ModelConfig, PPOConfig, PPOTrainer, get_peft_config

PROMPTS = ["the movie", "a film is", "this", "good acting and", "it was a plot", "so"]


def config(out: Path, **changes: Any) -> PPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "response_length": 8,
        "save_strategy": "no",
        "num_sample_generations": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PPOConfig(**(settings | changes))


def trainer_on(args: PPOConfig, **changes: Any) -> PPOTrainer:
    tokenizer = make_tokenizer()
    parts: dict[str, Any] = {
        "processing_class": tokenizer,
        "model": make_model("llama", tokenizer),
        "ref_model": None,
        "reward_model": make_model("llama", tokenizer, "reward", seed=1),
        "value_model": None if args.share_value_backbone else make_model("llama", tokenizer, "reward", seed=1),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
    }
    return PPOTrainer(args=args, **(parts | changes))


def run(out: Path, trainer: PPOTrainer | None = None, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of each update of a run."""
    (trainer or trainer_on(config(out, **changes))).train()
    return rows_of(out)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Weights:
    """A callback's worth: the policy's weights after every update."""

    def __init__(self, trainer: PPOTrainer) -> None:
        from transformers import TrainerCallback

        seen: list[dict[str, torch.Tensor]] = []

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seen.append(weights_of(trainer.model))

        trainer.add_callback(Look())
        self.seen = seen


# ------------------------------------------------------------------ presets


def test_the_vapo_preset_from_end_to_end(tmp_path: Path) -> None:
    """Short warm-up, larger steps: what a tiny run needs; the rest is the preset's."""
    trainer = trainer_on(config(tmp_path, preset="vapo", value_warmup_updates=2, max_steps=4, learning_rate=1e-3))
    start, value_start = weights_of(trainer.model), weights_of(trainer.value_model)
    looks = Weights(trainer)
    rows = run(tmp_path, trainer)
    assert same(looks.seen[0], start) and same(looks.seen[1], start)
    assert not same(looks.seen[2], start) and not same(weights_of(trainer.value_model), value_start)
    for row in rows[:2]:
        assert row["lr"] == 0 and row["loss/value_avg"] > 0 and row["value/grad_norm"] > 0
        assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert not any(name.startswith(("policy/", "loss/policy")) for name in row)
    # Linear over the two updates in which the policy learns; the value model's over all four.
    assert [row["lr"] for row in rows[2:]] == pytest.approx([1e-3, 0.5e-3])
    assert [row["value/lr"] for row in rows] == pytest.approx([2e-6, 1.5e-6, 1e-6, 0.5e-6])
    for row in rows[2:]:
        assert {"loss/positive_lm_avg", "loss/policy_avg", "policy/epochs"} <= row.keys()
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    expected = {
        "preset": "vapo",
        "kl_coef": 0.0,
        "cliprange": 0.2,
        "cliprange_high": 0.28,
        "lam_alpha": 0.05,
        "lam_value": 1.0,
        "positive_lm_coef": 0.1,
        "value_learning_rate": 2e-6,
        "value_warmup_updates": 2,
        "num_generations": 16,
        "loss_aggregation": "token",
        "temperature": 1.0,
    }
    assert {name: saved[name] for name in expected} == expected


# ------------------------------------------------------------------ moving average


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_moving_average(adapter: bool, tmp_path: Path) -> None:
    lora = get_peft_config(ModelConfig(use_peft=True)) if adapter else None
    args = config(tmp_path / "run", ema_decay=0.75, save_strategy="steps", save_steps=2)
    trainer = trainer_on(args, peft_config=lora)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    average = {name: weights_of(trainer.model)[name] for name in trained}
    looks = Weights(trainer)
    trainer.train()
    after = weights_of(trainer.model)
    for weights in looks.seen:
        average = {name: 0.75 * average[name] + 0.25 * weights[name] for name in trained}
    trainer.save_model()
    assert same(weights_of(trainer.model), after), "saving the average moved the policy"
    folder = tmp_path / "run" / "policy_ema"
    assert len(AutoTokenizer.from_pretrained(folder)) == len(trainer.processing_class)
    if adapter:
        saved = load_file(folder / "adapter_model.safetensors")
        by_name = {name.replace(".weight", ".default.weight"): tensor for name, tensor in saved.items()}
    else:
        by_name = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert set(by_name) == set(trained)
    for name in trained:
        torch.testing.assert_close(by_name[name].detach(), average[name], rtol=1e-5, atol=1e-6)
    assert max((average[name] - after[name]).abs().max().item() for name in trained) > 1e-4

    # A run that goes on from the checkpoint before has the same average in the end, to the bit.
    resumed = trainer_on(config(tmp_path / "again", ema_decay=0.75), peft_config=lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    resumed.save_model()
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    again = load_file(tmp_path / "again" / "policy_ema" / name)
    assert same(again, load_file(folder / name))


def test_a_moving_average_begins_where_a_checkpoint_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_on(config(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)).train()
    resumed = trainer_on(config(tmp_path / "again", max_steps=2, ema_decay=0.5))
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "has no moving average" in caplog.text
    resumed.save_model()
    ours, theirs = (load_file(tmp_path / "again" / sub / "model.safetensors") for sub in ("policy_ema", "."))
    assert same(ours, theirs)

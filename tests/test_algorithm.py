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
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import fourscore.ppo.trainer as trainer_module
from fourscore import FourscoreError, ModelConfig, PPOConfig, PPOTrainer, get_peft_config
from fourscore.ppo.first_ratio import ratio_bound, ratio_finding

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


class Weights(TrainerCallback):
    """Keeps the policy's weights after every update."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self.seen: list[dict[str, torch.Tensor]] = []
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(weights_of(self.trainer.model))


# ------------------------------------------------------------------ presets


def test_the_vapo_preset_from_end_to_end(tmp_path: Path) -> None:
    """Short warm-up, larger steps: what a tiny run needs; the rest is the preset's."""
    smaller = {"gradient_accumulation_steps": 4, "value_warmup_updates": 2, "max_steps": 4, "learning_rate": 1e-3}
    trainer = trainer_on(config(tmp_path, preset="vapo", **smaller))
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


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward that a tiny model can learn: how many tokens of the completion hold an e."""
    return [float(sum("e" in word for word in text.split(" ")) + text.count("e")) for text in completions]


def test_the_vapo_preset_learns(tmp_path: Path) -> None:
    changes = {
        "preset": "vapo",
        "num_generations": 4,
        "value_warmup_updates": 6,
        "learning_rate": 3e-3,
        "value_learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 26,
        "per_device_train_batch_size": 64,
        "response_length": 12,
        "lam_alpha": 0.5,
        "vf_coef": 1.0,
        "cliprange_value": 10.0,
    }
    args = config(tmp_path, **changes)
    rows = run(tmp_path, trainer_on(args, reward_model=None, reward_funcs=letters))
    score = lambda some: sum(row["objective/scores"] for row in some) / len(some)  # noqa: E731
    assert score(rows[-5:]) > score(rows[:6]) + 1
    # While it warms up, the value model learns what the policy, which stands still, will get.
    assert rows[5]["value/explained_variance"] > rows[0]["value/explained_variance"] + 0.5


# ------------------------------------------------------------------ the value model first


def test_warm_up_of_a_head_on_the_policys_backbone(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path, share_value_backbone=True, value_warmup_updates=1, max_steps=2))
    start, head = weights_of(trainer.model), weights_of(trainer.roles.value_head)
    looks = Weights(trainer)
    heads = []
    trainer.optimizers["value"].register_step_post_hook(lambda *_: heads.append(weights_of(trainer.roles.value_head)))
    rows = run(tmp_path, trainer)
    assert same(looks.seen[0], start) and not same(heads[3], head)
    assert not same(looks.seen[1], start)
    assert "loss/policy_avg" not in rows[0] and rows[0]["loss/value_avg"] > 0
    assert rows[1]["loss/policy_avg"] and rows[1]["policy/epochs"] == 4


def test_warm_up_with_one_optimizer_for_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It steps in every update, its schedule, too, but what has no gradient stands still."""
    tokenizer = make_tokenizer()
    models = {"model": make_model("llama", tokenizer), "value_model": make_model("llama", tokenizer, "reward", seed=1)}
    optimizer = torch.optim.AdamW([p for m in models.values() for p in m.parameters()], lr=1e-3, weight_decay=0.1)
    args = config(tmp_path, value_warmup_updates=2, value_learning_rate=1e-2)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_on(args, optimizers=(optimizer, None), **models)
    assert "--value_learning_rate without effect" in caplog.text
    start, value_start = weights_of(trainer.model), weights_of(trainer.value_model)
    looks = Weights(trainer)
    rows = run(tmp_path, trainer)
    assert same(looks.seen[1], start) and not same(looks.seen[2], start)
    assert not same(weights_of(trainer.value_model), value_start)
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert "value/lr" not in rows[0]


def test_warm_up_learns_from_monte_carlo_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    update = trainer_module.update

    def keep(policy: Any, value_model: Any, experience: Any, *rest: Any) -> Any:
        seen.append(experience)
        return update(policy, value_model, experience, *rest)

    monkeypatch.setattr(trainer_module, "update", keep)
    run(tmp_path, lam=0.3, value_warmup_updates=1, max_steps=2, kl_coef=0.0)
    for e, monte_carlo in zip(seen, (True, False), strict=True):
        scores = torch.repeat_interleave(e.scores, e.completion_lens)
        assert torch.allclose(e.returns, scores, atol=1e-5) == monte_carlo


def test_schedules_of_their_own(tmp_path: Path) -> None:
    rows = run(
        tmp_path,
        max_steps=4,
        value_learning_rate=1e-2,
        value_lr_scheduler_type="constant_with_warmup",
        value_warmup_steps=2,
    )
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [row["value/lr"] for row in rows] == pytest.approx([0, 0.5e-2, 1e-2, 1e-2])


# ------------------------------------------------------------------ KL


def test_the_coefficient_adapts_and_goes_on_where_it_was(tmp_path: Path) -> None:
    changes = {"kl_coef": 0.1, "kl_target": 1e-3, "kl_horizon": 16, "max_steps": 4}
    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=2, **changes)
    expected = 0.1
    for row in whole:
        assert row["objective/kl_coef"] == pytest.approx(expected)
        expected *= 1 + max(-0.2, min(0.2, row["objective/kl"] / 1e-3 - 1)) * 8 / 16
    assert whole[3]["objective/kl_coef"] != pytest.approx(0.1)
    resumed = trainer_on(config(tmp_path / "again", **changes))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = rows_of(tmp_path / "again")
    assert [row["objective/kl_coef"] for row in again] == [row["objective/kl_coef"] for row in whole[2:]]
    assert [row["loss/policy_avg"] for row in again] == [row["loss/policy_avg"] for row in whole[2:]]


def test_the_kl_term_is_in_the_loss_or_in_the_reward(tmp_path: Path) -> None:
    reference = make_model("llama", make_tokenizer(), seed=5)
    rows = {
        in_loss: run(
            tmp_path / str(in_loss),
            trainer_on(config(tmp_path / str(in_loss), use_kl_loss=in_loss, kl_coef=2.0), ref_model=reference),
        )
        for in_loss in (False, True)
    }
    assert "loss/kl_avg" in rows[True][0] and "loss/kl_avg" not in rows[False][0]
    # The first rollout is the same, but only one of them has the term in what the value model is to foretell.
    assert rows[True][0]["objective/kl"] == rows[False][0]["objective/kl"]
    assert rows[True][0]["value/bias_first"] != pytest.approx(rows[False][0]["value/bias_first"], abs=0.1)
    for row in (*rows[True], *rows[False]):
        shaping = row["objective/rlhf_reward"] - row["objective/scores"]
        assert shaping == pytest.approx(-2.0 * row["objective/kl"], rel=1e-4)


def test_early_stop_is_logged(tmp_path: Path) -> None:
    rows = run(tmp_path, early_stop_kl=1e-12, num_ppo_epochs=4)
    assert [row["policy/epochs"] for row in rows] == [1, 1, 1]
    assert "policy/epochs" in rows[0] and rows[0]["value/grad_norm"] > 0


# ------------------------------------------------------------------ first ratios


def rounding(monkeypatch: pytest.MonkeyPatch, size: float, update: int = 2) -> None:
    """From the given update on, rollout logprobs that the update's forward does not find again."""
    fill_in, calls = trainer_module.fill_in, []

    def off(roles: Any, experience: Any, *rest: Any, **named: Any) -> Any:
        scores = fill_in(roles, experience, *rest, **named)
        calls.append(1)
        if len(calls) >= update:
            experience.logprobs = experience.logprobs + size
        return scores

    monkeypatch.setattr(trainer_module, "fill_in", off)


def test_first_ratios_are_one(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "minibatches": {"num_mini_batches": 2},
        "trunk": {"share_value_backbone": True},
        "support": {"top_k": 20, "top_p": 0.9, "entropy_coef": 0.1, "use_kl_loss": True, "temperature": 0.7},
    }
    for name, changes in cases.items():
        for row in run(tmp_path / name, stop_on_ratio=True, **changes):
            assert 0 <= row["policy/first_ratio_mean"] <= row["policy/first_ratio_max"] < 1e-4


def test_what_the_rollout_knows_is_not_computed_again(tmp_path: Path) -> None:
    forwards = {}
    for name, changes in {"plain": {}, "trunk": {"share_value_backbone": True}, "frozen": {"freeze_layers": 1}}.items():
        trainer = trainer_on(config(tmp_path / name, **changes))
        experience = trainer._rollout([[5, 6, 7], [8, 9]])
        assert experience.logprobs is not None
        seen: list[bool] = []
        handle = trainer.model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(True))
        trainer._score(experience)
        handle.remove()
        forwards[name] = len(seen)
    # Values of a shared trunk, and the bottom that the reference goes on from, come with the policy's pass.
    assert forwards["plain"] == 0 < min(forwards["trunk"], forwards["frozen"])


def test_ratios_that_are_not_one_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rounding(monkeypatch, 1e-2)
    with caplog.at_level(logging.WARNING):
        rows = run(tmp_path)
    said = [record.message for record in caplog.records if "first ratios" in record.message]
    assert len(said) == 2 and "first ratios of update 2 are 1.0e-02 off 1 on average" in said[0]
    # exp(-0.01) - 1 at every token.
    assert rows[1]["policy/first_ratio_mean"] == pytest.approx(0.00995, rel=1e-2)
    assert rows[1]["policy/first_ratio_max"] == pytest.approx(0.00995, rel=1e-2)


def test_stop_on_ratio_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", normalize_scores=True)
    out = tmp_path / "run"
    with monkeypatch.context() as broken:
        rounding(broken, 1e-2, update=3)
        with pytest.raises(FourscoreError, match=r"--stop_on_ratio: .* update 3 .*checkpoint-2.*--resume_from"):
            run(out, stop_on_ratio=True, normalize_scores=True)
    assert [row["step"] for row in rows_of(out)] == [1, 2]
    trainer_on(config(out, stop_on_ratio=True, normalize_scores=True)).train(resume_from_checkpoint=True)
    timed = ("time/", "memory/", "eps")
    for ours, theirs in zip(rows_of(out), whole, strict=True):
        assert {k: v for k, v in ours.items() if not k.startswith(timed)} == {
            k: v for k, v in theirs.items() if not k.startswith(timed)
        }


def test_stop_on_ratio_before_the_first_update_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding(monkeypatch, 1e-2, update=1)
    with pytest.raises(FourscoreError, match="no update was done yet"):
        run(tmp_path, stop_on_ratio=True)


def test_what_rounding_explains(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path))
    assert ratio_bound(trainer.roles, tf32=False) == 1e-4
    assert ratio_bound(trainer.roles, tf32=True) == 2e-2
    trainer.roles.autocast_dtype = torch.bfloat16
    assert ratio_bound(trainer.roles, tf32=False) == 2e-2
    assert ratio_finding(2e-2, 1.5, 2e-2, 1) is None  # single tokens may be far off
    assert ratio_finding(2.1e-2, 1.5, 2e-2, 7) is not None


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

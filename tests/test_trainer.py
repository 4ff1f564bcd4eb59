"""What a user sees of PPOTrainer: its files, its callbacks, its errors."""

import gzip
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)

from fourscore import FourscoreError, ModelConfig, PPOConfig, PPOTrainer, demo, get_peft_config, load_models
from fourscore.models.checks import check_shipped_policy
from fourscore.parallel import Parallel
from fourscore.ppo.scoring import logprobs_of
from fourscore.rewards.samples import is_the_runs

PROMPTS = ["the movie", "a film is", "this", "good acting and", "it was a plot", "so"]


def config(out: Path, **changes) -> PPOConfig:
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "response_length": 6,
        "save_strategy": "no",
        "num_sample_generations": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return PPOConfig(**(settings | changes))


def trainer_on(args: PPOConfig, **changes) -> PPOTrainer:
    tokenizer = make_tokenizer()
    parts = {
        "processing_class": tokenizer,
        "model": make_model("llama", tokenizer),
        "ref_model": None,
        "reward_model": make_model("llama", tokenizer, "reward", seed=1),
        "value_model": make_model("llama", tokenizer, "reward", seed=1),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
    }
    return PPOTrainer(args=args, **(parts | changes))


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.events.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append("evaluate")
        assert metrics["eval/scores"] is not None

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def test_a_run_directory(tmp_path: Path) -> None:
    out, seen = tmp_path / "run", Recorder()
    args = config(out, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    held_out = Dataset.from_dict({"prompt": PROMPTS[:5]})
    trainer = trainer_on(args, eval_dataset=held_out, callbacks=[seen])
    result = trainer.train()
    trainer.save_model()
    assert result.global_step == 2
    assert seen.events == ["begin", "step 1", "step 2", "evaluate", "save", "end"]
    assert [log["episode"] for log in seen.logs if "episode" in log] == [4, 8]

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    for name in ("time/rollout_s", "time/scoring_s", "time/update_s", "time/total_s", "memory/peak_gib"):
        assert metrics[0][name] > 0
    assert "eval/scores" not in metrics[0]
    assert all(is_the_runs(name) for row in metrics for name in row), "rewards could log under it"
    assert {"eval/scores", "eval/kl", "eval/completion_length", "eval/ended"} <= metrics[1].keys()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["split"] for row in samples} == {"train", "eval"}
    assert {"step", "split", "prompt", "completion", "score"} == samples[0].keys()
    assert json.loads((out / "summary.json").read_text())["updates"] == 2
    assert yaml.safe_load((out / "config.yaml").read_text())["response_length"] == 6
    assert (out / "README.md").read_text().startswith("---")
    value_model = AutoModelForSequenceClassification.from_pretrained(out / "value_model")
    assert value_model.config.num_labels == 1

    with pytest.raises(FourscoreError, match=r"not empty.*--resume_from_checkpoint"):
        trainer_on(config(out)).train()


def test_a_run_that_goes_on_with_other_settings_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps in (1, 2):
        args = config(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1)
        trainer_on(args).train(resume_from_checkpoint=steps > 1)
    assert "goes on with other settings" not in caplog.text
    trainer_on(replace(args, max_steps=3, num_total_batches=None, gamma=0.5)).train(resume_from_checkpoint=True)
    assert "goes on with other settings than before: --gamma 0.5 (was 1.0)" in caplog.text


@pytest.mark.parametrize("role", ["model", "ref_model", "reward_model", "value_model"])
def test_models_are_given_loaded(role: str, tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match=rf"^{role} './sft': must be a loaded model"):
        trainer_on(config(tmp_path), **{role: "./sft"})


def test_the_shipped_policy_with_another_tokenizer(tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(demo.POLICY)
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FourscoreError, match=rf"^--sft_model_path: without it .*{tmp_path}; name your SFT"):
        trainer_on(config(tmp_path / "run"), model=policy, processing_class=tokenizer)
    with pytest.raises(FourscoreError, match=rf"^--sft_model_path: without it .*{tmp_path}; name your SFT"):
        load_models(ModelConfig(model_name_or_path=str(tmp_path)), config(tmp_path / "run"))


def test_the_shipped_policy_with_its_tokenizer_from_another_place(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.POLICY)
    tokenizer.add_special_tokens({"pad_token": "[MY PAD]"})
    tokenizer.save_pretrained(tmp_path)
    check_shipped_policy(str(demo.POLICY), AutoTokenizer.from_pretrained(tmp_path))


def test_completions_of_no_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert trainer_on(config(tmp_path)).generate_completions() == []
    assert "nothing to complete without an eval_dataset" in caplog.text


def test_the_reference_stays_and_the_others_move(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path))
    before = {
        name: {k: v.clone() for k, v in model.state_dict().items()}
        for name, model in (
            ("policy", trainer.model),
            ("ref", trainer.ref_model),
            ("reward", trainer.reward_model),
            ("value", trainer.value_model),
        )
    }
    trainer.train()
    for name, model, moves in (
        ("policy", trainer.model, True),
        ("ref", trainer.ref_model, False),
        ("reward", trainer.reward_model, False),
        ("value", trainer.value_model, True),
    ):
        same = all(torch.equal(v, before[name][k]) for k, v in model.state_dict().items())
        assert same != moves, name


def test_peft_trains_adapters_and_the_head_only(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path), peft_config=get_peft_config(ModelConfig(use_peft=True)))
    assert trainer.ref_model is None
    trained = lambda model: {n for n, p in model.named_parameters() if p.requires_grad}  # noqa: E731
    policy, value = trained(trainer.model), trained(trainer.value_model)
    assert all("lora_" in name for name in policy)
    assert {name for name in value if "lora_" not in name} == {"base_model.model.score.modules_to_save.default.weight"}
    # The reward model stands on the value model's base.
    ours = {p.data_ptr() for p in trainer.value_model.parameters()}
    assert all(p.data_ptr() in ours for p in trainer.reward_model.parameters())
    trainer.train()
    assert trained(trainer.model) == policy
    assert trained(trainer.value_model) == value


def test_full_value_training_under_peft(tmp_path: Path) -> None:
    args = config(tmp_path, value_training="full")
    trainer = trainer_on(args, peft_config=get_peft_config(ModelConfig(use_peft=True)))
    assert all(p.requires_grad for p in trainer.value_model.parameters())
    trainer.train()


def test_gradient_clipping_and_weight_decay_reach_the_optimizer(tmp_path: Path) -> None:
    weights = {}
    for limit in (1e-6, 1.0):
        # A rate at which the smaller step is not lost in rounding.
        args = config(tmp_path / str(limit), max_grad_norm=limit, optim="sgd", max_steps=1, learning_rate=1.0)
        trainer = trainer_on(args)
        start = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        weights[limit] = (trainer.model.lm_head.weight - start).norm().item()
    assert 0 < weights[1e-6] < 1e-4 * weights[1.0]
    decayed = trainer_on(config(tmp_path / "decay", weight_decay=0.1)).optimizers["policy"]
    assert [g["weight_decay"] for g in decayed.param_groups] == [0.1, 0.0]


def test_the_learning_rate_falls_linearly_by_update(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path, max_steps=4, num_mini_batches=2))
    trainer.train()
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize(("mini_batches", "steps"), [(1, 2), (2, 4)])
def test_one_optimizer_step_a_minibatch(mini_batches: int, steps: int, tmp_path: Path) -> None:
    args = config(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_mini_batches=mini_batches,
        num_ppo_epochs=2,
        max_steps=1,
    )
    trainer = trainer_on(args)
    taken = []
    trainer.optimizers["policy"].register_step_post_hook(lambda *_: taken.append(1))
    trainer.train()
    assert len(taken) == steps


def test_own_optimizer_and_schedule(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    policy = make_model("llama", tokenizer)
    value_model = make_model("llama", tokenizer, "reward", seed=1)
    optimizer = torch.optim.SGD([*policy.parameters(), *value_model.parameters()], lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = trainer_on(config(tmp_path), model=policy, value_model=value_model, optimizers=(optimizer, schedule))
    start = value_model.score.weight.detach().clone()
    trainer.train()
    assert not torch.equal(value_model.score.weight, start)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["lr"] == 0.5


def test_a_collator_is_asked_for_the_prompts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    calls = []

    def collate(rows):
        calls.append(len(rows))
        return DataCollatorWithPadding(tokenizer)(rows)

    tokenizer.padding_side = "left"
    with_collator = trainer_on(config(tmp_path / "a"), processing_class=tokenizer, data_collator=collate)
    without = trainer_on(config(tmp_path / "b"))
    with_collator.train()
    without.train()
    assert calls == [4, 4]
    a, b = (json.loads((tmp_path / x / "metrics.jsonl").read_text().splitlines()[-1]) for x in "ab")
    assert a["objective/scores"] == b["objective/scores"]


def test_missing_eos_penalty_and_stop_tokens(tmp_path: Path) -> None:
    fixed = trainer_on(config(tmp_path / "a", stop_token="none", max_steps=1))
    fixed.train()
    row = json.loads((tmp_path / "a" / "metrics.jsonl").read_text())
    assert row["tokens/completion"] == 4 * 6
    punished = trainer_on(config(tmp_path / "b", stop_token="none", max_steps=1, missing_eos_penalty=100.0))
    punished.train()
    other = json.loads((tmp_path / "b" / "metrics.jsonl").read_text())
    missing = 4 - other["val/num_eos_tokens"]
    assert missing > 0
    assert row["objective/scores"] - other["objective/scores"] == pytest.approx(100 * missing / 4, rel=1e-4)


def test_generate_completions_shows_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_on(config(tmp_path), eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    rows = trainer.generate_completions()
    assert [row["prompt"] for row in rows] == PROMPTS
    assert "greedy completions" in capsys.readouterr().out
    assert trainer.generate_completions() == rows
    assert trainer_on(config(tmp_path / "x")).generate_completions() == []


def test_early_stop_by_a_callback(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True
            return control

    assert trainer_on(config(tmp_path, max_steps=5), callbacks=[Stop()]).train().global_step == 1


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    policy = make_model("llama", tokenizer)
    reward = make_model("llama", tokenizer, "reward", seed=1)
    lora = get_peft_config(ModelConfig(use_peft=True))
    args = config(tmp_path)
    for changes, message in (
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"model": policy, "ref_model": policy}, "same object"),
        ({"reward_model": reward, "value_model": reward}, "same object"),
        ({"reward_model": make_model("llama", tokenizer, "reward", num_labels=2)}, "num_labels"),
        ({"reward_model": make_model("llama", tokenizer, "reward", vocab_size=999)}, "vocabular"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, "prompt"),
        ({"train_dataset": Dataset.from_dict({"input_ids": [[1, 10**6]]})}, "another tokenizer"),
    ):
        with pytest.raises(FourscoreError, match=message):
            trainer_on(args, **changes)
    adapted = trainer_on(args, peft_config=lora).model
    with pytest.raises(FourscoreError, match="PEFT"):
        trainer_on(args, model=adapted, peft_config=lora)
    with pytest.raises(FourscoreError, match="eval_dataset"):
        trainer_on(config(tmp_path, eval_strategy="steps", eval_steps=1))
    with pytest.raises(FourscoreError, match="num_mini_batches"):
        trainer_on(config(tmp_path, num_mini_batches=3))


def test_a_score_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    reward = make_model("llama", make_tokenizer(), "reward", seed=1)
    torch.nn.init.constant_(reward.score.weight, float("nan"))
    with pytest.raises(FourscoreError, match="'reward_model' gave nan, which is not finite, for the sample '"):
        trainer_on(config(tmp_path), reward_model=reward).train()


def test_embedded_default_loads(tmp_path: Path) -> None:
    models = load_models(ModelConfig(), config(tmp_path))
    assert models.tokenizer.pad_token_id not in (None, models.tokenizer.eos_token_id)
    assert models.tokenizer.padding_side == "left"
    assert models.policy.config.vocab_size == models.reward_model.config.vocab_size


def test_the_readme_example_runs(
    llama_policy: Path, llama_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert "total_episodes=20_000" in code
    code = code.replace("total_episodes=20_000", "total_episodes=8, use_cpu=True")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft").symlink_to(llama_policy)
    (tmp_path / "reward").symlink_to(llama_reward)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "adapter_model.safetensors").is_file()


def test_bf16_autocast_keeps_the_first_ratio_near_one(tmp_path: Path) -> None:
    # One optimizer step an update, so every ratio is taken before anything moved. Single logits near 20 are 0.125 apart
    # in bf16, so it is the mean that can be held to a bound.
    trainer = trainer_on(config(tmp_path, bf16=True, num_ppo_epochs=1, max_steps=1, response_length=3))
    trainer.train()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["val/ratio"] == pytest.approx(1, abs=2e-2)
    assert row["policy/first_ratio_mean"] < 2e-2
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_only_what_trains_is_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    # Writing to frozen weights would copy pages that are mapped from the file.
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.data_ptr()))
    model = make_model("llama", make_tokenizer())
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    two = Parallel(torch.device("cpu"), rank=0, world_size=2, sharded=False)
    two.broadcast(model, frozen_too=False)
    assert sent == [model.lm_head.weight.data_ptr()]


def test_a_contradictory_generation_config_does_not_cost_the_run(tmp_path: Path) -> None:
    policy = make_model("llama", make_tokenizer())
    policy.generation_config.do_sample, policy.generation_config.temperature = False, 0.6
    trainer = trainer_on(config(tmp_path, max_steps=1), model=policy)
    trainer.train()
    trainer.save_model()


def test_what_does_not_fit_the_positions_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    parts = {
        "model": make_model("gpt2", tokenizer, n_positions=8),
        "reward_model": make_model("gpt2", tokenizer, "reward", seed=1),
        "value_model": make_model("gpt2", tokenizer, "reward", seed=1),
    }
    with pytest.raises(FourscoreError, match="--response_length 6"):
        trainer_on(config(tmp_path), **parts)
    with pytest.raises(FourscoreError, match="--stop_token_id 100000"):
        trainer_on(config(tmp_path, stop_token_id=100_000))


def test_a_flag_wins_over_a_recorded_configuration(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path, max_steps=-1, num_train_epochs=2))
    trainer.train()
    assert "total_episodes" not in yaml.safe_load((tmp_path / "config.yaml").read_text())


# ------------------------------------------------------------------ options of the rollout


@pytest.mark.parametrize("kind", [{}, {"freeze_layers": 1}, {"share_value_backbone": True}, {"peft": True}], ids=str)
@pytest.mark.parametrize(
    "drawn",
    [{"top_k": 6}, {"top_p": 0.8}, {"top_p": 0.999}, {"min_response_length": 4}, {"num_generations": 4}],
    ids=str,
)
def test_a_policy_that_has_not_moved_is_its_own_reference(kind: dict, drawn: dict, tmp_path: Path) -> None:
    """Old, new and reference logprobs are of one distribution: the first ratios are 1 and the KL is 0."""
    kind = dict(kind)
    peft = get_peft_config(ModelConfig(use_peft=True, lora_r=4)) if kind.pop("peft", False) else None
    args = config(tmp_path, max_steps=1, temperature=0.9, gradient_accumulation_steps=2, **kind, **drawn)
    value = {"value_model": None} if kind.get("share_value_backbone") else {}
    trainer = trainer_on(args, peft_config=peft, eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}), **value)
    kept = []
    score = trainer._score

    def watch(e, *rest):
        kept.append(e)
        return score(e, *rest)

    trainer._score = watch
    # Before anything moves; with a fixed seed of its own.
    assert abs(trainer.evaluate()["eval/kl"]) < 1e-5
    metrics = trainer.train().metrics
    assert abs(metrics["objective/kl"]) < 1e-5
    assert metrics["policy/first_ratio_max"] < 2e-6
    (e,) = kept
    assert (e.support is None) == ("num_generations" in drawn)
    if "num_generations" not in drawn:
        full = logprobs_of(trainer.ref_model or trainer.model, replace(e, support=None), 0.9, 8, nullcontext)
        assert (e.ref_logprobs > full + 1e-4).any(), "nothing was left out: the comparison says nothing"


def test_completions_of_a_prompt_lie_side_by_side(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=5, gradient_accumulation_steps=2, num_generations=4)
    trainer = trainer_on(args)
    alone = trainer_on(config(tmp_path, max_steps=5, per_device_train_batch_size=2))
    seen, texts = [], []
    rollout = trainer._rollout

    def watch(prompts: list[list[int]], *rest, **named):
        seen.append(prompts)
        texts.append(experience := rollout(prompts, *rest, **named))
        return experience

    trainer._rollout = watch
    trainer.train()
    for step, prompts in enumerate(seen):
        alone.state.global_step = step
        one, two = alone._prompt_ids(alone.train_dataset, alone._next_indices())
        assert prompts == [one] * 4 + [two] * 4
    groups = [[tuple(c) for c in e.completions()[start : start + 4]] for e in texts for start in (0, 4)]
    assert sum(len(set(group)) > 1 for group in groups) > 8, "the completions of a prompt are drawn one by one"
    # 40 samples of 6 prompts, 4 of each in a pass.
    assert (trainer.state.episode, trainer.state.epoch) == (40, 40 / 24)
    assert trainer.state.num_train_epochs == 2

    # Of two processes each takes half, with more completions than that half of one prompt's.
    (one,), (two,) = seen[0][:1], seen[0][4:5]
    trainer.state.global_step, args.local_batch_size = 0, 4
    for generations, halves in ((4, [[one] * 4, [two] * 4]), (8, [[one] * 4, [one] * 4])):
        args.num_generations = generations
        for rank, half in enumerate(halves):
            trainer.parallel = replace(trainer.parallel, rank=rank, world_size=2)
            assert trainer._prompt_ids(trainer.train_dataset, trainer._next_indices()) == half


def test_stops_of_evaluation_are_those_of_training(tmp_path: Path) -> None:
    """Greedy: no top-k or top-p, but the shortest completion and the texts that end one."""
    plain = trainer_on(config(tmp_path), eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    free = plain.complete_eval_prompts(0.0)
    # The text of the third token of a completion; and the first token of another one is to stop it, but must not.
    row = next(r for r in free if len(r["completion_ids"]) == 6)
    decode = plain.processing_class.decode
    text = decode(row["completion_ids"][2:3])
    first = free[-1]["completion_ids"][0]
    stopped = {"stop_strings": [text], "stop_token_id": first, "min_response_length": 2, "top_k": 2, "top_p": 0.1}
    trainer = trainer_on(config(tmp_path, **stopped), eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    rows = trainer.complete_eval_prompts(0.0)
    twin = next(r for r in rows if r["prompt"] == row["prompt"])
    assert twin["completion_ids"] == row["completion_ids"][: len(twin["completion_ids"])]
    assert len(twin["completion_ids"]) <= 3 and twin["ended"] == 1
    assert rows[-1]["completion_ids"][0] != first and rows[-1]["completion_length"] >= 2


def test_a_completion_that_a_text_ends_is_not_penalized(tmp_path: Path) -> None:
    letters = [chr(i) for i in range(33, 127)]
    args = config(tmp_path, stop_strings=letters, stop_token="none", missing_eos_penalty=100.0, max_steps=1)
    trainer = trainer_on(args)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    ended = [any(letter in row["completion"] for letter in letters) for row in rows if row["split"] == "train"]
    scores = [row["score"] for row in rows if row["split"] == "train"]
    assert any(ended)
    assert [score > -50 for score in scores] == ended


@pytest.mark.parametrize(("changes", "message"), [({"top_k": 301}, "--top_k 301: the policy knows 300 tokens")])
def test_bad_options_of_the_rollout(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(FourscoreError, match=message):
        trainer_on(config(tmp_path, **changes))


def test_profile_writes_a_trace_of_one_update_and_prints_what_costs_most(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "profile"
    trainer = trainer_on(config(tmp_path, profile=True, num_sample_generations=0, max_steps=3))
    trainer.add_callback(NotYet(folder))
    trainer.train()
    shown = capsys.readouterr().out
    calls = {}
    for phase in ("rollout", "scoring", "update"):
        with gzip.open(folder / f"{phase}.json.gz", "rt") as file:
            calls[phase] = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "cpu_op"]
        assert shown.count(f"{phase}: costliest operations") == 1
    assert any(product in shown for product in ("aten::mm", "fourscore::multiply"))
    assert not any("backward" in name for name in calls["rollout"] + calls["scoring"])
    assert any("backward" in name for name in calls["update"])
    only = trainer_on(config(tmp_path / "only", profile=True, num_sample_generations=0, max_steps=1))
    only.train()
    assert len(list((tmp_path / "only" / "profile").iterdir())) == 3


class NotYet(TrainerCallback):
    """The first update is not the one that is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        assert self.folder.exists() == (state.global_step > 1)


@pytest.mark.parametrize("keep", [None, True, False])
def test_memory_that_is_kept_is_given_back_after_rollout_scoring_and_update(keep, tmp_path, monkeypatch) -> None:
    given: list[str] = []
    # Told for real, this process would keep its memory through all the tests that follow.
    monkeypatch.setattr("fourscore.ppo.trainer.keep_freed_memory", lambda weights: True)
    monkeypatch.setattr("fourscore.ppo.trainer.give_back", lambda: given.append(phase[-1]))
    trainer = trainer_on(config(tmp_path, keep_freed_memory=keep, max_steps=2))
    phase = []
    for name in ("_rollout", "_score", "_update"):
        inner = getattr(trainer, name)
        monkeypatch.setattr(
            trainer, name, lambda *a, _inner=inner, _name=name, **k: (phase.append(_name), _inner(*a, **k))[1]
        )
    trainer.train()
    assert given == ([] if keep is False else ["_rollout", "_score", "_update"] * 2)


@pytest.mark.parametrize(
    ("changes", "count"), [({}, 4), ({"cuda_graphs": "none"}, 0), ({"freeze_layers": 1}, 0)], ids=["", "none", "frozen"]
)
def test_models_whose_passes_may_become_graphs(changes, count, tmp_path):
    """Not those that share layers of a pass in scoring: a graph would neither record nor replay them."""
    assert len(trainer_on(config(tmp_path, **changes))._recorded_trunks()) == count

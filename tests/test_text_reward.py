"""Reward models that read text, runs without a reward model, and value models that start elsewhere."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from test_rewards import PROMPTS, config, experience, metrics, short_is_good
from tiny import CHAT_TEMPLATE, make_checkpoint, make_encoder, make_model, make_other_decoder, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fourscore import FourscoreError, ModelConfig, PPOConfig, PPOTrainer, cli, load_models
from fourscore.models.checks import check_models
from fourscore.models.forward import score_head
from fourscore.plan.estimate import make_plan
from fourscore.rewards.samples import Notes, Samples
from fourscore.rewards.text_model import TextModel

COMPLETIONS = [
    "film was good",
    "the acting of this plot was slow and bad",
    "ending",
    "a great joy",
    "heart and funny",
    "",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_other_decoder(tmp_path_factory.mktemp("decoder"), chat_template=CHAT_TEMPLATE)


def samples(chat: bool = False) -> Samples:
    tokenizer = make_tokenizer()
    ids = lambda texts: [tokenizer(text)["input_ids"] for text in texts]  # noqa: E731
    completions = [[*c, tokenizer.eos_token_id] for c in ids([f" {text}" for text in COMPLETIONS])]
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
    return Samples(experience(ids(PROMPTS), completions), tokenizer, lambda: {"prompt": prompts})


def by_hand(path: Path, texts: list[str], **options: Any) -> list[float]:
    """Each text alone, with plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", **options)).logits.item() for text in texts]


def test_an_encoder_scores_the_decoded_text(encoder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    reward = TextModel(model, AutoTokenizer.from_pretrained(encoder), batch_size=4)
    given = samples()
    assert given.texts[0] == "the movie film was good"
    scores = reward.rate(given, Notes())
    assert scores.tolist() == pytest.approx(by_hand(encoder, given.texts), abs=1e-5)
    assert scores.std() > 0.01


def test_a_decoder_of_another_vocabulary_gets_its_own_chat_template(decoder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(decoder).eval()
    reward = TextModel(model, AutoTokenizer.from_pretrained(decoder), batch_size=4)
    plain, chat = samples(), samples(chat=True)
    assert reward.rate(plain, Notes()).tolist() == pytest.approx(by_hand(decoder, plain.texts), abs=1e-5)
    texts = [
        f"user: {prompt}\nassistant: {completion}\n"
        for prompt, completion in zip(PROMPTS, chat.completions, strict=True)
    ]
    expected = by_hand(decoder, texts, add_special_tokens=False)
    assert reward.rate(chat, Notes()).tolist() == pytest.approx(expected, abs=1e-5)
    assert reward.rate(plain, Notes()).tolist() != pytest.approx(expected, abs=1e-3)


def test_too_long_a_text_is_read_from_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_encoder(tmp_path, max_position_embeddings=8)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    given = samples()
    scores = TextModel(model, tokenizer, 4).rate(given, Notes())
    kept = [" ".join(text.split()[-6:]) for text in given.texts]  # [CLS] and [SEP] are two of eight
    words = [i for i, text in enumerate(given.texts) if len(tokenizer(text)["input_ids"]) == len(text.split()) + 2]
    assert any(len(given.texts[i].split()) > 6 for i in words)
    expected = by_hand(path, kept)
    assert [scores[i].item() for i in words] == pytest.approx([expected[i] for i in words], abs=1e-5)
    assert "are longer than the 8 tokens it reads" in caplog.text


# ------------------------------------------------------------------------------------------------------------- loading


def settings(policy: Path, reward: Path | None, **training: Any) -> PPOConfig:
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "response_length": 8}
    path = None if reward is None else str(reward)
    return PPOConfig(sft_model_path=str(policy), reward_model_path=path, use_cpu=True, **(values | training))


def storages(model: Any, trained: bool = False) -> set[int]:
    return {p.data_ptr() for p in model.parameters() if trained or not p.requires_grad}


def causal_adapter(folder: Path, base: Path) -> Path:
    adapted = get_peft_model(
        make_model("llama", make_tokenizer()),
        LoraConfig(
            task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False
        ),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["encoder", "decoder", "none"])
def test_under_peft_the_value_model_stands_on_the_policys_backbone(
    kind: str, encoder: Path, decoder: Path, llama_policy: Path
) -> None:
    reward = {"encoder": encoder, "decoder": decoder, "none": None}[kind]
    models = load_models(ModelConfig(use_peft=True), settings(llama_policy, reward))
    assert models.ref_policy is None
    assert storages(models.value_model) - {score_head(models.value_model).weight.data_ptr()} <= storages(
        models.policy
    ) | {p.data_ptr() for n, p in models.value_model.named_parameters() if "score" in n}
    assert not score_head(models.value_model).weight.any()
    assert score_head(models.value_model).weight.requires_grad
    assert (models.reward_model is None) == (kind == "none")
    assert (models.reward_tokenizer is None) == (kind == "none")
    if reward is not None:
        assert not any(p.requires_grad for p in models.reward_model.parameters())
    trained = [n for n, p in models.value_model.named_parameters() if p.requires_grad and "score" not in n]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("freeze_layers", [0, 1])
def test_without_peft_the_value_model_is_a_copy_of_the_sft_checkpoint(
    freeze_layers: int, encoder: Path, llama_policy: Path
) -> None:
    models = load_models(ModelConfig(), settings(llama_policy, encoder, freeze_layers=freeze_layers))
    assert not storages(models.value_model, True) & {
        p.data_ptr() for p in models.policy.parameters() if p.requires_grad
    }
    theirs = dict(models.ref_policy.model.named_parameters())
    for name, parameter in models.value_model.model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        assert (parameter.data_ptr() == theirs[name].data_ptr()) == (not parameter.requires_grad)
    assert bool(storages(models.value_model)) == bool(freeze_layers)
    assert not models.value_model.score.weight.any()
    ids = torch.arange(3, 21).reshape(2, 9)
    assert not models.value_model(ids).logits.any()


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_value_model_starts_where_it_is_told(
    use_peft: bool, llama_policy: Path, llama_reward: Path, encoder: Path, tmp_path: Path
) -> None:
    path = make_checkpoint("llama", tmp_path / "value", "reward", seed=7)
    expected = AutoModelForSequenceClassification.from_pretrained(path)
    for reward in (llama_reward, encoder, None):
        args = settings(llama_policy, reward, value_model_path=str(path))
        models = load_models(ModelConfig(use_peft=use_peft), args)
        assert torch.equal(score_head(models.value_model).weight, expected.score.weight)
        name = "model.layers.0.mlp.up_proj.weight"
        base = models.value_model.get_base_model() if use_peft else models.value_model
        assert torch.equal(base.get_parameter(name), expected.get_parameter(name))
    # A causal LM has no head: that starts at zero.
    causal = make_checkpoint("llama", tmp_path / "causal", "policy", seed=8)
    models = load_models(ModelConfig(use_peft=use_peft), settings(llama_policy, None, value_model_path=str(causal)))
    assert not score_head(models.value_model).weight.any()


@pytest.mark.parametrize("value_training", ["adapter", "full"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_an_sft_adapter_is_part_of_where_the_value_model_starts(
    use_peft: bool, value_training: str, llama_policy: Path, tmp_path: Path
) -> None:
    adapter = causal_adapter(tmp_path / "sft", llama_policy)
    args = settings(adapter, None, value_training=value_training, reward_funcs=["x.py:f"])
    models = load_models(ModelConfig(use_peft=use_peft), args)
    ids = torch.arange(3, 21).reshape(2, 9)
    with torch.no_grad():
        states = models.policy(ids, output_hidden_states=True).hidden_states[-1]
        values = models.value_model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(states, values, atol=1e-5)
    assert not torch.allclose(
        make_model("llama", make_tokenizer())(ids, output_hidden_states=True).hidden_states[-1], states
    )


CASES = [
    ("encoder", {}, {}),
    ("encoder", {"use_peft": True}, {}),
    ("decoder", {"use_peft": True}, {"value_training": "full"}),
    ("encoder", {}, {"freeze_layers": 1}),
    ("none", {}, {}),
    ("none", {"use_peft": True}, {}),
    ("encoder", {"use_peft": True}, {"share_value_backbone": True}),
    ("none", {"use_peft": True}, {"value_model_path": "VALUE"}),
    ("none", {}, {"value_model_path": "VALUE"}),
    ("adapter", {"use_peft": True}, {}),
    ("adapter", {"use_peft": True}, {"value_training": "full"}),
    ("adapter", {}, {}),
]


@pytest.mark.parametrize(("kind", "model", "training"), CASES)
def test_the_plan_counts_what_is_loaded(
    kind: str, model: Any, training: Any, encoder: Path, decoder: Path, llama_policy: Path, tmp_path: Path
) -> None:
    reward = {"encoder": encoder, "decoder": decoder}.get(kind)
    policy = causal_adapter(tmp_path / "sft", llama_policy) if kind == "adapter" else llama_policy
    if "value_model_path" in training:
        training = {"value_model_path": str(make_checkpoint("llama", tmp_path / "value", "reward", seed=7))}
    args, model_args = settings(policy, reward, **training), ModelConfig(**model)
    plan = make_plan(args, model_args, prompt=8)
    models = load_models(model_args, args)
    roles = {name: getattr(models, name) for name in ("policy", "ref_policy", "reward_model", "value_model")}
    roles = {name: role for name, role in roles.items() if role is not None}
    assert list(plan.roles) == list(roles)
    seen: set[int] = set()
    for name, module in roles.items():
        planned, parameters = plan.roles[name], list(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        assert planned.parameters == sum(p.numel() for p in parameters)
        assert planned.trainable == sum(p.numel() for p in trained)
        new = {p.data_ptr(): p.numel() * p.element_size() for p in parameters if p.data_ptr() not in seen}
        assert planned.weights + planned.mapped == sum(new.values()), name
        seen |= set(new)
    if reward is not None:
        assert plan.roles["reward_model"].mapped > 0 and not plan.roles["reward_model"].weights
        assert "reward_model" in plan.parts["scoring"]
        assert any("texts" in sentence for sentence in plan.assumptions)
    if kind in ("encoder", "none") and model_args.use_peft and not training:
        assert [on for on in plan.layout.shared().values() if "policy" in on] == [["policy", "value_model"]]


def test_the_plan_counts_further_reward_models(llama_policy: Path, encoder: Path, tmp_path: Path) -> None:
    half = make_encoder(tmp_path / "half", dtype=torch.bfloat16)
    args = settings(llama_policy, encoder, reward_funcs=[str(half), str(encoder), "mine.py:f"])
    plan = make_plan(args, ModelConfig(), prompt=8)
    rewards = {name: role for name, role in plan.roles.items() if name.startswith("reward ")}
    assert list(rewards) == ["reward half", f"reward {encoder.name}"]
    count = plan.roles["reward_model"].parameters
    assert [role.parameters for role in rewards.values()] == [count, count]
    assert [role.weights for role in rewards.values()] == [4 * count, 0]
    alone = make_plan(settings(llama_policy, encoder), ModelConfig(), prompt=8)
    added = plan.peak_bytes["scoring"] - plan.baseline - (alone.peak_bytes["scoring"] - alone.baseline)
    assert added == 4 * count


# -------------------------------------------------------------------------------------------------------------- checks


def test_what_a_reward_model_that_reads_text_needs(llama_policy: Path, encoder: Path, tmp_path: Path) -> None:
    check_models(ModelConfig(), settings(llama_policy, encoder))
    for path, message in (
        (make_encoder(tmp_path / "two", num_labels=2), "has num_labels=2, a reward model has 1"),
        (make_checkpoint("llama", tmp_path / "size", "reward", vocab_size=280), "vocabulary of 280, and"),
        (make_encoder(tmp_path / "bare"), "so it has to read text, but no tokenizer"),
    ):
        for file in path.glob("*token*"):
            file.unlink()
        with pytest.raises(FourscoreError, match=message):
            check_models(ModelConfig(), settings(llama_policy, path))
    headless = make_encoder(tmp_path / "headless")
    model = AutoModelForSequenceClassification.from_pretrained(headless)
    model.bert.save_pretrained(headless)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(headless)
    with pytest.raises(FourscoreError, match="no trained `classifier` head"):
        check_models(ModelConfig(), settings(llama_policy, headless))


def test_a_value_model_reads_the_policys_tokens(llama_policy: Path, encoder: Path, decoder: Path) -> None:
    for path, message in (
        (encoder, "has no linear head named 'score'"),
        (decoder, "give a value model with the policy"),
    ):
        with pytest.raises(FourscoreError, match=f"--value_model_path .*{message}"):
            check_models(ModelConfig(), settings(llama_policy, None, value_model_path=str(path)))


# --------------------------------------------------------------------------------------------------------------- a run


def test_a_run_under_an_encoder_from_the_command_line(llama_policy: Path, encoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "target": i}) + "\n" for i, p in enumerate(PROMPTS)))
    (tmp_path / "mine.py").write_text(
        "def longer(completions, target): return [len(c) + t for c, t in zip(completions, target)]"
    )
    command = (
        f"ppo --sft_model_path {llama_policy} --reward_model_path {encoder} --dataset_name {data} --use_cpu --use_peft "
        f"--reward_funcs {tmp_path}/mine.py:longer {encoder} --reward_weights 1 0.01 0 "
        f"--output_dir {tmp_path}/run --per_device_train_batch_size 4 --max_steps 2 --response_length 5 "
        "--report_to none --save_strategy no --num_sample_generations 0 --center_scores 5"
    )
    assert cli.main(command.split()) == 0
    rows = metrics(tmp_path / "run")
    name = encoder.name
    for row in rows:
        assert row["rewards/reward_model/mean"] == row[f"rewards/{name}/mean"]
        expected = row["rewards/reward_model/mean"] + 0.01 * row["rewards/longer/mean"] - row["rewards/offset"]
        assert row["objective/scores"] == pytest.approx(expected, abs=1e-4)
    # What a run of its own value model would start from is there, too.
    assert (tmp_path / "run" / "value_model" / "adapter_config.json").is_file()


def test_a_script_that_loads_its_models_itself(llama_policy: Path, encoder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_policy)
    parts: dict[str, Any] = {
        "processing_class": tokenizer,
        "model": make_model("llama", tokenizer),
        "ref_model": None,
        "value_model": make_model("llama", tokenizer, "reward", seed=1),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS, "target": [0] * len(PROMPTS)}),
    }
    trainer = PPOTrainer(
        args=config(tmp_path, max_steps=1),
        reward_model=AutoModelForSequenceClassification.from_pretrained(encoder),
        reward_funcs=[short_is_good, AutoModelForSequenceClassification.from_pretrained(encoder), str(encoder)],
        **parts,
    )
    trainer.train()
    [row] = metrics(tmp_path)
    means = {row[f"rewards/{name}/mean"] for name in ("reward_model", encoder.name, f"{encoder.name}_2")}
    assert len(means) == 1
    assert trainer.reward_model is not None and not trainer.reward_model.training
    with pytest.raises(FourscoreError, match="BertForSequenceClassification reads text, and there is no tokenizer in"):
        bert = AutoModelForSequenceClassification.from_pretrained(encoder)
        bert.config._name_or_path = ""
        PPOTrainer(args=config(tmp_path / "b"), reward_model=bert, **parts)


def test_the_evidence_of_another_tokenizer(llama_policy: Path, encoder: Path, tmp_path: Path) -> None:
    """Its run and its comparison with plain transformers, on tiny models."""
    place = Path(__file__).parents[1] / "benchmarks" / "evidence" / "cross_tokenizer.py"
    spec = importlib.util.spec_from_file_location("cross_tokenizer", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.run(llama_policy, encoder, tmp_path / "run", updates=1, heldout=5)
    assert len(found["updates"]) == 1 and len(found["before"]) == len(found["after"]) == 5
    assert found["difference"] < 1e-5
    policy = AutoModelForCausalLM.from_pretrained(llama_policy)
    head = policy.lm_head.weight.numel()
    assert found["weights of the value model that are the policy's"] == policy.num_parameters() - head
    rows = [row | {"scores": row["scores"] + 1} for row in found["before"]]
    prompts = [AutoTokenizer.from_pretrained(llama_policy)(row["prompt"])["input_ids"] for row in rows]
    assert script.by_hand(encoder, llama_policy, prompts, rows) == pytest.approx(1, abs=1e-4)
    assert script.ranked_right([1.0, 2.0, 3.0], [1.0, 2.0, 0.0]) == pytest.approx(1 / 3, abs=0.05)

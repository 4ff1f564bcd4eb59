import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from fourscore import demo
from fourscore.config import (
    DERIVED_FIELDS,
    ModelConfig,
    PPOConfig,
    ScriptArguments,
    get_kbit_device_map,
    get_peft_config,
    get_quantization_config,
)
from fourscore.config_fields import FIELDS, GROUPS, field_default
from fourscore.errors import FourscoreError
from fourscore.flag_docs import render_docs
from fourscore.presets import FOLLOWS, PRESETS

ROOT = Path(__file__).parents[1]
DEFAULTS = {field.name: field_default(field) for field in dataclasses.fields(PPOConfig)}

# TRL 1.12's own fields and defaults: what must not drift.
TRL_PPO = {
    "learning_rate": 3e-6,
    "dataset_num_proc": None,
    "num_mini_batches": 1,
    "total_episodes": None,
    "local_rollout_forward_batch_size": 64,
    "num_sample_generations": 10,
    "response_length": 53,
    "stop_token_id": None,
    "temperature": 0.7,
    "missing_eos_penalty": None,
    "push_to_hub": False,
    "model_adapter_name": None,
    "ref_adapter_name": None,
    "num_ppo_epochs": 4,
    "whiten_rewards": False,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "vf_coef": 0.1,
    "cliprange_value": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "ds3_gather_for_generation": True,
}
TRL_MODEL = {
    "model_name_or_path": None,
    "model_revision": "main",
    "dtype": "float32",
    "attn_implementation": None,
    "use_peft": False,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_target_parameters": None,
    "lora_modules_to_save": None,
    "lora_task_type": "CAUSAL_LM",
    "use_rslora": False,
    "use_dora": False,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": False,
    "bnb_4bit_quant_storage": None,
}
TRL_SCRIPT = {
    "dataset_name": None,
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "dataset_streaming": False,
    "ignore_bias_buffers": False,
}

# The command lines in the docstrings of TRL's examples/scripts/ppo/ppo.py and ppo_tldr.py.
TRL_COMMANDS = {
    "ppo": (
        "--dataset_name trl-internal-testing/descriptiveness-sentiment-trl-style --dataset_train_split descriptiveness "
        "--output_dir out --per_device_train_batch_size 64 --gradient_accumulation_steps 1 --total_episodes 10000 "
        "--model_name_or_path EleutherAI/pythia-1b-deduped --missing_eos_penalty 1.0"
    ),
    "ppo_launched": (
        "--dataset_name trl-internal-testing/descriptiveness-sentiment-trl-style --dataset_train_split descriptiveness "
        "--output_dir out --num_ppo_epochs 1 --num_mini_batches 1 --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 16 --total_episodes 10000 --model_name_or_path EleutherAI/pythia-1b-deduped "
        "--sft_model_path EleutherAI/pythia-1b-deduped --reward_model_path EleutherAI/pythia-1b-deduped "
        "--local_rollout_forward_batch_size 1 --missing_eos_penalty 1.0"
    ),
    "tldr": (
        "--dataset_name trl-lib/tldr --dataset_test_split validation --output_dir out --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 64 --total_episodes 30000 --model_name_or_path EleutherAI/pythia-1b-deduped "
        "--sft_model_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr "
        "--reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr --missing_eos_penalty 1.0 "
        "--stop_token eos --response_length 53 --eval_strategy steps --eval_steps 100"
    ),
    "tldr_launched": (
        "--dataset_name trl-lib/tldr --dataset_test_split validation --output_dir out --per_device_train_batch_size 16 "
        "--gradient_accumulation_steps 4 --total_episodes 1000000 --model_name_or_path EleutherAI/pythia-1b-deduped "
        "--sft_model_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr "
        "--reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr --local_rollout_forward_batch_size 16 "
        "--missing_eos_penalty 1.0 --stop_token eos --eval_strategy steps --eval_steps 100"
    ),
}


def parse(command: str) -> tuple[ScriptArguments, PPOConfig, ModelConfig]:
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    return parser.parse_args_into_dataclasses(command.split(), look_for_args_file=False)


@pytest.mark.parametrize(
    ("config", "expected"), [(PPOConfig, TRL_PPO), (ModelConfig, TRL_MODEL), (ScriptArguments, TRL_SCRIPT)]
)
def test_trl_fields_keep_name_and_default(config, expected):
    defaults = {field.name: field_default(field) for field in dataclasses.fields(config)}
    # A preset fills these in, the default one with TRL's numbers.
    open_fields = defaults.keys() & {"temperature", "kl_coef", "learning_rate"}
    filled_in = {name: getattr(config(), name) for name in open_fields}
    assert {name: (defaults | filled_in)[name] for name in expected} == expected


@pytest.mark.parametrize("command", TRL_COMMANDS.values(), ids=TRL_COMMANDS)
def test_trl_command_lines_parse(command):
    words = command.split()
    script, training, model = parse(command)
    both = vars(script) | vars(training) | vars(model)
    for flag, text in zip(words[::2], words[1::2], strict=True):
        value = both[flag.removeprefix("--")]
        assert value == type(value)(text)
    if "--sft_model_path" not in command:
        assert (training.sft_model_path, training.reward_model_path) == (str(demo.POLICY), str(demo.REWARD))


def test_defaults_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = PPOConfig()
    assert args.output_dir == "runs/ppo"
    assert (args.stop_token, args.stop_token_id) == ("eos", None)
    assert (args.bf16, args.mixed_precision, args.gradient_checkpointing) == (False, "no", False)
    assert args.report_to == []
    assert args.logging_steps == 1
    assert args.max_grad_norm == 1.0


@pytest.mark.parametrize("bf16_supported", [True, False])
def test_defaults_with_an_accelerator(monkeypatch, bf16_supported):
    """Whatever the machine: the values that depend on an accelerator follow what torch says of it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("fourscore.config.is_torch_bf16_gpu_available", lambda: bf16_supported)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: bf16_supported)
    args = PPOConfig()
    assert args.bf16 is bf16_supported
    assert args.gradient_checkpointing is args.activation_checkpointing is False
    assert args.checkpointing_open, "the plan may switch it on"
    on_cpu = PPOConfig(use_cpu=True)
    assert (on_cpu.bf16, on_cpu.gradient_checkpointing, on_cpu.checkpointing_open) == (False, False, False)


def test_bf16_on_a_cpu_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match="emulated and slow"):
        args = PPOConfig(bf16=True, use_cpu=True)
    assert args.bf16 is True
    assert args.mixed_precision == "bf16"


def test_precision_of_accelerate_launch(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(FourscoreError, match="--mixed_precision fp16 is not supported: use bf16 or no"):
        PPOConfig()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match="emulated"):
        assert PPOConfig(use_cpu=True).bf16 is True
    assert PPOConfig(bf16=False).mixed_precision == "no"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gradient_checkpointing", True),
        ("--gradient_checkpointing true", True),
        ("--gradient_checkpointing false", False),
        ("--no_gradient_checkpointing", False),
        ("--no-gradient-checkpointing", False),
        ("--activation_checkpointing", True),
        ("--activation_checkpointing false --gradient_checkpointing true", False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_both_spellings_of_checkpointing(flags, expected):
    _, args, _ = parse(flags)
    assert args.gradient_checkpointing is expected
    assert args.activation_checkpointing is expected


def test_both_spellings_of_checkpointing_kwargs():
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        _, args, _ = parse(f'--{name} {{"use_reentrant":false}}')
        assert args.gradient_checkpointing_kwargs == args.activation_checkpointing_kwargs == {"use_reentrant": False}
    with pytest.raises(FourscoreError, match="is not JSON"):
        PPOConfig(gradient_checkpointing_kwargs="use_reentrant")


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({}, ("eos", None)),
        ({"stop_token": None}, (None, None)),
        ({"stop_token": "none"}, (None, None)),
        ({"stop_token_id": 7}, (None, [7])),
        ({"stop_token_id": [7, 9]}, (None, [7, 9])),
        ({"stop_token": "eos", "stop_token_id": 0}, (None, [0])),
    ],
)
def test_stop_token(given, resolved):
    args = PPOConfig(**given)
    assert (args.stop_token, args.stop_token_id) == resolved


def test_preset_fills_in_what_is_open():
    args = PPOConfig(preset="vapo", lam_alpha=0.1, kl_coef=0.05)
    assert (args.value_learning_rate, args.learning_rate, args.lam_value) == (2e-6, 1e-6, 1.0)
    assert (args.lam_alpha, args.kl_coef, args.cliprange, args.cliprange_high) == (0.1, 0.05, 0.2, 0.28)
    plain = PPOConfig(cliprange=0.3, lam=0.9, max_grad_norm=0.5)
    assert (plain.cliprange_high, plain.lam_value, plain.value_max_grad_norm) == (0.3, 0.9, 0.5)
    assert plain.value_lr_scheduler_type == plain.lr_scheduler_type
    with pytest.raises(FourscoreError, match="--preset grpo: must be one of n_plus, vapo"):
        PPOConfig(preset="grpo")


def test_presets_name_fields_that_can_be_left_open():
    for values in PRESETS.values():
        assert all(DEFAULTS[name] is None for name in values)
    assert all(DEFAULTS[name] is None and other in DEFAULTS for name, other in FOLLOWS.items())


def test_table_lists_every_field_once():
    assert set(FIELDS) == set(DEFAULTS)
    assert sum(len(group) for group in GROUPS.values()) == len(FIELDS)
    silent = [name for name, note in FIELDS.items() if note.status != "honoured" and not note.note]
    assert not silent


def test_docs_are_up_to_date():
    assert (ROOT / "docs" / "config.md").read_text() == render_docs(), "run python -m fourscore.flag_docs"


def other_than(name):
    """A value other than the default, of the kind the field takes."""
    special = {
        "deepspeed": "ds.json",
        "debug": "underflow_overflow",
        "include_for_metrics": ["loss"],
        "accelerator_config": {"split_batches": True},
        "parallelism_config": object(),
        "train_sampling_strategy": "sequential",
        "greater_is_better": True,
        "liger_kernel_config": {"rope": True},
    }
    default = DEFAULTS[name]
    if name in special:
        return special[name]
    return (not default) if isinstance(default, bool) else 3


@pytest.mark.parametrize("name", [name for name, note in FIELDS.items() if note.status == "refused"])
def test_refused_fields_raise_and_say_why(name):
    with pytest.raises(FourscoreError) as error:
        PPOConfig(**{name: other_than(name)})
    message = str(error.value)
    assert message.startswith(f"--{name} ")
    assert "\n" not in message
    if name != "deepspeed":
        assert FIELDS[name].note in message


def test_accepted_without_effect_really_is_accepted():
    PPOConfig(
        do_train=True,
        do_eval=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_num_workers=2,
        dataloader_prefetch_factor=2,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        label_names=[],
        ds3_gather_for_generation=False,
        use_cache=True,
        include_num_input_tokens_seen=True,
        local_rank=0,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"cliprange": 0}, "--cliprange 0"),
        ({"cliprange_value": -1}, "--cliprange_value -1"),
        ({"gamma": 1.1}, "--gamma 1.1: must be from 0 to 1"),
        ({"lam": -0.1}, "--lam -0.1"),
        ({"lam": float("nan")}, "--lam nan"),
        ({"kl_coef": -0.1}, "--kl_coef -0.1"),
        ({"learning_rate": float("inf")}, "--learning_rate inf"),
        ({"kl_estimator": "k2"}, "--kl_estimator k2: must be one of k1, k3"),
        ({"missing_eos_penalty": 0}, "--missing_eos_penalty 0"),
        ({"response_length": 0}, "--response_length 0: must be at least 1"),
        ({"num_ppo_epochs": 0}, "--num_ppo_epochs 0"),
        ({"total_episodes": 0}, "--total_episodes 0"),
        ({"max_prompt_length": 0}, "--max_prompt_length 0"),
        ({"max_prompt_length_action": "cut"}, "--max_prompt_length_action cut: must be one of drop, truncate"),
        ({"stop_token": "period"}, "--stop_token period: must be one of eos, none"),
        ({"stop_token_id": -1}, "--stop_token_id -1"),
        ({"save_strategy": "epoch"}, "--save_strategy epoch: must be no or steps"),
        ({"save_strategy": "best"}, "--save_strategy best"),
        ({"eval_strategy": "epoch"}, "--eval_strategy epoch"),
        ({"logging_strategy": "epoch"}, "--logging_strategy epoch"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "--lr_scheduler_type reduce_lr_on"),
        ({"optim": "lomo"}, "--optim lomo"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(FourscoreError) as error:
        PPOConfig(**values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("config", ["ds.json", {"zero_optimization": {"stage": 2}}])
def test_deepspeed_points_to_fsdp(config):
    with pytest.raises(FourscoreError, match="accelerate launch --use_fsdp --fsdp_version 2"):
        PPOConfig(deepspeed=config)


def test_deepspeed_of_the_launcher_points_to_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(FourscoreError, match="accelerate launch --use_fsdp --fsdp_version 2"):
        PPOConfig()


def test_fsdp_flags():
    assert PPOConfig(fsdp="full_shard auto_wrap").fsdp is True
    assert PPOConfig(fsdp="true").fsdp is True
    assert not PPOConfig(fsdp="false").fsdp
    for flags in (
        {"fsdp": "full_shard", "fsdp_config": {"version": 1}},
        {"fsdp": "full_shard offload"},
        {"fsdp": True, "fsdp_config": '{"cpu_offload": true}'},
        {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
    ):
        with pytest.raises(FourscoreError, match="FSDP"):
            PPOConfig(**flags)


@pytest.mark.parametrize(
    ("environment", "fine"),
    [
        ({"FSDP_VERSION": "2"}, True),
        ({"FSDP_VERSION": "1"}, False),
        ({}, False),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, False),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, False),
    ],
)
def test_fsdp_of_the_launcher(monkeypatch, environment, fine):
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    if fine:
        PPOConfig()
    else:
        with pytest.raises(FourscoreError, match="FSDP"):
            PPOConfig()


def test_resolve_batches():
    args = PPOConfig(
        per_device_train_batch_size=4, gradient_accumulation_steps=6, num_mini_batches=3, total_episodes=100
    )
    args.resolve_batches(num_prompts=10, world_size=2)
    assert {name: getattr(args, name) for name in DERIVED_FIELDS} == {
        "world_size": 2,
        "micro_batch_size": 8,
        "local_batch_size": 24,
        "batch_size": 48,
        "local_mini_batch_size": 8,
        "mini_batch_size": 16,
        "num_total_batches": 3,  # 100 samples are two batches of 48 and a bit
    }


def test_length_of_a_run():
    epochs = PPOConfig(per_device_train_batch_size=10, num_train_epochs=2.5)
    epochs.resolve_batches(num_prompts=30, world_size=1)
    assert (epochs.total_episodes, epochs.num_total_batches) == (75, 8)
    steps = PPOConfig(per_device_train_batch_size=10, max_steps=4, total_episodes=1000)
    steps.resolve_batches(num_prompts=30, world_size=1)
    assert (steps.total_episodes, steps.num_total_batches) == (40, 4)


def test_several_completions_a_prompt():
    args = PPOConfig(per_device_train_batch_size=6, num_generations=4, num_train_epochs=2)
    args.resolve_batches(num_prompts=30, world_size=2)  # 12 samples of 3 prompts an update; groups may span processes
    assert (args.batch_size, args.total_episodes, args.num_total_batches) == (12, 240, 20)
    with pytest.raises(FourscoreError, match=r"--num_generations 4 .* 18 samples .*size 6 x .*steps 1 x 3 processes"):
        args.resolve_batches(num_prompts=30, world_size=3)


def test_batches_that_do_not_divide_name_the_flags():
    args = PPOConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_mini_batches=3)
    with pytest.raises(FourscoreError) as error:
        args.resolve_batches(num_prompts=10, world_size=1)
    for flag in ("--num_mini_batches 3", "--per_device_train_batch_size 4", "--gradient_accumulation_steps 2"):
        assert flag in str(error.value)
    with pytest.raises(FourscoreError, match="no prompt"):
        PPOConfig().resolve_batches(num_prompts=0, world_size=1)


def test_replace_of_a_finished_configuration():
    args = PPOConfig(total_episodes=64, eval_strategy="steps")
    args.resolve_batches(num_prompts=10, world_size=1)
    changed = dataclasses.replace(args, learning_rate=1e-5)
    assert (changed.learning_rate, changed.batch_size) == (1e-5, args.batch_size)
    with pytest.raises(FourscoreError, match="--batch_size"):
        dataclasses.replace(args, batch_size=5)


def test_model_config_checks():
    for values in (
        {"load_in_4bit": True, "load_in_8bit": True},
        {"dtype": "float64"},
        {"lora_r": 0},
        {"lora_dropout": 1.0},
        {"bnb_4bit_quant_type": "int4"},
    ):
        with pytest.raises(FourscoreError, match="--"):
            ModelConfig(**values)
    with pytest.raises(FourscoreError, match="--dataset_streaming"):
        ScriptArguments(dataset_streaming=True)


def test_peft_config():
    assert get_peft_config(ModelConfig()) is None
    _, _, model = parse(
        "--use_peft --lora_target_modules all-linear --lora_r 8 --use_rslora --lora_modules_to_save norm"
    )
    assert model.lora_target_modules == "all-linear"
    config = get_peft_config(model)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.05)
    assert (config.target_modules, config.modules_to_save) == ("all-linear", ["norm"])
    assert (config.use_rslora, config.use_dora, config.task_type) == (True, False, "CAUSAL_LM")
    _, _, model = parse("--use_peft --lora_target_modules q_proj v_proj")
    assert get_peft_config(model).target_modules == {"q_proj", "v_proj"}


def test_quantization_config(monkeypatch):
    assert get_quantization_config(ModelConfig()) is None
    eight = get_quantization_config(ModelConfig(load_in_8bit=True))
    assert eight.load_in_8bit
    assert eight.llm_int8_skip_modules == ["lm_head", "score"]
    four = get_quantization_config(ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True, dtype="bfloat16"))
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert four.llm_int8_skip_modules == ["lm_head", "score"]
    for available, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        automatic = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="auto"))
        assert automatic.bnb_4bit_compute_dtype == dtype


def test_device_map_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert get_kbit_device_map() is None


def test_help_strings_are_safe_for_argparse():
    help_text = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig)).format_help()
    assert "--kl_coef" in help_text
    assert "--value_training" in help_text

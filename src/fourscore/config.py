"""The three dataclasses a run is configured by, and all the checks that need no weights.

Field names, meanings and defaults are TRL 1.12's, so that its PPO scripts and command lines work with a changed import;
`fourscore.config_fields` lists the differences.
"""

# ruff: noqa: RUF009  (_flag and _option are dataclasses.field with the help string filled in)

import argparse
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available

from fourscore import demo
from fourscore.combinations import contradictions, contradictions_of_run, doubtful
from fourscore.config_fields import FIELDS, field_default, help_text
from fourscore.errors import Findings, FourscoreError
from fourscore.presets import FOLLOWS, PRESETS

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

DERIVED_FIELDS = (
    "world_size",
    "num_total_batches",
    "micro_batch_size",
    "local_batch_size",
    "batch_size",
    "local_mini_batch_size",
    "mini_batch_size",
)
"""`PPOConfig` fields that `resolve_batches` computes. They are no settings: a saved configuration leaves them out."""


def _flag(name: str, default: Any, **metadata: Any) -> Any:
    """A `PPOConfig` field whose help string comes from the table of fields.

    The default is None where a preset or another field fills it in (`fourscore.presets`), whatever type it then has.
    """
    return field(default=default, metadata={"help": help_text(name), **metadata})


def _option(help: str, default: Any) -> Any:
    return field(default=default, metadata={"help": help.replace("%", "%%")})


class _Switch(argparse.Action):
    """`--name [BOOL]` and `--no_name` of one field that is None when neither is given.

    `HfArgumentParser` makes `--no_name` only for fields that are True by default, which cannot tell an unset flag.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        negated = (option_string or "").startswith("--no")
        setattr(namespace, self.dest, values is not True if negated else values)


def _require(ok: bool, name: str, value: Any, must: str) -> None:
    if not ok:
        raise FourscoreError(f"--{name} {value}: {must}")


def _require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    shown = ", ".join(str(choice) for choice in choices if choice is not None)
    _require(value in choices, name, value, f"must be one of {shown}")


@dataclass
class ModelConfig:
    """Which checkpoints are loaded and how: TRL 1.12's fields, and a few more.

    Raises:
        FourscoreError: values out of range, or two that exclude each other; a line each.
    """

    model_name_or_path: str | None = _option("Tokenizer only (default: that of sft_model_path).", None)
    model_revision: str = _option("Branch, tag or commit of hub checkpoints.", "main")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = _option(
        "Type of frozen weights; what trains is float32.", "float32"
    )
    attn_implementation: str | None = _option("Attention, such as sdpa, eager or flash_attention_2.", None)
    trust_remote_code: bool = _option("Run model code that comes with a checkpoint.", False)
    allow_pickle: bool = _option("Read checkpoints that are pickles (.bin); reading one can run its code.", False)
    allow_untrained_reward_head: bool = _option("Accept a reward checkpoint whose score head is noise.", False)
    use_peft: bool = _option("Train LoRA adapters; without them the policy is its reference.", False)
    lora_r: int = _option("LoRA rank.", 16)
    lora_alpha: int = _option("LoRA alpha.", 32)
    lora_dropout: float = _option("LoRA dropout; saved, but 0 in training.", 0.05)
    lora_target_modules: list[str] | None = _option(
        "Modules with an adapter, or all-linear (default: PEFT's choice).", None
    )
    lora_target_parameters: list[str] | None = _option("Parameters with an adapter, such as experts of an MoE.", None)
    lora_modules_to_save: list[str] | None = _option("Modules of the policy that train in full.", None)
    lora_task_type: str = _option("PEFT task type of the policy; the value model's is SEQ_CLS.", "CAUSAL_LM")
    use_rslora: bool = _option("Scale adapters by alpha/sqrt(r).", False)
    use_dora: bool = _option("Train magnitude and direction apart (DoRA).", False)
    load_in_8bit: bool = _option("Frozen weights in 8 bits; needs use_peft.", False)
    load_in_4bit: bool = _option("Frozen weights in 4 bits; needs use_peft.", False)
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = _option("4-bit number format.", "nf4")
    use_bnb_nested_quant: bool = _option("Quantize the quantization constants.", False)
    bnb_4bit_quant_storage: str | None = _option("Type that 4-bit weights are stored as.", None)

    def __post_init__(self) -> None:
        """Check the values."""
        findings = Findings()
        if self.load_in_8bit and self.load_in_4bit:
            findings.error("--load_in_8bit and --load_in_4bit exclude each other: drop one")
        with findings.collect():
            _require_choice("dtype", self.dtype, ("auto", "bfloat16", "float16", "float32", None))
        with findings.collect():
            _require_choice("bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("fp4", "nf4"))
        with findings.collect():
            _require(self.lora_r >= 1, "lora_r", self.lora_r, "must be at least 1")
        with findings.collect():
            _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "must be from 0 to below 1")
        findings.raise_errors()
        # One word may be a keyword ("all-linear") or a regular expression, which PEFT takes as a string; of a name as a
        # string it would take no more than a module with just that path.
        names = self.lora_target_modules
        if isinstance(names, list) and len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0]):
            self.lora_target_modules = names[0]  # type: ignore[assignment]


@dataclass
class ScriptArguments:
    """Where the prompts come from: TRL 1.12's fields, and two more.

    Raises:
        FourscoreError: `dataset_streaming` is set.
    """

    dataset_name: str | None = _option("Prompts: hub name, file or folder (default: shipped ones).", None)
    dataset_config: str | None = _option("Configuration of a hub dataset.", None)
    dataset_train_split: str = _option("Split to train on.", "train")
    dataset_test_split: str = _option("Split to evaluate on.", "test")
    eval_dataset_name: str | None = _option("Prompts to evaluate on, if in another place.", None)
    prompt_column: str = _option("Column with text, a conversation or input_ids.", "prompt")
    dataset_streaming: bool = _option("Not supported: the number of prompts sets the length of a run.", False)
    ignore_bias_buffers: bool = _option("Accepted, has no effect.", False)

    def __post_init__(self) -> None:
        """Check the values."""
        if self.dataset_streaming:
            raise FourscoreError(
                "--dataset_streaming is not supported, the number of prompts sets the length of a run: "
                "drop it, or save the prompts you want to a .jsonl file"
            )


@dataclass
class PPOConfig(TrainingArguments):
    """Everything about a PPO run but its models and data.

    TRL 1.12's `PPOConfig` on top of `transformers.TrainingArguments`. `fourscore.config_fields.FIELDS` says of every
    field whether it is honoured, changed or refused.

    Raises:
        FourscoreError: values out of range, or any but the default for a field that is refused; a line each.
    """

    # Models
    sft_model_path: str | None = _flag("sft_model_path", None)
    reward_model_path: str | None = _flag("reward_model_path", None)
    model_adapter_name: str | None = _flag("model_adapter_name", None)
    ref_adapter_name: str | None = _flag("ref_adapter_name", None)
    value_training: Literal["adapter", "full"] = _flag("value_training", "adapter")
    freeze_layers: int = _flag("freeze_layers", 0)
    share_value_backbone: bool = _flag("share_value_backbone", False)
    value_model_path: str | None = _flag("value_model_path", None)

    # Rewards
    reward_funcs: list[str] | None = _flag("reward_funcs", None)
    reward_url: list[str] | None = _flag("reward_url", None)
    reward_weights: list[float] | None = _flag("reward_weights", None)
    reward_timeout: float = _flag("reward_timeout", 60.0)
    reward_retries: int = _flag("reward_retries", 3)
    reward_concurrency: int = _flag("reward_concurrency", 8)
    reward_batch_size: int = _flag("reward_batch_size", 64)
    missing_eos_penalty: float | None = _flag("missing_eos_penalty", None)
    length_penalty: float = _flag("length_penalty", 0.0)
    overlong_buffer: int = _flag("overlong_buffer", 0)
    overlong_penalty: float = _flag("overlong_penalty", 1.0)
    score_clip: float | None = _flag("score_clip", None)
    normalize_scores: bool = _flag("normalize_scores", False)
    center_scores: int = _flag("center_scores", 0)

    # Rollout
    rollout_engine: Literal["transformers", "vllm"] = _flag("rollout_engine", "transformers")
    vllm_server_url: str | None = _flag("vllm_server_url", None)
    vllm_python: str | None = _flag("vllm_python", None)
    vllm_gpu_memory_utilization: float = _flag("vllm_gpu_memory_utilization", 0.3)
    vllm_timeout: float = _flag("vllm_timeout", 300.0)
    vllm_retries: int = _flag("vllm_retries", 8)
    response_length: int = _flag("response_length", 53)
    min_response_length: int = _flag("min_response_length", 0)
    num_generations: int = _flag("num_generations", None)
    temperature: float = _flag("temperature", None)
    top_k: int = _flag("top_k", 0)
    top_p: float = _flag("top_p", 1.0)
    stop_token: Literal["eos", "none"] | None = _flag("stop_token", "eos")
    stop_token_id: list[int] | None = _flag("stop_token_id", None)
    stop_strings: list[str] | None = _flag("stop_strings", None)
    max_prompt_length: int | None = _flag("max_prompt_length", None)
    max_prompt_length_action: Literal["drop", "truncate"] = _flag("max_prompt_length_action", "drop")
    local_rollout_forward_batch_size: int = _flag("local_rollout_forward_batch_size", 64)
    pack_rollout_weights: bool = _flag("pack_rollout_weights", True)
    cuda_graphs: Literal["none", "forward", "all"] = _flag("cuda_graphs", "forward")
    keep_freed_memory: bool | None = _flag("keep_freed_memory", None)
    dataset_num_proc: int | None = _flag("dataset_num_proc", None)
    num_sample_generations: int = _flag("num_sample_generations", 10)

    # PPO
    preset: Literal["n_plus", "vapo"] = _flag("preset", "n_plus")
    num_ppo_epochs: int = _flag("num_ppo_epochs", 4)
    num_mini_batches: int = _flag("num_mini_batches", 1)
    tokens_per_microbatch: int | None = _flag("tokens_per_microbatch", None)
    kl_coef: float = _flag("kl_coef", None)
    kl_estimator: Literal["k1", "k3"] = _flag("kl_estimator", "k1")
    use_kl_loss: bool = _flag("use_kl_loss", False)
    kl_target: float | None = _flag("kl_target", None)
    kl_horizon: int = _flag("kl_horizon", 10_000)
    early_stop_kl: float | None = _flag("early_stop_kl", None)
    cliprange: float = _flag("cliprange", 0.2)
    cliprange_high: float = _flag("cliprange_high", None)
    dual_clip: float | None = _flag("dual_clip", None)
    entropy_coef: float = _flag("entropy_coef", 0.0)
    loss_aggregation: Literal["token", "sequence"] = _flag("loss_aggregation", "token")
    positive_lm_coef: float = _flag("positive_lm_coef", None)
    positive_lm_threshold: float = _flag("positive_lm_threshold", 0.0)
    cliprange_value: float = _flag("cliprange_value", 0.2)
    vf_coef: float = _flag("vf_coef", 0.1)
    value_warmup_updates: int = _flag("value_warmup_updates", None)
    gamma: float = _flag("gamma", 1.0)
    lam: float = _flag("lam", 0.95)
    lam_value: float = _flag("lam_value", None)
    lam_alpha: float = _flag("lam_alpha", None)
    whiten_rewards: bool = _flag("whiten_rewards", False)
    whiten_advantages: bool = _flag("whiten_advantages", True)
    ema_decay: float | None = _flag("ema_decay", None)
    stop_on_ratio: bool = _flag("stop_on_ratio", False)

    # Batch and length
    total_episodes: int | None = _flag("total_episodes", None)
    world_size: int | None = _flag("world_size", None)
    num_total_batches: int | None = _flag("num_total_batches", None)
    micro_batch_size: int | None = _flag("micro_batch_size", None)
    local_batch_size: int | None = _flag("local_batch_size", None)
    batch_size: int | None = _flag("batch_size", None)
    local_mini_batch_size: int | None = _flag("local_mini_batch_size", None)
    mini_batch_size: int | None = _flag("mini_batch_size", None)

    # Inherited fields with another default. `push_to_hub` is here because TRL's class declares it too.
    output_dir: str | None = _flag("output_dir", None)
    learning_rate: float = _flag("learning_rate", None)
    value_learning_rate: float = _flag("value_learning_rate", None)
    value_lr_scheduler_type: str = _flag("value_lr_scheduler_type", None)
    value_warmup_steps: float = _flag("value_warmup_steps", None)
    value_max_grad_norm: float = _flag("value_max_grad_norm", None)
    logging_steps: float = _flag("logging_steps", 1)
    eval_steps: float | None = _flag("eval_steps", 10)
    push_to_hub: bool = _flag("push_to_hub", False)
    bf16: bool | None = _flag("bf16", None, nargs="?", const=True)
    ds3_gather_for_generation: bool = _flag("ds3_gather_for_generation", True)

    ignore_plan: bool = _flag("ignore_plan", False)
    profile: bool = _flag("profile", False)

    # transformers 5.23 has both names, before that there is the old one alone. Declared here, both always work.
    activation_checkpointing: bool | None = _flag("activation_checkpointing", None, nargs="?", const=True)
    activation_checkpointing_kwargs: dict[str, Any] | str | None = _flag("activation_checkpointing_kwargs", None)
    gradient_checkpointing: bool | None = _flag(
        "gradient_checkpointing",
        None,
        nargs="?",
        const=True,
        action=_Switch,
        aliases=["--no_gradient_checkpointing", "--no-gradient-checkpointing"],
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = _flag("gradient_checkpointing_kwargs", None)

    # Whether total_episodes follows from other fields: a saved configuration then leaves it to them.
    episodes_derived = False
    # Whether nobody said anything of activation checkpointing, on an accelerator: the plan may then switch it on.
    checkpointing_open = False

    def __post_init__(self) -> None:
        """Check the values and put in those that depend on the machine."""
        self._refuse_deepspeed()
        self._resolve_preset()
        if isinstance(self.stop_token_id, int):  # TRL's type
            self.stop_token_id = [self.stop_token_id]
        if isinstance(self.stop_strings, str):
            self.stop_strings = [self.stop_strings]
        findings = Findings()
        for check in (self._refuse_fields, self._check_values):
            with findings.collect():
                check()
        contradictions(self, findings)
        findings.raise_errors()
        for sentence in doubtful(self):
            warnings.warn(sentence, stacklevel=3)

        self.output_dir = os.path.join("runs", "ppo") if self.output_dir is None else str(self.output_dir)
        self.sft_model_path = str(demo.POLICY if self.sft_model_path is None else self.sft_model_path)
        if self.reward_model_path is not None:
            self.reward_model_path = str(self.reward_model_path)
        elif self.sft_model_path == str(demo.POLICY) and not self.reward_funcs and not self.reward_url:
            self.reward_model_path = str(demo.REWARD)
        # "none" is how a command line says None; a stop token id stands in for either.
        if self.stop_token == "none" or self.stop_token_id is not None:
            self.stop_token = None

        # transformers takes True from Python only, and the name of a sharding strategy from a command line.
        self.fsdp: Any = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)

        accelerated = _has_accelerator() and not self.use_cpu
        self._resolve_checkpointing(accelerated)
        launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16 is None:
            if launcher_precision not in ("no", "bf16"):
                raise FourscoreError(
                    f"accelerate launch --mixed_precision {launcher_precision} is not supported: use bf16 or no"
                )
            supported = accelerated and bool(is_torch_bf16_gpu_available())
            self.bf16 = supported or launcher_precision == "bf16"
        emulated = bool(self.bf16) and not accelerated
        if emulated:
            warnings.warn("--bf16 on a CPU is emulated and slow: leave it out to train in float32", stacklevel=3)

        # transformers refuses bf16 where there is no accelerator unless use_cpu is set, which is no more than caution.
        self.bf16 = bool(self.bf16) and not emulated
        super().__post_init__()
        self.bf16 = self.bf16 or emulated
        self.mixed_precision = "bf16" if self.bf16 else "no"

        self._check_fsdp()
        self._check_schedules()
        self._check_derived()
        self.world_size = self._num_processes()

    def _resolve_preset(self) -> None:
        """Put the preset's values into fields that were left open, and then what follows from others."""
        _require_choice("preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, other in FOLLOWS.items():
            if getattr(self, name) is None:
                setattr(self, name, getattr(self, other))

    def resolve_batches(self, num_prompts: int, world_size: int) -> None:
        """Compute the batch sizes and the number of updates.

        Sizes count samples. With `local_batch_size = per_device_train_batch_size * gradient_accumulation_steps`:
        `batch_size` is that over all processes, a minibatch one of `num_mini_batches` equal parts of it, and
        `num_total_batches` the updates that make up `total_episodes`, the last one included even if it goes beyond.
        An update takes `batch_size / num_generations` prompts, and a pass over the prompts has `num_generations`
        samples of each.

        Args:
            num_prompts: prompts in the training set.
            world_size: number of processes.

        Raises:
            FourscoreError: `num_mini_batches` or `num_generations` does not divide the batch, there are no prompts, or
                other settings do not fit the length of the run.
        """
        if num_prompts < 1:
            raise FourscoreError("--dataset_name: there is no prompt to train on")
        for name, size in self._batch_sizes(world_size).items():
            setattr(self, name, size)
        self._resolve_length(num_prompts)
        findings = Findings()
        contradictions_of_run(self, findings)
        findings.raise_errors()

    def _resolve_length(self, num_prompts: int) -> None:
        assert self.batch_size is not None
        if self.max_steps > 0:
            self.num_total_batches = self.max_steps
            self.total_episodes = self.max_steps * self.batch_size
            self.episodes_derived = True
            return
        if self.total_episodes is None:
            self.total_episodes = int(self.num_train_epochs * num_prompts * self.num_generations)
            self.episodes_derived = True
        if self.total_episodes < 1:
            raise FourscoreError(
                f"--num_train_epochs {self.num_train_epochs} of {num_prompts} prompts is not one sample: raise it"
            )
        self.num_total_batches = math.ceil(self.total_episodes / self.batch_size)

    def _batch_sizes(self, world_size: int) -> dict[str, int]:
        local = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if local % self.num_mini_batches:
            raise FourscoreError(
                f"--num_mini_batches {self.num_mini_batches} does not divide the {local} samples of an update per "
                f"process (--per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}): change one of the three"
            )
        if local * world_size % self.num_generations:
            processes = f" x {world_size} processes" if world_size > 1 else ""
            raise FourscoreError(
                f"--num_generations {self.num_generations} does not divide the {local * world_size} samples of an "
                f"update (--per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}{processes}): change one of them"
            )
        return {
            "world_size": world_size,
            "micro_batch_size": self.per_device_train_batch_size * world_size,
            "local_batch_size": local,
            "batch_size": local * world_size,
            "local_mini_batch_size": local // self.num_mini_batches,
            "mini_batch_size": local * world_size // self.num_mini_batches,
        }

    def _num_processes(self) -> int:
        return self.distributed_state.num_processes if self.distributed_state is not None else 1

    def _check_derived(self) -> None:
        """Refuse derived fields, except what `dataclasses.replace` of a resolved configuration hands back."""
        given = {name: getattr(self, name) for name in DERIVED_FIELDS if getattr(self, name) is not None}
        if not given:
            return
        expected: dict[str, int | None] = dict(self._batch_sizes(self._num_processes()))
        expected["num_total_batches"] = self.max_steps if self.max_steps > 0 else None
        if expected["num_total_batches"] is None and self.total_episodes is not None:
            expected["num_total_batches"] = math.ceil(self.total_episodes / (expected["batch_size"] or 1))
        for name, value in given.items():
            _require(value == expected[name], name, value, FIELDS[name].note)

    def _refuse_deepspeed(self) -> None:
        by_launcher = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if not self.deepspeed and not by_launcher:
            return
        source = "--deepspeed" if self.deepspeed else "the DeepSpeed configuration of accelerate launch"
        raise FourscoreError(
            f"{source} is not supported (it takes one trained model, PPO has two): use accelerate launch --use_fsdp "
            "--fsdp_version 2, which shards as ZeRO-3 does"
        )

    def _refuse_fields(self) -> None:
        findings = Findings()
        for item in fields(self):
            note = FIELDS.get(item.name)
            if note is None or note.status != "refused" or item.name in DERIVED_FIELDS:
                continue
            value, default = getattr(self, item.name), field_default(item)
            # A field that transformers has normalized already (replace() of a finished configuration) is still unset.
            unset = value == default or (not value and not default) or value == AcceleratorConfig()
            with findings.collect():
                _require(unset, item.name, value, note.note)
        findings.raise_errors()

    def _check_fsdp(self) -> None:
        """Hold the FSDP settings of the flags and of `accelerate launch` against what is supported."""
        settings: dict[str, Any] = {}
        if self.fsdp:
            settings = {"version": 2} | (self.fsdp_config if isinstance(self.fsdp_config, dict) else {})
        elif parse_flag_from_env("ACCELERATE_USE_FSDP"):
            settings = {
                "version": os.environ.get("FSDP_VERSION", "1"),
                "cpu_offload": parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
                "activation_checkpointing": parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"),
            }
        if settings and str(settings["version"]) != "2":
            raise FourscoreError("FSDP version 1 is not supported: use accelerate launch --use_fsdp --fsdp_version 2")
        if settings and self.share_value_backbone:
            raise FourscoreError("--share_value_backbone with FSDP is not supported: leave out one of the two")
        if str(settings.get("cpu_offload", False)).lower() == "true":
            raise FourscoreError("FSDP's CPU offload is not supported: use more processes, or --use_peft")
        if str(settings.get("activation_checkpointing", False)).lower() == "true":
            raise FourscoreError("FSDP's activation_checkpointing is not supported: use --gradient_checkpointing true")

    def _resolve_checkpointing(self, accelerated: bool) -> None:
        pairs = (
            ("activation_checkpointing", "gradient_checkpointing"),
            ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        )
        for new, old in pairs:
            value = getattr(self, old) if getattr(self, new) is None else getattr(self, new)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise FourscoreError(f"--{old} {value}: is not JSON ({error})") from None
            if new == "activation_checkpointing" and value is None:
                value, self.checkpointing_open = False, accelerated
            setattr(self, new, value)
            setattr(self, old, value)

    def _check_values(self) -> None:
        at_least_one = (
            "response_length",
            "local_rollout_forward_batch_size",
            "num_ppo_epochs",
            "num_mini_batches",
            "per_device_train_batch_size",
            "tokens_per_microbatch",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "total_episodes",
            "max_prompt_length",
            "dataset_num_proc",
            "save_total_limit",
            "num_generations",
            "reward_concurrency",
            "reward_batch_size",
            "kl_horizon",
        )
        above_zero = (
            "temperature",
            "cliprange",
            "cliprange_high",
            "cliprange_value",
            "missing_eos_penalty",
            "num_train_epochs",
            "reward_timeout",
            "vllm_timeout",
            "score_clip",
            "kl_target",
            "early_stop_kl",
        )
        not_negative = (
            "freeze_layers",
            "reward_retries",
            "vllm_retries",
            "overlong_buffer",
            "overlong_penalty",
            "center_scores",
            "min_response_length",
            "top_k",
            "kl_coef",
            "entropy_coef",
            "positive_lm_coef",
            "value_warmup_updates",
            "lam_alpha",
            "vf_coef",
            "learning_rate",
            "value_learning_rate",
            "value_warmup_steps",
            "value_max_grad_norm",
            "weight_decay",
            "max_grad_norm",
            "num_sample_generations",
        )
        findings = Findings()
        for names, holds, must in (
            (at_least_one, lambda value: value >= 1, "must be at least 1"),
            (above_zero, lambda value: value > 0, "must be above 0"),
            (not_negative, lambda value: value >= 0, "must not be negative"),
            (("gamma", "lam", "lam_value"), lambda value: 0 <= value <= 1, "must be from 0 to 1"),
            (("top_p",), lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
            (("ema_decay", "vllm_gpu_memory_utilization"), lambda value: 0 < value < 1, "must be between 0 and 1"),
            (("dual_clip",), lambda value: value > 1, "must be above 1"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None:
                    with findings.collect():
                        _require(holds(value) and math.isfinite(value), name, value, must)
        choices: dict[str, tuple[str | None, ...]] = {
            "kl_estimator": ("k1", "k3"),
            "value_training": ("adapter", "full"),
            "rollout_engine": ("transformers", "vllm"),
            "stop_token": ("eos", "none", None),
            "loss_aggregation": ("token", "sequence"),
            "max_prompt_length_action": ("drop", "truncate"),
        }
        for name, allowed in choices.items():
            with findings.collect():
                _require_choice(name, getattr(self, name), allowed)
        if self.share_value_backbone and self.value_training == "full":
            findings.error(
                "--share_value_backbone with --value_training full: the value model has no weights but its head then; "
                "drop one"
            )
        for index in self.stop_token_id or ():
            with findings.collect():
                _require(index >= 0, "stop_token_id", index, "must not be negative")
        if self.overlong_buffer > max(self.response_length, 0):
            findings.error(
                f"--overlong_buffer {self.overlong_buffer}: is above --response_length {self.response_length}; lower it"
            )
        for weight in self.reward_weights or ():
            with findings.collect():
                _require(math.isfinite(weight), "reward_weights", weight, "must be a number")
        with findings.collect():
            _require(math.isfinite(self.length_penalty), "length_penalty", self.length_penalty, "must be a number")
        urls = [("reward_url", url) for url in self.reward_url or ()]
        for name, url in [*urls, ("vllm_server_url", self.vllm_server_url)]:
            if url is not None:
                with findings.collect():
                    must = "must start with http:// or https://"
                    _require(re.match(r"https?://[^/]+", url) is not None, name, url, must)
        if self.top_k == 1:
            findings.error("--top_k 1: leaves one token to draw, of which nothing is learned; give more, or 0 for all")
        if not all(self.stop_strings or ()):
            findings.error("--stop_strings: one of the texts is empty; leave it out")
        if self.min_response_length > max(self.response_length, 0):
            findings.error(
                f"--min_response_length {self.min_response_length}: is above --response_length "
                f"{self.response_length}; lower it"
            )
        findings.raise_errors()

    def _check_schedules(self) -> None:
        """Refuse the values of otherwise supported fields that the training loop has no moment or metric for."""
        findings = Findings()
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            value = getattr(self, name).value
            with findings.collect():
                _require(value in ("no", "steps"), name, value, "must be no or steps: PPO counts updates")
        value_schedule = getattr(self.value_lr_scheduler_type, "value", self.value_lr_scheduler_type)
        with findings.collect():
            _require_choice("value_lr_scheduler_type", value_schedule, tuple(kind.value for kind in SchedulerType))
            self.value_lr_scheduler_type = SchedulerType(value_schedule)
        schedules = {self.lr_scheduler_type.value: "lr_scheduler_type"}
        schedules.setdefault(value_schedule, "value_lr_scheduler_type")
        for name, flag in schedules.items():
            with findings.collect():
                must = "follows an evaluation loss, which PPO lacks: try linear"
                _require(name not in ("reduce_lr_on_plateau", "greedy"), flag, name, must)
        optimizer = self.optim.value
        special = optimizer.startswith(("galore", "apollo", "lomo", "adalomo", "schedule_free"))
        with findings.collect():
            _require(not special, "optim", optimizer, "is not supported: try adamw_torch or a bitsandbytes optimizer")
        findings.raise_errors()


def _has_accelerator() -> bool:
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return False
    return torch.accelerator.is_available()


def get_peft_config(model_args: ModelConfig) -> "LoraConfig | None":
    """The LoRA configuration of the policy, or None without `use_peft`."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


def get_quantization_config(model_args: ModelConfig) -> "BitsAndBytesConfig | None":
    """The bitsandbytes configuration of frozen weights, or None without `load_in_4bit` or `load_in_8bit`.

    Heads stay as they are: a quantized score head could not train.
    """
    if not model_args.load_in_4bit and not model_args.load_in_8bit:
        return None
    from transformers import BitsAndBytesConfig

    heads = ["lm_head", "score"]
    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    compute_dtype = model_args.dtype
    if compute_dtype in (None, "auto"):
        compute_dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
        llm_int8_skip_modules=heads,
    )


def get_kbit_device_map() -> dict[str, int] | None:
    """The device map of a quantized model: all of it on this process's accelerator. None on a CPU."""
    if not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type not in ("cuda", "xpu"):
        return None
    from accelerate import PartialState

    return {"": PartialState().local_process_index}

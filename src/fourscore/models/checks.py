"""What can be known of checkpoints before a byte of weights is read: from configs, safetensors headers, tokenizers."""

import copy
import difflib
import filecmp
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from fourscore import demo
from fourscore.config import get_peft_config, get_quantization_config
from fourscore.errors import Findings, FourscoreError
from fourscore.models.adapters import HEAD, OUTPUT_LAYERS
from fourscore.models.checkpoint import ADAPTER_CONFIG, Checkpoint, TensorHeader, find_checkpoint
from fourscore.models.cpu import cpu_info
from fourscore.models.layout import SFT_ADAPTER, Layout, decide_layout, frozen_dtype, value_start
from fourscore.models.tokenizer import first_conflict, load_tokenizer

if TYPE_CHECKING:
    from fourscore.config import ModelConfig, PPOConfig

logger = logging.getLogger(__name__)

_OTHER_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "RewardModel")
_LINEAR = (nn.Linear, Conv1D)
_ADAPTABLE = (*_LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_EMULATED_BY = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fphp")}


@dataclass(frozen=True)
class Inspected:
    """What is known of the models; None where what was found does not let go on.

    Attributes:
        sft: the SFT checkpoint.
        reward: the reward checkpoint; None, too, where none is named.
        tokenizer: the policy's, as its files have it.
        skeletons: `policy`, `reward_model` and `value_model` on the meta device; the latter two may be one, and a value
            model that is a head on the policy has none.
        value: the checkpoint that `--value_model_path` names.
        reward_tokenizer: the reward checkpoint's own, if it reads text: its tokens are not the policy's.
    """

    sft: Checkpoint | None
    reward: Checkpoint | None
    tokenizer: PreTrainedTokenizerBase | None
    skeletons: Mapping[str, nn.Module]
    value: Checkpoint | None = None
    reward_tokenizer: PreTrainedTokenizerBase | None = None

    def layout(self, model_args: "ModelConfig", training_args: "PPOConfig", *, on_cpu: bool) -> Layout:
        """Who shares what; only without errors."""
        assert self.sft is not None
        reads_text = self.reward_tokenizer is not None
        return decide_layout(
            self.sft, self.reward, model_args, training_args, on_cpu=on_cpu, reads_text=reads_text, value=self.value
        )


def check_models(model_args: "ModelConfig", training_args: "PPOConfig") -> Inspected:
    """Looks at the checkpoints and refuses what cannot be trained.

    Raises:
        FourscoreError: a line for each reason, with the flag, its value and the way out.
    """
    findings = Findings()
    inspected = inspect_models(model_args, training_args, findings)
    findings.raise_errors()
    return inspected


def inspect_models(
    model_args: "ModelConfig", training_args: "PPOConfig", findings: Findings, *, trains: bool = True
) -> Inspected:
    """What `check_models` does, with every error noted.

    Args:
        model_args: which checkpoints, and how they are to be loaded.
        training_args: their paths, and what trains.
        findings: takes errors and warnings.
        trains: False where the models are to compute only, so that nothing has to be fit to train.
    """
    check_quantization(model_args, training_args, findings, trains)
    on_cpu = training_args.use_cpu or not torch.accelerator.is_available()
    model_args = _usable_attention(model_args, on_cpu, findings)

    def find(flag: str, path: str | None) -> Checkpoint | None:
        return None if path is None else find_checkpoint(flag, str(path), model_args, findings)

    sft = find("--sft_model_path", training_args.sft_model_path)
    reward = find("--reward_model_path", training_args.reward_model_path)
    value = find("--value_model_path", training_args.value_model_path if trains else None)
    adapter = None if sft is None else sft.adapter
    if sft is not None and adapter is not None and Path(adapter.path, SFT_ADAPTER, ADAPTER_CONFIG).is_file():
        findings.error(
            f"{sft.named}: was trained on top of the adapter in its folder {SFT_ADAPTER}; merge both into their base, "
            "and give that"
        )
    tokenizer = None
    source = model_args.model_name_or_path or (None if sft is None else tokenizer_place(sft))
    if source is not None:
        flag = "--model_name_or_path" if model_args.model_name_or_path else "--sft_model_path"
        with findings.collect():
            tokenizer = load_tokenizer(source, model_args.model_revision, model_args.trust_remote_code, flag)

    skeletons: dict[str, nn.Module] = {}
    if sft is not None:
        with findings.collect():
            check_policy(sft)
            skeletons["policy"] = build_skeleton(sft, AutoModelForCausalLM, model_args)
            check_adapter_fits(sft, skeletons["policy"])
    if sft is not None and tokenizer is not None:
        with findings.collect():
            check_shipped_policy(str(training_args.sft_model_path), tokenizer)
        with findings.collect():
            check_stop_token(training_args, tokenizer, sft.embedding_rows)
        with findings.collect():
            check_top_k(training_args, sft.embedding_rows)
        with findings.collect():
            _check_beyond_rows(tokenizer, str(source), sft)
    reward_tokenizer = None
    if reward is not None:
        with findings.collect():
            skeletons["reward_model"] = skeleton = check_reward(reward, model_args, findings)
            check_adapter_fits(reward, skeleton)
            if sft is not None and (why := reads_text(reward, skeleton, sft, tokenizer, str(source), model_args)):
                reward_tokenizer = tokenizer_of(reward, model_args)
                if reward_tokenizer is None:
                    raise FourscoreError(
                        f"{reward.named}: {why}, so it has to read text, but no tokenizer of its own is with it; "
                        "copy that there, or give a reward model with the policy's tokenizer"
                    )
                logger.info("%s reads text: %s", reward.named, why)
    if not trains:
        return Inspected(sft, reward, tokenizer, skeletons, None, reward_tokenizer)
    named_value = value
    if sft is None:
        value = value or reward  # as far as one can tell
    elif reward is not None or training_args.reward_model_path is None:
        value = value_start(sft, reward, reads_text=reward_tokenizer is not None, value=value)
    if training_args.share_value_backbone:
        pass  # the value model is a head on the policy
    elif value is reward and "reward_model" in skeletons:
        skeletons["value_model"] = skeletons["reward_model"]
    elif value is not None and value is not reward and sft is not None:
        with findings.collect():
            skeletons["value_model"] = _value_skeleton(value, sft, tokenizer, str(source), model_args)
    used = {id(c): c for c in (sft, value) if c is not None}
    _check_freeze_layers(model_args, training_args, list(used.values()), findings)
    for checkpoint, full in ((sft, False), (value, training_args.value_training == "full")):
        if checkpoint is not None:
            with findings.collect():
                _check_trainable(checkpoint, full, model_args)
    for checkpoint in {id(c): c for c in (sft, reward, value) if c is not None}.values():
        _check_dtype(checkpoint, model_args, on_cpu, findings)
    if model_args.use_peft:
        check_lora(model_args, training_args, sft, value, skeletons, findings)
    return Inspected(sft, reward, tokenizer, skeletons, named_value, reward_tokenizer)


def _value_skeleton(
    start: Checkpoint,
    sft: Checkpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    model_args: "ModelConfig",
) -> nn.Module:
    """The value model that starts elsewhere than from the reward checkpoint, on the meta device."""
    config = start.config
    if (
        config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and "AutoModelForSequenceClassification" not in (getattr(config, "auto_map", None) or {})
    ):
        raise FourscoreError(
            f"{start.named}: transformers has no sequence classifier of model type {config.model_type!r}, which the "
            "value model would be; name another with --value_model_path"
        )
    skeleton = build_skeleton(start, AutoModelForSequenceClassification, model_args)
    if not isinstance(getattr(skeleton, HEAD, None), nn.Linear):
        raise FourscoreError(
            f"{start.named}: {type(skeleton).__name__} has no linear head named {HEAD!r}, as decoders have, and a "
            "value model reads the policy's tokens one by one; name another with --value_model_path"
        )
    if start is not sft:
        check_adapter_fits(start, skeleton)
        labels = _labels(dict(start.tensors or {}))
        if labels not in (None, 1):
            raise FourscoreError(f"{start.named}: has num_labels={labels}, a value model has 1; give another")
        why = _other_tokens(start, sft, tokenizer, source, model_args)
        if why is not None:
            raise FourscoreError(f"{start.named}: {why}; give a value model with the policy's tokenizer")
    return skeleton


def reads_text(
    reward: Checkpoint,
    skeleton: nn.Module,
    sft: Checkpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    model_args: "ModelConfig",
) -> str | None:
    """Why a reward model cannot read the policy's tokens; None where it can.

    Args:
        reward: the reward checkpoint.
        skeleton: its model.
        sft: the SFT checkpoint.
        tokenizer: the policy's; None if that could not be had.
        source: where it came from.
        model_args: revision and `trust_remote_code` of the reward checkpoint's tokenizer.
    """
    if not isinstance(getattr(skeleton, HEAD, None), nn.Linear):
        return f"{type(skeleton).__name__} has no linear head named {HEAD!r}, as decoders have"
    return _other_tokens(reward, sft, tokenizer, source, model_args)


def _other_tokens(
    checkpoint: Checkpoint,
    sft: Checkpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    model_args: "ModelConfig",
) -> str | None:
    """How the tokens of a checkpoint differ from the policy's; None if they do not."""
    if tokenizer is not None and not _same_tokenizer(checkpoint.path, source):
        other = tokenizer_of(checkpoint, model_args)
        if other is not None and (conflict := first_conflict(tokenizer, other)) is not None:
            theirs, mine = other.convert_ids_to_tokens(conflict), tokenizer.convert_ids_to_tokens(conflict)
            return f"id {conflict} is {theirs!r} there and {mine!r} in {source}"
    if checkpoint.embedding_rows != sft.embedding_rows:
        return f"it has a vocabulary of {checkpoint.embedding_rows}, and {sft.named} one of {sft.embedding_rows}"
    return None


def check_quantization(
    model_args: "ModelConfig", training_args: "PPOConfig", findings: Findings, trains: bool = True
) -> None:
    """Refuses 4 and 8 bits where nothing could be trained on top, or bitsandbytes is missing."""
    flag = "--load_in_4bit" if model_args.load_in_4bit else "--load_in_8bit" if model_args.load_in_8bit else None
    if flag is None:
        return
    if trains and not model_args.use_peft:
        findings.error(f"{flag}: quantized weights cannot be trained; add --use_peft to train adapters on them")
    if trains and training_args.value_training == "full":
        findings.error(f"--value_training full with {flag}: quantized weights cannot be trained; use adapter")
    if trains and training_args.fsdp:
        findings.error(f"--fsdp with {flag}: FSDP cannot shard quantized weights; leave out one of the two")
    if importlib.util.find_spec("bitsandbytes") is None:
        findings.error(f"{flag} needs bitsandbytes: pip install 'fourscore[quantization]'")
        return
    try:
        get_quantization_config(model_args)
    except (ValueError, TypeError, AttributeError) as error:  # what bitsandbytes has no type for
        storage = model_args.bnb_4bit_quant_storage
        findings.error(f"--bnb_4bit_quant_storage {storage}: {_line(error)}; use uint8, or leave it out")


def _check_freeze_layers(
    model_args: "ModelConfig", training_args: "PPOConfig", checkpoints: list[Checkpoint], findings: Findings
) -> None:
    """Refuses to freeze layers under adapters, or so many that none is left to train."""
    n = training_args.freeze_layers
    if n and model_args.use_peft:
        findings.error(f"--freeze_layers {n} with --use_peft: every layer is frozen under adapters; drop one")
    for checkpoint in checkpoints:
        layers = getattr(checkpoint.config.get_text_config(), "num_hidden_layers", None)
        if n and layers is not None and n >= layers:
            findings.error(
                f"--freeze_layers {n}: {checkpoint.named} has {layers} layers, and the last one must train; "
                f"give at most {layers - 1}"
            )


def check_policy(policy: Checkpoint) -> None:
    """Refuses what is not a causal LM."""
    config = policy.config
    architectures = config.architectures or []
    wrong = [name for name in architectures if name.endswith(_OTHER_TASKS)]
    if wrong and not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise FourscoreError(f"{policy.named}: is a {wrong[0]}, not a causal LM; give the SFT checkpoint")
    if policy.adapter is not None and policy.adapter.config.task_type == TaskType.SEQ_CLS:
        raise FourscoreError(f"{policy.named}: is an adapter of a sequence classifier; give the SFT checkpoint")
    auto_map = getattr(config, "auto_map", None) or {}
    if config.is_encoder_decoder or (
        config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in auto_map
    ):
        raise FourscoreError(f"{policy.named}: model type {config.model_type!r} is not a causal LM; give one")


def check_reward_type(reward: Checkpoint) -> None:
    """Refuses what transformers has no sequence classifier for."""
    config = reward.config
    auto_map = getattr(config, "auto_map", None) or {}
    if (
        config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and "AutoModelForSequenceClassification" not in auto_map
    ):
        raise FourscoreError(
            f"{reward.named}: model type {config.model_type!r} has no sequence classifier in transformers; "
            "give a reward model that AutoModelForSequenceClassification loads"
        )


def check_reward(reward: Checkpoint, model_args: "ModelConfig", findings: Findings) -> nn.Module:
    """Refuses what is not a sequence classifier with a trained head of one label.

    Args:
        reward: the reward checkpoint.
        model_args: attention, `allow_untrained_reward_head`.
        findings: takes what is wrong with the head.

    Returns:
        its model on the meta device.

    Raises:
        FourscoreError: there is no such model.
    """
    check_reward_type(reward)
    error: FourscoreError | None = None
    try:
        skeleton = build_skeleton(reward, AutoModelForSequenceClassification, model_args)
    except FourscoreError as caught:
        if model_args.attn_implementation is None:
            raise
        error = caught
        plain = copy.copy(model_args)
        plain.attn_implementation = None
        skeleton = build_skeleton(reward, AutoModelForSequenceClassification, plain)
    with findings.collect():
        _check_head(reward, skeleton, model_args.allow_untrained_reward_head)
    if error is not None:
        raise error
    return skeleton


def _check_head(reward: Checkpoint, skeleton: nn.Module, allow_untrained_head: bool) -> None:
    config = reward.config
    added = (reward.adapter.tensors if reward.adapter is not None else None) or {}
    tensors = dict(reward.tensors or {}) | {_plain_name(name): tensor for name, tensor in added.items()}
    backbone = f"{getattr(skeleton, 'base_model_prefix', '')}."
    head = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if not name.startswith(backbone)}
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    # Tensors of a causal LM's file may lack the backbone's prefix; those of a head have none anyway.
    trained = classifier if reward.weights is None else head.keys() <= tensors.keys() or has_score(tensors)
    if not trained and not allow_untrained_head:
        raise FourscoreError(untrained_head_message(reward.named, min(head, default=HEAD).split(".")[0]))
    labels = next(
        (tensors[name].shape[0] for name, shape in head.items() if name in tensors and tensors[name].shape != shape),
        _labels(tensors),
    )
    if labels is None:
        labels = config.num_labels if classifier and HEAD in {name.split(".")[0] for name in head} else 1
    if labels != 1:
        raise FourscoreError(
            f"{reward.named}: has num_labels={labels}, a reward model has 1; give one that was trained so"
        )


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _labels(tensors: Mapping[str, TensorHeader]) -> int | None:
    """Rows of the head in a file, if it has one."""
    return next((tensor.shape[0] for name, tensor in tensors.items() if has_score({name}) and tensor.shape), None)


def _check_trainable(checkpoint: Checkpoint, full: bool, model_args: "ModelConfig") -> None:
    """Refuses a checkpoint that comes quantized where its weights would have to train."""
    if getattr(checkpoint.config, "quantization_config", None) and (full or not model_args.use_peft):
        way_out = "use --value_training adapter" if model_args.use_peft else "add --use_peft"
        raise FourscoreError(f"{checkpoint.named}: is quantized, so that adapters alone can train; {way_out}")


def _check_dtype(checkpoint: Checkpoint, model_args: "ModelConfig", on_cpu: bool, findings: Findings) -> None:
    """Holds the dtype of frozen weights against what trains on them and what computes them."""
    dtype = frozen_dtype(checkpoint, model_args)
    name = str(dtype).removeprefix("torch.")
    flag = f"--dtype {model_args.dtype}"
    if model_args.dtype in ("auto", None):
        flag = f"{checkpoint.named}: is stored in {name}, and {flag} takes that"
    if dtype == torch.float16 and model_args.use_peft:
        findings.error(f"{flag}: adapters on float16 weights would need loss scaling; use --dtype bfloat16 or float32")
    if on_cpu and dtype in _EMULATED_BY and is_emulated(dtype):
        findings.warn(
            f"{flag}: this CPU has no {name} instructions and emulates them, which takes about 5 times as long as "
            "float32 in a forward pass and 30 times with a backward pass; use --dtype float32"
        )


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU lacks instructions for `dtype` (bfloat16, float16); False where it does not say."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpu_info(), re.MULTILINE)
    return match is not None and not set(match[1].split()) & set(_EMULATED_BY[dtype])


# --------------------------------------------------------------------------------------------- skeletons and adapters


def _usable_attention(model_args: "ModelConfig", on_cpu: bool, findings: Findings) -> "ModelConfig":
    """Refuses flash attention where there is no accelerator; what is checked after it goes on without."""
    asked = model_args.attn_implementation
    if asked is None or not on_cpu or "flash" not in asked:
        return model_args
    findings.error(f"--attn_implementation {asked}: needs an accelerator, and this runs on a CPU; use sdpa or eager")
    usable = copy.copy(model_args)
    usable.attn_implementation = None
    return usable


def build_skeleton(checkpoint: Checkpoint, auto_class: Any, model_args: "ModelConfig") -> nn.Module:
    """The model on the meta device: all its modules, none of its weights.

    Args:
        checkpoint: whose config describes it.
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        model_args: attention and `trust_remote_code`.

    Raises:
        FourscoreError: the model lacks the attention that is asked for, or its config makes no model.
    """
    asked = model_args.attn_implementation

    def build(attention: str | None) -> nn.Module:
        config = copy.deepcopy(checkpoint.config)
        if auto_class is AutoModelForSequenceClassification:
            config.num_labels = 1
        chosen = {} if attention is None else {"attn_implementation": attention}
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return auto_class.from_config(config, trust_remote_code=model_args.trust_remote_code, **chosen)

    try:
        return build(asked)
    except Exception as error:  # model code says no in many ways
        ways = [way for way in ("sdpa", "eager") if way != asked and _builds(partial(build, way))]
        if asked is not None and ways:
            name = type(build(ways[0])).__name__
            raise FourscoreError(
                f"--attn_implementation {asked}: {name} cannot use it here ({_line(error)}); use {' or '.join(ways)}"
            ) from error
        raise FourscoreError(
            f"{checkpoint.named}: no model can be built from its config.json ({_line(error)}); mend it"
        ) from error


def _builds(build: Callable[[], Any]) -> bool:
    try:
        build()
    except Exception:  # as above
        return False
    return True


def lora_config(model_args: "ModelConfig") -> Any:
    """What `get_peft_config` makes of the flags, or None without `--use_peft`.

    Raises:
        FourscoreError: PEFT would not take them.
    """
    if model_args.use_peft and model_args.lora_task_type not in TaskType.__members__:
        known = ", ".join(TaskType.__members__)
        raise FourscoreError(f"--lora_task_type {model_args.lora_task_type}: must be one of {known}; leave it out")
    try:
        config = get_peft_config(model_args)
    except (ValueError, TypeError, ImportError) as error:
        raise FourscoreError(f"--use_peft: PEFT refuses these settings ({_line(error)}); change them") from error
    targets = None if config is None else config.target_modules
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise FourscoreError(f"--lora_target_modules {targets}: is not a regular expression ({error})") from error
    return config


def check_lora(
    model_args: "ModelConfig",
    training_args: "PPOConfig",
    sft: Checkpoint | None,
    start: Checkpoint | None,
    skeletons: Mapping[str, nn.Module],
    findings: Findings,
) -> None:
    """Holds the flags of the adapters against the modules that there are."""
    config: Any = None
    with findings.collect():
        config = lora_config(model_args)
    if config is None:
        return
    policy, value = skeletons.get("policy"), skeletons.get("value_model")
    if training_args.value_training == "full":
        value = None
    if policy is not None:
        _check_names(config, policy, findings)
    if value is not None and config.target_modules is not None:
        # What only a policy has (lm_head) is left out of the value model's adapter.
        there = config.target_modules
        if not isinstance(there, str):
            there = {name for name in there if name.rsplit(".", 1)[-1] not in OUTPUT_LAYERS}
        # One name that matches will do here: policy and value model may be of different architectures.
        if policy is None or not any(is_targeted(there, name) for name, _ in value.named_modules()):
            with findings.collect():
                _check_targets(there, value)
    if config.target_modules is None and not config.target_parameters:
        for checkpoint, model in ((sft, policy), (start, value)):
            if checkpoint is not None and model is not None:
                with findings.collect():
                    _check_default_targets(checkpoint, model)


def _check_names(config: Any, model: nn.Module, findings: Findings) -> None:
    """Every name in the flags of the policy's adapter is one of something."""
    if config.target_modules is not None:
        with findings.collect():
            _check_targets(config.target_modules, model)
    for flag, names, there in (
        ("--lora_modules_to_save", config.modules_to_save, [name for name, _ in model.named_modules()]),
        ("--lora_target_parameters", config.target_parameters, [name for name, _ in model.named_parameters()]),
    ):
        for name in names or ():
            if not any(is_targeted([name], found) for found in there):
                findings.error(_nothing_named(flag, name, model, {found.rsplit(".", 1)[-1] for found in there}))


def is_targeted(targets: str | Iterable[str], name: str) -> bool:
    """Whether PEFT takes a module to be among `targets`: a regular expression, or names or ends of names."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_targets(targets: str | Iterable[str], model: nn.Module) -> None:
    if targets == "all-linear":
        return
    findings = Findings()
    for each in [targets] if isinstance(targets, str) else [[target] for target in sorted(targets)]:
        named = each if isinstance(each, str) else each[0]
        matched = {name: module for name, module in model.named_modules() if is_targeted(each, name)}
        odd = {name: module for name, module in matched.items() if not isinstance(module, _ADAPTABLE)}
        if not matched:
            findings.error(_nothing_named("--lora_target_modules", named, model, linear_names(model)))
        elif odd:
            name, module = next(iter(odd.items()))
            findings.error(
                f"--lora_target_modules {named}: {name} of {type(model).__name__} is a {type(module).__name__}, which "
                f"takes no adapter; its linear layers are {', '.join(linear_names(model))}"
            )
    findings.raise_errors()


def _check_default_targets(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuses a model type that PEFT has no targets for when none are named."""
    config: Any = model.config
    model_type = config.model_type
    if model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise FourscoreError(
            f"--lora_target_modules is not given, and PEFT has no default for the model type {model_type!r} of "
            f"{checkpoint.named}; use all-linear, or some of {', '.join(linear_names(model))}"
        )


def check_adapter_fits(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuses an adapter whose weights have no place in its base."""
    if checkpoint.adapter is None:
        return
    modules = dict(model.named_modules())
    for name, tensor in sorted((checkpoint.adapter.tensors or {}).items()):
        path, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if not found:
            continue
        module = modules.get(path)
        weight = getattr(module, "weight", None)
        if module is None:
            problem = f"has weights for {path}, which {type(model).__name__} lacks"
        elif weight is not None and tensor.shape[-1] not in weight.shape:
            problem = f"has weights for {path} of width {tensor.shape[-1]}, which is {tuple(weight.shape)} there"
        else:
            continue
        raise FourscoreError(
            f"{checkpoint.named}: {problem}; name the model it was trained on, in place of {checkpoint.path}, as "
            "base_model_name_or_path in its adapter_config.json"
        )


def _nothing_named(flag: str, name: str, model: nn.Module, there: Iterable[str]) -> str:
    message = f"{flag} {name}: matches nothing in {type(model).__name__}"
    close = [word for word in difflib.get_close_matches(name, list(there), n=1) if word != name]
    if close:
        message += f": did you mean {close[0]}?"
    return f"{message} (its linear layers are {', '.join(linear_names(model))})"


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of linear layers, but for those of the output."""
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    return sorted(found - OUTPUT_LAYERS)


# ------------------------------------------------------------------------------------------- tokenizers and positions


def tokenizer_place(sft: Checkpoint) -> str:
    """Where the policy's tokenizer is: beside the adapter, if the checkpoint is one and brings it, else at its base."""
    brings = sft.adapter is not None and any(Path(sft.given).glob("tokenizer*"))
    return sft.given if brings else sft.path


def check_shipped_policy(policy: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse the policy that ships with fourscore, the default, with another tokenizer than its own.

    Args:
        policy: where the policy, or the base of its adapter, is from.
        tokenizer: that it is given.
    """
    shipped, place = os.path.realpath(demo.POLICY), getattr(tokenizer, "name_or_path", "")
    if os.path.realpath(policy) != shipped or not place or os.path.realpath(place) == shipped:
        return
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(token) != number for token, number in load_tokenizer(str(demo.POLICY)).get_vocab().items()):
        raise FourscoreError(
            "--sft_model_path: without it the policy is the one that ships with fourscore, and its tokenizer is not "
            f"that of {place}; name your SFT checkpoint"
        )


def _check_beyond_rows(tokenizer: PreTrainedTokenizerBase, source: str, policy: Checkpoint) -> None:
    """Refuses a tokenizer (before a pad token is added to it) with ids that have no embedding."""
    rows = policy.embedding_rows
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
    if beyond and beyond != [tokenizer.pad_token]:
        raise FourscoreError(
            f"{policy.flag} {policy.path}: {len(beyond)} tokens of the tokenizer {source} ({beyond[0]!r}, ...) are "
            f"beyond its {rows} embedding rows; give the tokenizer it was trained with (--model_name_or_path)"
        )


def _same_tokenizer(one: str, other: str) -> bool:
    """Whether two places hold the same tokenizer, so that the second need not be loaded."""
    mine, theirs = (Path(place) / "tokenizer.json" for place in (one, other))
    return one == other or (mine.is_file() and theirs.is_file() and filecmp.cmp(mine, theirs, shallow=False))


def check_stop_token(args: "PPOConfig", tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[int, ...]:
    """The ids at which generation stops, as `--stop_token` and `--stop_token_id` say.

    Args:
        args: both flags.
        tokenizer: the policy's.
        vocabulary: ids that the policy knows.

    Raises:
        FourscoreError: there is no such token.
    """
    if args.stop_token_id is not None:
        if (largest := max(args.stop_token_id)) >= vocabulary:
            raise FourscoreError(f"--stop_token_id {largest}: the policy knows no such id; give one below {vocabulary}")
        return tuple(args.stop_token_id)
    if args.stop_token == "eos":
        if tokenizer.eos_token_id is None:
            raise FourscoreError(
                "--stop_token eos: the tokenizer has no EOS token; use --stop_token none, or --stop_token_id"
            )
        return (int(tokenizer.eos_token_id),)
    return ()


def check_top_k(args: "PPOConfig", vocabulary: int) -> None:
    """Hold `--top_k` against the ids that the policy knows.

    Raises:
        FourscoreError: there are not so many.
    """
    if args.top_k > vocabulary:
        raise FourscoreError(f"--top_k {args.top_k}: the policy knows {vocabulary} tokens; give fewer, or 0 for all")


def check_length(name: str, config: Any, weights: Iterable[str], longest: int, response_length: int) -> str | None:
    """Holds the longest prompt and a full completion against the positions that a model has.

    Args:
        name: of the model, for the message.
        config: its config.
        weights: names of its parameters.
        longest: tokens of the longest prompt.
        response_length: most tokens of a completion.

    Returns:
        A warning where rotary positions go on, at a quality nobody has tested; else None.

    Raises:
        FourscoreError: a table of learned positions ends before.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    needed = longest + response_length
    if positions is None or needed <= positions:
        return None
    message = (
        f"--response_length {response_length}: with the longest prompt ({longest} tokens) that makes {needed} tokens, "
        f"but {name} was made for {positions}; lower --max_prompt_length or --response_length"
    )
    if any(weight.endswith(("wpe.weight", "embed_positions.weight")) for weight in weights):
        raise FourscoreError(message)
    return message


def has_score(names: Iterable[str]) -> bool:
    """Whether a `score` head is among tensor names."""
    return any(f".{name}".endswith(f".{HEAD}.weight") for name in names)


def untrained_head_message(named: str, head: str = HEAD) -> str:
    """What is said of a reward checkpoint without a head."""
    return (
        f"{named}: has no trained `{head}` head, its scores would be noise; give a trained reward model, or pass "
        "--allow_untrained_reward_head true"
    )


def tokenizer_of(reward: Checkpoint, model_args: "ModelConfig") -> PreTrainedTokenizerBase | None:
    """The reward checkpoint's own tokenizer, if it has one."""
    if os.path.isdir(reward.path) and not any(Path(reward.path).glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            reward.path, revision=model_args.model_revision, trust_remote_code=model_args.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""Adapters on the policy and the value model, and the reference that is the policy without its adapter."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from fourscore.errors import FourscoreError

logger = logging.getLogger(__name__)

HEAD = "score"
"""Name of the head of a reward or value model in every decoder that transformers gives one."""

_OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", HEAD, "classifier"})
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add_policy_adapter(model: nn.Module, peft_config: PeftConfig) -> PeftModel:
    """Puts a fresh adapter on a causal LM; everything else in it is frozen.

    What trains is fp32. The caller's `peft_config` is left as it is.

    Raises:
        FourscoreError: the model has an adapter already, or the config would change the shared base.
    """
    config = _checked_copy(model, peft_config, report=True)
    config.task_type = TaskType.CAUSAL_LM
    return _wrap(model, config)


def add_value_adapter(model: nn.Module, peft_config: PeftConfig) -> PeftModel:
    """Puts a fresh adapter and a trainable copy of the head on a reward model, which makes it a value model.

    `peft_config` is the policy's: output layers among its targets (`lm_head`) have no counterpart here and are left
    out; if nothing else is targeted, the head alone trains. The caller's `peft_config` is left as it is.

    Raises:
        FourscoreError: the model has no `score` head or has an adapter already, or the config would change the base.
    """
    if not hasattr(model, HEAD):
        raise FourscoreError(
            f"value model {type(model).__name__} has no `{HEAD}` head: use a decoder's ForSequenceClassification"
        )
    config = _checked_copy(model, peft_config, report=False)
    config.task_type = TaskType.SEQ_CLS
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        targets = [targets] if targets in _OUTPUT_LAYERS else None
    if targets is not None:
        kept = {target for target in targets if target.rsplit(".", 1)[-1] not in _OUTPUT_LAYERS}
        config.target_modules = kept or DUMMY_TARGET_MODULES
    saved = getattr(config, "modules_to_save", None) or []
    # PEFT adds the head itself, for this task type.
    config.modules_to_save = [name for name in saved if name.rsplit(".", 1)[-1] not in _OUTPUT_LAYERS]
    return _wrap(model, config)


def freeze(model: nn.Module) -> None:
    """Turns gradients off for every parameter of `model`."""
    model.requires_grad_(False)


def train_in_fp32(model: nn.Module) -> None:
    """Makes every parameter that trains at least fp32, in place; frozen ones keep their dtype.

    A parameter that changes dtype becomes a new object: call this before an optimizer is built. A linear layer that
    becomes fp32 among bf16 ones (a value head, say) casts its input, so that a plain forward works without autocast.
    """
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter.dtype in (torch.float32, torch.float64):
                continue
            if id(parameter) not in replaced:
                replaced[id(parameter)] = nn.Parameter(parameter.detach().float())
            setattr(module, name, replaced[id(parameter)])
            if isinstance(module, nn.Linear) and name == "weight":
                module.register_forward_pre_hook(_cast_input)


@contextmanager
def reference(
    policy: PeftModel, ref_adapter_name: str | None = None, model_adapter_name: str | None = None
) -> Iterator[PeftModel]:
    """In this context `policy` computes as the reference policy.

    That is with its adapter off, or, if `ref_adapter_name` is given, with that adapter in its place. Afterwards the
    active adapter (`model_adapter_name`, else the one that was active) and every parameter's `requires_grad` are as
    they were: PEFT itself would turn gradients on for whatever adapter becomes active again.

    Raises:
        FourscoreError: there is no adapter of one of the names.
    """
    for flag, name in (("ref_adapter_name", ref_adapter_name), ("model_adapter_name", model_adapter_name)):
        if name is not None and name not in policy.peft_config:
            raise FourscoreError(
                f"--{flag} {name}: the policy has no such adapter, only {', '.join(policy.peft_config)}"
            )
    gradients = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    active = [model_adapter_name] if model_adapter_name is not None else list(policy.base_model.active_adapters)
    try:
        if ref_adapter_name is None:
            with policy.disable_adapter():
                yield policy
        else:
            policy.set_adapter(ref_adapter_name)
            yield policy
    finally:
        if ref_adapter_name is not None:
            # PeftModel.set_adapter takes one name only; the tuner below it takes several.
            policy.set_adapter(active[0])
            if len(active) > 1:
                policy.base_model.set_adapter(active)
        for parameter, requires_grad in gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _checked_copy(model: nn.Module, peft_config: PeftConfig, report: bool) -> Any:
    if isinstance(model, PeftModel):
        raise FourscoreError(
            "a PEFT config (--use_peft) for a model that has an adapter already: pass the adapted model without a "
            "PEFT config, or merge its adapter (merge_and_unload) first"
        )
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise FourscoreError(
            f"PEFT type {peft_config.peft_type}: prompt learning changes the prompt, so old and new logprobs would "
            "not be of the same text; use LoRA"
        )
    init = getattr(peft_config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
        raise FourscoreError(
            f"init_lora_weights={init!r} rewrites the base weights, which other roles share; use True or 'gaussian'"
        )
    bias = getattr(peft_config, "bias", "none")
    if bias != "none":
        raise FourscoreError(f"bias={bias!r} trains biases of the base, which other roles share; use bias='none'")
    config: Any = copy.deepcopy(peft_config)
    config.inference_mode = False
    for name, value in list(vars(config).items()):
        if name.endswith("dropout") and isinstance(value, int | float) and value:
            if report:
                logger.warning("%s %s is taken as 0: PPO needs the policy that was sampled", name, value)
            setattr(config, name, 0.0)
    return config


def _wrap(model: nn.Module, config: Any) -> PeftModel:
    freeze(model)
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by a name that is being retired.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise FourscoreError(f"--lora_target_modules does not fit {type(model).__name__}: {_line(error)}") from error
    train_in_fp32(adapted)
    return adapted


def _cast_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: torch.Tensor = module.weight
    return (args[0].to(weight.dtype), *args[1:]) if args else args


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

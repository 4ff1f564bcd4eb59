"""From the models a user hands over to four roles that are ready to train."""

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from fourscore.errors import FourscoreError
from fourscore.models.adapters import (
    add_policy_adapter,
    add_value_adapter,
    freeze,
    reference,
    train_in_fp32,
    trained_adapter,
)
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import score_head, without_peft
from fourscore.models.frozen_layers import bottom_parameters, freeze_bottom, has_tied_head, same_bottom
from fourscore.models.quantized import stay_trainable
from fourscore.models.sharing import share_frozen
from fourscore.models.trunk import share_trunk, shares_trunk
from fourscore.parallel import Parallel

logger = logging.getLogger(__name__)


@dataclass
class Roles:
    """The four models, on their device.

    Attributes:
        policy: causal LM, trains.
        ref_policy: frozen causal LM; None when the policy with its adapter off is the reference.
        reward_model: frozen sequence classifier; the value model itself where that with its adapter off is it; None
            where other rewards take its place.
        value_model: sequence classifier, trains.
        as_reference: context manager that yields the reference policy.
        as_reward: context manager that yields the reward model.
        autocast: makes the context of every forward pass of policy and value model.
        autocast_dtype: that it computes in, if it is on.
        replays_policy: layers at the bottom of policy and reference that scoring computes once for both.
        replays_value: layers at the bottom of value and reward model that scoring computes once for both.
        reads_text: the reward model has a tokenizer of its own.
    """

    policy: Any
    ref_policy: Any | None
    reward_model: Any | None
    value_model: Any
    as_reference: Callable[[], AbstractContextManager[Any]]
    as_reward: Callable[[], AbstractContextManager[Any]]
    autocast: Callable[[], AbstractContextManager]
    autocast_dtype: torch.dtype | None = None
    replays_policy: int = 0
    replays_value: int = 0
    reads_text: bool = False

    @property
    def value_head(self) -> nn.Linear | None:
        """The value model's head where that is all it has beside the policy's backbone."""
        return score_head(self.value_model) if shares_trunk(self.policy, self.value_model) else None

    @property
    def trained(self) -> dict[str, nn.Module]:
        """What trains, by the name of the role."""
        return {"policy": self.policy, "value": self.value_head or self.value_model}


def prepare_roles(
    args: Any,
    policy: Any,
    ref_policy: Any | None,
    reward_model: Any | None,
    value_model: Any,
    peft_config: PeftConfig | None,
    parallel: Parallel,
    reads_text: bool = False,
) -> Roles:
    """Add adapters, freeze, share, switch dropout off, and move to the device; the models are changed in place.

    Args:
        args: `PPOConfig`.
        policy: causal LM, plain or PEFT.
        ref_policy: causal LM; None for the policy with its adapter off, or without PEFT for a frozen copy.
        reward_model: sequence classifier with one label, or None.
        value_model: sequence classifier with one label, another object than `reward_model`; None, or one on the
            policy's backbone, with `--share_value_backbone`.
        peft_config: wraps a plain policy, and unless `--value_training full` the value model, too.
        parallel: the processes.
        reads_text: the reward model has a tokenizer of its own, so it may be any sequence classifier with one label.

    Raises:
        FourscoreError: models that cannot be these roles.
    """
    if args.share_value_backbone and not shares_trunk(policy, value_model):
        if value_model is not None:
            logger.warning("--share_value_backbone: the value_model that was given is not used")
        value_model = share_trunk(policy)
    _check(policy, ref_policy, reward_model, value_model, peft_config, reads_text)
    shared_trunk = shares_trunk(policy, value_model)
    for model in (policy, ref_policy, reward_model, value_model):
        if model is not None:
            stay_trainable(model)
    quantized = any(getattr(m, "is_quantized", False) for m in (policy, value_model))
    if peft_config is not None:
        policy = add_policy_adapter(policy, peft_config)
    under_peft = isinstance(policy, PeftModel)
    if under_peft and args.model_adapter_name is not None:
        if args.model_adapter_name not in policy.peft_config:
            raise FourscoreError(
                f"--model_adapter_name {args.model_adapter_name}: the policy has no such adapter, only "
                f"{', '.join(policy.peft_config)}"
            )
        policy.set_adapter(args.model_adapter_name)
    if quantized and not under_peft:
        raise FourscoreError(
            "quantized weights cannot train: add --use_peft, or leave out --load_in_4bit/--load_in_8bit."
        )
    if reward_model is not None:
        freeze(reward_model)
    adaptable = under_peft and not shared_trunk and not isinstance(value_model, PeftModel)
    if adaptable and args.value_training == "adapter":
        value_model = add_value_adapter(value_model, peft_config or policy.peft_config[trained_adapter(policy)])
    elif adaptable and getattr(value_model, "is_quantized", False):
        raise FourscoreError("--value_training full cannot train quantized weights: leave it out.")
    if args.freeze_layers:
        if under_peft:
            raise FourscoreError(
                f"--freeze_layers {args.freeze_layers} with an adapter: every layer is frozen then; drop one"
            )
        for model in (policy,) if shared_trunk else (policy, value_model):
            freeze_bottom(model, args.freeze_layers)
    if ref_policy is None and not under_peft:
        bottom = bottom_parameters(policy, args.freeze_layers)
        ref_policy = copy.deepcopy(policy, {id(parameter): parameter for parameter in bottom})
    if ref_policy is not None:
        freeze(ref_policy)
    # With a shared trunk the value model has nothing of its own to share.
    frozen = [ref_policy, reward_model, None if shared_trunk else value_model, policy]
    freed = share_frozen([model for model in frozen if model is not None])
    if freed >= 2**20:
        logger.info("models that came from one checkpoint share %.2f GiB of frozen weights", freed / 2**30)
    if args.freeze_layers:
        tied = ", and lm_head, which is tied to it" if has_tied_head(policy) else ""
        logger.info("frozen: %d layers and the embedding%s", args.freeze_layers, tied)
    for model in (policy, value_model, reward_model, ref_policy):
        if model is not None:
            disable_dropout(model)
    for model in (policy, value_model):
        train_in_fp32(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise FourscoreError(f"nothing in {type(model).__name__} trains: every parameter has requires_grad=False.")
    autocast_dtype = _autocast_dtype(args, policy, value_model)
    _make_savable(policy)
    if args.gradient_checkpointing:
        for model in (policy,) if shared_trunk else (policy, value_model):
            if isinstance(model, PeftModel):
                model.enable_input_require_grads()  # frozen embeddings would cut the graph of reentrant checkpointing
            model.gradient_checkpointing_enable({"use_reentrant": False} | (args.gradient_checkpointing_kwargs or {}))
    as_reward: Callable[[], AbstractContextManager[Any]] = partial(nullcontext, reward_model)
    # The reward model scores outside of autocast, so it is gathered in its own dtype, too.
    to_place: list[tuple[Any, torch.dtype | None]] = [
        (policy, autocast_dtype),
        (score_head(value_model) if shared_trunk else value_model, autocast_dtype),
        (ref_policy, autocast_dtype),
        (reward_model, None),
    ]
    if parallel.sharded and reward_model is not None and _stands_on(reward_model, value_model):
        # FSDP2 takes a parameter into one group, so here the value model with its adapter off is the reward model.
        reward_model.to("meta")
        reward_model, as_reward = value_model, partial(reference, value_model)
        to_place.pop()
    _place([(model, dtype) for model, dtype in to_place if model is not None], parallel)
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if autocast_dtype is not None:
        autocast = partial(torch.autocast, parallel.device.type, dtype=autocast_dtype)
    as_reference: Callable[[], AbstractContextManager[Any]] = partial(nullcontext, ref_policy)
    if ref_policy is None:
        as_reference = partial(reference, policy, args.ref_adapter_name, args.model_adapter_name)
    layers = 0 if parallel.sharded else args.freeze_layers  # FSDP2 has given each model weights of its own
    # The reward model knows no autocast: what the value model computes under it is another number.
    of_its_own = shared_trunk or autocast_dtype is not None or reward_model is None or reads_text
    value_layers = 0 if of_its_own else layers
    return Roles(
        policy,
        ref_policy,
        reward_model,
        value_model,
        as_reference,
        as_reward,
        autocast,
        autocast_dtype,
        replays_policy=layers if ref_policy is not None and same_bottom(policy, ref_policy, layers) else 0,
        replays_value=value_layers if value_layers and same_bottom(value_model, reward_model, value_layers) else 0,
        reads_text=reads_text,
    )


def _stands_on(reward_model: nn.Module, value_model: nn.Module) -> bool:
    """Whether all that the reward model is made of is in the value model, too."""
    held = {id(p) for p in value_model.parameters()}
    return isinstance(value_model, PeftModel) and all(id(p) in held for p in reward_model.parameters())


def _check(
    policy: Any,
    ref_policy: Any,
    reward_model: Any,
    value_model: Any,
    peft_config: PeftConfig | None,
    reads_text: bool,
) -> None:
    if value_model is None:
        raise FourscoreError("value_model is missing: pass one, or set share_value_backbone.")
    if ref_policy is policy:
        raise FourscoreError("ref_model and model are the same object: pass a copy, or None for a frozen copy.")
    if reward_model is value_model:
        raise FourscoreError("reward_model and value_model are the same object, but only one of them trains: load two.")
    if peft_config is not None and isinstance(policy, PeftModel):
        raise FourscoreError(
            "model is a PEFT model already and peft_config was given, too: pass one of the two "
            "(or merge_and_unload() the first adapter)."
        )
    others = [(n, m) for n, m in (("reward_model", reward_model), ("value_model", value_model)) if m is not None]
    for name, model in others:
        labels = getattr(model.config, "num_labels", None)
        if labels != 1:
            raise FourscoreError(
                f"{name} has num_labels={labels}, but a score is one number: load it with num_labels=1."
            )
        if not (reads_text and model is reward_model):
            score_head(model)
    if reads_text:
        others = [("value_model", value_model)]
    vocabularies = {name: model.config.get_text_config().vocab_size for name, model in [("model", policy), *others]}
    if len(set(vocabularies.values())) > 1:
        raise FourscoreError(
            f"vocabularies differ ({vocabularies}): reward and value model read the policy's tokens, so they must come "
            "from checkpoints of the same tokenizer."
        )


def _autocast_dtype(args: Any, policy: nn.Module, value_model: nn.Module) -> torch.dtype | None:
    """bf16 where asked for, or where frozen bf16 weights carry fp32 adapters and heads."""
    dtypes = {p.dtype for model in (policy, value_model) for p in model.parameters() if p.is_floating_point()}
    if torch.float16 in dtypes:
        raise FourscoreError("--dtype float16 would need loss scaling: use --dtype bfloat16 or float32.")
    return torch.bfloat16 if args.bf16 or torch.bfloat16 in dtypes else None


def _make_savable(policy: Any) -> None:
    """Mend a generation config that contradicts itself: chat checkpoints bring such, and transformers writes none."""
    base = without_peft(policy)
    try:
        base.generation_config.validate(strict=True)
    except ValueError:
        # Sampling settings beside do_sample=False: what they are there for is sampling.
        base.generation_config.do_sample = True


def _place(models: list[tuple[Any, torch.dtype | None]], parallel: Parallel) -> None:
    """Onto the device, equal on every process, sharded if asked for; each model beside the dtype it is gathered in."""
    if parallel.sharded:
        if any(getattr(model, "is_quantized", False) for model, _ in models):
            raise FourscoreError("FSDP cannot shard quantized weights: leave out one of the two.")
        owned: set[int] = set()
        for model, _ in models:
            _own_parameters(model, owned)
    for model, dtype in models:
        if not getattr(model, "is_quantized", False):
            model.to(parallel.device)
        parallel.broadcast(model, frozen_too=parallel.sharded)
        if parallel.sharded:
            parallel.shard(model, dtype)


def _own_parameters(model: nn.Module, owned: set[int]) -> None:
    """Copy the parameters that another role holds, too: FSDP2 takes a parameter into one group only."""
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in owned:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.data.clone(), parameter.requires_grad)
                setattr(module, name, copies[id(parameter)])
    owned.update(id(p) for p in model.parameters())

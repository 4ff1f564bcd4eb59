"""Adapters on the policy and the value model, and the reference that is the policy without its adapter."""

import copy
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    TaskType,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor, nn

from fourscore.errors import FourscoreError
from fourscore.models.checkpoint import ADAPTER_WEIGHTS, Adapter

logger = logging.getLogger(__name__)

HEAD = "score"
"""Name of the head of a reward or value model in every decoder that transformers gives one."""

_SAVED = "_modules_of_frozen_adapter"
OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", HEAD, "classifier"})
"""Names that models give the layer behind the backbone."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def add_frozen_adapter(model: nn.Module, adapter: Adapter, name: str) -> PeftModel:
    """Puts a checkpoint's adapter on its base, frozen: the model that was fine-tuned, on weights that others share.

    What the adapter saved of whole modules (a head, embeddings) takes their place in this tree, so that an adapter put
    on top may bring modules of its own.

    Args:
        model: the base, with modules of its own over whatever weights; changed in place.
        adapter: the adapter's folder and config.
        name: that it goes by in the model.

    Raises:
        FourscoreError: the adapter is of another model.
    """
    state = load_peft_weights(adapter.path, device="cpu", revision=adapter.revision)
    # A value model on a causal LM's adapter has no output layer for what that may hold of one.
    lacking = OUTPUT_LAYERS - {part for name, _ in model.named_modules() for part in name.split(".")}
    state = {key: tensor for key, tensor in state.items() if lacking.isdisjoint(key.split("."))}
    saved, rest = _split_saved_modules(model, state)
    for target, tensor in saved.items():
        owner = model.get_submodule(target.rpartition(".")[0])
        before = getattr(owner, target.rpartition(".")[2])
        weight = nn.Parameter(tensor.to(before.device, before.dtype, copy=True), requires_grad=False)
        setattr(owner, target.rpartition(".")[2], weight)
    adapted = wrap_frozen(model, adapter.config, name)
    result = set_peft_model_state_dict(adapted, rest, adapter_name=name)
    unknown = list(result.unexpected_keys)
    missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if unknown or missing:
        raise _unfit(adapter, model, (unknown or missing)[0])
    setattr(adapted, _SAVED, tuple(saved))
    return adapted


def add_second_adapter(model: PeftModel, adapter: Adapter) -> PeftModel:
    """Puts an adapter on top of a frozen one, both active and frozen: the policy as its run's checkpoints keep it.

    Args:
        model: with the adapter that the second one was trained on; changed in place.
        adapter: the second one's folder and config.

    Raises:
        FourscoreError: the adapter is of another model.
    """
    config: Any = copy.deepcopy(adapter.config)
    config.inference_mode = False
    _without_dropout(config)
    adapted = _on_top(model, config)
    state = load_peft_weights(adapter.path, device="cpu", revision=adapter.revision)
    result = set_peft_model_state_dict(adapted, state, adapter_name="default")
    if result.unexpected_keys:
        raise _unfit(adapter, model, result.unexpected_keys[0])
    freeze(adapted)
    return adapted


def wrap_frozen(model: nn.Module, peft_config: PeftConfig, name: str) -> PeftModel:
    """A frozen adapter's modules on a frozen base, without its weights and without modules that it saved whole."""
    config: Any = copy.deepcopy(peft_config)
    config.modules_to_save = None
    config.inference_mode = False
    _without_dropout(config)
    freeze(model)
    # A sequence classifier of PEFT's would add its head to what the adapter trains.
    causal = config.task_type == TaskType.CAUSAL_LM and hasattr(model, "prepare_inputs_for_generation")
    wrapper = PeftModelForCausalLM if causal else PeftModel
    config.task_type = TaskType.CAUSAL_LM if wrapper is PeftModelForCausalLM else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = wrapper(model, config, adapter_name=name)
    freeze(adapted)
    return adapted


def merge_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Adds a checkpoint's adapter into weights that nobody shares; returns the plain model.

    Raises:
        FourscoreError: the adapter is of another model.
    """
    return add_frozen_adapter(model, adapter, "default").merge_and_unload()


def add_policy_adapter(model: nn.Module, peft_config: PeftConfig) -> PeftModel:
    """Puts a fresh adapter on a causal LM; everything else in it is frozen, an adapter that is there already as well.

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
        targets = [targets] if targets in OUTPUT_LAYERS else None
    if targets is not None:
        kept = {target for target in targets if target.rsplit(".", 1)[-1] not in OUTPUT_LAYERS}
        config.target_modules = kept or DUMMY_TARGET_MODULES
    saved = getattr(config, "modules_to_save", None) or []
    # PEFT adds the head itself where the adapter is the model's first, for this task type.
    config.modules_to_save = [name for name in saved if name.rsplit(".", 1)[-1] not in OUTPUT_LAYERS]
    if isinstance(model, PeftModel):
        config.modules_to_save.append(HEAD)
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
    """In this context `policy` computes as the reference policy, or a value model as the reward model.

    That is with the adapter that trains off (frozen ones below it stay on), or, if `ref_adapter_name` is given, with
    that adapter in its place. Afterwards the active adapter (`model_adapter_name`, else the one that was active) and
    every parameter's `requires_grad` are as they were: PEFT itself would turn gradients on for whatever adapter
    becomes active again.

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
    below = [ref_adapter_name] if ref_adapter_name is not None else frozen_adapters(policy)
    try:
        if below:
            activate(policy, below)
            yield policy
        else:
            with policy.disable_adapter():
                yield policy
    finally:
        if below:
            activate(policy, active)
        for parameter, requires_grad in gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def activate(model: PeftModel, names: list[str]) -> None:
    """Makes adapters the active ones, the last of them the one that PEFT takes for the model's."""
    model.set_adapter(names[-1])
    if len(names) > 1:
        # PeftModel.set_adapter takes one name only; the tuner below it takes several.
        model.base_model.set_adapter(names)


def frozen_adapters(model: PeftModel) -> list[str]:
    """Names of active adapters of which no parameter trains."""
    trains = {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}
    return [name for name in model.base_model.active_adapters if name not in trains]


def trained_adapter(model: PeftModel) -> str:
    """Name of the active adapter that trains."""
    frozen = frozen_adapters(model)
    return next((n for n in model.base_model.active_adapters if n not in frozen), str(model.active_adapter))


def adapter_folder(model: PeftModel, folder: Path) -> Path:
    """Where in a folder `save_pretrained` puts the adapter that trains: each but "default" gets one of its name."""
    name = trained_adapter(model)
    return folder if name == "default" else folder / name


def can_be_one(model: PeftModel) -> bool:
    """Whether the active adapters are one LoRA, or can be put together as one."""
    configs = [cast(Any, model.peft_config[name]) for name in model.base_model.active_adapters]
    plain = all(
        c.peft_type == "LORA" and not c.use_dora and not c.target_parameters and c.bias == "none" for c in configs
    )
    return plain or len(configs) == 1


def is_lora(model: PeftModel) -> bool:
    """Whether the active adapters are LoRA, and nothing else of PEFT's."""
    return all(model.peft_config[name].peft_type == "LORA" for name in model.base_model.active_adapters)


def joint_rank(model: PeftModel) -> int:
    """The rank of the active adapters as one LoRA."""
    return sum(_rank(model.peft_config[name]) for name in model.base_model.active_adapters)


def _rank(config: Any) -> int:
    """The largest of a LoRA's matrices."""
    return int(max([config.r, *config.rank_pattern.values()]))


def write_combined_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Makes one LoRA of the frozen adapters and the trained one in a folder that `save_pretrained` has written.

    `B1 A1 + B2 A2` is `[B1 B2] [A1; A2]`, so the sum is a LoRA of their joint rank, exactly, and `from_pretrained` on
    the base model gives the whole policy.

    Args:
        model: whose adapters these are; they `can_be_one`.
        folder: holds the trained adapter, and each frozen one in a folder of its name.
        state: all of the model's weights, where it is sharded.
    """
    frozen, trained = frozen_adapters(model), trained_adapter(model)
    places = {name: folder / name for name in frozen} | {trained: adapter_folder(model, folder)}
    configs = {name: cast(Any, model.peft_config[name]) for name in places}
    pieces: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for adapter, place in places.items():
        for key, tensor in load_peft_weights(str(place), device="cpu").items():
            module, found, part = key.partition(".lora_")
            if not found:
                whole[key] = tensor
                continue
            scaling = model.get_submodule(module).scaling[adapter]
            pieces.setdefault(f"{module}.lora_{part}", {})[adapter] = tensor * scaling if _is_up(part) else tensor
    own = dict(model.get_base_model().named_parameters(remove_duplicate=False))
    for name in set(getattr(model, _SAVED, ())) & own.keys():  # but for a head that trains by now
        key = f"base_model.model.{name}"
        whole.setdefault(key, (own[name] if state is None else state[key]).detach().cpu().contiguous())
    ranks = {name: _rank(config) for name, config in configs.items()}
    joint = {key: _concatenated(key, parts, ranks) for key, parts in pieces.items()}
    config: Any = copy.deepcopy(configs[trained])
    config.r = config.lora_alpha = sum(ranks.values())
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.target_modules = sorted({key.partition(".lora_")[0].removeprefix("base_model.model.") for key in joint})
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = sorted({key.split(".")[-2] for key in whole}) or None
    config.inference_mode = True
    for name in frozen:
        shutil.rmtree(folder / name)
    save_file(joint | whole, places[trained] / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(places[trained])


def _unfit(adapter: Adapter, model: nn.Module, key: str) -> FourscoreError:
    return FourscoreError(
        f"adapter {adapter.path}: does not fit {type(model).__name__} (such as {key}); "
        "give the base model it was trained on"
    )


def _is_up(part: str) -> bool:
    return part.startswith(("B", "embedding_B"))


def _concatenated(key: str, parts: dict[str, Tensor], ranks: dict[str, int]) -> Tensor:
    """One side of several LoRAs along their rank, zeros where one has none there or a smaller one."""
    down = not _is_up(key.partition(".lora_")[2])
    like = next(iter(parts.values()))
    if not down:
        like = like.transpose(0, 1)
    joint = torch.zeros(sum(ranks.values()), *like.shape[1:], dtype=like.dtype)
    start = 0
    for name, rank in ranks.items():
        if name in parts:
            piece = parts[name] if down else parts[name].transpose(0, 1)
            joint[start : start + len(piece)] = piece
        start += rank
    return joint if down else joint.transpose(0, 1).contiguous()


def _split_saved_modules(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of an adapter file that are whole modules' (by their name in `model`), and the others."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = {key: key.removeprefix("base_model.model.") for key in state}
    whole = {name: state[key] for key, name in saved.items() if name in own}
    return whole, {key: tensor for key, tensor in state.items() if saved[key] not in own}


def _checked_copy(model: nn.Module, peft_config: PeftConfig, report: bool) -> Any:
    if isinstance(model, PeftModel) and any(p.requires_grad for p in model.parameters()):
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
    for name, value in _without_dropout(config).items():
        if report:
            logger.warning("%s %s is taken as 0: PPO needs the policy that was sampled", name, value)
    return config


def _without_dropout(config: Any) -> dict[str, float]:
    """Sets every dropout of an adapter to zero; returns what was not."""
    found = {n: v for n, v in vars(config).items() if n.endswith("dropout") and isinstance(v, int | float) and v}
    for name in found:
        setattr(config, name, 0.0)
    return found


def _wrap(model: nn.Module, config: Any) -> PeftModel:
    freeze(model)
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by a name that is being retired.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = _on_top(model, config) if isinstance(model, PeftModel) else get_peft_model(model, config)
    except ValueError as error:
        raise FourscoreError(f"--lora_target_modules does not fit {type(model).__name__}: {_line(error)}") from error
    train_in_fp32(adapted)
    return adapted


def _on_top(model: PeftModel, config: Any) -> PeftModel:
    """A second adapter beside a frozen one, both active; PEFT would make both trainable."""
    below = list(model.base_model.active_adapters)
    model.add_adapter("default", config)
    activate(model, [*below, "default"])
    for name, parameter in model.named_parameters():
        if not set(below).isdisjoint(name.split(".")):
            parameter.requires_grad_(False)
    return model


def _cast_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: torch.Tensor = module.weight
    return (args[0].to(weight.dtype), *args[1:]) if args else args


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

"""The four roles from two checkpoints, each read once."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    set_seed,
)

from fourscore.config import ModelConfig, PPOConfig, get_kbit_device_map, get_peft_config, get_quantization_config
from fourscore.errors import Findings, FourscoreError
from fourscore.models.adapters import (
    HEAD,
    add_frozen_adapter,
    add_policy_adapter,
    add_second_adapter,
    add_value_adapter,
    freeze,
    merge_adapter,
    train_in_fp32,
)
from fourscore.models.checkpoint import Adapter, Checkpoint, safetensors_files
from fourscore.models.checks import Inspected, has_score, inspect_models, untrained_head_message
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import score_head
from fourscore.models.frozen_layers import adopt_bottom, bottom_parameters, freeze_bottom
from fourscore.models.layout import SFT_ADAPTER, Backbone, Layout, frozen_dtype, value_start
from fourscore.models.quantized import stay_trainable
from fourscore.models.sharing import clone_owning, clone_sharing
from fourscore.models.tokenizer import ensure_pad_token, ensure_safe_pad
from fourscore.models.trunk import share_trunk
from fourscore.parallel import is_sharded
from fourscore.runs.memory import return_freed_memory

logger = logging.getLogger(__name__)

Read = Callable[[torch.dtype], nn.Module]
Head = Literal["trained", "zero"]
"""Whether a `score` head that is not in the files is an error, or starts at zero."""


@dataclass
class Models:
    """The roles, each an ordinary transformers or PEFT object, and the tokenizer they share.

    Attributes:
        tokenizer: pads on the left, with a pad token that is not EOS.
        policy: causal LM; what trains in it is fp32.
        ref_policy: frozen causal LM; None under PEFT, where the policy with its adapter off is the reference.
        reward_model: frozen sequence classifier with one label; None without a reward checkpoint.
        value_model: sequence classifier with one label; what trains in it is fp32, its head always does.
        reward_tokenizer: the reward model's own, where it does not read the policy's tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: Any
    ref_policy: Any | None
    reward_model: Any | None
    value_model: Any
    reward_tokenizer: PreTrainedTokenizerBase | None = None


def load_models(
    model_args: ModelConfig,
    training_args: PPOConfig,
    layout: Layout | None = None,
    inspected: Inspected | None = None,
) -> Models:
    """Loads policy, reference, reward and value model.

    Without `reward_model_path` there is no reward model; other rewards are then the trainer's affair.

    Everything that configs, headers and tokenizers can tell is checked first. Then each checkpoint is read once, and
    roles are built as the layout says: a frozen role keeps what was read (memory-mapped on a CPU where the file has the
    dtype asked for), a trained one gets fp32 weights of its own, or under PEFT an adapter on the very same frozen
    weights. When SFT and reward checkpoint are adapters of one base, that base is all that is read.

    Args:
        model_args: dtype of frozen weights, attention, PEFT, quantization.
        training_args: paths of the SFT and the reward checkpoint.
        layout: who stands on what, if decided already; default: decided here, in the same way.
        inspected: what `inspect_models` has found without errors, if it was asked already.

    Raises:
        FourscoreError: a checkpoint is missing or unfit; the message names the flag and the way out.
    """
    if inspected is None:
        findings = Findings()
        inspected = inspect_models(model_args, training_args, findings)
        findings.raise_errors()
        for warning in findings.warnings:
            logger.warning(warning)
    sft, reward, tokenizer = inspected.sft, inspected.reward, inspected.tokenizer
    assert sft is not None and tokenizer is not None
    if _on_cpu(training_args):
        weights = 4 * sum(math.prod(tensor.shape) for tensor in (sft.tensors or {}).values())
        return_freed_memory(weights)  # what conversion and quantization leave behind, too
    ensure_pad_token(tokenizer, sft.embedding_rows, _stop_ids(sft.config, training_args))
    reward_tokenizer = inspected.reward_tokenizer
    reads_text = reward_tokenizer is not None
    start = value_start(sft, reward, reads_text=reads_text, value=inspected.value)
    for checkpoint in (sft, reward, start):
        if checkpoint is not None and not (checkpoint is reward and reads_text):  # that one's pad is its tokenizer's
            ensure_safe_pad(checkpoint.config, tokenizer)

    # Fresh adapters are drawn below: the same for the same seed, and on every process.
    set_seed(training_args.seed)
    layout = layout or inspected.layout(model_args, training_args, on_cpu=_on_cpu(training_args))
    del inspected  # with its skeletons: the models can have their memory
    peft_config = get_peft_config(model_args)
    roles = layout.roles
    policy_on, value_on = roles["policy"].backbone, roles["value_model"].backbone
    layers = roles["policy"].frozen_layers
    device_map = _device_map(model_args, training_args)

    def owned(backbone: str) -> bool:
        return any(role.owns for role in roles.values() if role.backbone == backbone)

    def read_classifier(checkpoint: Checkpoint, backbone: str, merged: bool, head: Head) -> tuple[Any, Any | None]:
        read = _reader(checkpoint, AutoModelForSequenceClassification, model_args, device_map, head)
        return _read(read, layout.backbones[backbone], owned(backbone), merged, layers)

    def classifiers_on_policy(checkpoint: Checkpoint, head: Tensor) -> tuple[Any, Any | None]:
        on_frozen = _classifier_on(frozen, checkpoint, head, model_args)
        return on_frozen, None if trained is None else _classifier_on(trained, checkpoint, head, model_args)

    read_policy = _reader(sft, AutoModelForCausalLM, model_args, device_map)
    frozen, trained = _read(read_policy, layout.backbones[policy_on], owned(policy_on), roles["policy"].merged, layers)
    reward_model: Any | None = None
    trained_reward: Any | None = None
    if (on := roles.get("reward_model")) is not None:
        assert reward is not None
        if on.backbone == policy_on:
            reward_model, trained_reward = classifiers_on_policy(reward, _head(reward, model_args))
        else:
            reward_model, trained_reward = read_classifier(reward, on.backbone, on.merged, "trained")
        freeze(reward_model)
        if on.adapter is not None:
            reward_model = add_frozen_adapter(reward_model, layout.adapters[on.adapter], on.adapter)

    value: Any | None = None
    trained_value: Any | None = None
    on = roles["value_model"]
    if on.trains == "head":
        pass  # a head on the policy, as soon as that is there
    elif start is reward:
        value, trained_value = reward_model, trained_reward
    else:
        if value_on == policy_on:
            head = _stored_head(start)
            zeros = torch.zeros(1, start.config.get_text_config().hidden_size)
            value, trained_value = classifiers_on_policy(start, zeros if head is None else head)
        else:
            value, trained_value = read_classifier(start, value_on, on.merged, "zero")
        freeze(value)
        if on.adapter is not None:
            value = add_frozen_adapter(value, layout.adapters[on.adapter], on.adapter)
    freeze(frozen)

    ref_policy: Any | None = None
    policy: Any
    if peft_config is None:
        assert trained is not None
        ref_policy, policy = frozen, _to_train(trained, layers)
    else:
        policy = frozen
        if (below := roles["policy"].adapter) is not None:
            policy = add_frozen_adapter(policy, layout.adapters[below], below)
        policy = add_policy_adapter(policy, peft_config)
    value_model: Any
    if on.trains == "head":
        value_model = share_trunk(policy)
    elif on.owns:
        assert trained_value is not None
        if value_on == policy_on and roles["policy"].owns:  # that copy is the policy's
            trained_value = clone_owning(trained_value, torch.float32, bottom_parameters(trained_value, layers))
        value_model = _to_train(trained_value, layers)
    else:
        assert peft_config is not None
        value_model = add_value_adapter(clone_sharing(value) if value is reward_model else value, peft_config)
    del value, trained_value, trained_reward
    if reward_model is not None and not reads_text:
        score_head(reward_model)

    for name, model in (
        ("policy", policy),
        ("ref_policy", ref_policy),
        ("reward", reward_model),
        ("value", value_model),
    ):
        if model is None:
            continue
        if dropout := disable_dropout(model):
            logger.info("%s: dropout set to 0 in %d places", name, len(dropout))
    return Models(tokenizer, policy.train(), ref_policy, reward_model, value_model.train(), reward_tokenizer)


@dataclass(frozen=True)
class Frozen:
    """A causal LM that is to compute only.

    Attributes:
        checkpoint: a whole model, or an adapter with its base.
        dtype: of the weights.
        on_top: a second adapter, which was trained on the checkpoint's own.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    on_top: Adapter | None = None


def load_frozen(
    policies: Sequence[Frozen], reward: Checkpoint | None, model_args: ModelConfig, training_args: PPOConfig
) -> tuple[list[nn.Module], nn.Module | None]:
    """Loads models of which nothing trains: equal weights are read and held once.

    On a CPU, weights whose file has the dtype asked for stay mapped from it. Adapters are never merged, so models whose
    checkpoints are adapters of one base, or an adapter and its base, stand on that base together.

    Args:
        policies: the causal LMs.
        reward: a sequence classifier with one label, or None.
        model_args: dtype of the reward model, attention, quantization.
        training_args: the device.

    Returns:
        the causal LMs, and the reward model if one was asked for.

    Raises:
        FourscoreError: a checkpoint cannot be loaded, or an adapter does not fit.
    """
    device_map = _device_map(model_args, training_args)
    bases: dict[tuple[Any, ...], nn.Module] = {}
    models: list[nn.Module] = []
    for wanted in policies:
        checkpoint = wanted.checkpoint
        key = (checkpoint.identity, checkpoint.config.model_type, wanted.dtype)
        if key not in bases:
            bases[key] = _reader(checkpoint, AutoModelForCausalLM, model_args, device_map)(wanted.dtype)
            freeze(bases[key])
        model: Any = clone_sharing(bases[key])
        if checkpoint.adapter is not None:
            model = add_frozen_adapter(model, checkpoint.adapter, SFT_ADAPTER)
        if wanted.on_top is not None:
            model = add_second_adapter(model, wanted.on_top)
        models.append(model.eval())
    if reward is None:
        return models, None
    dtype = frozen_dtype(reward, model_args)
    base = bases.get((reward.identity, reward.config.model_type, dtype))
    if base is not None:
        reward_model = _classifier_on(base, reward, _head(reward, model_args), model_args)
    else:
        reward_model = _reader(reward, AutoModelForSequenceClassification, model_args, device_map)(dtype)
    freeze(reward_model)
    if reward.adapter is not None:
        reward_model = add_frozen_adapter(reward_model, reward.adapter, "reward")
    return models, reward_model.eval()


def _on_cpu(training_args: PPOConfig) -> bool:
    return bool(training_args.device.type == "cpu")


def _device_map(model_args: ModelConfig, training_args: PPOConfig) -> dict[str, Any] | None:
    """Where weights go while they are read: straight to the accelerator, unless they are to be sharded over several."""
    if _on_cpu(training_args):
        return {"": "cpu"} if model_args.load_in_4bit or model_args.load_in_8bit else None
    if is_sharded(training_args):
        return None
    return get_kbit_device_map() or {"": str(training_args.device)}


def _read(
    read: Read, backbone: Backbone, owned: bool, merged: bool, frozen_layers: int
) -> tuple[nn.Module, nn.Module | None]:
    """The frozen model in the dtype asked for, and an fp32 one to train if a role owns such weights; one reading.

    The two stand on the frozen one's lowest layers where those do not train.
    """
    if not merged and not owned:
        return read(backbone.dtype), None
    if not merged and backbone.dtype in (torch.float32, backbone.checkpoint.dtype):
        frozen = read(backbone.dtype)
        return frozen, clone_owning(frozen, torch.float32, bottom_parameters(frozen, frozen_layers))
    # The file may hold more than the frozen copy is to keep: the trained weights must not be rounded.
    trained = read(torch.float32)
    if merged:
        assert backbone.checkpoint.adapter is not None
        trained = merge_adapter(trained, backbone.checkpoint.adapter)
    frozen = clone_owning(trained, backbone.dtype)
    adopt_bottom(trained, frozen, frozen_layers)
    return frozen, trained


def _to_train(model: nn.Module, frozen_layers: int) -> nn.Module:
    model.requires_grad_(True)
    freeze_bottom(model, frozen_layers)
    train_in_fp32(model)
    return model


def _classifier_on(causal: Any, reward: Checkpoint, head: Tensor, model_args: ModelConfig) -> nn.Module:
    """A sequence classifier over the very weights of a causal LM, with a head of its own."""
    config = copy.deepcopy(reward.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            config,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=model_args.trust_remote_code,
        )
    prefix = model.base_model_prefix
    setattr(model, prefix, clone_sharing(getattr(causal, prefix)))
    like = causal.get_input_embeddings().weight
    outline = score_head(model)
    outline.weight = nn.Parameter(head.to(like.device, like.dtype, copy=True))
    for name in ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(causal):
            setattr(model, name, getattr(causal, name))
    if getattr(causal.config, "quantization_config", None) is not None:
        model.config.quantization_config = causal.config.quantization_config
    return model.eval()


def _head(reward: Checkpoint, model_args: ModelConfig) -> Tensor:
    """The `score` weights `[1, d]` in a checkpoint's own files, else fresh ones, which an adapter may replace."""
    if (head := _stored_head(reward)) is not None:
        return head
    if reward.adapter is None:
        _untrained_head(reward.named, model_args)
    text = reward.config.get_text_config()
    return torch.randn(1, text.hidden_size) * float(getattr(text, "initializer_range", 0.02))


def _stored_head(checkpoint: Checkpoint) -> Tensor | None:
    """The `score` weights `[1, d]` in a checkpoint's own files, if they are there."""
    for file in safetensors_files(checkpoint.path, checkpoint.revision):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if has_score({name}):
                    return opened.get_tensor(name)
    return None


def _untrained_head(named: str, model_args: ModelConfig, head: str = HEAD) -> None:
    if not model_args.allow_untrained_reward_head:
        raise FourscoreError(untrained_head_message(named, head))
    logger.warning("%s: the `%s` head is untrained, scores are noise", named, head)


def _reader(
    checkpoint: Checkpoint,
    auto_class: Any,
    model_args: ModelConfig,
    device_map: dict[str, Any] | None,
    head: Head = "trained",
) -> Read:
    """A function that reads the checkpoint's weights in a dtype and refuses holes in them."""
    config, classifies = checkpoint.config, auto_class is AutoModelForSequenceClassification
    if classifies:
        config = copy.deepcopy(config)
        config.num_labels = 1
    kwargs: dict[str, Any] = {
        "config": config,
        "revision": checkpoint.revision,
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": model_args.trust_remote_code,
        "device_map": device_map,
    }
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        # It says in every forward of every layer that fp32 inputs are cast.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        # GPT-NeoX's name for the output layer, which by default transformers leaves alone, and encoders' for the head.
        quantization_config.llm_int8_skip_modules += ["embed_out", "classifier"]
        kwargs["quantization_config"] = quantization_config
    named = checkpoint.named

    def read(dtype: torch.dtype) -> nn.Module:
        try:
            model, report = auto_class.from_pretrained(checkpoint.path, dtype=dtype, output_loading_info=True, **kwargs)
        except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
            raise FourscoreError(f"{named}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
        missing = set(report["missing_keys"])
        of_head = {name for name in missing if classifies and not name.startswith(f"{model.base_model_prefix}.")}
        if of_head and head == "zero":
            for parameter in score_head(model).parameters():
                nn.init.zeros_(parameter)
        elif of_head and checkpoint.adapter is None:
            _untrained_head(named, model_args, min(of_head).split(".")[0])
        missing -= of_head
        if missing:
            raise FourscoreError(f"{named}: {len(missing)} weights are missing from it, such as {min(missing)}")
        stay_trainable(model)
        return model

    return read


def _stop_ids(config: Any, training_args: PPOConfig) -> list[int]:
    """Ids at which generation may stop: the config's EOS ids and the run's stop token."""
    eos = getattr(config.get_text_config(), "eos_token_id", None)
    ids = list(eos) if isinstance(eos, list | tuple) else [eos]
    return [index for index in [*ids, *(training_args.stop_token_id or ())] if index is not None]

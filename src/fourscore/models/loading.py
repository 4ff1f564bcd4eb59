"""The four roles from two checkpoints, each read once."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    set_seed,
)

from fourscore.config import ModelConfig, PPOConfig, get_kbit_device_map, get_peft_config, get_quantization_config
from fourscore.errors import FourscoreError
from fourscore.models.adapters import HEAD, add_policy_adapter, add_value_adapter, freeze, train_in_fp32
from fourscore.models.checkpoint import Checkpoint
from fourscore.models.checks import check_models, check_vocabulary, has_score, untrained_head_message
from fourscore.models.dropout import disable_dropout
from fourscore.models.forward import score_head
from fourscore.models.frozen_layers import adopt_bottom, bottom_parameters, freeze_bottom
from fourscore.models.layout import frozen_dtype
from fourscore.models.sharing import clone_owning, clone_sharing
from fourscore.models.tokenizer import ensure_pad_token, ensure_safe_pad, load_tokenizer
from fourscore.models.trunk import share_trunk

logger = logging.getLogger(__name__)


@dataclass
class Models:
    """The roles, each an ordinary transformers or PEFT object, and the tokenizer they share.

    Attributes:
        tokenizer: pads on the left, with a pad token that is not EOS.
        policy: causal LM; what trains in it is fp32.
        ref_policy: frozen causal LM; None under PEFT, where the policy with its adapter off is the reference.
        reward_model: frozen sequence classifier with one label.
        value_model: sequence classifier with one label; what trains in it is fp32, its head always does.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: Any
    ref_policy: Any | None
    reward_model: Any
    value_model: Any


def load_models(model_args: ModelConfig, training_args: PPOConfig) -> Models:
    """Loads policy, reference, reward and value model.

    Everything that configs, headers and tokenizers can tell is checked first. Then the SFT and the reward checkpoint
    are each read once: the frozen role keeps what was read (memory-mapped on a CPU where the file has the dtype asked
    for), the trained role gets fp32 weights of its own, or under PEFT an adapter on the very same frozen weights.

    Args:
        model_args: dtype of frozen weights, attention, PEFT, quantization.
        training_args: paths of the SFT and the reward checkpoint.

    Raises:
        FourscoreError: a checkpoint is missing or unfit; the message names the flag and the way out.
    """
    sft, reward = check_models(model_args, training_args)
    source = str(model_args.model_name_or_path or sft.path)
    tokenizer = load_tokenizer(
        source,
        model_args.model_revision,
        model_args.trust_remote_code,
        flag="--model_name_or_path" if model_args.model_name_or_path else sft.flag,
    )
    check_vocabulary(tokenizer, source, sft, reward, model_args)
    ensure_pad_token(tokenizer, sft.embedding_rows, _stop_ids(sft.config, training_args))
    reward.config.num_labels = 1
    for checkpoint in (sft, reward):
        ensure_safe_pad(checkpoint.config, tokenizer)

    # Fresh adapters are drawn below: the same for the same seed, and on every process.
    set_seed(training_args.seed)
    peft_config = get_peft_config(model_args)
    device_map = {"": "cpu"} if training_args.use_cpu else get_kbit_device_map()
    read_policy = _reader(sft, AutoModelForCausalLM, model_args, device_map)
    read_reward = _reader(reward, AutoModelForSequenceClassification, model_args, device_map)
    ref_policy: Any | None = None
    if peft_config is None:
        ref_policy, policy = _frozen_and_trained(read_policy, sft, model_args, training_args.freeze_layers)
    else:
        policy = add_policy_adapter(read_policy(frozen_dtype(sft, model_args)), peft_config)
    if training_args.share_value_backbone:
        reward_model = read_reward(frozen_dtype(reward, model_args))
        freeze(reward_model)
        value_model = share_trunk(policy)
    elif peft_config is None or training_args.value_training == "full":
        reward_model, value_model = _frozen_and_trained(read_reward, reward, model_args, training_args.freeze_layers)
    else:
        reward_model = read_reward(frozen_dtype(reward, model_args))
        freeze(reward_model)
        value_model = add_value_adapter(clone_sharing(reward_model), peft_config)
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
    return Models(tokenizer, policy.train(), ref_policy, reward_model, value_model.train())


def _frozen_and_trained(
    read: Callable[[torch.dtype], nn.Module], checkpoint: Checkpoint, model_args: ModelConfig, freeze_layers: int
) -> tuple[nn.Module, nn.Module]:
    """A frozen model in the dtype asked for and a trained one in fp32, from one reading; they share a frozen bottom."""
    wanted = frozen_dtype(checkpoint, model_args)
    if wanted in (torch.float32, checkpoint.dtype):
        frozen = read(wanted)
        trained = clone_owning(frozen, torch.float32, keep=bottom_parameters(frozen, freeze_layers))
    else:
        # The file may hold more than the frozen copy is to keep: the trained weights must not be rounded.
        trained = read(torch.float32)
        frozen = clone_owning(trained, wanted)
    freeze(frozen)
    trained.requires_grad_(True)
    adopt_bottom(trained, frozen, freeze_layers)
    freeze_bottom(trained, freeze_layers)
    train_in_fp32(trained)
    return frozen, trained


def _reader(
    checkpoint: Checkpoint, auto_class: Any, model_args: ModelConfig, device_map: dict[str, Any] | None
) -> Callable[[torch.dtype], nn.Module]:
    """A function that reads the checkpoint's weights in a dtype and refuses holes in them."""
    kwargs: dict[str, Any] = {
        "config": checkpoint.config,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": model_args.trust_remote_code,
    }
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        # It says in every forward of every layer that fp32 inputs are cast.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        # GPT-NeoX's name for the output layer, which by default transformers leaves alone.
        quantization_config.llm_int8_skip_modules.append("embed_out")
        kwargs |= {"quantization_config": quantization_config, "device_map": device_map}
    named = f"{checkpoint.flag} {checkpoint.path}"

    def read(dtype: torch.dtype) -> nn.Module:
        try:
            model, report = auto_class.from_pretrained(checkpoint.path, dtype=dtype, output_loading_info=True, **kwargs)
        except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
            raise FourscoreError(f"{named}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
        missing = set(report["missing_keys"])
        if has_score(missing):
            if not model_args.allow_untrained_reward_head:
                raise FourscoreError(untrained_head_message(named))
            logger.warning("%s: the `%s` head is untrained, scores are noise", named, HEAD)
            missing = {name for name in missing if not has_score({name})}
        if missing:
            raise FourscoreError(f"{named}: {len(missing)} weights are missing from it, such as {min(missing)}")
        return model

    return read


def _stop_ids(config: Any, training_args: PPOConfig) -> list[int]:
    """Ids at which generation may stop: the config's EOS ids and the run's stop token."""
    eos = getattr(config.get_text_config(), "eos_token_id", None)
    ids = list(eos) if isinstance(eos, list | tuple) else [eos]
    return [index for index in [*ids, training_args.stop_token_id] if index is not None]

"""Reads a checkpoint whose files hold exactly the tensors of the model, with nothing to do but to take them."""

import copy
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights

from fourscore.config import ModelConfig
from fourscore.models.checkpoint import Checkpoint, safetensors_files
from fourscore.models.threads import map_in_threads


def read_plain(
    checkpoint: Checkpoint, auto_class: Any, dtype: torch.dtype, model_args: ModelConfig
) -> nn.Module | None:
    """What `auto_class.from_pretrained` gives on the CPU, sooner; None where it has more to do than to copy tensors.

    More to do means: the weights are quantized, or not here as safetensors; a name or a shape in the files is not the
    model's, or one is missing; transformers changes the tensors of such a model on reading, or keeps some of them in
    another dtype; the model brings its own code. Tensors that have the dtype asked for stay mapped from the file.

    Args:
        checkpoint: what is read.
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        dtype: of floating point weights.
        model_args: attention.
    """
    if checkpoint.tensors is None or getattr(checkpoint.config, "quantization_config", None):
        return None
    if model_args.trust_remote_code and getattr(checkpoint.config, "auto_map", None):
        return None
    files = safetensors_files(checkpoint.path, checkpoint.revision)
    if not files:
        return None
    config = copy.deepcopy(checkpoint.config)
    if auto_class is AutoModelForSequenceClassification:
        config.num_labels = 1
    with torch.device("meta"), no_init_weights():
        model = auto_class.from_config(config, attn_implementation=model_args.attn_implementation, dtype=dtype)
    tied = model.all_tied_weights_keys.keys()
    slots = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    if {n: t.shape for n, t in checkpoint.tensors.items()} != {n: tuple(t.shape) for n, t in slots.items()}:
        return None
    if model._get_dtype_plan(dtype) or get_model_conversion_mapping(model, add_legacy=False):
        return None
    if not _compute_buffers(model):
        return None

    for file in files:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            slices = [opened.get_slice(name) for name in names]
            for name, tensor in zip(names, map_in_threads(_read, slices, [slots[n].dtype for n in names]), strict=True):
                _put(model, name, tensor)
    model.tie_weights(recompute_mapping=False)
    model.config.name_or_path = checkpoint.path
    if model.can_generate():
        _read_generation_config(model, checkpoint)
    return model.eval()


def _read(piece: Any, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = piece[...]
    return tensor.to(dtype)


def _compute_buffers(model: Any) -> bool:
    """Makes the buffers that are in no file, rotary frequencies for one; False where weights would be touched, too."""
    computed = False
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if names and module._parameters:
            return False
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        module._is_hf_initialized = not names  # so transformers knows what is left to it
        computed |= bool(names)
    if computed:
        model.initialize_weights()
    return True


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if attribute in owner._buffers:
        owner._buffers[attribute] = tensor
    else:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _read_generation_config(model: Any, checkpoint: Checkpoint) -> None:
    """As `from_pretrained` does it: from its file, or from an old `config.json` that holds such settings."""
    model.adjust_generation_fn(
        generation_config=None,
        from_auto_class=True,
        from_pipeline=None,
        pretrained_model_name_or_path=checkpoint.path,
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=False,
        token=None,
        revision=checkpoint.revision,
        subfolder="",
        trust_remote_code=None,
    )

"""Checkpoints to measure with: real shapes, random weights, written once. No download."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    logging,
)

from fourscore import demo

logging.set_verbosity_error()
logging.disable_progress_bar()

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 3072,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    # SmolLM2-135M.
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    # Llama 3.2 1B.
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # Llama 3.1 8B.
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Pair:
    """Folders of an SFT and of a reward checkpoint."""

    policy: Path
    reward: Path

    def files(self) -> list[Path]:
        """Their safetensors files."""
        return sorted({file for folder in (self.policy, self.reward) for file in folder.glob("*.safetensors")})

    def parameters(self) -> int:
        """Of the policy."""
        count = 0
        for file in self.policy.glob("*.safetensors"):
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    count += torch.Size(opened.get_slice(name).get_shape()).numel()
        return count


def random_pair(cache: Path, shape: str, dtype: torch.dtype, **changes: int) -> Pair:
    """A Llama and a reward model of that shape, each with weights of its own; written if they are not there yet.

    Args:
        cache: folder.
        shape: a name in `SHAPES`.
        dtype: of the files.
        changes: what is different from that shape.
    """
    names = [shape, *(f"{name}-{size}" for name, size in sorted(changes.items())), str(dtype).removeprefix("torch.")]
    root = cache / "-".join(names)
    pair = Pair(root / "policy", root / "reward")
    for seed, (folder, model_class) in enumerate(
        ((pair.policy, LlamaForCausalLM), (pair.reward, LlamaForSequenceClassification))
    ):
        if not folder.exists():
            _write(folder, lambda to, c=model_class, s=seed: _random_model(to, c, SHAPES[shape] | changes, dtype, s))
    return pair


def adapter_pair(cache: Path, base: Path) -> Pair:
    """Two LoRA adapters of one base: an SFT checkpoint, and a reward model with its head; written if not there yet."""
    base = base.resolve()
    root = cache / f"adapters-of-{base.parent.name}-{base.name}"
    pair = Pair(root / "policy", root / "reward")
    if not pair.policy.exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        _write(pair.policy, get_peft_model(model, _fresh("CAUSAL_LM")).save_pretrained)
    if not pair.reward.exists():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
        _write(pair.reward, get_peft_model(model, _fresh("SEQ_CLS", modules_to_save=["score"])).save_pretrained)
    return pair


def drop_from_page_cache(file: Path) -> None:
    """The next reading of the file is from the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)  # pages that are not written yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def read_into_page_cache(file: Path) -> None:
    """The next reading of the file is from memory."""
    with open(file, "rb", buffering=0) as opened:
        while opened.read(2**24):
            pass


def _fresh(task_type: str, **more: Any) -> LoraConfig:
    # Not PEFT's first weights: with those an adapter does nothing.
    return LoraConfig(task_type=task_type, init_lora_weights=False, **LORA, **more)


def _random_model(folder: Path, model_class: Any, shape: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.POLICY)
    config = LlamaConfig(
        **({"tie_word_embeddings": True} | shape),
        max_position_embeddings=2048,
        dtype=dtype,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=[model_class.__name__],
        **({"num_labels": 1} if model_class is LlamaForSequenceClassification else {}),
    )
    with torch.device("meta"):
        model = model_class(config)
    # Where a GPU is, it is quicker by far with billions of them.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():  # names a tied output layer once, under the embedding
        weight = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            weight.normal_(0, 0.02, generator=generator)
        weights[name] = weight.cpu()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write(folder: Path, write: Any) -> None:
    """In one step: an interrupted writing leaves no half of a checkpoint under this name."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    part.rename(folder)

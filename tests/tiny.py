"""Tiny checkpoints of several architectures with a small real tokenizer, made in-process."""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Kind = Literal["policy", "reward"]
Pad = Literal["own", "spare", "none"]

EOS = "<|endoftext|>"
PAD = "<|pad|>"
SPARE = "<|reserved_0|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", "gemma3_text")

_TEXT = [
    "the film was a great joy to watch and the story is good",
    "the plot of this movie was slow and the acting was bad",
    "a warm and funny comedy with a good heart",
    "I did not like the ending of the film at all",
] * 4


def make_tokenizer(pad: Pad = "own", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 300 tokens.

    `pad`: "own" has the distinct pad token `<|pad|>`; "spare" has no pad token but the unused special token
    `<|reserved_0|>`; "none" has neither.
    """
    specials = {"own": [EOS, PAD], "spare": [EOS, SPARE], "none": [EOS]}[pad]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, model_max_length=128)
    if pad == "own":
        tokenizer.pad_token = PAD
    elif pad == "spare":
        tokenizer.add_special_tokens({"additional_special_tokens": [SPARE]})
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config(arch: str, tokenizer: PreTrainedTokenizerFast, kind: Kind = "policy", **cfg: Any) -> Any:
    """Config of two layers, width 64; `cfg` overrides by the architecture's own names."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    if arch == "gpt2":
        values |= {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        values |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
    if arch not in ("gpt2", "gpt_neox"):
        values |= {"num_key_value_heads": 2, "head_dim": 16}
    if arch == "gpt_neox":
        # The defaults of newer releases drop activations in training: keep the zoo deterministic unless asked.
        values |= {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    if arch in ("gemma2", "gemma3_text"):
        values |= {"sliding_window": 64, "query_pre_attn_scalar": 16}
    if kind == "reward":
        values |= {"num_labels": 1}
    return AutoConfig.for_model(arch, **(values | cfg))


def make_model(arch: str, tokenizer: PreTrainedTokenizerFast, kind: Kind = "policy", seed: int = 0, **cfg: Any) -> Any:
    """Randomly initialised model, fp32; the same seed gives the same weights."""
    auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(make_config(arch, tokenizer, kind, **cfg))
    return model


def make_checkpoint(
    arch: str,
    dir: str | Path,
    kind: Kind = "policy",
    *,
    pad: Pad = "own",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    chat_template: str | None = None,
    safe_serialization: bool = True,
    **cfg: Any,
) -> Path:
    """Writes a checkpoint with its tokenizer to `dir` and returns the path.

    `kind`: "policy" is a causal LM, "reward" a sequence classifier with one label. `cfg` goes to the config
    (`vocab_size=320` gives spare embedding rows, `tie_word_embeddings=True`, `attention_dropout=0.3`, ...).
    """
    path = Path(dir)
    tokenizer = make_tokenizer(pad, chat_template)
    model = make_model(arch, tokenizer, kind, seed, **cfg).to(dtype)
    model.save_pretrained(path)
    if not safe_serialization:
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    tokenizer.save_pretrained(path)
    return path


def make_adapter(base: Path, dir: Path, **lora: Any) -> Path:
    """Writes a LoRA with random weights on the causal LM in `base`, and its tokenizer, to `dir`; returns the path."""
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, init_lora_weights=False, **lora)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(dir)
    AutoTokenizer.from_pretrained(base).save_pretrained(dir)
    return dir


def make_encoder(
    dir: str | Path, *, seed: int = 0, num_labels: int = 1, dtype: torch.dtype = torch.float32, **cfg: Any
) -> Path:
    """Writes a BERT with a `classifier` head and a WordPiece tokenizer of its own to `dir`, and returns the path."""
    path = Path(dir)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(33, 127)]
    words = sorted({word for line in _TEXT for word in line.lower().split()} - set(letters))
    vocab = {piece: i for i, piece in enumerate([*specials, *letters, *(f"##{c}" for c in letters), *words])}
    tokenizer = BertTokenizerFast(vocab=vocab, do_lower_case=True, model_max_length=64)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = sizes | {"vocab_size": len(vocab), "max_position_embeddings": 64, "initializer_range": 0.2} | cfg
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(BertConfig(num_labels=num_labels, **settings))
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_other_decoder(dir: str | Path, *, seed: int = 0, chat_template: str | None = None, **cfg: Any) -> Path:
    """Writes a decoder reward model with a vocabulary of whole words to `dir`, and returns the path."""
    path = Path(dir)
    words = sorted({word for line in _TEXT for word in line.split()})
    pieces = dict.fromkeys(["<unk>", "<eos>", "<pad>", "<bos>", *words, "user", "assistant", ":"])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", model_max_length=64
    )
    tokenizer.chat_template = chat_template
    make_model("llama", tokenizer, "reward", seed, **cfg).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

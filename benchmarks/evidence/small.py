"""Models small enough to learn in seconds, over vocabularies made by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

EOS = "<eos>"
PAD = "<pad>"
QUIET = {
    "save_strategy": "no",
    "logging_strategy": "no",
    "num_sample_generations": 0,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Settings of a run that leaves nothing but its metrics."""


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token a word, words apart by spaces; `<eos>` and `<pad>` come after them."""
    vocabulary = {word: i for i, word in enumerate([*words, EOS, PAD])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)


def make_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaConfig:
    """Two layers of width 32; `changes` go on top."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
        "num_labels": 1,
    }
    return LlamaConfig(**(values | changes))


def make_policy(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Random weights; the same seed gives the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def make_value_model(config: LlamaConfig, seed: int) -> LlamaForSequenceClassification:
    """Random weights below a head of zeros, so that every value is 0 to begin with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
    torch.nn.init.zeros_(model.score.weight)
    return model

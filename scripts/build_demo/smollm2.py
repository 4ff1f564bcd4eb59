"""SmolLM2-135M-Instruct as ordinary checkpoints: a policy, and a reward model trained from it with a LoRA."""

import random
from pathlib import Path

import torch

from .reward import (
    add_lora,
    load_scorer,
    make_pairs,
    pair_accuracy,
    scores,
    split_snippets,
    train_reward,
)
from .sources import load_smollm2

PAD = "<empty_output>"  # an unused special token inside the embedding, so padding is not EOS
PAIRS, HELDOUT_PAIRS, HELDOUT_TEXTS = 800, 100, 200
RANK, LAYERS = 16, 10


def write_policy(work: Path, out: Path) -> None:
    """Writes SmolLM2 with its tokenizer, in fp32 safetensors, to ``out/policy``."""
    model, tokenizer = load_smollm2(work)
    tokenizer.pad_token = PAD
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out / "policy")
    tokenizer.save_pretrained(out / "policy")


def write_reward(work: Path, out: Path, *, pairs: int = PAIRS, seed: int = 0) -> dict[str, float]:
    """Trains a score head and a LoRA on human-rated film pairs, merges it, writes ``out/reward``."""
    torch.manual_seed(seed)
    train, heldout = split_snippets(work, ("movieReviewSnippets",))
    model, tokenizer = load_scorer(out / "policy")
    model = add_lora(model, RANK, LAYERS)
    train_reward(
        model,
        tokenizer,
        make_pairs(train, pairs, seed),
        make_pairs(heldout, HELDOUT_PAIRS, seed + 1),
        out / "work",
        learning_rate=5e-4,
        batch=16,
        seed=seed,
    )
    merged = model.merge_and_unload()
    merged.save_pretrained(out / "reward")
    tokenizer.save_pretrained(out / "reward")
    sample = random.Random(seed).sample(heldout, HELDOUT_TEXTS)  # the file's first ones are all praise
    accuracy = pair_accuracy(scores(merged, tokenizer, [r.text for r in sample], batch=32), sample, 2000, seed)
    return {"pairs": pairs, "held-out pair accuracy": accuracy}

"""Prompts: the first words of reviews, as far as they say nothing good or bad yet."""

import json
import random
from pathlib import Path

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .policy import policy_texts

TRAIN_PROMPTS, HELDOUT_PROMPTS = 2000, 256
MIN_WORDS, MAX_WORDS, PASSES = 2, 6, 3


def neutral_starts(texts: list[str], taken: set[str], count: int, rng: random.Random) -> list[str]:
    """Up to `count` distinct beginnings that VADER scores 0 and that are not in `taken`, one a text and pass."""
    analyzer = SentimentIntensityAnalyzer()
    found: dict[str, None] = {}
    for _ in range(PASSES):
        for text in texts:
            parts = text.split()
            start = " ".join(parts[: rng.randint(MIN_WORDS, MAX_WORDS)])
            if len(start.split()) > len(parts) - 3 or start in taken or start in found:
                continue
            if analyzer.polarity_scores(start)["compound"] == 0:
                found[start] = None
            if len(found) == count:
                return list(found)
    return list(found)


def build_prompts(work: Path, target: Path, seed: int = 0) -> dict[str, int]:
    """Writes ``prompts_train.jsonl`` and ``prompts_heldout.jsonl``; no held-out prompt is a training prompt.

    Held-out prompts are cut from the held-out reviews, which the policy never saw.
    """
    rng = random.Random(seed)
    train_texts, unseen = policy_texts(work, seed)
    rng.shuffle(train_texts)
    heldout = neutral_starts(unseen, set(), HELDOUT_PROMPTS, rng)
    train = neutral_starts(train_texts, set(heldout), TRAIN_PROMPTS, rng)
    for name, prompts in (("train", train), ("heldout", heldout)):
        path = target / f"prompts_{name}.jsonl"
        staging = path.with_suffix(".new")
        staging.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        staging.replace(path)
    return {"train prompts": len(train), "held-out prompts": len(heldout)}

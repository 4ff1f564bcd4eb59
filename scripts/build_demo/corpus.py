"""The corpus: SmolLM2 writes one-sentence reviews, and what is not a clean sentence is dropped."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .sampler import SharedPrefixSampler
from .seeds import (
    ASPECTS,
    EXAMPLES,
    INSTRUCTIONS,
    PLAIN_OPENINGS,
    PLURAL_ASPECTS,
    PLURAL_OPENINGS,
    SINGULAR_OPENINGS,
)
from .sources import load_smollm2, rated_snippets

KINDS = ("negative", "positive", "negative", "mixed", "positive", "negative")  # round i writes KINDS[i % 6]
SHOTS = 8
OPENINGS_PER_ROUND = 1500
BATCH = 192
MAX_TOKENS = 40
TEMPERATURE, TOP_P = 0.7, 0.9


def opening(rng: random.Random) -> str:
    """The first words of a review, such as ``The acting is``."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(SINGULAR_OPENINGS).format(rng.choice(ASPECTS))
    if draw < 0.6:
        return rng.choice(PLURAL_OPENINGS).format(rng.choice(PLURAL_ASPECTS))
    return rng.choice(PLAIN_OPENINGS)


def everyday_vocab(tokenizer: PreTrainedTokenizerBase, texts: list[str], stop: set[int]) -> torch.Tensor:
    """Token ids found in at least five of the human reviews, or in an example: plain words for a small model."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(set(tokenizer(" " + text, add_special_tokens=False).input_ids))
    kept = {token for token, count in counts.items() if count >= 5} | stop
    for examples in EXAMPLES.values():
        for example in examples:
            kept.update(tokenizer(example, add_special_tokens=False).input_ids)
    return torch.tensor(sorted(kept))


def write_raw(work: Path, rounds: int, seed: int = 0) -> Path:
    """Appends sampled reviews to ``raw.jsonl`` until it holds `rounds` rounds; a round cut off stays as it is."""
    path = work / "corpus" / "raw.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    if path.exists():
        with path.open() as lines:
            done = 1 + max((json.loads(line)["round"] for line in lines), default=-1)
    if done >= rounds:
        return path
    model, tokenizer = load_smollm2(work)
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    stop = {*newline, tokenizer.eos_token_id}
    texts = [r.text for r in rated_snippets(work) if r.source in ("movieReviewSnippets", "amazonReviewSnippets")]
    sampler = SharedPrefixSampler(model, everyday_vocab(tokenizer, texts, stop), BATCH, MAX_TOKENS)
    while done < rounds:
        rng = random.Random(seed * 100_003 + done)
        generator = torch.Generator().manual_seed(seed * 100_003 + done)
        kind = KINDS[done % len(KINDS)]
        turn = [{"role": "user", "content": INSTRUCTIONS[kind]}]
        prefix = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prefix += "\n".join(rng.sample(EXAMPLES[kind], SHOTS)) + "\n"
        prefix_ids = tokenizer(prefix, add_special_tokens=False).input_ids
        openings = [opening(rng) for _ in range(OPENINGS_PER_ROUND)]
        opening_ids = [tokenizer(text, add_special_tokens=False).input_ids for text in openings]
        started, tokens = time.time(), 0
        with path.open("a") as out:
            for index, ids, ended in sampler.sample(prefix_ids, opening_ids, stop, TEMPERATURE, TOP_P, generator):
                tokens += len(ids)
                row = {"round": done, "kind": kind, "opening": openings[index], "text": tokenizer.decode(ids).strip()}
                out.write(json.dumps(row | {"ended": ended}) + "\n")
        seconds = time.time() - started
        print(f"round {done} {kind}: {seconds:.0f} s, {tokens / seconds:.0f} tokens/s", flush=True)
        done += 1
    return path

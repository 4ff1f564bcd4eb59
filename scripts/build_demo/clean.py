"""From raw sampled lines to a clean, sentiment-balanced corpus with its own held-out part."""

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .seeds import EXAMPLES
from .sources import is_heldout

MIN_WORDS, MAX_WORDS = 6, 28
MIN_WORD_COUNT = 3
MAX_RATIO, NEUTRAL_SHARE = 1.15, 0.25  # of one sentiment to the other; of neutral reviews in all
CLEAR = 0.3
PLAIN = re.compile(r"[A-Z][A-Za-z' ,-]*[.!]")
UNWANTED = re.compile(
    r"\b(review|reviews|reviewer|rating|stars|prompt|sentence|assistant|sure|here|following|example|"
    r"language model|note|line|please|sorry|sex|sexual|kill|killed|suicide|racist|black|white|gay|jew|muslim)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Review:
    """One text of the corpus and what VADER's compound score says of it."""

    text: str
    compound: float


def words(text: str) -> list[str]:
    """Lower-case words, punctuation dropped."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def is_clean(text: str) -> bool:
    """Whether `text` is one plain sentence of usual length that does not repeat itself."""
    found = words(text)
    if not PLAIN.fullmatch(text) or not MIN_WORDS <= len(found) <= MAX_WORDS or UNWANTED.search(text):
        return False
    if any(a == b for a, b in itertools.pairwise(found) if a not in ("very", "so", "that", "had")):
        return False
    if re.search(r"\b([a-z]+),? (?:and|or|but) \1\b", text.lower()):
        return False
    trigrams = list(zip(found, found[1:], found[2:], strict=False))
    content = Counter(word for word in found if len(word) > 4)
    return len(trigrams) == len(set(trigrams)) and max(content.values(), default=0) <= 2


def clean(work: Path, seed: int = 0) -> dict[str, int]:
    """Writes ``train.jsonl`` and ``heldout.jsonl`` from ``raw.jsonl``; returns the counts at each step.

    A text is dropped when it is cut off, not plain, a copy, contains a word the corpus hardly uses, or clearly
    contradicts the sentiment that was asked for (SmolLM2 drifts to praise).
    """
    folder = work / "corpus"
    analyzer = SentimentIntensityAnalyzer()
    with (folder / "raw.jsonl").open() as lines:
        raw = [json.loads(line) for line in lines]
    counts = {"raw": len(raw)}
    seen = {" ".join(words(example)) for examples in EXAMPLES.values() for example in examples}
    kept: list[Review] = []
    for row in raw:
        text = row["text"].strip()
        key = " ".join(words(text))
        if not row["ended"] or key in seen or not is_clean(text):
            continue
        compound = analyzer.polarity_scores(text)["compound"]
        if (row["kind"] == "positive" and compound <= -CLEAR) or (row["kind"] == "negative" and compound >= CLEAR):
            continue
        seen.add(key)
        kept.append(Review(text, compound))
    counts["clean"] = len(kept)
    usage = Counter(word for review in kept for word in words(review.text))
    kept = [review for review in kept if all(usage[word] >= MIN_WORD_COUNT for word in words(review.text))]
    counts["common words"] = len(kept)
    rng = random.Random(seed)
    rng.shuffle(kept)
    used: set[str] = set()
    for name in ("heldout", "train"):
        part = balance([review for review in kept if is_heldout(review.text) == (name == "heldout")])
        rng.shuffle(part)
        counts[name] = len(part)
        used.update(word for review in part for word in words(review.text))
        with (folder / f"{name}.jsonl").open("w") as out:
            out.writelines(json.dumps(asdict(review)) + "\n" for review in part)
    counts["words in use"] = len(used)
    return counts


def balance(reviews: list[Review]) -> list[Review]:
    """The reviews without the surplus of the larger of the two sentiments, and with a bounded share of neutral ones."""
    positive = [review for review in reviews if review.compound >= 0.05]
    negative = [review for review in reviews if review.compound <= -0.05]
    neutral = [review for review in reviews if abs(review.compound) < 0.05]
    most = int(MAX_RATIO * min(len(positive), len(negative)))
    polar = positive[:most] + negative[:most]
    return polar + neutral[: int(len(polar) * NEUTRAL_SHARE / (1 - NEUTRAL_SHARE))]


def read_reviews(work: Path, part: str) -> list[Review]:
    """The ``train`` or ``heldout`` part of the corpus."""
    with (work / "corpus" / f"{part}.jsonl").open() as lines:
        return [Review(**json.loads(line)) for line in lines]

"""More text from the same text: words swapped for others of their kind, and halves of sentences exchanged."""

import random
import re

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

KINDS: tuple[tuple[str, ...], ...] = (
    ("movie", "film"),
    ("plot", "story", "script", "premise", "writing"),
    ("music", "soundtrack", "score"),
    ("camera work", "cinematography", "editing", "production"),
    ("pacing", "direction"),
    ("lead actor", "main character", "villain"),
    ("ending", "final scene"),
    ("first half", "second half"),
    ("jokes", "conversations"),
    ("characters", "actors"),
    ("fight scenes", "action scenes", "car chases"),
    ("visuals", "special effects", "sets", "costumes"),
    ("songs", "dance numbers"),
    ("terrible", "horrible", "awful", "dreadful"),
    ("boring", "dull", "tedious"),
    ("stupid", "silly", "dumb", "ridiculous"),
    ("weak", "poor", "lazy"),
    ("cheap", "ugly"),
    ("great", "wonderful", "fantastic", "excellent"),
    ("beautiful", "stunning", "lovely", "gorgeous"),
    ("clever", "smart", "brilliant"),
    ("funny", "hilarious"),
    ("hated", "disliked"),
    ("loved", "enjoyed"),
    ("wife", "husband", "brother", "sister"),
)
KIND_OF = {word: kind for kind in KINDS for word in kind}
SWAPPABLE = re.compile(r"\b(?:(an?) )?(" + "|".join(sorted(KIND_OF, key=len, reverse=True)) + r")\b", re.IGNORECASE)


def vary(text: str, rng: random.Random) -> str:
    """`text` with words swapped within their kind; a word keeps one replacement, and none is used twice."""
    present = {match.group(2).lower() for match in SWAPPABLE.finditer(text)}
    chosen: dict[str, str] = {}

    def swap(match: re.Match[str]) -> str:
        article, word = match.group(1), match.group(2)
        if word not in chosen:
            free = [other for other in KIND_OF.get(word, ()) if other not in present and other not in chosen.values()]
            chosen[word] = rng.choice([word, *free])
        new = chosen[word]
        if article is None:
            return new
        return f"{article[0]}{'n' if new[0] in 'aeiou' else ''} {new}"

    return SWAPPABLE.sub(swap, text)


def variants(texts: list[str], count: int, seed: int) -> list[str]:
    """The texts and up to `count` distinct variants of each, without copies."""
    rng = random.Random(seed)
    found = dict.fromkeys(texts)
    for text in texts:
        found.update(dict.fromkeys(vary(text, rng) for _ in range(count)))
    return list(found)


JOINT = re.compile(r", (and|but) ")
STANDS_ALONE = re.compile(
    r"(?:I|it|we|the|this|that|nobody|everyone|my|there|you)\b(?!.*\b(?:he|him|his|she|her|they|them)\b)"
)


def sign(text: str, analyzer: SentimentIntensityAnalyzer) -> int:
    """1, -1 or 0: VADER's verdict on `text`."""
    compound = analyzer.polarity_scores(text)["compound"]
    return (compound >= 0.05) - (compound <= -0.05)


def recombine(texts: list[str], count: int, seed: int) -> list[str]:
    """Up to `count` new sentences from the halves of sentences of the form ``first, and (or but) second.``.

    A first half gets the second half of another sentence with the same joint whose halves VADER gives the same
    signs, provided that the new second half stands alone: its subject refers to nothing in its old first half.
    """
    rng = random.Random(seed)
    analyzer = SentimentIntensityAnalyzer()
    firsts: list[tuple[str, tuple[str, int, int]]] = []
    seconds: dict[tuple[str, int, int], list[str]] = {}
    for text in texts:
        parts = JOINT.split(text, maxsplit=1)
        if len(parts) != 3:
            continue
        first, joint, second = parts
        key = (joint, sign(first, analyzer), sign(second, analyzer))
        if len(first.split()) >= 3:
            firsts.append((first, key))
        if STANDS_ALONE.match(second):
            seconds.setdefault(key, []).append(second)
    found: dict[str, None] = {}
    for _ in range(count if firsts else 0):
        first, key = rng.choice(firsts)
        if key in seconds:
            found[f"{first}, {key[0]} {rng.choice(seconds[key])}"] = None
    return list(found)

"""What the finished checkpoints do: samples, their sentiment, and whether plain transformers reads them rightly."""

import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .reward import scores

MAX_NEW_TOKENS = 32
PROBES = (
    ("The acting is wonderful and I loved the story.", "The acting is terrible and I hated the story."),
    ("This film is funny, warm and full of heart.", "This film is slow, ugly and a waste of time."),
    ("The ending was a beautiful surprise.", "The ending was stupid and ruined the movie."),
    ("I would happily watch it again.", "I would never watch it again."),
    ("The jokes are really funny.", "The jokes are not funny at all."),
    ("The music is lovely and fits every scene.", "The music is annoying and far too loud."),
    ("It is one of the best movies of the year.", "It is one of the worst movies of the year."),
    ("My family and I enjoyed every minute of it.", "My family and I were bored the whole time."),
    ("The cast is excellent and the script is smart.", "The cast is wasted and the script is a mess."),
    ("The plot is clever and exciting.", "The plot makes no sense."),
)


@torch.inference_mode()
def sample(path: Path, prompts: list[str], temperature: float, seed: int = 0) -> tuple[list[str], float]:
    """Completions with their prompts, and the share that ended with EOS in time."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    ended = float((out[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id).any(1).float().mean())
    return tokenizer.batch_decode(out, skip_special_tokens=True), ended


@torch.inference_mode()
def check_reward_reads_eos(path: Path) -> float:
    """The largest difference between scores of a padded batch and of unpadded ids, each read at the EOS."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [text for probe in PROBES for text in probe]
    padded = scores(model, tokenizer, texts)
    alone = []
    for text in texts:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == tokenizer.eos_token_id and (ids != tokenizer.pad_token_id).all()
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        alone.append(model.score(hidden)[0])
    return float((padded - torch.stack(alone)).abs().max())


def describe(policy: Path, reward: Path, prompts: list[str]) -> dict[str, float | str]:
    """Prints samples at two temperatures and returns the figures the documentation quotes."""
    analyzer = SentimentIntensityAnalyzer()
    tokenizer = AutoTokenizer.from_pretrained(reward)
    scorer = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
    report: dict[str, float | str] = {"padding changes the score by at most": check_reward_reads_eos(reward)}
    for temperature in (1.0, 0.7):
        texts, ended = sample(policy, prompts, temperature)
        found = scores(scorer, tokenizer, texts)
        compounds = [analyzer.polarity_scores(text)["compound"] for text in texts]
        print(f"\nsamples at temperature {temperature}:")
        for text, score in list(zip(texts, found.tolist(), strict=True))[:20]:
            print(f"  {score:+.2f}  {text}")
        lengths = [
            len(tokenizer(t)["input_ids"]) - len(tokenizer(p)["input_ids"]) for t, p in zip(texts, prompts, strict=True)
        ]
        report |= {
            f"T={temperature} ended within {MAX_NEW_TOKENS}": ended,
            f"T={temperature} mean completion tokens": statistics.mean(lengths),
            f"T={temperature} distinct texts": len(set(texts)) / len(texts),
            f"T={temperature} VADER positive": statistics.mean(c >= 0.05 for c in compounds),
            f"T={temperature} VADER negative": statistics.mean(c <= -0.05 for c in compounds),
            f"T={temperature} score mean": float(found.mean()),
            f"T={temperature} score std": float(found.std()),
            f"T={temperature} correlation of score and VADER": statistics.correlation(found.tolist(), compounds),
        }
    flat = scores(scorer, tokenizer, [text for probe in PROBES for text in probe]).view(-1, 2)
    print("\nhand-written pairs:")
    for (good, bad), (a, b) in zip(PROBES, flat.tolist(), strict=True):
        print(f"  {a:+.2f} {b:+.2f}  {good} | {bad}")
    report["hand-written pairs ranked right"] = f"{int((flat[:, 0] > flat[:, 1]).sum())} of {len(PROBES)}"
    return report

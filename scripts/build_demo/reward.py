"""The reward model: the language model with a score head, trained on human ratings with TRL's RewardTrainer."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import RewardConfig, RewardTrainer

from .sources import Rated, is_heldout, rated_snippets

SOURCES = ("movieReviewSnippets", "amazonReviewSnippets")
MIN_GAP = 1.0
MAX_WORDS, MAX_TRAIN_WORDS = 40, 18


def split_snippets(work: Path, sources: tuple[str, ...]) -> tuple[list[Rated], list[Rated]]:
    """Rated snippets as (short ones to train on, held-out ones of any usual length)."""
    rows = [r for r in rated_snippets(work) if r.source in sources and 2 <= len(r.text.split()) <= MAX_WORDS]
    train = [r for r in rows if not is_heldout(r.text) and len(r.text.split()) <= MAX_TRAIN_WORDS]
    return train, [r for r in rows if is_heldout(r.text)]


def make_pairs(rows: list[Rated], count: int, seed: int) -> Dataset:
    """`count` random pairs of one source whose ratings lie at least `MIN_GAP` apart, the better one `chosen`."""
    rng = random.Random(seed)
    by_source: dict[str, list[Rated]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    pairs: list[dict[str, str]] = []
    while len(pairs) < count:
        first = rng.choice(rows)
        second = rng.choice(by_source[first.source])
        if abs(first.rating - second.rating) >= MIN_GAP:
            better, worse = (first, second) if first.rating > second.rating else (second, first)
            pairs.append({"chosen": better.text, "rejected": worse.text})
    return Dataset.from_list(pairs)


def train_reward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    heldout: Dataset,
    out: Path,
    *,
    learning_rate: float,
    epochs: float = 1,
    batch: int = 32,
    max_steps: int = -1,
    seed: int = 0,
) -> float:
    """Trains on pairs (TRL appends EOS to both texts), returns the share of held-out pairs ranked right."""
    arguments = RewardConfig(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=64,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.05,
        center_rewards_coefficient=0.01,
        max_length=128,
        logging_steps=50,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = RewardTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=heldout, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(out))
    return float(trainer.evaluate()["eval_accuracy"])


@torch.inference_mode()
def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch: int = 128
) -> torch.Tensor:
    """Scores of complete texts, read at the EOS that ends each."""
    model.eval()
    found: list[torch.Tensor] = []
    for i in range(0, len(texts), batch):
        inputs = tokenizer([t + tokenizer.eos_token for t in texts[i : i + batch]], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        found.append(model(**inputs).logits[:, 0].float())
    return torch.cat(found)


def pair_accuracy(found: torch.Tensor, rows: list[Rated], count: int, seed: int) -> float:
    """Share of random pairs, ratings at least `MIN_GAP` apart, that the scores of `rows` rank as people did."""
    rng = random.Random(seed)
    right = total = 0
    while total < count:
        i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
        gap = rows[i].rating - rows[j].rating
        if rows[i].source == rows[j].source and abs(gap) >= MIN_GAP:
            total += 1
            right += int((float(found[i] - found[j]) > 0) == (gap > 0))
    return right / total


def add_lora(model: PreTrainedModel, rank: int, layers: int) -> PreTrainedModel:
    """`model` with a LoRA on the linear layers of its last `layers` layers and its score head trained in full."""
    depth = model.config.num_hidden_layers
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(depth - layers, depth)),
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, lora)


def load_scorer(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint with a one-number score head, in fp32, and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def build_reward(work: Path, start: Path, out: Path, *, pairs: int, seed: int = 0) -> dict[str, float]:
    """Trains `out` from the language model `start` on pairs of film and product review snippets."""
    torch.manual_seed(seed)
    train, heldout = split_snippets(work, SOURCES)
    model, tokenizer = load_scorer(start)
    accuracy = train_reward(
        model,
        tokenizer,
        make_pairs(train, pairs, seed),
        make_pairs(heldout, 2000, seed + 1),
        out,
        learning_rate=1.5e-3,
        seed=seed,
    )
    return {"training pairs": pairs, "training snippets": len(train), "accuracy of TRL's evaluation": accuracy}


def evaluate(work: Path, path: Path, count: int = 20_000) -> dict[str, float]:
    """Accuracy of a finished reward model on held-out pairs, by set of snippets."""
    model, tokenizer = load_scorer(path)
    report: dict[str, float] = {}
    for source in SOURCES:
        _, heldout = split_snippets(work, (source,))
        found = scores(model, tokenizer, [row.text for row in heldout])
        report[f"{source} held out"] = len(heldout)
        report[f"{source} pair accuracy"] = pair_accuracy(found, heldout, count, seed=0)
    return report

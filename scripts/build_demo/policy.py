"""The SFT policy: a byte-level BPE tokenizer and a small Llama, trained from scratch with TRL's SFTTrainer."""

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from .augment import recombine, variants
from .clean import read_reviews, words
from .phrasebook import sentences
from .sources import RATED_SETS, Rated, is_heldout, rated_snippets

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 3072
HUMAN_MAX_WORDS = 30
VARIANTS, RECOMBINED, PHRASEBOOK = 2, 1, 8000
KEEP_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with distinct end and padding tokens that adds neither of them by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=128, clean_up_tokenization_spaces=False
    )


def new_policy(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of about 2.4M parameters with random weights and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=512,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def human_texts(work: Path) -> list[Rated]:
    """Human snippets worth reading for the language model: reviews of usual length."""
    return [
        row
        for row in rated_snippets(work)
        if row.source in RATED_SETS[:2] and 4 <= len(row.text.split()) <= HUMAN_MAX_WORDS
    ]


def train_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[str],
    heldout: list[str],
    out: Path,
    *,
    epochs: float,
    learning_rate: float,
    batch: int = 32,
    seed: int = 0,
) -> float:
    """Trains `model` on texts that each end in EOS, saves it to `out`, returns the held-out loss per token."""
    arguments = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=128,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        max_length=96,
        train_sampling_strategy="group_by_length",
        logging_steps=100,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": train}),
        eval_dataset=Dataset.from_dict({"text": heldout}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out))
    return float(trainer.evaluate()["eval_loss"])


def policy_texts(work: Path, seed: int = 0) -> tuple[list[str], list[str]]:
    """What the policy learns, and the held-out reviews that it never sees.

    The first are reviews, sentences of their halves, variants of both, and the phrasebook's sentences.
    """
    reviews = [review.text for review in read_reviews(work, "train")]
    heldout = [review.text for review in read_reviews(work, "heldout")]
    unseen = {" ".join(words(text)) for text in heldout}
    more = variants(reviews + recombine(reviews, RECOMBINED * len(reviews), seed), VARIANTS, seed)
    more += sentences(PHRASEBOOK, seed)
    return [text for text in more if " ".join(words(text)) not in unseen], heldout


def build_policy(work: Path, *, epochs: float, start: Path | None = None, seed: int = 0) -> dict[str, float]:
    """Trains ``work/policy`` from scratch, or further from `start`, a policy of an earlier and smaller corpus.

    The tokenizer also learns from the human snippets that the reward model will read.
    """
    torch.manual_seed(seed)
    train, heldout = policy_texts(work, seed)
    if start is None:
        human = [row.text for row in human_texts(work) if not is_heldout(row.text)]
        tokenizer = train_tokenizer(train + human)
        model = new_policy(tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    report: dict[str, float] = {"texts": len(train), "parameters": model.num_parameters()}
    print(report, flush=True)
    rate = 2e-3 if start is None else 1.2e-3
    loss = train_lm(model, tokenizer, train, heldout, work / "policy", epochs=epochs, learning_rate=rate, seed=seed)
    return report | {"held-out loss per token": loss}


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Writes a bf16 checkpoint with only the files a reader needs, replacing `target` at once."""
    staging, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    shutil.rmtree(staging, ignore_errors=True)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    for path in staging.iterdir():
        if path.name in KEEP_FILES:
            path.chmod(0o644)
        else:
            path.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)

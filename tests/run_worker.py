"""One run on tiny models in a process of its own; with a number, it is killed before that update."""

import os
import signal
import sys

import torch
from datasets import Dataset
from transformers import TrainerCallback

from fourscore import ModelConfig, PPOConfig, PPOTrainer, load_models

PROMPTS = ["the movie", "a film is", "this", "good acting and", "it was a plot"] * 4


class KilledBefore(TrainerCallback):
    """As an out-of-memory killer would do it: nothing of the process gets to clean up."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def main(out: str, sft: str, reward: str, adapter: str, kill_before: int, resume: bool) -> None:
    torch.set_num_threads(1)
    groups = {"num_generations": 4, "top_p": 0.9, "min_response_length": 3} if adapter == "groups" else {}
    args = PPOConfig(
        output_dir=out,
        sft_model_path=sft,
        reward_model_path=reward,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        max_steps=6,
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=3,
        learning_rate=1e-3,
        warmup_steps=2,
        response_length=8,
        missing_eos_penalty=1.0,
        report_to="none",
        disable_tqdm=True,
        **groups,
    )
    models = load_models(ModelConfig(use_peft=adapter in ("lora", "on an adapter")), args)
    trainer = PPOTrainer(
        args=args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:5]}),
        callbacks=[KilledBefore(kill_before)],
    )
    trainer.train(resume_from_checkpoint=resume or None)


if __name__ == "__main__":
    out, sft, reward, adapter, kill_before, resume = sys.argv[1:]
    main(out, sft, reward, adapter, int(kill_before), resume == "resume")

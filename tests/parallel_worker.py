"""Trains a tiny policy for two updates on fixed completions and writes the weights: run alone, or under a launcher."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from tiny import make_model, make_tokenizer

import fourscore.ppo.trainer as trainer_module
from fourscore import ModelConfig, PPOConfig, PPOTrainer, get_peft_config
from fourscore.ppo.experience import Experience


def fixed_completions(policy, prompts, sampling, *, synced=False):
    """Completions that follow from the prompt alone, of very unequal lengths."""
    completions = [[(7 * t + sum(p)) % 250 + 3 for t in range(1 + 3 * (sum(p) % 5))] for p in prompts]
    return Experience(
        input_ids=torch.tensor([i for p, c in zip(prompts, completions, strict=True) for i in p + c]),
        prompt_lens=torch.tensor([len(p) for p in prompts]),
        completion_lens=torch.tensor([len(c) for c in completions]),
        has_eos=torch.tensor([sum(p) % 2 == 0 for p in prompts]),
    )


def main(out: str, sharing: str, adapter: str, world_size: int) -> None:
    if sharing != "sampled":
        trainer_module.generate = fixed_completions
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    prompts = ["the film", "a", "this was a good movie and", "the acting", "it is", "plot", "bad bad bad", "so fine a film"]
    args = PPOConfig(
        output_dir=out,
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // world_size,
        num_ppo_epochs=2,
        max_steps=2,
        learning_rate=1e-3,
        response_length=8,
        save_strategy="no",
        num_sample_generations=0,
        missing_eos_penalty=1.0,
        whiten_rewards=True,
        fsdp="full_shard" if sharing == "fsdp" else None,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=make_model("llama", tokenizer),
        ref_model=None if adapter == "lora" else make_model("llama", tokenizer),
        reward_model=make_model("llama", tokenizer, "reward", seed=1),
        value_model=make_model("llama", tokenizer, "reward", seed=1),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:3]}),
        peft_config=get_peft_config(ModelConfig(use_peft=adapter == "lora")),
    )
    trainer.train()
    trainer.save_model()
    trainer.generate_completions()
    if trainer.parallel.is_main:
        (Path(out) / "done").touch()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

"""Trains tiny policies for two updates on fixed completions and writes the weights: run alone, or under a launcher."""

import math
import sys
from pathlib import Path

import torch
from datasets import Dataset

import fourscore.rollout.transformers as rollout_module
from fourscore import ModelConfig, PPOConfig, PPOTrainer, load_models
from fourscore.models.support import Support
from fourscore.ppo.experience import Experience
from fourscore.rollout.transformers import generate

PROMPTS = ["the film", "a", "this was a good movie and", "the acting", "it is", "plot", "bad bad bad", "so fine a film"]

OPTIONS = {
    "use_kl_loss": True,
    "kl_target": 0.5,
    "kl_horizon": 8,
    "cliprange_high": 0.3,
    "dual_clip": 3.0,
    "entropy_coef": 0.05,
    "loss_aggregation": "sequence",
    "positive_lm_coef": 0.1,
    "lam_alpha": 0.5,
    "lam_value": 1.0,
    "value_learning_rate": 5e-4,
    "value_max_grad_norm": 0.5,
    "early_stop_kl": 1.0,
    "stop_on_ratio": True,
    "ema_decay": 0.5,
    "value_warmup_updates": 1,
    "tokens_per_microbatch": 31,  # one pass on one process, two on the other
}
"""Of the algorithm, all that there are."""


def fixed_completions(policy, prompts, sampling, **kwargs):
    """Completions that follow from the prompt alone, of very unequal lengths; so does their support."""
    completions = [[(7 * t + sum(p)) % 250 + 3 for t in range(1 + 3 * (sum(p) % 5))] for p in prompts]
    drawn = torch.tensor([i for c in completions for i in c])
    allowed = (drawn[:, None] + torch.arange(300)) % 7 < 4
    allowed[torch.arange(len(drawn)), drawn] = True
    return Experience(
        input_ids=torch.tensor([i for p, c in zip(prompts, completions, strict=True) for i in p + c]),
        prompt_lens=torch.tensor([len(p) for p in prompts]),
        completion_lens=torch.tensor([len(c) for c in completions]),
        has_eos=torch.tensor([sum(p) % 2 == 0 for p in prompts]),
        support=Support.of(allowed) if sampling.truncates else None,
    )


def make_trainer(out: Path, world_size: int, sft: str, reward: str, kind: str) -> PPOTrainer:
    args = PPOConfig(
        output_dir=str(out),
        sft_model_path=sft,
        reward_model_path=reward,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // world_size,
        num_ppo_epochs=2,
        max_steps=2,
        learning_rate=1e-3,
        response_length=8,
        save_steps=1,
        num_sample_generations=0,
        missing_eos_penalty=1.0,
        freeze_layers=int(kind == "frozen"),
        share_value_backbone=kind == "trunk",
        whiten_rewards=True,
        num_generations=4 if kind == "groups" else 1,
        top_k=150 if kind == "groups" else 0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **(OPTIONS if kind == "options" else {}),
    )
    models = load_models(ModelConfig(use_peft=kind in ("lora", "on an adapter")), args)
    return PPOTrainer(
        args=args,
        processing_class=models.tokenizer,
        model=models.policy,
        ref_model=models.ref_policy,
        reward_model=models.reward_model,
        value_model=models.value_model,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}),
    )


def check_sharing(trainer: PPOTrainer) -> None:
    """What is frozen is held once a process, still mapped from its file, and sharded weights are in one tree."""
    value, reward = trainer.value_model, trainer.reward_model
    frozen = {p.data_ptr() for p in value.parameters() if not p.requires_grad}
    if trainer.parallel.sharded:
        assert (reward is value) == (trainer.ref_model is None)
        return
    if trainer.ref_model is None:
        assert {p.data_ptr() for p in reward.parameters()} == frozen
    lines = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []
    spans = [line.split()[0].split("-") for line in lines if line.endswith("model.safetensors")]
    held = {p.data_ptr() for m in (trainer.model, trainer.ref_model, reward) if m for p in m.parameters()}
    trained = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad}
    outside = [a for a in held - trained if not any(int(start, 16) <= a < int(end, 16) for start, end in spans)]
    assert not lines or not outside, f"{len(outside)} of {len(held - trained)} frozen tensors are copies"


def main(out: Path, world_size: int, sft: str, reward: str, adapter: str, kind: str) -> None:
    sft = adapter if kind == "on an adapter" else sft
    rollout_module.generate = fixed_completions
    trainer = make_trainer(out, world_size, sft, reward, kind)
    assert trainer.parallel.world_size == world_size
    result = trainer.train().metrics
    trainer.save_model()
    if kind != "on an adapter":  # which is in memory, and not in a file
        check_sharing(trainer)
    if kind == "options":
        assert trainer.state.kl_coef != trainer.args.kl_coef

    # Weights, optimizers and schedules come back as they were: the second update is the same one again.
    resumed = make_trainer(out, world_size, sft, reward, kind)
    again = resumed.train(resume_from_checkpoint=str(out / "checkpoint-1")).metrics
    for name in ("objective/kl", "loss/policy_avg", "loss/value_avg", "policy/grad_norm", "value/grad_norm", "lr"):
        assert math.isclose(again[name], result[name], rel_tol=1e-5, abs_tol=1e-7), (name, again[name], result[name])

    # For real this time: ranks that finish their completions at different steps must not leave each other waiting.
    rollout_module.generate = generate
    assert len(trainer.generate_completions()) == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, processes, kinds, *checkpoints = sys.argv[1:]
    for kind in kinds.split(","):
        main(Path(folder) / kind, int(processes), *checkpoints, kind)

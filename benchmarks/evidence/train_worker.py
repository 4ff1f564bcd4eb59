"""Trains once with one system in this process and keeps the policy along the way: started by `training.py`.

Its argument is JSON: `system` ("fourscore" or "trl"), `policy`, `reward`, `prompts` (a .jsonl file), `flags` (fields of
`PPOConfig`, of both systems alike), `value` ("reward": starts as the reward model; "sft": the SFT checkpoint's backbone
and a fresh head), `keep` (after which updates) and `folder`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)


class KeepPolicies(TrainerCallback):
    """Saves the policy after some updates, in a folder named after the update, and stops after the last of them."""

    def __init__(self, folder: Path, updates: list[int]) -> None:
        self.folder, self.updates = folder, updates

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After an update."""
        if state.global_step in self.updates:
            policy = getattr(model, "policy", model)  # TRL hands over policy and value model in one
            policy.save_pretrained(self.folder / str(state.global_step))
        control.should_training_stop |= state.global_step == max(self.updates)


def make_trainer(job: dict[str, Any]) -> Any:
    """The system's trainer, with its four models loaded one by one as TRL's script does."""
    if job["system"] == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    else:
        from fourscore import PPOConfig, PPOTrainer

    folder = Path(job["folder"])
    args = PPOConfig(
        output_dir=str(folder / "run"),
        sft_model_path=job["policy"],
        reward_model_path=job["reward"],
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        **job["flags"],
    )
    set_seed(args.seed)  # a fresh head is drawn while loading
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    classifier = AutoModelForSequenceClassification
    start = job["reward"] if job["value"] == "reward" else job["policy"]
    value_model = classifier.from_pretrained(start, num_labels=1, dtype="float32")
    reward_model = classifier.from_pretrained(job["reward"], num_labels=1, dtype="float32")
    ref_policy, policy = (AutoModelForCausalLM.from_pretrained(job["policy"], dtype="float32") for _ in range(2))
    prompts = [json.loads(line)["prompt"] for line in Path(job["prompts"]).read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)) if job["system"] == "trl" else None,
        callbacks=[KeepPolicies(folder / "policies", job["keep"])],
    )


def main() -> None:
    """Train, print."""
    job = json.loads(sys.argv[1])
    trainer = make_trainer(job)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    names = ("objective/scores", "objective/kl", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/value_avg", "lr")
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    history = {name: [round(row[name], 6) for row in rows] for name in names}
    print("\n" + json.dumps({"train_seconds": round(seconds, 1), "history": history}))


if __name__ == "__main__":
    main()

"""Makes one PPO update with one system for every line it reads: started by `speed.py`.

Its argument is the JSON of `update_worker.py` with `workload` (the fields of a `Workload`) and `small_warm_up` (whether
the first update is of few tokens). Each answer is a line of JSON: seconds in all and by phase, the tokens, and the peak
of memory.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any, TextIO

import torch
from datasets import Dataset
from memory_probe import MemoryProbe, memory
from scripted import EOS, Batch, Script, Workload
from transformers import TrainerCallback
from update_worker import make_trainer


class Batches:
    """The batches of a workload, one after the other: the data collator of both trainers.

    It pays no attention to the rows that it is given, so both systems have the same prompts in the same updates, though
    they shuffle differently.
    """

    def __init__(self, workload: Workload, small_warm_up: bool) -> None:
        self._workload, self._small_warm_up = workload, small_warm_up
        self._next = 0

    def batch(self, number: int) -> Batch:
        """That of an update; 0 is the one to warm up with."""
        small = self._small_warm_up and number == 0
        return self._workload.small_batch() if small else self._workload.batch_of(number)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Prompts of the next update, padded on the left with the tokenizer's pad token."""
        prompts = self.batch(self._next).prompts
        self._next += 1
        width = max(len(prompt) for prompt in prompts)
        padded = [[PAD] * (width - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(padded)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


PAD = 1
"""In the tokenizer of all checkpoints here; no prompt holds it."""


class Turns(TrainerCallback):
    """Waits for a line before each update and answers it after. An update is what a trainer does between two logs."""

    def __init__(self, batches: Batches, answers: TextIO, device: str) -> None:
        self.script: Script
        self.phases: dict[str, float] = {}
        self.drawn: list[int] = []
        self._batches, self._answers, self._device = batches, answers, device
        self._before = memory()["anon"]
        self._number = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first update follows."""
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """An update is over."""
        if logs is not None and "objective/scores" in logs:
            self._answer(logs)
            self._wait()

    def mark(self, name: str) -> None:
        """Seconds of the update until now."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.phases.setdefault(name, time.perf_counter() - self._started)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit()
        self._batch = self._batches.batch(self._number)
        self._number += 1
        self.script.begin(self._batch)
        self.phases = {}
        # Ten milliseconds: what the sampling takes is not to be seen in the times.
        self._probe = MemoryProbe(0.01)
        self._probe.phase("update")
        self._worked, self._started = time.process_time(), time.perf_counter()

    def _answer(self, logs: dict[str, float]) -> None:
        self.mark("end")
        cpu_s = time.process_time() - self._worked
        self._probe.stop()
        marks = self.phases
        if "time/rollout_s" in logs:  # fourscore's own
            rollout, scoring = logs["time/rollout_s"], logs["time/scoring_s"]
            drawn = [round(logs["tokens/prompt"]), round(logs["tokens/completion"])]
        else:
            rollout, scoring = marks["rollout"], marks["training"] - marks["rollout"]
            drawn = [sum(self._batch.prompt_lens()), sum(self.drawn)]
        lens = [self._batch.prompt_lens(), self._batch.completion_lens]
        if drawn != [sum(each) for each in lens]:
            sys.exit(f"drew {drawn} tokens of prompts and completions, not {[sum(each) for each in lens]}")
        result = {
            "whole_s": marks["end"],
            "rollout_s": rollout,
            "read_s": self.script.read - self._started,
            "scoring_s": scoring,
            "update_s": marks["end"] - rollout - scoring,
            "cpu_s": cpu_s,
            "prompt_lens": lens[0],
            "completion_lens": lens[1],
            "anon": self._probe.peak("anon"),
            "anon_above_imports": self._probe.peak("anon") - self._before,
            "device": self._probe.peak("device"),
        }
        self._answers.write(json.dumps(result) + "\n")
        self._answers.flush()


def follow_trl(trainer: Any, turns: Turns) -> None:
    """Mark TRL's phases from outside.

    Its rollout is one function, and its policy and value model are called as one module in training only. What it does
    in between, advantages among it, is scoring.
    """
    from trl.experimental.ppo import ppo_trainer

    generation = ppo_trainer.batch_generation

    def batch_generation(model: Any, queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = generation(model, queries, *args, **kwargs)
        turns.mark("rollout")
        completions = out[0][:, queries.shape[1] :].tolist()
        turns.drawn = [row.index(EOS) + 1 if EOS in row else len(row) for row in completions]
        return out

    ppo_trainer.batch_generation = batch_generation
    trainer.model.register_forward_pre_hook(lambda module, args: turns.mark("training"))


def main() -> None:
    """Work until there are no more lines."""
    job = json.loads(sys.argv[1])
    # Trainers print: what is theirs goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    workload = Workload.of(job["workload"])
    batches = Batches(workload, job["small_warm_up"])
    turns = Turns(batches, answers, job["device"])
    job["batch"] = workload.batch
    job["flags"] |= {
        "num_ppo_epochs": workload.epochs,
        "response_length": workload.response_length,
        "stop_token": "eos",
        "logging_steps": 1,
    }
    # Enough rows that none is the last of a pass, when TRL makes other steps.
    prompts = batches.batch(1).prompts * (job["updates"] + 2)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(
            job, output_dir, Dataset.from_dict({"input_ids": prompts}), data_collator=batches, callbacks=[turns]
        )
        policy = trainer.model
        if job["system"] == "trl":
            follow_trl(trainer, turns)
            policy = trainer.model.policy
        turns.script = Script(policy.get_base_model() if hasattr(policy, "get_base_model") else policy)
        trainer.train()


if __name__ == "__main__":
    main()

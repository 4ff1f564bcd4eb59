"""Does PPO find the optimum where the optimum is known? `make evidence-optimum`.

A language model of 6 tokens completes prompts with at most `--length` tokens. All completions can be written down, and
so can the policy that is best: with reward r and KL weight beta, E[r] - beta KL(policy || reference) is largest for
p*(y|x) = p_ref(y|x) exp(r(x, y) / beta) / Z(x), where it is beta log Z. Training sees samples only; what is reported is
computed over all completions. Exits 1 if a run of the default settings misses an aim.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from small import QUIET, make_config, make_policy, make_tokenizer, make_value_model
from torch import Tensor

from fourscore import PPOConfig, PPOTrainer

LETTERS = "abcd"
PROMPTS = ("a", "b", "c d", "d")
AIM_SHARE = 0.95
"""Of the way from the reference's objective to the best one."""
AIM_KL = 0.05
"""Nats a completion, from the policy to the best one."""

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "temperature 0.7": {"temperature": 0.7},
    "lam 1": {"lam": 1.0},
    "no whitening": {"whiten_advantages": False},
    "kl_estimator k3": {"kl_estimator": "k3"},
    "use_kl_loss": {"use_kl_loss": True},
    "use_kl_loss, no whitening": {"use_kl_loss": True, "whiten_advantages": False},
}


@dataclass
class Problem:
    """Prompts, a reward, and the weight of the KL term.

    Attributes:
        length: most tokens in a completion, the EOS included.
        beta: weight of the KL term.
    """

    length: int
    beta: float

    @cached_property
    def tokenizer(self) -> Any:
        """Four letters, EOS and padding; the model may draw any of the six."""
        return make_tokenizer(LETTERS)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids."""
        return self.tokenizer(list(PROMPTS)).input_ids

    @cached_property
    def completions(self) -> list[tuple[int, ...]]:
        """Every completion there is: `N` of them, ending in EOS or of full length."""
        eos = self.tokenizer.eos_token_id
        others = [i for i in range(len(self.tokenizer)) if i != eos]
        ended = [(*c, eos) for n in range(self.length) for c in itertools.product(others, repeat=n)]
        return ended + list(itertools.product(others, repeat=self.length))

    def reward(self, prompt: Sequence[int], completion: Sequence[int]) -> float:
        """1 for each letter that follows its predecessor in a b c d a ..., less for others; an end is worth having."""
        letters = [t for t in completion if t < len(LETTERS)]
        steps = itertools.pairwise([prompt[-1], *letters])
        total = sum(1.0 if (after - before) % len(LETTERS) == 1 else -0.3 for before, after in steps)
        total += 0.7 if completion[-1] == self.tokenizer.eos_token_id else -0.5
        return total - sum(t == self.tokenizer.pad_token_id for t in completion)

    def reward_func(self, prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """The same, as `PPOTrainer` calls it."""
        ids = self.tokenizer(prompts).input_ids
        return [self.reward(p, c) for p, c in zip(ids, completion_ids, strict=True)]

    @cached_property
    def rewards(self) -> Tensor:
        """`[prompts, N]`."""
        rows = [[self.reward(p, c) for c in self.completions] for p in self.prompts]
        return torch.tensor(rows, dtype=torch.float64)

    @torch.no_grad()
    def logprobs(self, model: Any, temperature: float) -> Tensor:
        """Logprob of every completion under a causal LM, `[prompts, N]` nats, fp64 but for the forward pass."""
        lens = torch.tensor([len(c) for c in self.completions])
        inside = torch.arange(self.length) < lens[:, None]
        ids = torch.zeros(inside.shape, dtype=torch.long)
        ids[inside] = torch.tensor(list(itertools.chain.from_iterable(self.completions)))
        rows = []
        for prompt in self.prompts:
            whole = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], 1)
            logits = model(input_ids=whole, use_cache=False).logits[:, len(prompt) - 1 : -1].double()
            each = (logits / temperature).log_softmax(-1).gather(2, ids[..., None])[..., 0]
            rows.append((each * inside).sum(1))
        logprobs = torch.stack(rows)
        assert torch.allclose(logprobs.exp().sum(1), torch.ones(len(rows), dtype=torch.float64), atol=1e-5)
        return logprobs


@dataclass
class Optimum:
    """The best policy, and how far another one is from it; means over prompts.

    Attributes:
        problem: what is to be solved.
        reference: logprobs of all completions under the reference, `[prompts, N]`.
    """

    problem: Problem
    reference: Tensor

    @cached_property
    def _log_z(self) -> Tensor:
        return (self.reference + self.problem.rewards / self.problem.beta).logsumexp(1, keepdim=True)

    @cached_property
    def logprobs(self) -> Tensor:
        """Of all completions under the best policy, `[prompts, N]`."""
        return self.reference + self.problem.rewards / self.problem.beta - self._log_z

    def objective(self, logprobs: Tensor) -> float:
        """`E[r] - beta KL(policy || reference)`."""
        gain = self.problem.rewards - self.problem.beta * (logprobs - self.reference)
        return (logprobs.exp() * gain).sum(1).mean().item()

    @property
    def best(self) -> float:
        """`beta log Z`, the objective of the best policy."""
        return self.problem.beta * self._log_z.mean().item()

    def share(self, logprobs: Tensor) -> float:
        """Of the way from the reference's objective to the best one."""
        start = self.objective(self.reference)
        return (self.objective(logprobs) - start) / (self.best - start)

    def kl(self, logprobs: Tensor) -> float:
        """KL(policy || best policy), nats a completion."""
        return (logprobs.exp() * (logprobs - self.logprobs)).sum(1).mean().item()


def train(problem: Problem, seed: int, **flags: Any) -> dict[str, float]:
    """Train with PPO; says how far from the optimum reference and trained policy are.

    Args:
        problem: what is to be solved.
        seed: of models and training.
        **flags: fields of `PPOConfig`, beside those that are set here.

    Returns:
        `share`, `kl`, and of the reference `reference_kl`; the objectives `reference`, `policy` and `best`.
    """
    config = make_config(problem.tokenizer, initializer_range=0.2)
    policy = make_policy(config, seed)
    settings: dict[str, Any] = {
        "seed": seed,
        "response_length": problem.length,
        "kl_coef": problem.beta,
        "temperature": 1.0,
        "per_device_train_batch_size": 512,
        "local_rollout_forward_batch_size": 512,
        "num_ppo_epochs": 2,
        "learning_rate": 5e-3,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(output_dir=folder, **(QUIET | settings | flags))
        optimum = Optimum(problem, problem.logprobs(policy, args.temperature))
        trainer = PPOTrainer(
            args=args,
            processing_class=problem.tokenizer,
            model=policy,
            ref_model=None,
            reward_model=None,
            reward_funcs=problem.reward_func,
            value_model=make_value_model(config, seed + 1),
            train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        )
        trainer.train()
    trained = problem.logprobs(trainer.model, args.temperature)
    return {
        "share": optimum.share(trained),
        "kl": optimum.kl(trained),
        "reference_kl": optimum.kl(optimum.reference),
        "reference": optimum.objective(optimum.reference),
        "policy": optimum.objective(trained),
        "best": optimum.best,
    }


def main() -> None:
    """Train, print, compare with the aims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4, help="most tokens in a completion")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variant_seeds", type=int, nargs="+", default=[1], help="of all but the default settings")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--json", type=Path, help="where every single figure goes")
    options = parser.parse_args()
    problem = Problem(options.length, options.beta)
    print(f"{len(problem.completions)} completions of each of {len(PROMPTS)} prompts, beta {problem.beta}")
    columns = ("of the way to the best objective", "KL to the best policy", "before training")
    table = Table("", "seed", *columns)
    results, ok = [], True
    for name in options.variants:
        for seed in options.seeds if not VARIANTS[name] else options.variant_seeds:
            row = train(problem, seed, max_steps=options.updates, **VARIANTS[name])
            results.append({"variant": name, "seed": seed} | row)
            figures = [f"{row[key]:.3f}" for key in ("share", "kl", "reference_kl")]
            print(f"{name}, seed {seed}: share {figures[0]}, KL {figures[1]}", flush=True)
            table.add_row(name, str(seed), *figures)
            if not VARIANTS[name]:
                ok &= row["share"] >= AIM_SHARE and row["kl"] <= AIM_KL
    Console(width=120).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"aims (default): share >= {AIM_SHARE}, KL <= {AIM_KL}: {'reached' if ok else 'missed'}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()

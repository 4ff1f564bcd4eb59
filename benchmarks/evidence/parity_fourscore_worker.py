"""Computes with fourscore what TRL's trainer computed, from the same weights and samples: started by `trl_parity.py`.

Its argument is JSON, `jobs`: those that TRL's worker was given, each with its result under `trl`.
"""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from in_float64 import transformers_in_float64
from safetensors.torch import load_file
from torch import Tensor, nn

from fourscore import ModelConfig, PPOConfig, load_models
from fourscore.models.adapters import reference
from fourscore.parallel import Parallel
from fourscore.ppo.advantages import gae, kl_estimate, shaped_rewards, whiten
from fourscore.ppo.experience import Experience
from fourscore.ppo.objective import objective_metrics
from fourscore.ppo.optim import build_optimizer
from fourscore.ppo.scoring import logprobs_of, values_of
from fourscore.ppo.update import UpdateSettings, update
from fourscore.rewards.model import score

ALONE = Parallel(torch.device("cpu"), rank=0, world_size=1, sharded=False)
ROLES: dict[str, Literal["policy", "value"]] = {"policy": "policy", "value_model": "value"}
"""What TRL calls the two that train, and what `update` does."""
TEMPERATURE_EPSILON = 1e-7
"""TRL adds it to every temperature."""
OBJECTIVES = ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")
ROWS = 5
"""Samples a forward pass here; TRL takes the whole batch at once."""


@dataclass
class Roles:
    """fourscore's four models; `ref_policy` is None where it is the policy with its adapter off."""

    policy: Any
    ref_policy: Any | None
    reward_model: Any
    value_model: Any

    def as_reference(self) -> AbstractContextManager[Any]:
        """Yields the reference."""
        return reference(self.policy) if self.ref_policy is None else nullcontext(self.ref_policy)


@dataclass
class Recording:
    """What TRL computed.

    Attributes:
        tensors: as in `parity_trl_worker.Recorder`.
        pad_id: what TRL padded with.
        eos_id: what ends a completion.
    """

    tensors: dict[str, Tensor]
    pad_id: int
    eos_id: int

    @property
    def lens(self) -> Tensor:
        """`[n]` tokens of each completion."""
        return self.tensors["lengths"]

    @property
    def lens_with_extra(self) -> Tensor:
        """`[n]` the same with TRL's one position past the end, where there is room."""
        return self.lens + (self.lens < self.tensors["responses"].shape[1])

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return sum(name.endswith("/policy_loss") for name in self.tensors)

    def flat(self, name: str, lens: Tensor | None = None) -> Tensor:
        """A padded `[n, R]` tensor without its padding, `[C]`, or with `lens` tokens a row."""
        return unpadded(self.tensors[name], self.lens if lens is None else lens)

    def of(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def samples(self, lens: Tensor) -> Experience:
        """Prompts without their padding, and `lens` tokens of each completion."""
        rows = zip(self.tensors["queries"], self.tensors["responses"], self.lens.tolist(), lens.tolist(), strict=True)
        prompts, completions = [], []
        for query, response, length, wanted in rows:
            prompts.append(query[query != self.pad_id])
            completions.append(torch.cat([response[:length], response.new_zeros(wanted - length)]))
        return Experience(
            input_ids=torch.cat([x for pair in zip(prompts, completions, strict=True) for x in pair]),
            prompt_lens=torch.tensor([len(p) for p in prompts]),
            completion_lens=lens,
            has_eos=torch.stack([(c == self.eos_id).any() for c in completions]),
        )


def unpadded(rows: Tensor, lens: Tensor) -> Tensor:
    """The first `lens` of each row, one after the other."""
    return rows[torch.arange(rows.shape[1]) < lens[:, None]]


def off(ours: Tensor, theirs: Tensor) -> float:
    """Normwise relative error."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).double().norm() / theirs.double().norm())


def models_off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Normwise relative error over all parameters of a model, as one vector."""
    assert ours.keys() == theirs.keys()
    return off(*(torch.cat([of[name].flatten() for name in ours]) for of in (ours, theirs)))


def set_weights(roles: Roles, recording: Recording, step: int) -> None:
    """Gives what trains the weights that TRL had before that step."""
    for role in ROLES:
        trained = {name: p for name, p in getattr(roles, role).named_parameters() if p.requires_grad}
        theirs = recording.of(f"{step}/weights/{role}.")
        assert trained.keys() == theirs.keys()
        for name, parameter in trained.items():
            parameter.data.copy_(theirs[name])


def fill_in(roles: Roles, recording: Recording, args: PPOConfig) -> Experience:
    """What the models say of the samples, at the weights of the rollout."""
    set_weights(roles, recording, 0)
    e = recording.samples(recording.lens)
    e.logprobs = logprobs_of(roles.policy, e, args.temperature, ROWS, nullcontext)
    with roles.as_reference() as ref_policy:
        e.ref_logprobs = logprobs_of(ref_policy, e, args.temperature, ROWS, nullcontext)
    e.values = values_of(roles.value_model, e, ROWS, nullcontext)
    e.scores = score(roles.reward_model, e, ROWS)
    if args.missing_eos_penalty is not None:
        e.scores = e.scores - args.missing_eos_penalty * ~e.has_eos
    e.kl = kl_estimate(e.logprobs, e.ref_logprobs, args.kl_estimator)
    return e


def weights_after(roles: Roles, role: str, experience: Experience, args: PPOConfig, epochs: int) -> dict[str, Tensor]:
    """Those of one role after its optimizer steps, one an epoch, from the weights it has."""
    model: nn.Module = getattr(roles, role)
    other = {name: torch.optim.SGD(getattr(roles, r).parameters(), lr=0.0) for r, name in ROLES.items()}
    optimizers = other | {ROLES[role]: build_optimizer(model, args, ROLES[role])}
    _run_update(roles, experience, args, optimizers, epochs)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(roles: Roles, experience: Experience, args: PPOConfig) -> tuple[dict[str, Any], dict[str, float]]:
    """Those of one minibatch, by role and parameter, and the metrics; the weights stay."""
    found: dict[str, dict[str, Tensor]] = {}
    optimizers = {}
    for role, name in ROLES.items():
        model: nn.Module = getattr(roles, role)
        optimizers[name] = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

        def keep(*_: Any, role: str = role, model: nn.Module = model) -> None:
            found[role] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

        optimizers[name].register_step_pre_hook(keep)
    return found, _run_update(roles, experience, args, optimizers, epochs=1)


def _run_update(
    roles: Roles, experience: Experience, args: PPOConfig, optimizers: dict[str, torch.optim.Optimizer], epochs: int
) -> dict[str, float]:
    """All samples are one minibatch, in microbatches of `ROWS`."""
    settings = replace(UpdateSettings.of(args), epochs=epochs, minibatch=len(experience), microbatch=ROWS)
    shuffle = torch.Generator().manual_seed(0)
    return update(roles.policy, roles.value_model, experience, settings, optimizers, ALONE, shuffle, nullcontext)


@dataclass
class Comparison:
    """Of one recording.

    Attributes:
        errors: normwise relative error of each quantity.
        experience: what fourscore's models say of the samples; advantages are those computed from TRL's rewards.
        metrics: of every step, over completion tokens.
    """

    errors: dict[str, float]
    experience: Experience
    metrics: list[dict[str, float]]


def compare(roles: Roles, recording: Recording, args: PPOConfig, logged: dict[str, float]) -> Comparison:
    """Every quantity of the update.

    Args:
        roles: loaded from the checkpoints that TRL had.
        recording: TRL's numbers.
        args: the settings of both; the temperature is TRL's, its epsilon included.
        logged: TRL's metrics.
    """
    errors: dict[str, float] = {}
    e = fill_in(roles, recording, args)
    for name in ("logprobs", "ref_logprobs", "values", "kl"):
        errors[name] = off(getattr(e, name), recording.flat(name))
    errors["scores"] = off(e.scores, recording.tensors["scores"])
    ours = objective_metrics(e, args.kl_coef, ALONE)
    named = [f"objective/{name}" for name in OBJECTIVES]
    errors["objective/... metrics"] = off(
        *(torch.tensor([of[name] for name in named], dtype=torch.float64) for of in (ours, logged))
    )

    # TRL's per-token rewards and values, as rows that end where TRL's do: one position past a completion.
    extra = recording.lens_with_extra
    within = torch.arange(int(extra.max())) < recording.lens[:, None]
    real = unpadded(within, extra)
    kl = e.kl.new_zeros(len(real))
    kl[real] = e.kl
    rewards = shaped_rewards(kl, e.scores, extra, args.kl_coef)
    errors["rewards"] = off(rewards, recording.flat("unwhitened_rewards", extra))
    if args.whiten_rewards:
        rewards = whiten(recording.flat("unwhitened_rewards", extra), shift_mean=False)
        errors["whitened rewards"] = off(rewards, recording.flat("rewards", extra))
    values = recording.flat("values", extra)
    advantages, returns = gae(recording.flat("rewards", extra), values, extra, args.gamma, args.lam)
    errors["advantages"] = off(advantages, recording.flat("unwhitened_advantages", extra))
    errors["returns"] = off(returns, recording.flat("returns", extra))
    e.advantages = whiten(advantages[real])
    errors["whitened advantages"] = off(e.advantages, recording.flat("advantages"))

    # TRL's value loss is over one position more than its policy loss, so each has samples of its own here.
    for_policy = replace(e, logprobs=recording.flat("logprobs"), returns=returns[real])
    for_value = replace(
        recording.samples(extra), logprobs=torch.zeros_like(values), advantages=torch.zeros_like(values)
    )
    for_value.values, for_value.returns = values, returns
    losses: dict[str, list[Tensor]] = {"policy": [], "value": []}
    worst = {"policy": 0.0, "value": 0.0}
    metrics = []
    for step in range(recording.steps):
        set_weights(roles, recording, step)
        for (role, name), samples in zip(ROLES.items(), (for_policy, for_value), strict=True):
            found, said = gradients(roles, samples, args)
            worst[name] = max(worst[name], models_off(found[role], recording.of(f"{step}/gradient/{role}.")))
            losses[name].append(torch.tensor(said[f"loss/{name}_avg"], dtype=torch.float64))
            if name == "policy":
                metrics.append(said)
    for name in worst:
        theirs = torch.stack([recording.tensors[f"{step}/{name}_loss"] for step in range(recording.steps)])
        errors[f"{name} loss"] = off(torch.stack(losses[name]), theirs)
    for name in worst:
        errors[f"{name} gradient"] = worst[name]
    set_weights(roles, recording, 0)
    for (role, name), samples in zip(ROLES.items(), (for_policy, for_value), strict=True):
        ours = weights_after(roles, role, samples, args, recording.steps)
        errors[f"{name} weights after the update"] = models_off(ours, recording.of(f"end/weights/{role}."))
    return Comparison(errors, e, metrics)


def differences(
    roles: Roles, recording: Recording, args: PPOConfig, found: Comparison, logged: dict[str, float]
) -> dict[str, float]:
    """What choices that are not TRL's change in the numbers of this update: relative changes, normwise.

    Args:
        roles: as for `compare`.
        recording: TRL's numbers.
        args: the settings of both.
        found: what `compare` returned.
        logged: TRL's metrics.
    """
    e, set_apart = found.experience, {}
    assert e.kl is not None and e.scores is not None and e.values is not None and e.logprobs is not None
    rewards = shaped_rewards(e.kl, e.scores, e.completion_lens, args.kl_coef)
    if args.whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    advantages, returns = gae(rewards, e.values, e.completion_lens, args.gamma, args.lam)
    own = replace(e, advantages=whiten(advantages), returns=returns)
    set_weights(roles, recording, 0)
    gradient, _ = gradients(roles, own, args)
    set_apart["score on the last token: advantages"] = off(own.advantages, recording.flat("advantages"))
    set_apart["score on the last token: returns"] = off(returns, recording.flat("returns"))
    for role in ROLES:
        change = models_off(gradient[role], recording.of(f"0/gradient/{role}."))
        set_apart[f"score on the last token: {role} gradient"] = change

    cut = int(e.completion_lens[: len(e) // 2].sum())
    parts = torch.cat([whiten(advantages[:cut]), whiten(advantages[cut:])])
    set_apart["whitened in two halves: advantages"] = off(parts, own.advantages)
    plain = logprobs_of(roles.policy, e, args.temperature - TEMPERATURE_EPSILON, ROWS, nullcontext)
    set_apart["temperature epsilon: logprobs"] = off(e.logprobs, plain)

    set_apart["share of completion tokens in the rectangle"] = float(recording.lens.float().mean()) / len(
        recording.tensors["responses"][0]
    )
    for name in ("policy/approxkl_avg", "val/ratio", "policy/entropy_avg"):
        mean = sum(metrics[name] for metrics in found.metrics) / len(found.metrics)
        set_apart[f"{name}, over completion tokens"] = mean
        set_apart[f"{name}, logged by TRL"] = logged[name]
    set_apart["val/num_eos_tokens, completions that ended"] = float(e.has_eos.sum())
    set_apart["val/num_eos_tokens, logged by TRL"] = logged["val/num_eos_tokens"]

    roles.reward_model.config.pad_token_id = recording.eos_id
    before_eos = score(roles.reward_model, e, ROWS)
    roles.reward_model.config.pad_token_id = None
    at_eos = score(roles.reward_model, e, ROWS)
    set_apart["reward checkpoint with pad = EOS: scores of what ended"] = off(before_eos[e.has_eos], at_eos[e.has_eos])
    return set_apart


def arguments(job: dict[str, Any]) -> PPOConfig:
    """TRL's flags for fourscore, made to mean what TRL does with them; batches resolved."""
    temperature = job["flags"]["temperature"] + TEMPERATURE_EPSILON
    flags = job["flags"] | {
        "temperature": temperature,
        "max_grad_norm": 0.0,
    }  # TRL clips nothing
    args = PPOConfig(
        sft_model_path=job["policy"],
        reward_model_path=job["reward"],
        value_training="adapter" if job["lora"] is None else "full",
        **flags,
    )
    args.resolve_batches(len(job["prompts"]), world_size=1)
    return args


def load_roles(job: dict[str, Any], args: PPOConfig) -> Roles:
    """By `load_models`, then in the job's dtype."""
    lora = job["lora"] or {}
    model_args = ModelConfig(
        dtype="float32",
        use_peft=bool(lora),
        lora_r=lora.get("r", 16),
        lora_alpha=lora.get("lora_alpha", 32),
        lora_target_modules=lora.get("target_modules"),
    )
    models = load_models(model_args, args)
    roles = Roles(models.policy, models.ref_policy, models.reward_model, models.value_model)
    for model in vars(roles).values():
        if model is not None:
            model.to(getattr(torch, job["dtype"]))
    roles.reward_model.config.pad_token_id = None  # the score is read at the last token, as TRL does
    return roles


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    """Errors and differences of one recording, and what its samples are."""
    logged = job["trl"]["metrics"]
    with transformers_in_float64() if job["dtype"] == "float64" else nullcontext():
        args = arguments(job)
        roles = load_roles(job, args)
        recording = Recording(load_file(job["recording"]), job["trl"]["pad_id"], roles.policy.config.eos_token_id)
        found = compare(roles, recording, args, logged)
        return {
            "errors": found.errors,
            "differences": differences(roles, recording, args, found, logged),
            "samples": len(found.experience),
            "ended": int(found.experience.has_eos.sum()),
            "prompt_lens": found.experience.prompt_lens.tolist(),
            "completion_lens": found.experience.completion_lens.tolist(),
        }


def main() -> None:
    """Compare each, print."""
    print(json.dumps({"results": [result_of(job) for job in json.loads(sys.argv[1])["jobs"]]}))


if __name__ == "__main__":
    main()

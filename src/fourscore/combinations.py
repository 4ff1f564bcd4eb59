"""Values of `PPOConfig` that are fine each by itself, but not together."""

from typing import TYPE_CHECKING

from fourscore.errors import Findings

if TYPE_CHECKING:
    from fourscore.config import PPOConfig

VLLM_TEMPERATURES = 0.01, 2.0
"""What vLLM neither refuses nor changes, 0 aside."""


def contradictions(args: "PPOConfig", findings: Findings) -> None:
    """What cannot be meant, of flags alone."""
    if args.kl_target is not None and args.kl_coef == 0:
        findings.error(f"--kl_target {args.kl_target}: a --kl_coef of 0 cannot adapt; give one above 0, or drop it")
    if args.value_warmup_updates and args.vf_coef == 0:
        findings.error(
            f"--value_warmup_updates {args.value_warmup_updates}: with --vf_coef 0 nothing learns in them; raise it, "
            "or drop them (0)"
        )

    if args.rollout_engine == "vllm":
        _of_vllm(args, findings)
        return
    for flag, value in (("vllm_server_url", args.vllm_server_url), ("vllm_python", args.vllm_python)):
        if value is not None:
            findings.error(f"--{flag} {value}: does nothing without --rollout_engine vllm; add it or drop this")


def _of_vllm(args: "PPOConfig", findings: Findings) -> None:
    if args.vllm_server_url is not None and args.vllm_python is not None:
        findings.error(
            f"--vllm_python {args.vllm_python}: starts a server, and --vllm_server_url names one; drop one of the two"
        )
    truncated = [f"--top_k {args.top_k}"] * (args.top_k > 0) + [f"--top_p {args.top_p}"] * (args.top_p < 1)
    if truncated:
        findings.error(
            f"{' and '.join(truncated)} with --rollout_engine vllm: the server does not say which tokens that leaves, "
            "and logprobs need it; drop it, or use --rollout_engine transformers"
        )
    low, high = VLLM_TEMPERATURES
    if not low <= args.temperature <= high:
        findings.error(
            f"--temperature {args.temperature} with --rollout_engine vllm: vLLM draws at {low} to {high}; change it, "
            "or use --rollout_engine transformers"
        )


def contradictions_of_run(args: "PPOConfig", findings: Findings) -> None:
    """What cannot be meant, now that batches and the number of updates are known."""
    assert args.batch_size is not None and args.num_total_batches is not None
    if args.value_warmup_updates >= args.num_total_batches:
        findings.error(
            f"--value_warmup_updates {args.value_warmup_updates}: the run has {args.num_total_batches} updates, so the "
            "policy would never learn; lower it (0 is none), or make the run longer"
        )
    if args.kl_target is not None and args.kl_horizon < args.batch_size:
        findings.error(
            f"--kl_horizon {args.kl_horizon}: is below the {args.batch_size} samples of an update, so that kl_coef "
            "would jump; raise it"
        )


def doubtful(args: "PPOConfig") -> list[str]:
    """What does nothing beside other values, or not what it says, a sentence each."""
    found = []
    if args.use_kl_loss and args.kl_coef == 0:
        found.append("--use_kl_loss has no effect with --kl_coef 0")
    if args.kl_estimator == "k3" and not args.use_kl_loss and args.kl_coef != 0:
        found.append(
            "--kl_estimator k3 in the reward hardly holds the policy near its reference, its pull goes with the square "
            "of the distance there: use k1, or --use_kl_loss"
        )
    if args.early_stop_kl is not None and args.num_ppo_epochs * args.num_mini_batches == 1:
        found.append(
            f"--early_stop_kl {args.early_stop_kl} has no effect on updates of one step, which begins at the rollout's "
            "policy: raise --num_ppo_epochs or --num_mini_batches"
        )
    if args.positive_lm_threshold != 0 and args.positive_lm_coef == 0:
        found.append(f"--positive_lm_threshold {args.positive_lm_threshold} has no effect without --positive_lm_coef")
    if args.overlong_penalty != 1 and args.overlong_buffer == 0:
        found.append(f"--overlong_penalty {args.overlong_penalty} has no effect without --overlong_buffer")
    if 0 < args.lam_alpha * args.response_length <= 1:
        found.append(
            f"--lam_alpha {args.lam_alpha}: completions of at most {1 / args.lam_alpha:.0f} tokens get a lambda of 0, "
            f"and --response_length {args.response_length} allows no others: raise one of the two"
        )
    return found

"""What a rollout batch says of the objective, under TRL's names, and of the value model."""

import torch

from fourscore.parallel import Parallel
from fourscore.ppo.advantages import gae
from fourscore.ppo.experience import Experience


def objective_metrics(experience: Experience, kl_coef: float, parallel: Parallel) -> dict[str, float]:
    """Means over the samples of all processes.

    Args:
        experience: scored samples with their KL filled in.
        kl_coef: weight of the KL term.
        parallel: the processes.

    Returns:
        `objective/kl` and `objective/entropy` in nats a completion, `objective/non_score_reward`,
        `objective/rlhf_reward`, `objective/scores`, `objective/kl_coef` and, if there are any,
        `objective/token_rewards`; and the counts `val/num_eos_tokens` (completions that ended), `tokens/prompt` and
        `tokens/completion`.
    """
    e = experience
    assert e.kl is not None and e.logprobs is not None and e.scores is not None
    sums = [
        e.kl.sum(),
        -e.logprobs.sum(),
        e.scores.sum(),
        e.has_eos.sum(),
        e.prompt_lens.sum(),
        e.completion_lens.sum(),
        torch.tensor(len(e), device=e.kl.device),
        e.kl.new_zeros(()) if e.token_rewards is None else e.token_rewards.sum(),
    ]
    wide = torch.float32 if e.kl.device.type == "mps" else torch.float64  # MPS has no float64
    totals = parallel.sum(torch.stack([t.to(wide) for t in sums])).tolist()
    kl, surprisal, scores, ended, prompt, completion, n, by_token = totals
    shaping = -kl_coef * kl / n
    return {
        "objective/kl": kl / n,
        "objective/entropy": surprisal / n,
        "objective/non_score_reward": shaping,
        "objective/rlhf_reward": (scores + by_token) / n + shaping,
        "objective/scores": scores / n,
        "objective/kl_coef": kl_coef,
        "val/num_eos_tokens": int(ended),
        "tokens/prompt": int(prompt),
        "tokens/completion": int(completion),
        **({} if e.token_rewards is None else {"objective/token_rewards": by_token / n}),
    }


def mismatch_metrics(experience: Experience, parallel: Parallel) -> dict[str, float]:
    """How far the policy is from what a rollout engine with a forward pass of its own says of the tokens it drew.

    Args:
        experience: samples with logprobs filled in.
        parallel: the processes.

    Returns:
        over all tokens of all processes, `rollout/logprob_mismatch_mean` and `rollout/logprob_mismatch_max` of the
        absolute difference of logprobs in nats, and `rollout/ratio_mean`, policy over engine; nothing where the policy
        itself generated.
    """
    e = experience
    if e.engine_logprobs is None:
        return {}
    assert e.logprobs is not None
    difference = e.logprobs - e.engine_logprobs
    wide = torch.float32 if difference.device.type == "mps" else torch.float64  # MPS has no float64
    sums = [difference.abs().sum(), difference.exp().sum(), torch.tensor(len(difference), device=difference.device)]
    absolute, ratio, n = parallel.sum(torch.stack([t.to(wide) for t in sums])).tolist()
    return {
        "rollout/logprob_mismatch_mean": absolute / n,
        "rollout/logprob_mismatch_max": parallel.max(float(difference.abs().max())),
        "rollout/ratio_mean": ratio / n,
    }


_ROUNDING = 1e-5
"""What a KL term of rounding alone makes of equal returns stays below."""


def value_metrics(experience: Experience, gamma: float, parallel: Parallel) -> dict[str, float]:
    """How well the values of the rollout's states foretold what came: Monte-Carlo returns, over all processes.

    Args:
        experience: samples with rewards and values filled in.
        gamma: discount a token.
        parallel: the processes.

    Returns:
        `value/explained_variance`, `1 - Var(return - value) / Var(return)`: 1 is perfect, 0 no better than one number
        for all states, below 0 worse than that (missing where all returns are equal to rounding); and the mean of
        value - return in thirds of the completions, `value/bias_first`, `value/bias_middle` and `value/bias_last`
        (missing where no completion is long enough to have a token there; one of a single token has its middle alone).
    """
    e = experience
    assert e.rewards is not None and e.values is not None
    lens, values = e.completion_lens, e.values
    returns = gae(e.rewards, values, lens, gamma, 1.0)[1]
    errors = values - returns
    position = torch.arange(len(values), device=lens.device) - torch.repeat_interleave(lens.cumsum(0) - lens, lens)
    third = 3 * (2 * position + 1) // (2 * torch.repeat_interleave(lens, lens))  # by the middle of each token
    wide = torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no float64
    returns, errors = returns.to(wide), errors.to(wide)
    inside = [(third == k).to(wide) for k in range(3)]
    sums = [returns.sum(), errors.sum(), *(mask.sum() for mask in inside), *((mask * errors).sum() for mask in inside)]
    mean_return, mean_error, *rest = parallel.sum(torch.stack(sums)).tolist()
    counts, biases = rest[:3], rest[3:]
    tokens = sum(counts)
    squares = [(returns - mean_return / tokens).square().sum(), (errors - mean_error / tokens).square().sum()]
    spread, unexplained = parallel.sum(torch.stack(squares)).tolist()
    varies = spread / tokens > (_ROUNDING * max(1.0, abs(mean_return / tokens))) ** 2
    metrics = {"value/explained_variance": 1 - unexplained / spread} if varies else {}
    for name, count, bias in zip(("first", "middle", "last"), counts, biases, strict=True):
        if count:
            metrics[f"value/bias_{name}"] = bias / count
    return metrics

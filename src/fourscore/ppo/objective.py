"""What a rollout batch says of the objective, under TRL's names."""

import torch

from fourscore.parallel import Parallel
from fourscore.ppo.experience import Experience


def objective_metrics(experience: Experience, kl_coef: float, parallel: Parallel) -> dict[str, float]:
    """Means over the samples of all processes.

    Args:
        experience: scored samples with their KL filled in.
        kl_coef: weight of the KL term.
        parallel: the processes.

    Returns:
        `objective/kl` and `objective/entropy` in nats a completion, `objective/non_score_reward`,
        `objective/rlhf_reward` and `objective/scores`; and the counts `val/num_eos_tokens` (completions that ended),
        `tokens/prompt` and `tokens/completion`.
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
    ]
    wide = torch.float32 if e.kl.device.type == "mps" else torch.float64  # MPS has no float64
    totals = parallel.sum(torch.stack([t.to(wide) for t in sums])).tolist()
    kl, surprisal, scores, ended, prompt, completion, n = totals
    shaping = -kl_coef * kl / n
    return {
        "objective/kl": kl / n,
        "objective/entropy": surprisal / n,
        "objective/non_score_reward": shaping,
        "objective/rlhf_reward": scores / n + shaping,
        "objective/scores": scores / n,
        "val/num_eos_tokens": int(ended),
        "tokens/prompt": int(prompt),
        "tokens/completion": int(completion),
    }

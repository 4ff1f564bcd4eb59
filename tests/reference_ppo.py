"""One PPO update, straight down the page, from the papers: padded, masked, full logits, float64, slow.

Written from Schulman et al. 2017 (arXiv 1707.06347), Schulman et al. 2015 (arXiv 1506.02438), Huang et al. 2024
(arXiv 2403.17031), Loshchilov and Hutter 2019 (arXiv 1711.05101). It imports nothing from fourscore, so that the two
can only agree by both being right (or by the same mistake made twice).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Hyper:
    """The numbers of an update."""

    temperature: float = 1.0
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    missing_eos_penalty: float = 0.0
    eos_id: int = 0
    whiten_rewards: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    max_grad_norm: float = 1.0
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class Reference:
    """Every intermediate: `[B, R]` tensors with zeros where the mask is off; metrics of each step; AdamW's moments."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    steps: list[dict[str, float]] = field(default_factory=list)
    moments: list[list[Tensor]] = field(default_factory=list)


def reference_ppo(
    policy: Any,
    ref_policy: Any,
    reward_model: Any,
    value_model: Any,
    queries: Tensor,
    query_mask: Tensor,
    responses: Tensor,
    response_mask: Tensor,
    minibatches: list[list[int]],
    hyper: Hyper,
    earlier: list[Reference],
) -> Reference:
    """One update; policy and value model are changed in place.

    Args:
        policy: Llama-like causal LM; parameters with requires_grad train.
        ref_policy: frozen causal LM.
        reward_model: sequence classifier; its `score` head is read at the last response token.
        value_model: sequence classifier; parameters with requires_grad train.
        queries: `[B, Q]` prompts, padded on the left.
        query_mask: `[B, Q]` 1 at prompt tokens.
        responses: `[B, R]` completions, padded on the right.
        response_mask: `[B, R]` 1 at completion tokens.
        minibatches: row indices of each optimizer step, all epochs after one another.
        hyper: the numbers.
        earlier: updates before this one, whose AdamW moments it takes up.
    """
    B, Q = queries.shape
    R = responses.shape[1]
    ids = torch.cat([queries, responses], dim=1)
    mask = torch.cat([query_mask, response_mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    on = response_mask.bool()

    # What the four models say of the rollout. The state that chooses response token t sits at Q - 1 + t.
    with torch.no_grad():
        logits = policy(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logp = torch.log_softmax(logits[:, Q - 1 : -1] / hyper.temperature, dim=-1)
        old_logprobs = torch.gather(logp, 2, responses[:, :, None])[:, :, 0] * on
        logits = ref_policy(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logp = torch.log_softmax(logits[:, Q - 1 : -1] / hyper.temperature, dim=-1)
        ref_logprobs = torch.gather(logp, 2, responses[:, :, None])[:, :, 0] * on
        hidden = value_model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        old_values = value_model.score(hidden)[:, Q - 1 : -1, 0] * on
        hidden = reward_model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        every_score = reward_model.score(hidden)[:, :, 0]
        scores = torch.stack([every_score[b, Q + int(response_mask[b].sum()) - 1] for b in range(B)])

        for b in range(B):
            if hyper.eos_id not in responses[b][on[b]].tolist():
                scores[b] -= hyper.missing_eos_penalty

    # Rewards: minus the KL estimate at every token, the score added at the last one.
    kl = torch.zeros(B, R, dtype=torch.float64)
    rewards = torch.zeros(B, R, dtype=torch.float64)
    for b in range(B):
        length = int(response_mask[b].sum())
        for t in range(length):
            log_ratio = float(old_logprobs[b, t] - ref_logprobs[b, t])
            kl[b, t] = log_ratio if hyper.kl_estimator == "k1" else math.exp(-log_ratio) - 1 + log_ratio
            rewards[b, t] = -hyper.kl_coef * kl[b, t]
        rewards[b, length - 1] += scores[b]
    if hyper.whiten_rewards:
        kept = rewards[on]
        mean, variance = kept.mean(), kept.var(unbiased=True)
        rewards = torch.where(on, (rewards - mean) / torch.sqrt(variance + 1e-8) + mean, 0.0)

    # Advantages, from the last token back; returns before the advantages are whitened.
    advantages = torch.zeros(B, R, dtype=torch.float64)
    for b in range(B):
        length = int(response_mask[b].sum())
        running = 0.0
        for t in range(length - 1, -1, -1):
            next_value = float(old_values[b, t + 1]) if t + 1 < length else 0.0
            delta = float(rewards[b, t]) + hyper.gamma * next_value - float(old_values[b, t])
            running = delta + hyper.gamma * hyper.lam * running
            advantages[b, t] = running
    returns = (advantages + old_values) * on
    kept = advantages[on]
    advantages = torch.where(on, (advantages - kept.mean()) / torch.sqrt(kept.var(unbiased=True) + 1e-8), 0.0)

    result = Reference(old_logprobs, ref_logprobs, old_values, scores, kl, rewards, advantages, returns)

    # PPO epochs: one AdamW step a minibatch; each loss a mean over the minibatch's response tokens.
    policy_params = [p for p in policy.parameters() if p.requires_grad]
    value_params = [p for p in value_model.parameters() if p.requires_grad]
    params = policy_params + value_params
    first = list(earlier[-1].moments[0]) if earlier else [torch.zeros_like(p) for p in params]
    second = list(earlier[-1].moments[1]) if earlier else [torch.zeros_like(p) for p in params]
    for step, rows in enumerate(minibatches, start=1 + sum(len(update.steps) for update in earlier)):
        m = on[rows]
        tokens = m.sum()
        logits = policy(
            input_ids=ids[rows], attention_mask=mask[rows], position_ids=positions[rows], use_cache=False
        ).logits
        logp = torch.log_softmax(logits[:, Q - 1 : -1] / hyper.temperature, dim=-1)
        logprobs = torch.gather(logp, 2, responses[rows][:, :, None])[:, :, 0]
        hidden = value_model.base_model(
            input_ids=ids[rows], attention_mask=mask[rows], position_ids=positions[rows], use_cache=False
        ).last_hidden_state
        values = value_model.score(hidden)[:, Q - 1 : -1, 0]

        ratio = torch.exp(torch.where(m, logprobs - old_logprobs[rows], 0.0))
        surrogate = ratio * advantages[rows]
        surrogate_clipped = torch.clamp(ratio, 1 - hyper.cliprange, 1 + hyper.cliprange) * advantages[rows]
        pg_loss = -(torch.minimum(surrogate, surrogate_clipped) * m).sum() / tokens
        low, high = old_values[rows] - hyper.cliprange_value, old_values[rows] + hyper.cliprange_value
        error = (values - returns[rows]) ** 2
        error_clipped = (torch.minimum(torch.maximum(values, low), high) - returns[rows]) ** 2
        vf_loss = 0.5 * (torch.maximum(error, error_clipped) * m).sum() / tokens

        grads = torch.autograd.grad(pg_loss + hyper.vf_coef * vf_loss, params)
        policy_norm = math.sqrt(sum(float((g**2).sum()) for g in grads[: len(policy_params)]))
        value_norm = math.sqrt(sum(float((g**2).sum()) for g in grads[len(policy_params) :]))
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            norm = policy_norm if i < len(policy_params) else value_norm
            g = g * min(1.0, hyper.max_grad_norm / (norm + 1e-6))
            first[i] = hyper.betas[0] * first[i] + (1 - hyper.betas[0]) * g
            second[i] = hyper.betas[1] * second[i] + (1 - hyper.betas[1]) * g**2
            first_unbiased = first[i] / (1 - hyper.betas[0] ** step)
            second_unbiased = second[i] / (1 - hyper.betas[1] ** step)
            decay = hyper.weight_decay if p.ndim >= 2 else 0.0
            with torch.no_grad():
                p -= hyper.learning_rate * decay * p
                p -= hyper.learning_rate * first_unbiased / (torch.sqrt(second_unbiased) + hyper.eps)

        log_ratio = (logprobs - old_logprobs[rows]).detach()
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        result.steps.append(
            {
                "loss/policy_avg": pg_loss.item(),
                "loss/value_avg": vf_loss.item(),
                "policy/clipfrac_avg": float((surrogate_clipped < surrogate)[m].double().mean()),
                "val/clipfrac_avg": float((error_clipped > error)[m].double().mean()),
                "policy/approxkl_avg": float((0.5 * log_ratio**2 * m).sum() / tokens),
                "policy/entropy_avg": float((entropy * m).sum() / tokens),
                "val/ratio": float((log_ratio.exp() * m).sum() / tokens),
                "policy/grad_norm": policy_norm,
                "value/grad_norm": value_norm,
            }
        )
    result.moments = [first, second]
    return result

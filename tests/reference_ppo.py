"""One PPO update, straight down the page, from the papers: padded, masked, full logits, float64, slow.

Written from Schulman et al. 2017 (arXiv 1707.06347), Schulman et al. 2015 (arXiv 1506.02438), Huang et al. 2024
(arXiv 2403.17031), Loshchilov and Hutter 2019 (arXiv 1711.05101); its options from Ye et al. 2020 (arXiv 1912.09729),
Yu et al. 2025 (arXiv 2503.14476) and Yue et al. 2025 (arXiv 2504.05118). It imports nothing from fourscore, so that the
two can only agree by both being right (or by the same mistake made twice).
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
    value_max_grad_norm: float | None = None
    value_learning_rate: float | None = None
    cliprange_high: float | None = None
    dual_clip: float | None = None
    use_kl_loss: bool = False
    entropy_coef: float = 0.0
    loss_aggregation: str = "token"
    positive_lm_coef: float = 0.0
    positive_lm_threshold: float = 0.0
    lam_value: float | None = None
    lam_alpha: float = 0.0
    whiten_advantages: bool = True
    early_stop_kl: float = math.inf
    value_only: bool = False


@dataclass
class Reference:
    """Every intermediate: `[B, R]` tensors with zeros where the mask is off; metrics of each step; AdamW's state."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    monte_carlo: Tensor
    steps: list[dict[str, float]] = field(default_factory=list)
    moments: list[list[Tensor]] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=lambda: {"policy": 0, "value": 0})


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
        earlier: updates before this one, whose AdamW state it takes up.
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
            rewards[b, t] = 0.0 if hyper.use_kl_loss else -hyper.kl_coef * kl[b, t]
        rewards[b, length - 1] += scores[b]
    if hyper.whiten_rewards:
        kept = rewards[on]
        mean, variance = kept.mean(), kept.var(unbiased=True)
        rewards = torch.where(on, (rewards - mean) / torch.sqrt(variance + 1e-8) + mean, 0.0)

    # Advantages, from the last token back; the returns have a lambda of their own.
    def advantages_with(lam: float | None) -> Tensor:
        """None: 1 - 1 / (alpha l)."""
        result = torch.zeros(B, R, dtype=torch.float64)
        for b in range(B):
            length = int(response_mask[b].sum())
            own = max(0.0, 1 - 1 / (hyper.lam_alpha * length)) if lam is None else lam
            running = 0.0
            for t in range(length - 1, -1, -1):
                next_value = float(old_values[b, t + 1]) if t + 1 < length else 0.0
                delta = float(rewards[b, t]) + hyper.gamma * next_value - float(old_values[b, t])
                running = delta + hyper.gamma * own * running
                result[b, t] = running
        return result

    advantages = advantages_with(None if hyper.lam_alpha else hyper.lam)
    lam_value = 1.0 if hyper.value_only else hyper.lam if hyper.lam_value is None else hyper.lam_value
    returns = (advantages_with(lam_value) + old_values) * on
    monte_carlo = torch.zeros(B, R, dtype=torch.float64)
    for b in range(B):
        length = int(response_mask[b].sum())
        for t in range(length):
            monte_carlo[b, t] = sum(hyper.gamma ** (k - t) * float(rewards[b, k]) for k in range(t, length))
    if hyper.whiten_advantages:
        kept = advantages[on]
        advantages = torch.where(on, (advantages - kept.mean()) / torch.sqrt(kept.var(unbiased=True) + 1e-8), 0.0)

    result = Reference(old_logprobs, ref_logprobs, old_values, scores, kl, rewards, advantages, returns, monte_carlo)

    # PPO epochs: one AdamW step a minibatch; each loss a mean over the minibatch's response tokens.
    policy_params = [p for p in policy.parameters() if p.requires_grad]
    value_params = [p for p in value_model.parameters() if p.requires_grad]
    params = policy_params + value_params
    first = list(earlier[-1].moments[0]) if earlier else [torch.zeros_like(p) for p in params]
    second = list(earlier[-1].moments[1]) if earlier else [torch.zeros_like(p) for p in params]
    if earlier:
        result.taken = dict(earlier[-1].taken)
    policy_learns = not hyper.value_only
    for rows in minibatches:
        m = on[rows]
        tokens = m.sum()
        weight = m.double() / tokens
        if hyper.loss_aggregation == "sequence":
            weight = m.double() / m.sum(1, keepdim=True) / len(rows)
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
        high_range = hyper.cliprange if hyper.cliprange_high is None else hyper.cliprange_high
        surrogate = ratio * advantages[rows]
        surrogate_clipped = torch.clamp(ratio, 1 - hyper.cliprange, 1 + high_range) * advantages[rows]
        gain = torch.minimum(surrogate, surrogate_clipped)
        was_clipped = surrogate_clipped < surrogate
        if hyper.dual_clip is not None:
            floor = hyper.dual_clip * advantages[rows]
            was_clipped = was_clipped | ((advantages[rows] < 0) & (gain < floor))
            gain = torch.where(advantages[rows] < 0, torch.maximum(gain, floor), gain)
        pg_loss = -(gain * weight).sum()
        entropy = -(logp.exp() * logp).sum(-1)
        policy_total = pg_loss - hyper.entropy_coef * (entropy * weight).sum()
        extra = {}
        if hyper.use_kl_loss:
            # Times the ratio, k3 differentiated as it stands is right, and k1 but for a term that is 0 on average.
            apart = torch.where(m, logprobs - ref_logprobs[rows], 0.0)
            if hyper.kl_estimator == "k3":
                divergence = ratio * (torch.exp(-apart) - 1 + apart)
            else:
                divergence = ratio * apart - (ratio - ratio.detach())
            kl_loss = (divergence * weight).sum()
            policy_total = policy_total + hyper.kl_coef * kl_loss
            extra["loss/kl_avg"] = kl_loss.item()
        if hyper.positive_lm_coef:
            liked = (scores[rows] > hyper.positive_lm_threshold)[:, None] & m
            nll = -(logprobs * liked).sum() / liked.sum() if liked.any() else 0.0 * logprobs.sum()
            policy_total = policy_total + hyper.positive_lm_coef * nll
            extra["loss/positive_lm_avg"] = nll.item()
        low, high = old_values[rows] - hyper.cliprange_value, old_values[rows] + hyper.cliprange_value
        error = (values - returns[rows]) ** 2
        error_clipped = (torch.minimum(torch.maximum(values, low), high) - returns[rows]) ** 2
        vf_loss = 0.5 * (torch.maximum(error, error_clipped) * m).sum() / tokens

        log_ratio = (logprobs - old_logprobs[rows]).detach()
        metrics = {
            "loss/value_avg": vf_loss.item(),
            "val/clipfrac_avg": float((error_clipped > error)[m].double().mean()),
        }
        if policy_learns:
            metrics |= extra | {
                "loss/policy_avg": pg_loss.item(),
                "policy/clipfrac_avg": float(was_clipped[m].double().mean()),
                "policy/approxkl_avg": float((0.5 * log_ratio**2 * m).sum() / tokens),
                "policy/entropy_avg": ((entropy * m).sum() / tokens).item(),
                "val/ratio": float((log_ratio.exp() * m).sum() / tokens),
            }
            policy_learns = metrics["policy/approxkl_avg"] <= hyper.early_stop_kl

        for role, own, loss, limit, rate in (
            ("policy", policy_params, policy_total, hyper.max_grad_norm, hyper.learning_rate),
            ("value", value_params, hyper.vf_coef * vf_loss, hyper.value_max_grad_norm, hyper.value_learning_rate),
        ):
            if role == "policy" and not policy_learns:
                continue
            limit = hyper.max_grad_norm if limit is None else limit
            rate = hyper.learning_rate if rate is None else rate
            grads = torch.autograd.grad(loss, own)
            norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
            metrics[f"{role}/grad_norm"] = norm
            result.taken[role] += 1
            step = result.taken[role]
            start = 0 if role == "policy" else len(policy_params)
            for i, (p, g) in enumerate(zip(own, grads, strict=True), start=start):
                g = g * min(1.0, limit / (norm + 1e-6))
                first[i] = hyper.betas[0] * first[i] + (1 - hyper.betas[0]) * g
                second[i] = hyper.betas[1] * second[i] + (1 - hyper.betas[1]) * g**2
                first_unbiased = first[i] / (1 - hyper.betas[0] ** step)
                second_unbiased = second[i] / (1 - hyper.betas[1] ** step)
                decay = hyper.weight_decay if p.ndim >= 2 else 0.0
                with torch.no_grad():
                    p -= rate * decay * p
                    p -= rate * first_unbiased / (torch.sqrt(second_unbiased) + hyper.eps)
        result.steps.append(metrics)
    result.moments = [first, second]
    return result

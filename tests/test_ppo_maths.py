"""KL, rewards, GAE, whitening and losses against numbers worked out by hand, on ragged batches."""

import math

import pytest
import torch
from together import Together
from torch import Tensor
from torch.testing import assert_close

from fourscore.models.forward import microbatches, rectangle, scatter_back
from fourscore.parallel import Parallel
from fourscore.ppo.advantages import gae, kl_estimate, length_adaptive_lambda, shaped_rewards, whiten
from fourscore.ppo.experience import Experience, sum_per_sample
from fourscore.ppo.kl_control import adapted_kl_coef
from fourscore.ppo.losses import kl_loss, policy_loss, token_weights, value_loss
from fourscore.ppo.objective import value_metrics

ALONE = Parallel(torch.device("cpu"), rank=0, world_size=1, sharded=False)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


# ------------------------------------------------------------------ KL and rewards


def test_kl_k1_is_the_log_ratio_of_policy_to_reference() -> None:
    # log p - log q, token by token: -1 + 1.5, -2 + 2, -0.5 - 0
    assert_close(kl_estimate(f64(-1, -2, -0.5), f64(-1.5, -2, 0), "k1"), f64(0.5, 0, -0.5))


def test_kl_k3() -> None:
    # logr = log q - log p = -0.5, 0, 0.5; k3 = e^logr - 1 - logr:
    # e^-0.5 - 1 + 0.5 = 0.6065306597 - 0.5 = 0.1065306597;  0;  e^0.5 - 1 - 0.5 = 1.6487212707 - 1.5 = 0.1487212707
    k3 = kl_estimate(f64(-1, -2, -0.5), f64(-1.5, -2, 0), "k3")
    assert_close(k3, f64(0.1065306597, 0, 0.1487212707), rtol=0, atol=1e-10)


def test_kl_k3_keeps_its_digits_for_tiny_ratios() -> None:
    # logr = 1e-3: k3 = logr^2 / 2 + logr^3 / 6 = 5.0017e-7. In fp32 exp(1e-3) has a spacing of 1.2e-7.
    k3 = kl_estimate(torch.zeros(1), torch.full((1,), 1e-3), "k3")
    assert k3.item() == pytest.approx(1e-6 / 2 + 1e-9 / 6, rel=2e-3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_are_unbiased(estimator: str) -> None:
    p, q = f64(0.7, 0.2, 0.1), f64(0.3, 0.3, 0.4)
    # sum p log(p / q) = 0.7 * 0.8472979 + 0.2 * -0.4054651 + 0.1 * -1.3862944 = 0.593108 - 0.081093 - 0.138629
    expected = f64(0.3733861)[0]
    assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), expected, rtol=0, atol=1e-6)  # type: ignore[arg-type]


def test_shaped_rewards_put_the_score_on_the_last_token() -> None:
    kl = f64(1, 2, 3, 4, 5, 6)
    # lens 3, 1, 2: -0.1 * kl, and the scores 10, 20, 30 on tokens 2, 3 and 5.
    rewards = shaped_rewards(kl, f64(10, 20, 30), ints(3, 1, 2), 0.1)
    assert_close(rewards, f64(-0.1, -0.2, 9.7, 19.6, -0.5, 29.4))
    assert_close(kl, f64(1, 2, 3, 4, 5, 6))


def test_shaped_rewards_of_one_token_completions_without_kl() -> None:
    assert_close(shaped_rewards(f64(3, -4), f64(-1, 2), ints(1, 1), 0.0), f64(-1, 2))


def test_shaped_rewards_take_fp32_scores_for_other_dtypes() -> None:
    assert_close(shaped_rewards(f64(1), torch.tensor([0.5]), ints(1), 1.0), f64(-0.5))


# ------------------------------------------------------------------ GAE


REWARDS, VALUES, LENS = f64(1, 2, 3, 4), f64(0.5, 1, 2, -1), ints(3, 1)


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages"),
    [
        # Sample 0: delta_2 = 3 - 2 = 1, delta_1 = 2 + 0.9 * 2 - 1 = 2.8, delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4;
        # A_2 = 1, A_1 = 2.8 + 0.45 * 1 = 3.25, A_0 = 1.4 + 0.45 * 3.25 = 2.8625. Sample 1: 4 + 1 = 5.
        (0.9, 0.5, f64(2.8625, 3.25, 1, 5)),
        # lam = 0: the deltas themselves.
        (0.9, 0.0, f64(1.4, 2.8, 1, 5)),
        # lam = 1: discounted rewards to go less the value: 1 + 1.8 + 2.43 - 0.5, 2 + 2.7 - 1, 3 - 2, 4 + 1.
        (0.9, 1.0, f64(4.73, 3.7, 1, 5)),
        # gamma = lam = 1: 6 - 0.5, 5 - 1, 3 - 2, 4 + 1.
        (1.0, 1.0, f64(5.5, 4, 1, 5)),
        # gamma = 0: reward less value.
        (0.0, 0.95, f64(0.5, 1, 1, 5)),
    ],
)
def test_gae(gamma: float, lam: float, advantages: Tensor) -> None:
    got, returns = gae(REWARDS, VALUES, LENS, gamma, lam)
    assert_close(got, advantages)
    assert_close(returns, advantages + VALUES)


def test_gae_of_one_token_completions() -> None:
    got, returns = gae(f64(2, -1, 0), f64(0.5, 0.5, 7), ints(1, 1, 1), 0.9, 0.9)
    assert_close(got, f64(1.5, -1.5, -7))
    assert_close(returns, f64(2, -1, 0))


def test_gae_of_a_single_token_in_all() -> None:
    got, returns = gae(f64(3), f64(1), ints(1), 1.0, 0.95)
    assert_close(got, f64(2))
    assert_close(returns, f64(3))


def test_gae_does_not_see_the_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    lens = ints(2, 5, 1, 4)
    rewards, values = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    together, _ = gae(rewards, values, lens, 0.9, 0.8)
    pieces = zip(rewards.split(lens.tolist()), values.split(lens.tolist()), strict=True)
    alone = torch.cat([gae(r, v, ints(len(r)), 0.9, 0.8)[0] for r, v in pieces])
    assert_close(together, alone, rtol=0, atol=0)


def test_gae_with_a_lambda_for_each_sample() -> None:
    # Sample 0 with 0.5, sample 1 with 0: as above, gamma 0.9; lambda does not matter to a single token.
    got, _ = gae(f64(1, 2, 3, 4, 4), f64(0.5, 1, 2, -1, 2), ints(3, 2), 0.9, f64(0.5, 0))
    # Sample 1: delta_1 = 4 - 2 = 2, delta_0 = 4 + 0.9 * 2 + 1 = 6.8.
    assert_close(got, f64(2.8625, 3.25, 1, 6.8, 2))
    alone = [
        gae(f64(1, 2, 3), f64(0.5, 1, 2), ints(3), 0.9, 0.5)[0],
        gae(f64(4, 4), f64(-1, 2), ints(2), 0.9, 0.0)[0],
    ]
    assert_close(got, torch.cat(alone), rtol=0, atol=0)


def test_length_adaptive_lambda() -> None:
    # 1 - 1 / (0.05 l): 1 - 1/5 for 100 tokens, 1 - 1/50 for 1000; 20 tokens give 0, and fewer are held to it.
    got = length_adaptive_lambda(ints(100, 1000, 20, 3), 0.05, torch.float64)
    assert_close(got, f64(0.8, 0.98, 0, 0), rtol=0, atol=1e-15)


# ------------------------------------------------------------------ whitening


def test_whiten() -> None:
    # Mean 2.5; squares 2.25 + 0.25 + 0.25 + 2.25 = 5, over n - 1 = 3: variance 5/3, deviation 1.2909944;
    # -1.5 / 1.2909944 = -1.1618950, -0.5 / 1.2909944 = -0.3872983.
    expected = f64(-1.1618950, -0.3872983, 0.3872983, 1.1618950)
    assert_close(whiten(f64(1, 2, 3, 4)), expected, rtol=0, atol=1e-7)
    assert_close(whiten(f64(1, 2, 3, 4), shift_mean=False), expected + 2.5, rtol=0, atol=1e-7)


def test_whiten_of_two_tokens() -> None:
    # Mean 2, variance (1 + 1) / 1 = 2: -1 / 1.4142136 and 1 / 1.4142136.
    assert_close(whiten(f64(1, 3)), f64(-0.7071068, 0.7071068), rtol=0, atol=1e-7)


def test_whiten_of_a_single_token() -> None:
    assert_close(whiten(f64(7)), f64(0))
    assert_close(whiten(f64(7), shift_mean=False), f64(7))


def test_whiten_of_equal_values() -> None:
    assert_close(whiten(f64(3, 3, 3)), f64(0, 0, 0))
    assert_close(whiten(f64(3, 3, 3), shift_mean=False), f64(3, 3, 3))


def test_whiten_keeps_its_digits_far_from_zero() -> None:
    # In fp32 a sum of squares about 1e4 would have a spacing of 8: the variance 1 would be lost.
    whitened = whiten(torch.tensor([1e4 - 1, 1e4, 1e4 + 1]))
    assert_close(whitened, torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_whiten_over_two_processes_is_whitening_of_the_whole(cut: int, shift_mean: bool) -> None:
    whole = f64(0.3, -1, 2, 8, 8.5, -3, 0.1)
    parts = [whole[:cut], whole[cut:]]
    group = Together(2)
    got = group.run(lambda rank: whiten(parts[rank], shift_mean=shift_mean, reduce=group.sum))
    assert_close(torch.cat(got), whiten(whole, shift_mean=shift_mean), rtol=1e-12, atol=0)


# ------------------------------------------------------------------ losses


def test_policy_loss() -> None:
    ratios, advantages = f64(1, 1.5, 0.5, 1.5, 0.5), f64(1, 1, 1, -1, -1)
    old = f64(-1, -2, -3, -4, -5)
    # eps = 0.2, max(-A r, -A clip(r)): max(-1, -1) = -1; max(-1.5, -1.2) = -1.2, clipped; max(-0.5, -0.8) = -0.5;
    # max(1.5, 1.2) = 1.5; max(0.5, 0.8) = 0.8, clipped.
    terms = policy_loss(old + ratios.log(), old, advantages, 0.2)
    assert_close(terms.loss, f64(-1, -1.2, -0.5, 1.5, 0.8))
    assert terms.clipped.tolist() == [False, True, False, False, True]


def test_policy_loss_with_a_higher_upper_range() -> None:
    # eps = 0.2, eps_high = 0.28: 1.25 is inside now, 1.5 becomes 1.28; below 1 all is as before.
    ratios, advantages, old = f64(1.25, 1.5, 0.5), f64(2, 2, -2), f64(-1, -2, -3)
    terms = policy_loss(old + ratios.log(), old, advantages, 0.2, 0.28)
    assert_close(terms.loss, f64(-2.5, -2.56, 1.6))
    assert terms.clipped.tolist() == [False, True, True]


def test_policy_loss_with_a_dual_clip() -> None:
    # c = 3. A = -2: r = 2 costs 4, within 6; r = 5 would cost 10 and costs 6. A = 2 knows no such bound: -2 * 1.2.
    old = f64(-1, -2, -3)
    logprobs = (old + f64(2, 5, 5).log()).requires_grad_()
    terms = policy_loss(logprobs, old, f64(-2, -2, 2), 0.2, dual_clip=3.0)
    assert_close(terms.loss, f64(4, 6, -2.4))
    assert terms.clipped.tolist() == [False, True, True]
    # d/dlogp of 2 r is 2 r = 4 where nothing is clipped, and 0 elsewhere.
    assert_close(torch.autograd.grad(terms.loss.sum(), logprobs)[0], f64(4, 0, 0))


def test_policy_loss_of_an_unchanged_policy_is_minus_the_advantages() -> None:
    logprobs = f64(-1, -2, -3).requires_grad_()
    terms = policy_loss(logprobs, logprobs.detach(), f64(2, -3, 4), 0.2)
    assert_close(terms.loss, f64(-2, 3, -4))
    assert not terms.clipped.any()
    # d/dlogp of -A exp(logp - old) is -A at ratio 1.
    assert_close(torch.autograd.grad(terms.loss.sum(), logprobs)[0], f64(-2, 3, -4))


def test_policy_loss_has_no_gradient_where_clipped() -> None:
    old = f64(0, 0, 0)
    logprobs = (old + f64(1.5, 0.5, 1.5).log()).requires_grad_()
    terms = policy_loss(logprobs, old, f64(1, -1, -1), 0.2)
    # The first two are clipped; the third is not: d/dlogp of r = 1.5.
    assert_close(torch.autograd.grad(terms.loss.sum(), logprobs)[0], f64(0, 0, 1.5))


def test_value_loss() -> None:
    # eps = 0.2 about 0. Token 0: V 0.1, R 1: 0.81 both ways. Token 1: V 1, R 2: plain 1, clipped (0.2 - 2)^2 = 3.24.
    # Token 2: V -1, R 1: plain 4, clipped (-0.2 - 1)^2 = 1.44. Half of the larger ones.
    terms = value_loss(f64(0.1, 1, -1), f64(0, 0, 0), f64(1, 2, 1), 0.2)
    assert_close(terms.loss, f64(0.405, 1.62, 2))
    assert terms.clipped.tolist() == [False, True, False]


def test_value_loss_clips_about_the_old_value() -> None:
    # V_old = 5, V = 4, eps = 0.5: clipped to 4.5. R = 3: plain 1, clipped 2.25; half of it 1.125.
    terms = value_loss(f64(4), f64(5), f64(3), 0.5)
    assert_close(terms.loss, f64(1.125))
    assert terms.clipped.tolist() == [True]


def test_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    new, old, target = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    new = (old + 0.5 * new).requires_grad_()
    losses = {
        "policy": lambda x: policy_loss(x, old, target, 0.2),
        "policy, dual clip": lambda x: policy_loss(x, old, target, 0.2, 0.4, 1.5),
        "value": lambda x: value_loss(x, old, target, 0.2),
    }
    for name, loss in losses.items():
        assert 0 < loss(new).clipped.sum() < 40, name
        assert torch.autograd.gradcheck(lambda x, f=loss: f(x).loss.sum(), (new,), eps=1e-6, atol=1e-8)


def test_weights_of_a_mean_over_tokens_and_over_samples() -> None:
    # Two of four samples, of 1 and 3 tokens, in a minibatch of 8 tokens: 8 / (4 * 1) = 2, and 8 / (4 * 3) = 2/3 each.
    assert_close(token_weights(ints(1, 3), 8, 4, "token", torch.float64), f64(1, 1, 1, 1))
    assert_close(token_weights(ints(1, 3), 8, 4, "sequence", torch.float64), f64(2, 2 / 3, 2 / 3, 2 / 3))


def test_weights_of_a_minibatch_add_up_to_its_tokens() -> None:
    lens = ints(1, 3, 2, 7)
    for aggregation in ("token", "sequence"):
        assert token_weights(lens, 13, 4, aggregation, torch.float64).sum().item() == pytest.approx(13)  # type: ignore[arg-type]


# ------------------------------------------------------------------ the adaptive coefficient


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.64)),  # 10 % above, with 64 of 100 samples
        (60.0, 0.1 * (1 + 0.2 * 0.64)),  # held to 20 %
        (3.0, 0.1 * (1 - 0.2 * 0.64)),
        (-1.0, 0.1 * (1 - 0.2 * 0.64)),  # an estimate may be below 0
    ],
)
def test_adapted_kl_coef(kl: float, expected: float) -> None:
    assert adapted_kl_coef(0.1, kl, 6.0, 64, 100) == pytest.approx(expected)


# ------------------------------------------------------------------ what the value model foretells


def foretold(values: Tensor, rewards: Tensor, lens: Tensor) -> Experience:
    tokens = int(lens.sum())
    ids, ended = torch.zeros(2 * tokens, dtype=torch.long), torch.ones(len(lens), dtype=torch.bool)
    return Experience(ids, lens, lens, ended, values=values, rewards=rewards)


def test_value_metrics() -> None:
    # Returns 3, 2, 2 and 4, values 1, 1, 1 and 2. Return - value: 2, 1, 1, 2 about 1.5, squares 1 in all; returns about
    # 2.75, squares 0.0625 + 0.5625 + 0.5625 + 1.5625 = 2.75: explained 1 - 1 / 2.75. Value - return: -2 in the first
    # third, -1 and (of the single token) -2 in the middle, -1 in the last.
    e = foretold(f64(1, 1, 1, 2), f64(1, 0, 2, 4), ints(3, 1))
    expected = {
        "value/explained_variance": 1 - 1 / 2.75,
        "value/bias_first": -2.0,
        "value/bias_middle": -1.5,
        "value/bias_last": -1.0,
    }
    assert value_metrics(e, 1.0, ALONE) == pytest.approx(expected)
    # gamma 0.5: returns 1 + 0 + 0.5 = 1.5, 1, 2, 4; errors -0.5, 0, -1, -2.
    discounted = value_metrics(e, 0.5, ALONE)
    assert discounted["value/bias_first"] == pytest.approx(-0.5)
    assert discounted["value/bias_last"] == pytest.approx(-1)


def test_value_metrics_of_perfect_useless_and_harmful_values() -> None:
    rewards, lens = f64(1, 2, 3, 4), ints(1, 1, 1, 1)
    for values, explained in ((rewards, 1.0), (f64(7, 7, 7, 7), 0.0), (rewards.flip(0), -3.0)):
        metrics = value_metrics(foretold(values, rewards, lens), 1.0, ALONE)
        assert metrics["value/explained_variance"] == pytest.approx(explained)
        assert "value/bias_first" not in metrics and "value/bias_last" not in metrics


def test_value_metrics_where_all_returns_are_equal() -> None:
    for rounding in (0, 1e-6):  # of a KL term
        metrics = value_metrics(foretold(f64(1, 2), f64(5, 5 + rounding), ints(1, 1)), 1.0, ALONE)
        assert metrics == {"value/bias_middle": pytest.approx(-3.5)}
    assert "value/explained_variance" in value_metrics(foretold(f64(1, 2), f64(5, 5.001), ints(1, 1)), 1.0, ALONE)


def test_value_metrics_over_two_processes() -> None:
    generator = torch.Generator().manual_seed(8)
    lens = [ints(3, 1, 5), ints(2, 7)]
    parts = [
        foretold(*torch.randn(2, int(each.sum()), generator=generator, dtype=torch.float64), each) for each in lens
    ]
    assert all(e.values is not None and e.rewards is not None for e in parts)
    whole = foretold(
        torch.cat([e.values for e in parts]),  # type: ignore[misc]
        torch.cat([e.rewards for e in parts]),  # type: ignore[misc]
        torch.cat(lens),
    )
    group = Together(2)

    class Both:
        sum = group.sum

    expected = value_metrics(whole, 0.9, ALONE)
    for got in group.run(lambda rank: value_metrics(parts[rank], 0.9, Both())):  # type: ignore[arg-type]
        assert got == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------ KL as a loss


def test_kl_loss_by_hand() -> None:
    # ratio 2 and 1; d = logp - ref = -1 + 1.5 = 0.5 and -2 + 1 = -1. k1: 2 * 0.5 = 1, -1.
    # k3: e^-d - 1 + d: 2 * 0.1065306597 = 0.2130613194, and e^1 - 1 - 1 = 0.7182818285. Gradient of both: ratio * d.
    old, ref = f64(-1 - math.log(2), -2), f64(-1.5, -1)
    for estimator, value in (("k1", f64(1, -1)), ("k3", f64(0.2130613194, 0.7182818285))):
        logprobs = f64(-1, -2).requires_grad_()
        loss = kl_loss(logprobs, old, ref, estimator)  # type: ignore[arg-type]
        assert_close(loss.detach(), value, rtol=0, atol=1e-9)
        assert_close(torch.autograd.grad(loss.sum(), logprobs)[0], f64(1, -1))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("moved", [False, True], ids=["at the rollout's policy", "away from it"])
def test_kl_loss_has_the_gradient_of_the_divergence(estimator: str, moved: bool) -> None:
    """Over all tokens of a small vocabulary, each as often as the rollout's policy draws it: no sampling noise."""
    generator = torch.Generator().manual_seed(3)
    start, reference, step = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    old, ref = start.log_softmax(0), reference.log_softmax(0)
    logits = (start + 0.5 * step * moved).requires_grad_()
    logp = logits.log_softmax(0)
    expected = (logp.exp() * (logp - ref)).sum()
    mean = (old.exp() * kl_loss(logits.log_softmax(0), old, ref, estimator)).sum()  # type: ignore[arg-type]
    assert_close(mean, expected)
    gradient = torch.autograd.grad(expected, logits)[0]
    assert_close(torch.autograd.grad(mean, logits)[0], gradient)
    # What the estimators have by themselves is another one: nothing at all for k1, that of the other divergence for k3.
    naive = (old.exp() * kl_estimate(logits.log_softmax(0), ref, estimator)).sum()  # type: ignore[arg-type]
    assert (torch.autograd.grad(naive, logits)[0] - gradient).abs().max() > 0.05
    if not moved:
        k1 = (old.exp() * kl_estimate(logits.log_softmax(0), ref, "k1")).sum()
        assert_close(torch.autograd.grad(k1, logits)[0], torch.zeros_like(logits))
        k2 = (old.exp() * 0.5 * (logits.log_softmax(0) - ref).square()).sum()
        assert_close(torch.autograd.grad(k2, logits)[0], gradient)


def test_k3_as_a_reward_does_not_hold_the_policy_near_its_reference() -> None:
    """What the score-function gradient makes of either estimator, at a small distance from the reference."""
    generator = torch.Generator().manual_seed(4)
    reference, step = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    ref = reference.log_softmax(0)
    pulls = {}
    for estimator in ("k1", "k3"):
        for distance in (1e-3, 2e-3):
            logits = (reference + distance * step).requires_grad_()
            logp = logits.log_softmax(0)
            cost = kl_estimate(logp.detach(), ref, estimator)  # type: ignore[arg-type]
            pulls[estimator, distance] = torch.autograd.grad((logp.exp() * cost).sum(), logits)[0]
            if estimator == "k1":
                again = logits.log_softmax(0)
                exact = torch.autograd.grad((again.exp() * (again - ref)).sum(), logits)[0]
                assert_close(pulls[estimator, distance], exact)
    # k1 pulls back as a spring does, twice as hard at twice the distance; k3 with the square of it, next to nothing.
    assert (pulls["k1", 2e-3].norm() / pulls["k1", 1e-3].norm()).item() == pytest.approx(2, rel=1e-2)
    assert (pulls["k3", 2e-3].norm() / pulls["k3", 1e-3].norm()).item() == pytest.approx(4, rel=1e-2)
    assert pulls["k3", 1e-3].norm() < 2e-3 * pulls["k1", 1e-3].norm()


# ------------------------------------------------------------------ samples


def experience() -> Experience:
    """Three samples: prompts of 2, 1 and 3 tokens, completions of 1, 3 and 2."""
    return Experience(
        input_ids=ints(10, 11, 12, 20, 21, 22, 23, 30, 31, 32, 33, 34),
        prompt_lens=ints(2, 1, 3),
        completion_lens=ints(1, 3, 2),
        has_eos=torch.tensor([True, False, True]),
        logprobs=f64(-1, -2, -3, -4, -5, -6),
        scores=f64(0.1, 0.2, 0.3),
    )


def test_samples_prompts_and_completions() -> None:
    e = experience()
    assert len(e) == 3
    assert e.lens.tolist() == [3, 4, 5]
    assert [s.tolist() for s in e.samples()] == [[10, 11, 12], [20, 21, 22, 23], [30, 31, 32, 33, 34]]
    assert e.prompts() == [[10, 11], [20], [30, 31, 32]]
    assert e.completions() == [[12], [21, 22, 23], [33, 34]]


def test_select_takes_samples_in_the_order_asked_for() -> None:
    picked = experience().select(ints(2, 0))
    assert picked.prompts() == [[30, 31, 32], [10, 11]]
    assert picked.completions() == [[33, 34], [12]]
    assert picked.has_eos.tolist() == [True, True]
    assert picked.logprobs is not None and picked.scores is not None
    assert picked.logprobs.tolist() == [-5, -6, -1]
    assert picked.scores.tolist() == [0.3, 0.1]
    assert picked.values is None and picked.returns is None


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns"])
def test_select_splits_every_per_token_field_by_completion(name: str) -> None:
    e = experience()
    setattr(e, name, torch.arange(6.0))
    assert getattr(e.select(ints(1, 2)), name).tolist() == [1, 2, 3, 4, 5]


def test_select_may_repeat_and_leaves_the_source_alone() -> None:
    e = experience()
    assert e.select(ints(0, 0)).completions() == [[12], [12]]
    assert len(e) == 3 and e.input_ids.tolist()[0] == 10


def test_sum_per_sample() -> None:
    assert_close(sum_per_sample(f64(1, 2, 3, 4, 5, 6), ints(1, 3, 2)), f64(1, 9, 11))
    assert_close(sum_per_sample(f64(4), ints(1)), f64(4))


def test_microbatches_are_sorted_by_length_and_hold_no_more_than_so_many_of_the_longest() -> None:
    # 2 x 9 tokens at most: a third of 4 beside 9 and 9 would make 27; 4, 3 and 1 make 12.
    assert [g.tolist() for g in microbatches(ints(3, 9, 1, 9, 4), 2)] == [[1, 3], [4, 0, 2]]
    assert [g.tolist() for g in microbatches(ints(5, 6), 8)] == [[1, 0]]


def test_microbatches_are_cut_where_padding_would_cost_more_than_another_pass() -> None:
    # A pass costs 64 tokens. 100 beside 90 pads 10, beside 30 it would pad 70.
    assert [g.tolist() for g in microbatches(ints(30, 100, 90), 8)] == [[1, 2], [0]]
    assert [g.tolist() for g in microbatches(ints(40, 100, 90), 8)] == [[1, 2, 0]]


def test_microbatches_keep_to_a_budget_of_tokens() -> None:
    lens = ints(7, 3, 12, 5, 5, 4)
    assert [g.tolist() for g in microbatches(lens, 1, tokens=12)] == [[2], [0], [3, 4], [5, 1]]
    assert [g.tolist() for g in microbatches(lens, 1, tokens=1)] == [[2], [0], [3], [4], [5], [1]]
    assert [g.tolist() for g in microbatches(lens, 1, tokens=1000)] == [[2, 0, 3, 4, 5, 1]]


def test_microbatches_cost_the_least_of_all_cuts() -> None:
    """Against every way to cut eight samples into groups."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lens = torch.randint(1, 300, (8,), generator=generator).sort(descending=True).values.tolist()
        limit = 3 * lens[0]
        costs = []
        for cuts in range(2**7):
            ends = [i for i in range(1, 8) if cuts >> (i - 1) & 1] + [8]
            sizes = [(end - start) * lens[start] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
            if all(size <= limit for size in sizes):
                costs.append(sum(sizes) + 64 * len(sizes))
        groups = microbatches(torch.tensor(lens), 3)
        assert sum(len(g) * lens[g[0]] for g in groups) + 64 * len(groups) == min(costs)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_scatter_back_undoes_microbatches(size: int) -> None:
    lens = ints(3, 1, 4, 1, 5)
    order = microbatches(lens, size)
    per_sample = f64(0, 1, 2, 3, 4)
    assert_close(scatter_back([per_sample[g] for g in order], order), per_sample)
    per_token = torch.arange(14.0)
    pieces = per_token.split(lens.tolist())
    assert_close(scatter_back([torch.cat([pieces[i] for i in g.tolist()]) for g in order], order, lens), per_token)


def test_rectangle_names_the_state_before_each_completion_token() -> None:
    # A B | C      and      D | E F G: token C is chosen in the state of B, token E in that of D.
    batch = rectangle([ints(10, 11, 12), ints(20, 21, 22, 23)], ints(2, 1))
    assert batch.input_ids.tolist() == [[10, 11, 12, 0], [20, 21, 22, 23]]
    assert batch.rows.tolist() == [0, 1, 1, 1]
    assert batch.columns.tolist() == [1, 0, 1, 2]
    assert batch.targets.tolist() == [12, 21, 22, 23]


def test_rectangle_keeps_tokens_that_equal_the_padding() -> None:
    batch = rectangle([ints(0, 0, 0), ints(5, 0, 6, 0)], ints(1, 2))
    assert batch.targets.tolist() == [0, 0, 6, 0]
    assert batch.rows.tolist() == [0, 0, 1, 1]


def test_one_step_by_hand_from_scores_to_advantages() -> None:
    """Two samples of two tokens and one: the whole chain, with gamma 1 and lam 1."""
    kl = kl_estimate(f64(-1, -1, -2), f64(-2, -1, -1), "k1")  # 1, 0, -1
    rewards = shaped_rewards(kl, f64(2, 3), ints(2, 1), 0.5)  # -0.5, 2, 3.5
    advantages, returns = gae(rewards, f64(0, 1, 0.5), ints(2, 1), 1.0, 1.0)  # 1.5 - 0, 2 - 1, 3.5 - 0.5
    assert_close(advantages, f64(1.5, 1, 3))
    assert_close(returns, f64(1.5, 2, 3.5))
    # Mean 5.5 / 3 = 1.8333; squares 1/9 + 25/36 + 49/36 = 78/36 = 2.1667, over 2: 1.08333, deviation 1.0408330.
    deviation = math.sqrt(13 / 12)
    expected = f64(-1 / 3, -5 / 6, 7 / 6) / deviation
    assert_close(whiten(advantages), expected, rtol=0, atol=1e-7)

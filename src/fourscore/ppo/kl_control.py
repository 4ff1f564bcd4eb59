"""The KL coefficient of the next update."""


def adapted_kl_coef(kl_coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """A proportional controller in log space: up while the divergence is above its target, down while it is below.

    `e = clip(kl / target - 1, -0.2, 0.2)` and `beta <- beta (1 + e samples / horizon)`
    (Ziegler et al. 2019, arXiv 1909.08593, section 2.2, with `K = samples / horizon`).

    Args:
        kl_coef: beta, of the update that was.
        kl: nats a completion, its mean over that update's samples.
        target: nats a completion.
        samples: of the update.
        horizon: samples over which beta changes by a factor of about 1.2 at most.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * samples / horizon)

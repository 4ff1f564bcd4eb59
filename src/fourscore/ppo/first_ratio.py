"""Rollout and update must compute the same logprobs: the first ratios of an update are 1, but for rounding."""

from fourscore.ppo.roles import Roles

EXACT, ROUNDED = 1e-4, 2e-2
"""Mean of |ratio - 1| that rounding explains in float32, and in bfloat16, TF32 or with quantized weights."""


def ratio_bound(roles: Roles, tf32: bool) -> float:
    """What the mean of |ratio - 1| may be.

    Args:
        roles: the four models.
        tf32: matrix products are rounded to TF32.
    """
    quantized = getattr(roles.policy, "is_quantized", False)
    return ROUNDED if roles.autocast_dtype is not None or quantized or tf32 else EXACT


def ratio_finding(mean: float, largest: float, bound: float, update: int) -> str | None:
    """What is to be said of an update's first minibatch, in which nothing has moved yet; None if all is well.

    The mean decides: a logit near 20 is rounded by up to 0.06 in bfloat16, so single tokens may be far off.

    Args:
        mean: of |ratio - 1| over tokens.
        largest: of them.
        bound: of the mean.
        update: its number, from 1.
    """
    if mean <= bound:
        return None
    return (
        f"the first ratios of update {update} are {mean:.1e} off 1 on average (one of them {largest:.1e}), above "
        f"{bound:.0e}: rollout and update do not compute the same logprobs"
    )

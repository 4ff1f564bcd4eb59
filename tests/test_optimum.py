"""PPO ends up at the policy that is known to be best, where every completion can be written down."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "evidence"))

from optimum import Problem, train


def test_ppo_finds_the_optimum() -> None:
    found = train(Problem(length=3, beta=0.5), seed=1, max_steps=40)
    assert found["reference_kl"] > 2
    assert found["share"] > 0.95
    assert found["kl"] < 0.1
    # Two ways to one number: what is missing of the objective is beta times the divergence from the best policy.
    assert abs(found["best"] - found["policy"] - 0.5 * found["kl"]) < 1e-6

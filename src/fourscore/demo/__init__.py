"""The embedded default: small real checkpoints and prompts that ship with the package.

`scripts/build_demo` makes them from package registries alone; `docs/demo-checkpoints.md` says how good they are.
"""

from pathlib import Path

_HERE = Path(__file__).parent

POLICY = _HERE / "policy"
"""SFT policy: a causal LM and its tokenizer."""
REWARD = _HERE / "reward"
"""Reward model: a sequence classifier with one label, on the policy's tokenizer."""
PROMPTS_TRAIN = _HERE / "prompts_train.jsonl"
"""Prompts to train on: `{"prompt": str}` a line."""
PROMPTS_HELDOUT = _HERE / "prompts_heldout.jsonl"
"""Prompts that PPO does not train on: beginnings of reviews held out of the policy's corpus."""
RECIPE = _HERE / "ppo.yaml"
"""Flags of `fourscore ppo` for these checkpoints."""

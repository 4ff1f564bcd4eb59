"""Whole recipes: the values of `PPOConfig` fields that are left open.

A preset fills in fields that are None, so any of them can be overridden by a flag, a line of the configuration file or
an argument, and `config.yaml` records what came out.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031), with TRL 1.12's numbers.
    "n_plus": {
        "learning_rate": 3e-6,
        "temperature": 0.7,
        "num_generations": 1,
        "kl_coef": 0.05,
        "lam_alpha": 0.0,
        "positive_lm_coef": 0.0,
        "value_warmup_updates": 0,
    },
    # Yue et al. 2025, "VAPO" (arXiv 2504.05118), section 4 and the tables there; the value model is pretrained as in
    # VC-PPO (Yuan et al. 2025, arXiv 2503.01491).
    "vapo": {
        "learning_rate": 1e-6,
        "value_learning_rate": 2e-6,
        "temperature": 1.0,
        "num_generations": 16,
        "kl_coef": 0.0,
        "cliprange_high": 0.28,
        "lam_value": 1.0,
        "lam_alpha": 0.05,
        "positive_lm_coef": 0.1,
        "value_warmup_updates": 50,
    },
}

FOLLOWS = {
    "value_learning_rate": "learning_rate",
    "value_lr_scheduler_type": "lr_scheduler_type",
    "value_warmup_steps": "warmup_steps",
    "value_max_grad_norm": "max_grad_norm",
    "cliprange_high": "cliprange",
    "lam_value": "lam",
}
"""Fields that, left open by the preset, too, have the value of another one."""


def preset_default(name: str) -> str | None:
    """How the default of a field reads that presets or other fields fill in; None for any other field."""
    values = {preset: fields[name] for preset, fields in PRESETS.items() if name in fields}
    plain = str(values.pop("n_plus")) if "n_plus" in values else FOLLOWS.get(name)
    if plain is None:
        return None
    return "; ".join([plain, *(f"{preset}: {value}" for preset, value in values.items())])

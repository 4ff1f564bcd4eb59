"""PPO RLHF: a policy, a reference policy, a reward model and a value model.

Names are imported on first use, so that `import fourscore` and `fourscore --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourscore.config import (
        ModelConfig,
        PPOConfig,
        ScriptArguments,
        get_kbit_device_map,
        get_peft_config,
        get_quantization_config,
    )
    from fourscore.data import load_prompts
    from fourscore.errors import FourscoreError
    from fourscore.models.loading import Models, load_models
    from fourscore.ppo.trainer import PPOTrainer

__version__ = "0.1.0"

_HOME = {
    "FourscoreError": "fourscore.errors",
    "ModelConfig": "fourscore.config",
    "Models": "fourscore.models.loading",
    "PPOConfig": "fourscore.config",
    "PPOTrainer": "fourscore.ppo.trainer",
    "ScriptArguments": "fourscore.config",
    "get_kbit_device_map": "fourscore.config",
    "get_peft_config": "fourscore.config",
    "get_quantization_config": "fourscore.config",
    "load_models": "fourscore.models.loading",
    "load_prompts": "fourscore.data",
}

__all__ = [
    "FourscoreError",
    "ModelConfig",
    "Models",
    "PPOConfig",
    "PPOTrainer",
    "ScriptArguments",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
    "load_models",
    "load_prompts",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fourscore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

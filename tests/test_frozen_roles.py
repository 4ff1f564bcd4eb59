"""After ten updates, what does not train gives the very bits it gave before, and what trains is what did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_frozen_layers import experience, trained_by
from test_trainer import config, trainer_on
from torch import Tensor

from fourscore import ModelConfig, PPOTrainer, get_peft_config
from fourscore.ppo.scoring import logprobs_of
from fourscore.rewards.model import score

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "freeze_layers": {"freeze_layers": 1},
    "lora": {},
    "shared trunk": {"share_value_backbone": True},
    "shared trunk and lora": {"share_value_backbone": True},
    "shared trunk and freeze_layers": {"share_value_backbone": True, "freeze_layers": 1},
}


def frozen_outputs(trainer: PPOTrainer) -> list[Tensor]:
    e, autocast = experience(), trainer.roles.autocast
    with trainer.roles.as_reference() as reference:
        reference_logprobs = logprobs_of(reference, e, 0.7, 4, autocast)
    return [reference_logprobs, score(trainer.reward_model, e, 4)]


@pytest.mark.parametrize("case", CASES)
def test_frozen_roles_stay_as_they_are_over_ten_updates(case: str, tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=10, num_sample_generations=0, response_length=3, **CASES[case])
    peft = get_peft_config(ModelConfig(use_peft=True)) if "lora" in case else None
    parts = {"value_model": None} if args.share_value_backbone else {}
    trainer = trainer_on(args, peft_config=peft, **parts)
    e = experience()
    before = frozen_outputs(trainer)
    moving = logprobs_of(trainer.model, e, 0.7, 4, trainer.roles.autocast)
    held, names = trained_by(trainer), trained_names(trainer)
    assert trainer.train().global_step == 10
    for ours, theirs in zip(frozen_outputs(trainer), before, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(logprobs_of(trainer.model, e, 0.7, 4, trainer.roles.autocast), moving)
    assert trained_by(trainer) == held
    assert trained_names(trainer) == names


def trained_names(trainer: PPOTrainer) -> list[list[str]]:
    return [[n for n, p in m.named_parameters() if p.requires_grad] for m in trainer.roles.trained.values()]


def test_adapter_switches_leave_the_optimizers_parameters_alone(tmp_path: Path) -> None:
    trainer = trainer_on(config(tmp_path), peft_config=get_peft_config(ModelConfig(use_peft=True)))
    names = trained_names(trainer)
    for _ in range(5):
        with trainer.roles.as_reference() as reference:
            assert reference is trainer.model
        assert trained_names(trainer) == names
    training = {id(p) for m in trainer.roles.trained.values() for p in m.parameters() if p.requires_grad}
    assert trained_by(trainer) == training

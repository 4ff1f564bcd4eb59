"""Which weights each role stands on, decided from configs and headers alone: the loader obeys it."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fourscore.config import ModelConfig, PPOConfig
from fourscore.models.checkpoint import Adapter, Checkpoint

Storage = Literal["mapped", "converted", "quantized", "device"]
SFT_ADAPTER = "sft"
"""Name of an SFT checkpoint's adapter below the one that trains, and of its folder in a run's checkpoints."""

Trains = Literal["everything", "adapter", "head", "nothing"]


@dataclass(frozen=True)
class Backbone:
    """Frozen weights that are read once and held once, however many roles stand on them.

    Attributes:
        checkpoint: where they come from.
        dtype: they are held in, quantized ones aside.
        storage: "mapped" from the file, which costs no memory of its own; "converted" into one copy, when the file has
            another dtype or an adapter is merged into it; "quantized"; or copied to the "device".
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    storage: Storage


@dataclass(frozen=True)
class RoleLayout:
    """What one role is made of.

    Attributes:
        backbone: name of the frozen weights that it stands on or starts from.
        owns: it has an fp32 copy of those weights, to train them.
        trains: "everything" but `frozen_layers`, an "adapter" (a value model's with its head), a "head" on the policy's
            trunk, or "nothing".
        adapter: a frozen adapter of the checkpoint under the role's own; unmerged.
        merged: the checkpoint's adapter is merged into the weights.
        frozen_layers: layers from the bottom, and the embedding, that do not train and are the backbone's.
        reads_text: a reward model with a tokenizer of its own.
    """

    backbone: str
    owns: bool
    trains: Trains
    adapter: str | None = None
    merged: bool = False
    frozen_layers: int = 0
    reads_text: bool = False


@dataclass(frozen=True)
class Layout:
    """Backbones by name, and the roles on them: `policy`, `ref_policy`, `reward_model`, `value_model`.

    There is no `ref_policy` where the policy with its adapter off is the reference, and no `reward_model` where other
    rewards take its place. `adapters` are the frozen ones that roles stand on, by the name that they have there.
    """

    backbones: dict[str, Backbone]
    roles: dict[str, RoleLayout]
    adapters: dict[str, Adapter] = field(default_factory=dict)

    def shared(self) -> dict[str, list[str]]:
        """Roles on each backbone that hold its weights themselves, not a copy of them."""
        on = {name: [r for r, role in self.roles.items() if role.backbone == name] for name in self.backbones}
        held = {name: [r for r in roles if self._holds(r)] for name, roles in on.items()}
        return {name: roles for name, roles in held.items() if roles}

    def _holds(self, role: str) -> bool:
        # A head stands on whatever the policy has.
        layout = self.roles["policy" if self.roles[role].trains == "head" else role]
        return not layout.owns or layout.frozen_layers > 0


def decide_layout(
    sft: Checkpoint,
    reward: Checkpoint | None,
    model_args: ModelConfig,
    training_args: PPOConfig,
    *,
    on_cpu: bool,
    reads_text: bool = False,
    value: Checkpoint | None = None,
) -> Layout:
    """Who shares what.

    Args:
        sft: the SFT checkpoint.
        reward: the reward checkpoint; None without a reward model.
        model_args: dtype of frozen weights, PEFT, quantization.
        training_args: `value_training`, `freeze_layers`, `share_value_backbone`.
        on_cpu: the models are to live in host memory, where files can be mapped.
        reads_text: the reward model has another tokenizer, so that no other role can stand on it.
        value: where the value model starts; None: from the reward checkpoint, or where that has another tokenizer or is
            not there, from the SFT checkpoint.
    """
    peft = model_args.use_peft
    full_value = not peft or training_args.value_training == "full"
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    start = value_start(sft, reward, reads_text=reads_text, value=value)
    # Merged weights are another model's: an adapter stays beside its base wherever nothing but adapters trains.
    sft_merged = sft.adapter is not None and not peft
    start_merged = start.adapter is not None and full_value and not training_args.share_value_backbone
    reward_merged = reward is not None and reward.adapter is not None and start is reward and full_value

    def backbone(checkpoint: Checkpoint, merged: bool) -> Backbone:
        dtype = frozen_dtype(checkpoint, model_args)
        storage: Storage = "mapped" if checkpoint.dtype == dtype and not merged else "converted"
        if not on_cpu:
            storage = "device"
        # A checkpoint may come quantized, too.
        if quantized or getattr(checkpoint.config, "quantization_config", None):
            storage = "quantized"
        return Backbone(checkpoint, dtype, storage)

    def on_policys(checkpoint: Checkpoint, merged: bool) -> bool:
        if checkpoint is sft:
            return merged == sft_merged
        return _same_weights(sft, checkpoint) and not sft_merged and not merged

    shares_reward = reward is not None and not reads_text and on_policys(reward, reward_merged)
    base = "base" if shares_reward else "sft"
    backbones = {base: backbone(sft, sft_merged)}
    reward_on = base
    if reward is not None and not shares_reward:
        reward_on = "reward"
        backbones[reward_on] = backbone(reward, reward_merged)
    value_on = reward_on
    if start is not reward:
        value_on = base
        if not training_args.share_value_backbone and not on_policys(start, start_merged):
            value_on = "value"
            backbones[value_on] = backbone(start, start_merged)

    adapters: dict[str, Adapter] = {}

    def below(checkpoint: Checkpoint, merged: bool, name: str) -> str | None:
        if checkpoint.adapter is None or merged:
            return None
        adapters[name] = checkpoint.adapter
        return name

    roles: dict[str, RoleLayout] = {}
    frozen = 0 if peft else training_args.freeze_layers
    under_policy = below(sft, sft_merged, SFT_ADAPTER)
    if peft:
        roles["policy"] = RoleLayout(base, False, "adapter", under_policy)
    else:
        roles["policy"] = RoleLayout(base, True, "everything", merged=sft_merged, frozen_layers=frozen)
        roles["ref_policy"] = RoleLayout(base, False, "nothing", merged=sft_merged)
    if reward is not None:
        under_reward = below(reward, reward_merged, "reward")
        roles["reward_model"] = RoleLayout(
            reward_on, False, "nothing", under_reward, reward_merged, reads_text=reads_text
        )
    if training_args.share_value_backbone:
        roles["value_model"] = replace(roles["policy"], owns=False, trains="head")
    elif full_value:
        roles["value_model"] = RoleLayout(value_on, True, "everything", merged=start_merged, frozen_layers=frozen)
    else:
        name = SFT_ADAPTER if start is sft else "reward" if start is reward else "value"
        roles["value_model"] = RoleLayout(value_on, False, "adapter", below(start, False, name))
    return Layout(backbones, roles, adapters)


def value_start(
    sft: Checkpoint, reward: Checkpoint | None, *, reads_text: bool, value: Checkpoint | None
) -> Checkpoint:
    """The checkpoint that the value model starts from; arguments as for `decide_layout`."""
    if value is not None and reward is not None and not reads_text and value.given == reward.given:
        return reward
    if value is not None:
        return sft if value.given == sft.given else value
    return sft if reward is None or reads_text else reward


def frozen_dtype(checkpoint: Checkpoint, model_args: ModelConfig) -> torch.dtype:
    """Dtype of the frozen weights of a checkpoint: as asked for, "auto" being the one it is stored in."""
    if model_args.dtype in ("auto", None):
        stored = checkpoint.dtype or checkpoint.config.get_text_config().dtype
        return stored if isinstance(stored, torch.dtype) and stored.itemsize <= 4 else torch.float32
    dtype: torch.dtype = getattr(torch, str(model_args.dtype))
    return dtype


def _same_weights(sft: Checkpoint, reward: Checkpoint) -> bool:
    return sft.identity == reward.identity and sft.config.model_type == reward.config.model_type

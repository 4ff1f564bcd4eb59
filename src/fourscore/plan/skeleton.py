"""The four roles without weights: modules of the right classes, shapes, dtypes and sharing."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fourscore.config import ModelConfig, PPOConfig, get_peft_config
from fourscore.models.adapters import add_policy_adapter, add_value_adapter, freeze, wrap_frozen
from fourscore.models.checkpoint import Checkpoint
from fourscore.models.forward import score_head
from fourscore.models.frozen_layers import adopt_bottom, freeze_bottom
from fourscore.models.layout import Layout, RoleLayout
from fourscore.models.sharing import clone_sharing
from fourscore.models.trunk import share_trunk

_HEADS = ("lm_head", "embed_out", "score")


@dataclass
class Skeleton:
    """The roles, on the meta device or fake.

    Attributes:
        roles: module by role; no `ref_policy` where the policy with its adapter off is the reference, and no
            `reward_model` without one.
        frozen: ids of the Parameters that come from the files of a backbone, by the backbone's name.
    """

    roles: dict[str, nn.Module]
    frozen: dict[str, set[int]]


def depth_of(checkpoint: Checkpoint) -> int:
    """Layers of a model."""
    return int(checkpoint.config.get_text_config().num_hidden_layers)


def build_roles(
    layout: Layout, model_args: ModelConfig, training_args: PPOConfig, depth: int | None = None
) -> Skeleton:
    """Builds the roles of a layout on the meta device.

    Args:
        layout: what each role is made of.
        model_args: attention, PEFT, quantization.
        training_args: sequence-independent settings of the roles.
        depth: layers, instead of those of the checkpoints.
    """
    peft_config = get_peft_config(model_args)
    policy_layout, reward_layout = layout.roles["policy"], layout.roles.get("reward_model")
    value_layout = layout.roles["value_model"]
    frozen: dict[str, set[int]] = {name: set() for name in layout.backbones}
    roles: dict[str, nn.Module] = {}

    def build(role: RoleLayout, auto: Any, dtype: torch.dtype) -> nn.Module:
        return _model(layout.backbones[role.backbone].checkpoint, auto, dtype, model_args, depth)

    def hold(role: RoleLayout, auto: Any) -> nn.Module:
        backbone = layout.backbones[role.backbone]
        model = build(role, auto, backbone.dtype)
        if backbone.storage == "quantized":
            _quantize(model, model_args)
        freeze(model)
        return model

    def remember(name: str, model: nn.Module) -> None:
        frozen[name] |= {id(p) for p in model.parameters()}

    sft = hold(policy_layout, AutoModelForCausalLM)
    remember(policy_layout.backbone, sft)

    def classifier(role: RoleLayout) -> nn.Module:
        """A frozen classifier on a backbone, with the checkpoint's adapter on top."""
        model = hold(role, AutoModelForSequenceClassification)
        if role.backbone == policy_layout.backbone:
            _share_trunk(model, sft)
        remember(role.backbone, model)
        return _with_adapter(model, layout, role)

    reward: nn.Module | None = None
    if reward_layout is not None:
        roles["reward_model"] = reward = classifier(reward_layout)

    # The value model starts from the reward model, or from a backbone of its own or the policy's (as it is before it
    # gets an adapter).
    from_reward = reward_layout is not None and (value_layout.backbone, value_layout.adapter) == (
        reward_layout.backbone,
        reward_layout.adapter,
    )
    value_on: nn.Module | None = reward
    if not from_reward:
        value_on = classifier(value_layout) if value_layout.trains == "adapter" or value_layout.frozen_layers else None

    if policy_layout.trains == "everything":
        policy = build(policy_layout, AutoModelForCausalLM, torch.float32)
        _stand_on(policy, sft, policy_layout.frozen_layers)
        roles |= {"policy": policy, "ref_policy": sft}
    else:
        policy = add_policy_adapter(_with_adapter(sft, layout, policy_layout), peft_config)
        roles["policy"] = policy
    if value_layout.trains == "everything":
        value = build(value_layout, AutoModelForSequenceClassification, torch.float32)
        if value_layout.frozen_layers:
            assert value_on is not None
            _stand_on(value, value_on, value_layout.frozen_layers)
    elif value_layout.trains == "adapter":
        assert value_on is not None
        value = add_value_adapter(clone_sharing(value_on), peft_config)
    else:
        value = share_trunk(policy)
    roles["value_model"] = value
    for model in roles.values():
        model.train()
        # Already where they are to be: fake Parameters cannot be moved in place.
        for module in (model, score_head(model)) if hasattr(model, "score") else (model,):
            vars(module)["to"] = lambda *args, _module=module, **kwargs: _module
    return Skeleton(roles, frozen)


def fake_tensors(skeleton: Skeleton, fake: FakeTensorMode, device: torch.device) -> None:
    """Replaces meta tensors by fake ones on `device`, in place; what was shared or tied still is."""
    memo: dict[int, Tensor] = {}

    def faked(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            with fake:
                twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if is_parameter else twin
            kept.append(tensor)
        return memo[id(tensor)]

    kept: list[Tensor] = []  # ids stay theirs while they live
    for model in skeleton.roles.values():
        for module in model.modules():
            for slots in (module._parameters, module._buffers):
                for name, tensor in list(slots.items()):
                    if tensor is not None and tensor.is_meta:
                        slots[name] = faked(tensor)
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value.is_meta:
                    vars(module)[name] = faked(value)


def _model(
    checkpoint: Checkpoint, auto: Any, dtype: torch.dtype, model_args: ModelConfig, depth: int | None
) -> nn.Module:
    config = copy.deepcopy(checkpoint.config)
    if auto is AutoModelForSequenceClassification:
        config.num_labels = 1
    config.quantization_config = None
    del config.quantization_config
    if depth is not None:
        _shorten(config, depth)
    with torch.device("meta"):
        model: nn.Module = auto.from_config(
            config,
            dtype=dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=model_args.trust_remote_code,
        )
    model.tie_weights()
    return model


def _shorten(config: Any, depth: int) -> None:
    """Fewer layers of the same kind; lists with an entry a layer become as short."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for part in {id(config): config, id(text): text}.values():
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(part, name, value[:depth])
    text.num_hidden_layers = depth


def _share_trunk(model: Any, other: Any) -> None:
    """Points the backbone of `model` at the Parameters of the backbone of `other`, by name."""
    theirs = dict(other.base_model.named_parameters(remove_duplicate=False))
    for prefix, module in model.base_model.named_modules(remove_duplicate=False):
        for name in module._parameters:
            module._parameters[name] = theirs.get(f"{prefix}.{name}".lstrip("."), module._parameters[name])


def _stand_on(trained: nn.Module, frozen: nn.Module, layers: int) -> None:
    adopt_bottom(trained, frozen, layers)
    freeze_bottom(trained, layers)


def layers_of(model: Any) -> Any:
    """The stack of transformer layers."""
    count = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def _with_adapter(model: nn.Module, layout: Layout, role: RoleLayout) -> nn.Module:
    """The checkpoint's own adapter on its base, where the role stands on one."""
    if role.adapter is None:
        return model
    with torch.device("meta"):
        return wrap_frozen(model, layout.adapters[role.adapter].config, role.adapter)


# ---------------------------------------------------------------------------------------------------- quantization


class _Dequantize(torch.autograd.Function):
    """A product with weights that are unpacked for it, forward and backward: bitsandbytes keeps the packed ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.matmul(grad, grad.new_empty(ctx.shape)), None, None


class _QuantizedLinear(nn.Linear):
    """A stand-in for bitsandbytes' layers: packed weight and scales as it has them."""

    def __init__(self, linear: nn.Linear, model_args: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        numel = linear.weight.numel()
        if model_args.load_in_8bit:
            packed, scales = (torch.int8, linear.weight.shape), 4 * linear.out_features
        else:
            # One fp32 scale for 64 weights; nested, one byte each and an fp32 one for 256 of those.
            blocks = -(-numel // 64)
            scales = blocks + 4 * -(-blocks // 256) + 1024 if model_args.use_bnb_nested_quant else 4 * blocks
            packed = (torch.uint8, ((numel + 1) // 2, 1))
        self.weight = nn.Parameter(torch.empty(packed[1], dtype=packed[0], device="meta"), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = _Dequantize.apply(x, self.weight, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


def _quantize(model: Any, model_args: ModelConfig) -> None:
    """Puts stand-ins in the place of the layers that bitsandbytes would quantize."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            linear = isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D"
            if linear and child is not head and name not in _HEADS:
                if not isinstance(child, nn.Linear):
                    child.out_features, child.in_features = child.weight.shape[1], child.weight.shape[0]
                setattr(module, name, _QuantizedLinear(child, model_args))
    model.is_quantized = True


def logical_numel(module: nn.Module) -> dict[int, int]:
    """Weights that packed Parameters stand for, by the Parameter's id; scales stand for none."""
    found: dict[int, int] = {}
    for layer in module.modules():
        if isinstance(layer, _QuantizedLinear):
            found |= {id(layer.weight): layer.in_features * layer.out_features, id(layer.scales): 0}
    return found

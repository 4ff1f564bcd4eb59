"""Frozen weights held once: a second module tree over the same Parameters, and equal copies pointed at one storage."""

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

M = TypeVar("M", bound=nn.Module)


def clone_sharing(model: M) -> M:
    """A second module tree over the very Parameters and buffers of `model`.

    Modules, config and hooks are copied, tensors are not: whatever is put on one tree (an adapter, a head, dropout
    off) does not show in the other, and neither costs memory. Quantized weights (bitsandbytes) are shared too.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        _settle_8bit(module)
        for tensor in _tensors(module):
            memo[id(tensor)] = tensor
    return _copy_tree(model, memo)


def clone_owning(model: M, dtype: torch.dtype, keep: Iterable[nn.Parameter] = ()) -> M:
    """A copy of `model` with its own floating point weights in `dtype`; tied weights stay tied, buffers keep theirs.

    Args:
        model: what is copied.
        dtype: of the copied weights.
        keep: Parameters of `model` that both are to hold.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in keep}
    for parameter in model.parameters():
        if id(parameter) in memo:
            continue
        wanted = dtype if parameter.is_floating_point() else parameter.dtype
        data = parameter.detach().to(wanted, copy=True)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    twin = _copy_tree(model, memo)
    if hasattr(twin, "config"):
        twin.config.dtype = dtype
    return twin


def _copy_tree(model: M, memo: dict[int, Any]) -> M:
    """`copy.deepcopy(model, memo)` without the dozen empty dictionaries of each module, where most of its time goes.

    Modules that have ways of their own to be copied are left to it.
    """
    modules = [module for module in model.modules() if _is_copied_plainly(type(module))]
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
    for module in modules:
        twin = vars(memo[id(module)])
        for name, value in vars(module).items():
            is_empty = type(value) in (dict, OrderedDict, set) and not value
            twin[name] = memo.setdefault(id(value), type(value)()) if is_empty else copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


def _is_copied_plainly(kind: type[nn.Module]) -> bool:
    ways = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__")
    return not hasattr(kind, "__deepcopy__") and all(getattr(kind, w) is getattr(nn.Module, w) for w in ways)


def share_frozen(models: list[nn.Module]) -> int:
    """Points the frozen tensors of models that were loaded one by one at one storage, where they are the same.

    Models are compared when they come from the same checkpoint, and then tensor by tensor, byte by byte.

    Args:
        models: the roles; the first that holds a tensor keeps it.

    Returns:
        Bytes that are no longer held twice.
    """
    freed = 0
    for i, target in enumerate(models):
        for source in models[:i]:
            if _source(target) == _source(source):
                freed += share_parameters(target, source)
    return freed


def _source(model: Any) -> str:
    name = str(getattr(model.config, "_name_or_path", ""))
    return os.path.realpath(name) if os.path.isdir(name) else name


def share_parameters(target: nn.Module, source: nn.Module) -> int:
    """Points frozen tensors of `target` at those of `source` that hold the same bytes.

    Tensors are matched by name, whatever PEFT has wrapped around them, and replaced where both are frozen and agree
    in shape, dtype, device and every byte (for quantized weights the scales too). What trains is never touched.

    Args:
        target: loses its copies, in place.
        source: keeps its tensors.

    Returns:
        Bytes of `target`'s copies that are no longer used by it.
    """
    held = {name: (module, attribute) for name, module, attribute in _slots(source)}
    before = _storages(target)
    for name, module, attribute in list(_slots(target)):
        if name not in held:
            continue
        other, other_attribute = held[name]
        mine, theirs = getattr(module, attribute), getattr(other, other_attribute)
        if mine is theirs or mine.requires_grad or theirs.requires_grad:
            continue
        _settle_8bit(module)
        _settle_8bit(other)
        if not _same_bytes(module, mine, other, theirs):
            continue
        setattr(module, attribute, theirs)
        if attribute == "weight" and _is_8bit(module):
            module.state.CB, module.state.SCB = other.state.CB, other.state.SCB
        if attribute == "weight" and getattr(module, "quant_state", None) is not None:
            module.quant_state = theirs.quant_state
    after = _storages(target)
    return sum(size for key, size in before.items() if key not in after)


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter and buffer as (name without PEFT's wrappers, owner, attribute), tied ones once an owner."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute in [*module._parameters, *module._buffers]:
            if getattr(module, attribute) is not None:
                yield _plain_name(f"{prefix}.{attribute}".lstrip(".")), module, attribute


def _plain_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _same_bytes(module: nn.Module, mine: Tensor, other: nn.Module, theirs: Tensor) -> bool:
    if type(mine) is not type(theirs) or not _equal(mine, theirs):
        return False
    if hasattr(mine, "quant_state"):
        return _same_scales(mine.quant_state, theirs.quant_state)
    if _is_8bit(module) and _is_8bit(other) and mine is module.weight:
        return _equal(module.state.SCB, other.state.SCB)
    return True


def _same_scales(mine: Any, theirs: Any) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    left, right = mine.as_dict(packed=True), theirs.as_dict(packed=True)
    return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)


def _equal(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
        return False
    if mine.is_meta or isinstance(mine, FakeTensor):  # nothing to compare
        return False
    return torch.equal(_as_bytes(mine), _as_bytes(theirs))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _storages(model: nn.Module) -> dict[int, int]:
    """Address -> bytes of every storage that `model` holds."""
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in _tensors(module):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.untyped_storage().nbytes():
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def _tensors(module: nn.Module) -> Iterator[Any]:
    """Tensors that belong to one module: parameters, buffers, plain attributes, and what quantization adds."""
    owned = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    state = vars(module).get("state")
    if _is_8bit(module):
        owned += [state.CB, state.SCB]
    for tensor in owned:
        if not isinstance(tensor, Tensor):
            continue
        yield tensor
        quant_state = getattr(tensor, "quant_state", None)
        while quant_state is not None:
            # The state as well as its tensors: bitsandbytes changes it together with the weight it hangs on.
            yield quant_state
            yield from (value for value in vars(quant_state).values() if isinstance(value, Tensor))
            quant_state = quant_state.state2


def _is_8bit(module: nn.Module) -> bool:
    state = vars(module).get("state")
    return type(state).__name__ == "MatmulLtState"


def _settle_8bit(module: nn.Module) -> None:
    """Does what the first 8-bit forward does: it takes the scales off the Parameter, where a second tree looks."""
    if _is_8bit(module) and getattr(module.weight, "CB", None) is not None:
        module.init_8bit_state()

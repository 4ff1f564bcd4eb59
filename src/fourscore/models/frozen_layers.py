"""The frozen bottom of a model: embedding and lowest layers that do not train, held once and computed once for two."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fourscore.errors import FourscoreError
from fourscore.models.forward_as import forward_as


def bottom_parameters(model: nn.Module, n: int) -> list[nn.Parameter]:
    """Parameters of the embedding, learned positions included, and of the `n` lowest layers; none when `n` is 0.

    A head that is tied to the embedding is the embedding's Parameter, and so among them.

    Raises:
        FourscoreError: the model does not name its layers, or has no layer left to train.
    """
    if n == 0:
        return []
    backbone, layers = _layers(model)
    if n >= len(layers):
        raise FourscoreError(
            f"--freeze_layers {n}: {type(model).__name__} has {len(layers)} layers, and the last one must train; "
            f"give at most {len(layers) - 1}"
        )
    modules = [child for name, child in backbone.named_children() if _is_embedding(name, child)]
    found = {id(p): p for module in (*modules, *layers[:n]) for p in module.parameters()}
    return list(found.values())


def freeze_bottom(model: nn.Module, n: int) -> None:
    """Turns gradients off for `bottom_parameters`."""
    for parameter in bottom_parameters(model, n):
        parameter.requires_grad_(False)


def adopt_bottom(target: nn.Module, source: nn.Module, n: int) -> None:
    """Points the bottom of `target`, whatever its dtype, at that of `source`, a model of the same architecture."""
    kept = {id(p) for p in bottom_parameters(source, n)}
    for name, parameter in source.named_parameters(remove_duplicate=False):
        if id(parameter) in kept:
            owner, _, attribute = name.rpartition(".")
            setattr(target.get_submodule(owner), attribute, parameter)


def has_tied_head(model: Any) -> bool:
    """Whether the output layer of a causal LM is its embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def same_bottom(one: nn.Module, other: nn.Module, n: int) -> bool:
    """Whether two models stand on the very same frozen bottom of `n` layers, at least one."""
    if n == 0:
        return False
    mine, theirs = bottom_parameters(one, n), bottom_parameters(other, n)
    return len(mine) == len(theirs) and all(a is b and not a.requires_grad for a, b in zip(mine, theirs, strict=True))


@contextmanager
def recorded(model: nn.Module, n: int) -> Iterator[list[Any]]:
    """In this context what layer `n - 1` gives in a forward pass is put into the list; nothing is when `n` is 0."""
    outputs: list[Any] = []
    if n == 0:
        yield outputs
        return

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)

    handle = _layers(model)[1][n - 1].register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def replayed(model: nn.Module, n: int, outputs: list[Any]) -> Iterator[None]:
    """In this context the `n` lowest layers are not computed: they give what `recorded` kept of the same batch."""
    with ExitStack() as stack:
        for layer in _layers(model)[1][:n] if n else ():
            stack.enter_context(forward_as(layer, lambda *args, **kwargs: outputs[0]))
        yield


def _layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the layers, and the layers."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and all(type(m).__name__ in names for m in child):
                return module, child
    raise FourscoreError(
        f"{type(model).__name__} does not name its layers (_no_split_modules), so --freeze_layers cannot find them: "
        "leave it out"
    )


def _is_embedding(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or "embed" in name or name == "project_in"

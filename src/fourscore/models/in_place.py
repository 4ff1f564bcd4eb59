"""Gradients of tables with a row for each token of the vocabulary, added to the `.grad` that is there.

Autograd would make a second tensor of the whole table in every pass, and add the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fourscore.models.forward_as import forward_as


@contextmanager
def head_gradient_in_place(head: Any) -> Iterator[None]:
    """In this context a plain head's gradient will be added to the `.grad` it has; if it has none, autograd makes it.

    Args:
        head: the output layer of a causal LM.
    """
    weight = head.weight if type(head) is nn.Linear and head.bias is None else None
    if weight is None or not weight.requires_grad or weight.grad is None or isinstance(weight, DTensor):
        yield
        return

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        states = args[0].detach()

        def add(slope: Tensor) -> None:
            weight.grad.addmm_(slope.flatten(0, -2).T.to(weight.dtype), states.flatten(0, -2).to(weight.dtype))

        output.register_hook(add)

    weight.requires_grad_(False)
    handle = head.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        weight.requires_grad_(True)


@contextmanager
def embedding_gradient_in_place(model: Any) -> Iterator[None]:
    """In this context the gradient of a plain input embedding on a CPU will be added to the rows of its `.grad`.

    There a fresh tensor of the whole table takes longer than anything else that an embedding does. On a GPU autograd
    keeps making one: adding rows is not deterministic there.

    Args:
        model: with an input embedding, PEFT or plain.
    """
    embedding = model.get_input_embeddings() if torch.is_grad_enabled() else None
    if embedding is None or not _is_plain(embedding):
        yield
        return
    with forward_as(embedding, partial(_rows, embedding)):
        yield


def _is_plain(embedding: Any) -> bool:
    """Whether it trains, on a CPU, whole, and with defaults: no norm to keep, no scaling by frequency."""
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        return False
    weight = embedding.weight
    return weight.requires_grad and weight.device.type == "cpu" and not isinstance(weight, DTensor)


def _rows(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    weight = embedding.weight
    rows = F.embedding(ids, weight.detach()).requires_grad_()

    def add(slope: Tensor) -> None:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if embedding.padding_idx is not None:
            slope = slope.masked_fill((ids == embedding.padding_idx)[..., None], 0)
        weight.grad.index_add_(0, ids.flatten(), slope.flatten(0, -2))

    rows.register_hook(add)
    return rows

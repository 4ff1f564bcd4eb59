"""A whole decoder layer of one new token of each row, on a CPU.

Decoding is many small operations, and what Python and torch take between them adds up. What it is worth:
`benchmarks/fused.py`.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fourscore.models import few_rows, kernels
from fourscore.models.few_rows import FewRows
from fourscore.models.forward_as import forward_as
from fourscore.models.fused import is_silu
from fourscore.models.one_token import attends_by_kernel, rows_see_from

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""`model_type` of models whose layers are Llama's, but for biases, norms of queries and keys, and layers that do not
rotate."""

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _Layer(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = (
        *((name, _POINTER) for name in ("norm", "norm_of_mlp", "norm_of_q", "norm_of_k")),
        *((name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _LONG) for name in ("width", "heads", "kept", "size", "inner")),
        *((name, _FLOAT) for name in ("epsilon", "scale")),
        ("rotates", ctypes.c_int),
    )


class _Room(ctypes.Structure):
    """`Room` of kernels.cpp."""

    _fields_ = tuple(
        (name, _POINTER) for name in ("x", "strips", "q", "attended", "k", "v", "scores", "middle", "gate", "up")
    )


class _Rooms:
    """The room that the layers of a model use one after the other; made anew where it has to be another."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._numbers: dict[str, Tensor] = {}
        self._room = _Room()

    def of(self, layer: _Layer, rows: int, capacity: int) -> _Room:
        of_q, of_k = layer.heads * layer.size, layer.kept * layer.size
        widths = {"x": layer.width, "middle": layer.width, "q": of_q, "attended": of_q, "k": of_k, "v": of_k}
        widths |= {"gate": layer.inner, "up": layer.inner, "scores": layer.heads * capacity}
        sizes = {name: rows * width for name, width in widths.items()}
        sizes["strips"] = (rows + kernels.STRIP - 1) * max(layer.width, of_q, layer.inner)
        if sizes != self._sizes:
            self._sizes = sizes
            self._numbers = {name: torch.empty(size, dtype=torch.float32, device="cpu") for name, size in sizes.items()}
            self._room = _Room(**{name: numbers.data_ptr() for name, numbers in self._numbers.items()})
        return self._room


@contextmanager
def layers_of_one_token(model: Any) -> Iterator[None]:
    """In this context steps with `seen_from` have layers by a kernel, where a model allows it; all else is as ever.

    Within those of `packed`, whose weights it multiplies with, and of `attention_of_one_token`.

    Args:
        model: PEFT or plain, all in fp32 on a CPU, in evaluation mode, and not under autocast.
    """
    with ExitStack() as stack:
        if model.config.get_text_config().model_type in FAMILIES and attends_by_kernel(model):
            rooms = _Rooms()
            for layer in model.modules():
                if type(layer).__name__.endswith("DecoderLayer") and (made := _described(layer)) is not None:
                    stack.enter_context(forward_as(layer, partial(_step, layer, *made, rooms, layer.forward)))
        yield


def _described(layer: Any) -> tuple[_Layer, list[FewRows]] | None:
    """A layer as the kernel has it, and what its numbers belong to; None where it has something else."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")]
    linears += [getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    forwards = [vars(module).get("forward") for module in linears]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    by_kernel = [f for f in forwards if isinstance(f, FewRows) and f.takes]
    own = all(type(norm).__name__.endswith("RMSNorm") and few_rows.takes(norm.weight, None) for norm in norms)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules() if m is not layer)
    if len(by_kernel) < len(forwards) or not own or hooked or not is_silu(mlp.act_fn):
        return None
    if len({norm.variance_epsilon for norm in norms}) > 1 or attention.head_dim % kernels.STRIP:
        return None
    described = _Layer()
    for name, norm in zip(("norm", "norm_of_mlp", "norm_of_q", "norm_of_k"), norms, strict=False):
        setattr(described, name, norm.weight.data_ptr())
    for name, forward in zip(("q", "k", "v", "o", "gate", "up", "down"), by_kernel, strict=True):
        bias = None if forward.bias is None else forward.bias.data_ptr()
        setattr(described, name, _Linear(forward.weight.data_ptr(), bias))
    size = attention.head_dim
    described.width, described.inner, described.size = by_kernel[0].weight.shape[1], len(by_kernel[4].weight), size
    described.heads, described.kept = len(by_kernel[0].weight) // size, len(by_kernel[1].weight) // size
    described.epsilon, described.scale = norms[0].variance_epsilon, attention.scaling
    described.rotates = bool(getattr(attention, "use_rope", True))
    return described, by_kernel


def _step(
    layer: Any,
    described: _Layer,
    held: list[FewRows],
    rooms: _Rooms,
    otherwise: Callable[..., Tensor],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    begins = rows_see_from()
    # transformers calls it `cache` from 5.24 on.
    cache = kwargs.get("cache") or kwargs.get("past_key_values")
    if begins is None or cache is None or args or not few_rows.fits(x, held[0].weight) or not x.is_contiguous():
        return otherwise(x, *args, **kwargs)
    states = cache.layers[layer.self_attn.layer_idx]
    cosines, sines = kwargs["position_embeddings"]
    if cosines.shape[-1] != described.size:
        return otherwise(x, *args, **kwargs)
    rows, capacity, filled = len(begins), states.keys.shape[2], states.get_seq_length()
    y = torch.empty_like(x)
    room = rooms.of(described, len(states.keys), capacity)
    pointers = ctypes.byref(described), ctypes.byref(room)
    given = x, y, cosines.contiguous(), sines.contiguous(), states.keys, states.values, begins
    kernels.call("decode", *pointers, *given, rows, len(cosines), filled, capacity)
    return y

"""Passes of a backbone on a GPU as CUDA graphs: with few tokens, starting kernels takes longer than they do.

A graph repeats its kernels on the same memory. So a pass has a rectangle of ids of a few fixed sizes, and what it
computes of padding is thrown away. Backward is a second graph, over the activations that the first one leaves, before
any other pass: all of them have one pool of memory. Heads, whose work depends on how many tokens are completions, are
computed as ever.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourscore.models.unpadded import attention_is, can_unpad

logger = logging.getLogger(__name__)

_WIDTH = 64
"""Tokens of a row are a multiple; rows are a power of two."""
_MOST_CELLS = 8192
_MOST_WORK = 4e12
"""Tokens times weights: with more a GPU has enough to do while its next kernels are started, and padding costs time."""
_MOST_PASSES = 16
"""Graphs of a backbone: each takes some megabytes for itself. Sizes that are met later are computed without."""
_TRAINED_SHARE = 1 / 8
"""Of a backbone's weights; gradients of more, which a graph keeps a place for, would take too much memory."""

_NAME = "fourscore_causal"


class _Graphs:
    """Those of a backbone, by what they depend on."""

    def __init__(self, size: int, *, gradients: bool) -> None:
        self.size = size
        self.gradients = gradients
        self.passes: dict[Any, _Pass] = {}
        self.weights: tuple[int, ...] = ()
        self.fails = False


_allowed: "WeakKeyDictionary[nn.Module, _Graphs]" = WeakKeyDictionary()
_pool: Any = None
_replays = 0
"""Of all forward passes so far."""


@contextmanager
def allowed(trunks: list[nn.Module], *, gradients: bool) -> Iterator[None]:
    """In this context passes of backbones may become graphs, of those that can and are on one GPU.

    Args:
        trunks: of transformers, all of their weights where they are going to stay.
        gradients: those that train may, too, where it is a small part of the backbone that trains.
    """
    for trunk in trunks:
        if on_current_gpu(trunk):
            _allowed[trunk] = _Graphs(_size(trunk), gradients=gradients and trains_little(trunk))
    try:
        yield
    finally:
        for trunk in trunks:
            _allowed.pop(trunk, None)


def on_current_gpu(model: nn.Module) -> bool:
    """Whether all weights are on the GPU that this process computes on."""
    devices = {p.device for p in model.parameters()}
    return len(devices) == 1 and (one := devices.pop()).type == "cuda" and one.index == torch.cuda.current_device()


def trains_little(model: nn.Module) -> bool:
    """Whether adapters train, or as little."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) <= _TRAINED_SHARE * _size(model)


def shared_pool() -> Any:
    """The memory of all graphs: no two of them run at the same time."""
    global _pool
    if _pool is None:
        _pool = torch.cuda.graph_pool_handle()
    return _pool


def share_that_fits(cells: int, weights: int) -> float:
    """Of a pass, the part that may be a graph.

    Args:
        cells: tokens, padding included.
        weights: of the backbone.
    """
    return min(1.0, _MOST_CELLS / cells, _MOST_WORK / weights / cells)


def recorded_pass(model: Any, trunk: nn.Module, ids: Tensor) -> Callable[..., Any] | None:
    """What a model's backbone computes of `ids` as a graph, recorded if it is the first of its size.

    Args:
        model: PEFT or plain.
        trunk: its backbone.
        ids: `[n, L]`, padded on the right.

    Returns:
        a forward for the backbone, which pays no attention to what it is called with; None where no graph fits.
    """
    graphs = _allowed.get(trunk)
    if graphs is None or graphs.fails:
        return None
    n, width = ids.shape
    rows, columns = 1 << (n - 1).bit_length(), -(-width // _WIDTH) * _WIDTH
    fits = share_that_fits(rows * columns, graphs.size) == 1
    # What hooks within a backbone do is not repeated with its kernels.
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in trunk.modules() if m is not trunk)
    if not fits or hooked or not can_unpad(model, columns):
        return None
    weights = tuple(p.data_ptr() for p in trunk.parameters())
    if weights != graphs.weights:
        graphs.passes, graphs.weights = {}, weights
    trained = [p for p in trunk.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    if trained and not graphs.gradients:
        return None
    adapter: Any = next((m for m in trunk.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)), None)
    state = None if adapter is None else (adapter.disable_adapters, *adapter.active_adapters)
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    key = rows, columns, len(trained), state, autocast
    if key not in graphs.passes:
        if len(graphs.passes) == _MOST_PASSES:
            return None
        try:
            graphs.passes[key] = _Pass(model, trunk, rows, columns, trained)
        except RuntimeError as error:
            graphs.fails, graphs.passes = True, {}
            name = type(model).__name__
            logger.warning("passes of %s are not made CUDA graphs, which is slower: %s", name, first_line(error))
            return None
    found = graphs.passes[key]
    return lambda *args, **named: found(ids)


def bare_forward(trunk: Any, ids: Tensor) -> Any:
    """A backbone's own forward on `[n, L]` ids of which all count, without the hooks that are on it."""
    # A mask that nobody looks at: without one GPT-2 looks for padding, for which it waits.
    return trunk.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


class _Pass:
    """A forward pass and, where anything trains, the backward pass after it."""

    def __init__(self, model: Any, trunk: nn.Module, rows: int, columns: int, trained: list[nn.Parameter]) -> None:
        """Record it.

        Raises:
            RuntimeError: it waits for the GPU, which a graph cannot.
        """
        self.trained = trained
        self._ids = torch.zeros(rows, columns, dtype=torch.long, device=next(trunk.parameters()).device)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

        def forward() -> Any:
            return bare_forward(trunk, self._ids)

        def backward(states: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(states, trained, grad, allow_unused=True)

        with torch.set_grad_enabled(bool(trained)), attention_is(model, _NAME), recording() as warm_up:
            with warm_up():
                states = forward().last_hidden_state
                if trained:
                    backward(states, torch.zeros_like(states))
                del states
            with recorded_in(self._forward):
                out = forward()
            self._kind, states = type(out), out.last_hidden_state
            if trained:
                self._grad = torch.zeros_like(states)
                with recorded_in(self._backward):
                    self._gradients = backward(states, self._grad)
        self._states = states.detach()

    def __call__(self, ids: Tensor) -> Any:
        """The backbone's output of ids `[n, L]`: states `[n, L, d]`."""
        n, width = ids.shape
        states = _Replay.apply(self, ids, *self.trained) if self.trained else self.replay(ids)
        return self._kind(last_hidden_state=states[:n, :width])

    def replay(self, ids: Tensor) -> Tensor:
        """States of all cells `[rows, columns, d]`; the next pass writes over them."""
        global _replays
        n, width = ids.shape
        self._ids.zero_()
        self._ids[:n, :width] = ids
        self._forward.replay()
        _replays += 1
        return self._states

    def replay_backward(self, grad: Tensor) -> Iterator[Tensor | None]:
        """Gradients of what trains, from that of the states."""
        self._grad.copy_(grad)
        self._backward.replay()
        # Copies: autograd makes what it is given the parameter's own, and the next pass writes over these. It is what
        # torch.cuda.make_graphed_callables does not do, whose gradients are its own memory.
        return (None if each is None else each.clone() for each in self._gradients)


class _Replay(torch.autograd.Function):
    """A pass as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, recorded: _Pass, ids: Tensor, *trained: Tensor) -> Tensor:
        states = recorded.replay(ids)
        ctx.recorded, ctx.number = recorded, _replays
        return states.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.number != _replays:
            raise RuntimeError("another pass has written over the activations of this one; use --cuda_graphs forward")
        return None, None, *ctx.recorded.replay_backward(grad)


@contextmanager
def recording() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """A context to record CUDA graphs in; gives one in which the same is to run once before.

    Raises:
        RuntimeError: what ran waits for the GPU, which a graph cannot.
    """
    # Without autocast's cache: casts that it holds from before are freed while the graph still reads them.
    dtype, on = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    stream = torch.cuda.current_stream()
    with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
        try:
            yield _warm_up
        except RuntimeError:
            # A recording that broke off leaves its stream behind, and a generator that would draw no more.
            torch.cuda.set_stream(stream)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise


def recorded_in(graph: "torch.cuda.CUDAGraph") -> AbstractContextManager[None]:
    """What runs in this context becomes the graph."""
    # What other threads do, such as those of NCCL, is no part of it.
    return torch.cuda.graph(graph, pool=shared_pool(), capture_error_mode="thread_local")


@contextmanager
def _warm_up() -> Iterator[None]:
    """Libraries take memory when they are first called, and some code waits for the GPU: here that is an error."""
    before, stream = torch.cuda.get_sync_debug_mode(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see everything: what it misses fails as it is recorded
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(stream)


def first_line(error: Exception) -> str:
    """Of what it says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)


# No mask is registered: making one, transformers looks for packed samples, for which it waits.
AttentionInterface.register(_NAME, _attention)


def _size(trunk: nn.Module) -> int:
    return sum(p.numel() for p in trunk.parameters())

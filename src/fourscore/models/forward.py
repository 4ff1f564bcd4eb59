"""What the roles compute of given samples: logprobs, values and scores at the tokens where they are needed.

Models want rectangles, so samples are padded on the right here, at the door, and what comes back is flat again.
Causal attention never looks right, so right padding needs neither a mask nor position ids and cannot leak: real
tokens sit at positions 0, 1, ... whatever follows them. Where a model allows it, padding is for its attention only.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fourscore.errors import FourscoreError
from fourscore.models import chosen as kernel
from fourscore.models.forward_as import forward_as
from fourscore.models.fused import fused
from fourscore.models.in_place import embedding_gradient_in_place, head_gradient_in_place
from fourscore.models.pass_graphs import recorded_pass
from fourscore.models.products import fast_products
from fourscore.models.support import Support
from fourscore.models.unpadded import Layout, attention_within, can_unpad

CHUNK_BYTES = 2**24
"""Logits are made so many bytes at a time, in fp32."""
_ON_A_GPU = 8
"""Times as many there: starting a chunk's kernels takes as long as computing so many more logits."""

_PASS_TOKENS = {"cpu": 64, "cuda": 512}
"""What a pass costs by itself, reading all weights and starting every kernel, in tokens that take as long."""

_TWICE = 128
"""Tokens of a larger pass cost more each, as they take fresh memory: twice as much where they are worth so many passes.

Without padding nothing else keeps passes from growing, or makes them even.
"""


@dataclass
class Padded:
    """Samples as a right-padded rectangle, and the places that something is wanted of.

    Attributes:
        input_ids: `[n, L]`; behind the end of a sample stands 0, which every vocabulary has.
        lens: `[n]` tokens.
        rows: `[C]` of the places.
        columns: `[C]` of the places.
    """

    input_ids: Tensor
    lens: Tensor
    rows: Tensor
    columns: Tensor


@dataclass
class Rectangle(Padded):
    """A place for each completion token, samples in order: where the state is in which it was chosen, right before it.

    Attributes:
        targets: `[C]` the completion tokens.
        support: of the `C` targets, where they were not drawn from the whole vocabulary.
    """

    targets: Tensor
    support: Support | None = None


def rectangle(samples: list[Tensor], prompt_lens: Tensor, support: Support | None = None) -> Rectangle:
    """Pad samples to a rectangle.

    Args:
        samples: token ids of each sample, `[len_i]`, prompt and completion.
        prompt_lens: `[n]` tokens, each at least 1 and less than its sample's length.
        support: of the completion tokens, samples in order.
    """
    device = samples[0].device
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=0)
    lens = torch.tensor([len(s) for s in samples], device=device)
    at = torch.arange(ids.shape[1], device=device)
    chosen = (at >= prompt_lens[:, None]) & (at < lens[:, None])
    rows, columns = chosen.nonzero(as_tuple=True)
    return Rectangle(ids, lens, rows, columns - 1, ids[rows, columns], support)


def microbatches(lens: Tensor, size: int, tokens: int | None = None, *, padded: bool = True) -> list[Tensor]:
    """Indices of samples in groups, one forward pass each: sorted by length, and cut where that costs least.

    What is padded costs as much as what is not, and each pass costs as much as some tokens more. No group takes more
    memory than `size` samples of the greatest length, so there may be more of them where they are short. Without
    padding groups are about even, and no larger than pays.

    Args:
        lens: `[n]` tokens.
        size: samples of the greatest length a group.
        tokens: most tokens a group instead, padding included; one sample may have more.
        padded: to the longest of a group.

    Returns:
        index tensors that together hold 0 .. n-1 once each, the longest sample first.
    """
    order = torch.argsort(lens, descending=True, stable=True)
    longest_first = lens[order].numpy(force=True)
    limit = size * longest_first[0] if tokens is None else tokens
    one_pass = _PASS_TOKENS.get(lens.device.type, _PASS_TOKENS["cuda"])
    before = np.concatenate([[0], longest_first.cumsum()])
    # The least cost of the first j samples, and where their last group begins.
    least, begins = np.zeros(len(lens) + 1), np.zeros(len(lens) + 1, dtype=int)
    for j in range(1, len(lens) + 1):
        # Of a group from i to j.
        cells = longest_first[:j] * np.arange(j, 0, -1) if padded else before[j] - before[:j]
        cost = cells if padded else cells + cells**2 / (_TWICE * one_pass)
        costs = least[:j] + one_pass + np.where((cells > limit) & (np.arange(j) < j - 1), np.inf, cost)
        begins[j] = costs.argmin()
        least[j] = costs[begins[j]]
    ends = [len(lens)]
    while begins[ends[-1]] > 0:
        ends.append(begins[ends[-1]])
    return list(order.tensor_split(ends[:0:-1]))


def scatter_back(pieces: list[Tensor], order: list[Tensor], lens: Tensor | None = None) -> Tensor:
    """Put results that were computed in microbatches back into the order of the samples.

    Args:
        pieces: one flat tensor a microbatch: a number a sample, or with `lens` a number a completion token.
        order: the sample indices of each microbatch.
        lens: `[n]` completion tokens of each sample, when results are per token.

    Returns:
        `[n]` or `[C]`.
    """
    index = torch.cat(order)
    flat = torch.cat(pieces)
    if lens is None:
        out = torch.empty_like(flat)
        out[index] = flat
        return out
    per_sample = flat.split(lens[index].tolist())
    place: list[Tensor] = [flat] * len(index)
    for i, piece in zip(index.tolist(), per_sample, strict=True):
        place[i] = piece
    return torch.cat(place)


def completion_logprobs(
    model: nn.Module, batch: Rectangle, temperature: float, *, entropy_trains: bool = False
) -> tuple[Tensor, Tensor]:
    """Logprob of each completion token, and the entropy of the distribution it was drawn from.

    The model's own forward runs, so whatever it does to its logits (soft-capping, scaling) is kept, and sharded
    models gather their weights. Its head sees the completion's states only, a chunk of `CHUNK_BYTES` of logits at a
    time: the `[C, vocabulary]` logits never exist. Where the head trains, its backward pass makes each chunk again;
    where it is frozen, gradients of logprobs are made with them, up to a factor a token, as states are all they go to.

    Where the batch has a support, the distribution is that of the logits in it, renormalised.

    Gradients of the head and, on a CPU, of the input embedding are added to their parameters' `.grad` by `backward()`;
    `torch.autograd.grad` does not see them.

    Args:
        model: a causal LM, PEFT or plain.
        batch: the samples.
        temperature: logits are divided by it, as in the rollout.
        entropy_trains: the entropies have a gradient as well.

    Returns:
        logprobs `[C]` and entropies `[C]` in nats, fp32.

    Raises:
        FourscoreError: the model keeps its backbone where transformers does not.
    """
    logprobs, entropy, _ = _completion_states(model, batch, temperature, entropy_trains)
    return logprobs, entropy


def completion_logprobs_and_values(
    model: nn.Module, head: nn.Linear, batch: Rectangle, temperature: float, *, entropy_trains: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `completion_logprobs`, with the values that a head on the same backbone gives, from one forward pass.

    Args:
        model: a causal LM, PEFT or plain, not sharded.
        head: the value model's.
        batch: the samples.
        temperature: logits are divided by it, as in the rollout.
        entropy_trains: the entropies have a gradient as well.

    Returns:
        logprobs, entropies and values, `[C]` each, fp32.
    """
    logprobs, entropy, states = _completion_states(model, batch, temperature, entropy_trains)
    return logprobs, entropy, _linear_in_fp32(head, states)[:, 0]


@contextmanager
def _fed(model: nn.Module, batch: Padded) -> Iterator[tuple[Padded, dict[str, Tensor]]]:
    """The batch as a model is to see it in this context, padded or in one row, and the arguments of its forward."""
    n, width = batch.input_ids.shape
    trunk = without_peft(model).base_model
    if (recorded := recorded_pass(model, trunk, batch.input_ids)) is not None:
        with forward_as(trunk, recorded):
            yield batch, {"input_ids": batch.input_ids}
        return
    if (batch.lens == width).all() or not can_unpad(model, width):
        yield batch, {"input_ids": batch.input_ids}
        return
    at = torch.arange(width, device=batch.lens.device).expand(n, width)
    real = at < batch.lens[:, None]
    starts = batch.lens.cumsum(0) - batch.lens
    one_row = replace(
        batch,
        input_ids=batch.input_ids[real][None],
        rows=torch.zeros_like(batch.rows),
        columns=starts[batch.rows] + batch.columns,
    )
    with attention_within(model, Layout.of(batch.lens, microbatches(batch.lens, n))):
        yield one_row, {"input_ids": one_row.input_ids, "position_ids": at[real][None]}


def _completion_states(
    model: nn.Module, batch: Rectangle, temperature: float, entropy_trains: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs `[C]`, entropies `[C]`, and the last hidden states `[C, d]` that they were computed from."""
    base = without_peft(model)
    trunk = base.base_model
    if trunk is base:
        raise FourscoreError(
            f"{type(base).__name__} names no backbone (base_model_prefix): use an architecture of transformers."
        )
    head = base.get_output_embeddings()
    sharded = any(isinstance(parameter, DTensor) for parameter in base.parameters())
    seen: list[tuple[Any, Tensor]] = []
    entropies: list[Tensor] = []

    def narrow(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if seen:
            return output
        states = output[0]
        # Without a graph of their own, so that what the head makes of them tells whether it trains.
        narrowed = _with_states(output, states[:0] if sharded else states[:0].detach())
        seen.append((narrowed, states[fed.rows, fed.columns]))
        return narrowed

    def logits_of(states: Tensor) -> Tensor:
        """What the model's forward makes of `[c, d]` last hidden states: `[1, c, vocabulary]`."""
        with fast_products(head), forward_as(trunk, lambda *args, **kwargs: _with_states(seen[0][0], states[None])):
            return type(base).forward(base, input_ids=fed.input_ids, use_cache=False).logits

    def hand_over(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        states = seen[0][1]
        if torch.is_grad_enabled() and not states.requires_grad:
            states = states.detach().requires_grad_()  # nothing below the head trains, the head may
        chunk = CHUNK_BYTES * (_ON_A_GPU if states.is_cuda else 1)
        most = max(1, chunk // (4 * base.config.get_text_config().vocab_size))
        # Evened out: a last chunk of few rows would read all of the head, too.
        size = math.ceil(len(states) / math.ceil(len(states) / most))
        # Backward through a sharded head is for FSDP2 to begin.
        at_once = states.requires_grad and not (sharded or output.logits.requires_grad or entropy_trains)
        output.logits, entropy = _ChunkedLogprobs.apply(
            states, batch.targets, batch.support, temperature, size, logits_of, head, at_once
        )
        if not entropy_trains:
            entropy = entropy.detach()
        entropies.append(entropy)
        return output

    # FSDP2 gathers weights for the backward of what modules return, so results leave that way; and it lets go of them
    # in hooks of its own, so ours run before those.
    below = trunk.register_forward_hook(narrow, prepend=True)
    above = base.register_forward_hook(hand_over, prepend=True)
    with (
        _hook(below),
        _hook(above),
        fast_products(model),
        fused(model),
        embedding_gradient_in_place(model),
        _fed(model, batch) as (fed, inputs),
    ):
        logprobs = model(**inputs, use_cache=False).logits
    return logprobs, entropies[0], seen[0][1]


class _ChunkedLogprobs(torch.autograd.Function):
    """Logprobs `[C]` of targets and entropies `[C]` from states `[C, d]`.

    With `at_once` the gradient of each logprob is made with it, and the head is not gone through again. That leaves out
    gradients of the head and of the entropies. Otherwise the backward pass makes each chunk's logits a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        support: Support | None,
        temperature: float,
        size: int,
        logits_of: Callable[[Tensor], Tensor],
        head: nn.Module | None,
        at_once: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.size, ctx.logits_of, ctx.head = temperature, size, logits_of, head
        ctx.supports = supports = [None] * len(targets.split(size)) if support is None else support.split(size)
        kind = states.device.type
        # Without its cache: it would hand out the casts of weights that were made here, without a graph.
        ctx.autocast = partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
        logprobs, entropies, slopes = [], [], []
        for some, chosen, within in zip(states.split(size), targets.split(size), supports, strict=True):
            some = some.detach().requires_grad_(at_once)
            with torch.set_grad_enabled(at_once):
                logits = logits_of(some)
            # The edge leads back through the head without keeping the logits themselves.
            edge, dtype = get_gradient_edge(logits) if at_once else None, logits.dtype
            if kernel.fits(logits):
                given = some.new_ones(len(some)) if at_once else None
                logprob, entropy, slope = kernel.logprobs_of(logits.detach()[0], chosen, temperature, within, given)
                logprobs.append(logprob)
                entropies.append(entropy)
                if edge is not None and slope is not None:
                    slopes += torch.autograd.grad(edge, some, slope[None])
                continue
            logits = _scaled(logits.detach()[0], temperature, within)
            logits -= logits.amax(1, keepdim=True)
            chosen_logit = logits.gather(1, chosen[:, None]).squeeze(1)
            weights = logits.exp()
            total = weights.sum(1)
            logprobs.append(chosen_logit - total.log())
            if within is not None:
                logits.clamp_(min=torch.finfo(logits.dtype).min)  # zero times minus infinity is no number
            entropies.append(total.log() - logits.mul_(weights).sum(1) / total)
            if edge is not None:
                slope = _logprob_slope_(weights, total, chosen, total.new_full(total.shape, 1 / temperature))
                slopes += torch.autograd.grad(edge, some, slope[None].to(dtype))
        ctx.at_once = at_once
        ctx.save_for_backward(*([torch.cat(slopes)] if at_once else [states, targets]))
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.at_once:
            (slopes,) = ctx.saved_tensors
            assert grad is not None
            return (grad[:, None] * slopes).to(slopes.dtype), *[None] * 7
        states, targets = ctx.saved_tensors
        if grad is None:
            assert entropy_grad is not None
            grad = torch.zeros_like(entropy_grad)
        chunks = [x.split(ctx.size) for x in (states, targets, grad)]
        of_entropy = [None] * len(chunks[0]) if entropy_grad is None else entropy_grad.split(ctx.size)
        pieces = []
        for some, chosen, grads, entropy_grads, within in zip(*chunks, of_entropy, ctx.supports, strict=True):
            some = some.detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast(), head_gradient_in_place(ctx.head):
                logits = ctx.logits_of(some)
            if entropy_grads is None and kernel.fits(logits):
                *_, by_kernel = kernel.logprobs_of(logits.detach()[0], chosen, ctx.temperature, within, grads)
                assert by_kernel is not None
                logits.backward(by_kernel[None])
                pieces.append(some.grad)
                continue
            slope = _scaled(logits.detach()[0], ctx.temperature, within)
            slope -= slope.amax(1, keepdim=True)
            bonus = None if entropy_grads is None else _entropy_slope(slope, entropy_grads / ctx.temperature)
            slope.exp_()
            slope = _logprob_slope_(slope, slope.sum(1), chosen, grads / ctx.temperature)
            if bonus is not None:
                slope += bonus
            logits.backward(slope[None].to(logits.dtype))
            pieces.append(some.grad)
        return torch.cat(pieces), *[None] * 7


def _logprob_slope_(weights: Tensor, total: Tensor, chosen: Tensor, grads: Tensor) -> Tensor:
    """Gradient of logprobs with respect to logits, `onehot - softmax`, times `grads`; written over `weights`.

    Args:
        weights: `[c, V]`, what the softmax is the share of in their sum.
        total: `[c]`, that sum.
        chosen: `[c]` tokens.
        grads: `[c]`.
    """
    weights *= (-grads / total)[:, None]
    return weights.scatter_add_(1, chosen[:, None], grads[:, None])


def _entropy_slope(logits: Tensor, grads: Tensor) -> Tensor:
    """Gradient of entropies `H = -sum p log p` with respect to logits: `-p (log p + H)`, times `grads`.

    Args:
        logits: `[c, V]`.
        grads: `[c]`.
    """
    logp = logits.log_softmax(1)
    p = logp.exp()
    logp.masked_fill_(p == 0, 0)  # p log p is 0 there, and not 0 times minus infinity
    entropy = -(p * logp).sum(1, keepdim=True)
    return p.mul_(logp.add_(entropy)).mul_(-grads[:, None])


def _scaled(logits: Tensor, temperature: float, support: Support | None) -> Tensor:
    """A copy in fp32 or wider, divided by the temperature; minus infinity outside of the support."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).div_(temperature)
    return scaled if support is None else scaled.masked_fill_(support.barred(scaled.shape[1]), -torch.inf)


def _with_states(output: Any, states: Tensor) -> Any:
    """A backbone's output with other last hidden states."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**(dict(output) | {"last_hidden_state": states}))


def completion_values(model: nn.Module, batch: Rectangle) -> Tensor:
    """Value of the state in which each completion token was chosen: the head on every such position.

    On a CPU the gradient of the input embedding is added to its `.grad` by `backward()`; `torch.autograd.grad` does not
    see it.

    Args:
        model: a sequence classifier with one label, PEFT or plain.
        batch: the samples.

    Returns:
        `[C]`, fp32.
    """
    return _head_outputs(model, batch)


def sample_scores(model: nn.Module, samples: list[Tensor]) -> Tensor:
    """Score of each sample, equal to the checkpoint's own forward on that sample's unpadded ids.

    A classifier of transformers scores the last token that is not its `config.pad_token_id`: for a checkpoint whose
    pad token is its EOS token that is the token *before* EOS, and its head was trained there, so we read it there.

    Args:
        model: a sequence classifier with one label.
        samples: token ids of each sample, `[len_i]`.

    Returns:
        `[n]`, fp32.
    """
    device = samples[0].device
    pad = model.config.get_text_config().pad_token_id
    columns = []
    for sample in samples:
        real = torch.ones_like(sample, dtype=torch.bool) if pad is None else sample != pad
        at = real.nonzero()
        columns.append(int(at[-1]) if len(at) else 0)
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=0)
    lens, ends = (torch.tensor(each, device=device) for each in ([len(s) for s in samples], columns))
    return _head_outputs(model, Padded(ids, lens, torch.arange(len(samples), device=device), ends))


def without_peft(model: Any) -> Any:
    """The transformers model below PEFT's wrapper, or the model itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def score_head(model: nn.Module) -> nn.Linear:
    """The linear layer that turns a hidden state into the one number, the trained copy under PEFT.

    Raises:
        FourscoreError: the model has none under the name `score`.
    """
    owner = without_peft(model)
    head = getattr(owner, "score", None)
    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[active[0]] if active else head.original_module
    if not isinstance(head, nn.Linear):
        raise FourscoreError(
            f"{type(owner).__name__} has no linear head named 'score': use a checkpoint that "
            "AutoModelForSequenceClassification loads with such a head (Llama, Qwen, Gemma, GPT-2, GPT-NeoX, ...)."
        )
    return head


def _linear_in_fp32(head: nn.Linear, states: Tensor) -> Tensor:
    """A linear layer in fp32 or wider, whatever autocast says; `[..., outputs]`."""
    wide = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        return F.linear(states.to(wide), head.weight.to(wide), None if head.bias is None else head.bias.to(wide))


def _head_outputs(model: nn.Module, batch: Padded) -> Tensor:
    """The score head's output at the batch's places, in fp32 whatever autocast says; `[C]`."""
    found: list[Tensor] = []

    def in_fp32(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found.append(_linear_in_fp32(module, args[0]))
        return found[0]

    def hand_over(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        output.logits = found[0][fed.rows, fed.columns, 0]
        return output

    base = without_peft(model)
    # FSDP2 gathers weights for the backward of what modules return, so results leave that way; and it lets go of them
    # in hooks of its own, so ours run before those.
    widened = score_head(model).register_forward_hook(in_fp32, prepend=True)
    returned = base.register_forward_hook(hand_over, prepend=True)
    with (
        _hook(widened),
        _hook(returned),
        _pools_anything(model),
        fast_products(model),
        fused(model),
        embedding_gradient_in_place(model),
        _fed(model, batch) as (fed, inputs),
    ):
        return model(**inputs, use_cache=False).logits


@contextmanager
def _hook(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _pools_anything(model: nn.Module) -> Iterator[None]:
    """Without a pad id transformers refuses to pool a batch; its pooled result is not used here, so any id serves."""
    config: Any = model.config.get_text_config()
    before = config.pad_token_id
    if before is None:
        config.pad_token_id = 0
    try:
        yield
    finally:
        config.pad_token_id = before

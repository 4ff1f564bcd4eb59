"""What torch makes of many operations, and fourscore's kernels of one, on this CPU: `python benchmarks/fused.py`.

In fp32, with all threads, on layers of a model's shape; the two in turns, but for steps of decoding, where one comes
after the other; medians in milliseconds. First of a pass of so many tokens, forward and with gradients: what
`src/fourscore/models/fused.py` is for. Then of logits: logprobs and their gradients (`chosen.py`), and a token drawn
for each row (`src/fourscore/rollout/sampling.py`). Then a step of decoding, a layer: by the kernels of `few_rows.py`,
`one_token.py` and `fused.py`, and by that of `layer_of_one_token.py`.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from checkpoints import SHAPES
from products import BEYOND_CACHES, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from fourscore.models import chosen, forward, fused, kernels
from fourscore.models.layer_of_one_token import layers_of_one_token
from fourscore.models.one_token import attention_of_one_token
from fourscore.models.packed import packed
from fourscore.rollout.decode import Rows
from fourscore.rollout.sampling import Sampling, draw
from fourscore.runs.memory import keep_freed_memory

ROTATED = modeling_llama.apply_rotary_pos_emb


def in_turn(table: Table, of: str, count: int, systems: list[Callable[[], Any]]) -> None:
    """Add a row."""
    table.add_row(of, str(count), *(f"{1e3 * taken:.2f}" for taken in seconds(systems)))


def of_passes(policy: Any, tokens: list[int]) -> Table:
    """Milliseconds of the operations of a layer."""
    table = Table("of a layer", "tokens", "forward: torch", "kernel", "with gradients: torch", "kernel")
    config, norm = policy.config, policy.model.norm
    heads, kept, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    with fused.fused(policy):
        normed, rotated = norm.forward, modeling_llama.apply_rotary_pos_emb
    for count in tokens:
        x, gate, up = (torch.randn(1, count, n) for n in (config.hidden_size, *[config.intermediate_size] * 2))
        q, k = (torch.randn(1, count, n, size).transpose(1, 2) for n in (heads, kept))
        angles = policy.model.rotary_emb(x, torch.arange(count)[None])
        rotates = [lambda q, k, rotate=rotate, angles=angles: rotate(q, k, *angles) for rotate in (ROTATED, rotated)]
        operations: dict[str, tuple[list[Tensor], list[Callable[..., Any]]]] = {
            "RMS norm": ([x], [norm.forward, normed]),
            "rotary positions": ([q, k], rotates),
            "SwiGLU": ([gate, up], [lambda gate, up: F.silu(gate) * up, fused._SwiGLU.apply]),
        }
        for name, (inputs, ways) in operations.items():
            torch.testing.assert_close(*(way(*inputs) for way in ways))
            forwards = [partial(without_gradients, way, inputs) for way in ways]
            both = [partial(with_gradients, way, [i.requires_grad_() for i in inputs]) for way in ways]
            in_turn(table, name, count, [*forwards, *both])
    return table


@torch.no_grad()
def without_gradients(way: Callable[..., Any], inputs: list[Tensor]) -> None:
    """A forward pass."""
    way(*inputs)


def with_gradients(way: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Forward and backward, from gradients of one."""
    outputs = way(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])


def of_logits(vocabulary: int) -> Table:
    """Milliseconds of what is done with logits that are there: their head has few inputs here."""
    table = Table("of logits", "rows", "torch", "kernel")
    head, rows = torch.randn(8, vocabulary), forward.CHUNK_BYTES // (4 * vocabulary)
    states, targets = torch.randn(rows, 8).requires_grad_(), torch.randint(0, vocabulary, (rows,))

    def logprobs(by_kernel: bool) -> None:
        with nullcontext() if by_kernel else patch.object(chosen, "fits", lambda *args: False):
            forward._ChunkedLogprobs.apply(states, targets, None, 1.0, rows, lambda s: (s @ head)[None], None, True)

    def tokens(by_kernel: bool) -> None:
        with nullcontext() if by_kernel else patch.object(kernels, "are_there", lambda: False):
            draw(scores, Sampling(1, 1.0, (), None, 16))

    scores = torch.randn(16, vocabulary)
    in_turn(table, "logprobs, with gradients", rows, [partial(logprobs, False), partial(logprobs, True)])
    in_turn(table, "tokens drawn", 16, [partial(tokens, False), partial(tokens, True)])
    return table


@torch.no_grad()
def of_steps(policy: Any, counts: list[int], lengths: list[int]) -> Table:
    """Milliseconds of a step of decoding, by the number of layers."""
    table = Table("rows", "tokens", "kernels", "one kernel")
    layers = len(policy.model.layers)
    for count in counts:
        for length in lengths:
            prompts = [[5 + row % 50] * max(1, length - row) for row in range(count)]
            taken = []
            with attention_of_one_token(policy):
                for whole in (False, True):
                    rows = Rows(policy, count, length + 64)
                    rows.read(policy, prompts)
                    with layers_of_one_token(policy) if whole else nullcontext():
                        taken += seconds([partial(rows.step, policy, torch.full((count,), 5))])
            table.add_row(str(count), str(length), *(f"{1e3 * second / layers:.2f}" for second in taken))
    return table


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 1024], help="of a pass")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16], help="of a step")
    parser.add_argument("--lengths", nargs="+", type=int, default=[60, 400], help="tokens of a row before a step")
    options = parser.parse_args()
    if not kernels.are_there():
        raise SystemExit("no kernels to compare")
    keep_freed_memory(BEYOND_CACHES)  # as a run does
    shape = SHAPES[options.model]
    # So many layers that their weights come from memory, and as good as no head.
    policy = LlamaForCausalLM(LlamaConfig(**(shape | {"num_hidden_layers": 8, "vocab_size": 64}))).eval()
    policy.requires_grad_(False)
    console = Console()
    console.print(f"{options.model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    console.print(of_passes(policy, options.tokens))
    console.print(of_logits(shape["vocab_size"]))
    console.print("A step of decoding, milliseconds a layer")
    with packed(policy), fused.fused(policy):
        console.print(of_steps(policy, options.rows, options.lengths))


if __name__ == "__main__":
    main()

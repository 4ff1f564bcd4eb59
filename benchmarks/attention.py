"""Attention by torch and by fourscore's kernels on this CPU: `python benchmarks/attention.py`.

In fp32, with all threads, samples and rows of lengths from half of the tokens on; the two in turns, medians. First
within the samples of a pass, for which torch has them in rectangles, forward and with gradients, in milliseconds a
layer: what `src/fourscore/models/within_samples.py` goes by. Then of one new token a row, as in decoding, in
microseconds a layer: what `src/fourscore/models/one_token.py` goes by.
"""

import argparse
from contextlib import nullcontext
from unittest.mock import patch

import torch
from checkpoints import SHAPES
from products import BEYOND_CACHES, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourscore.models import one_token, openblas, unpadded, within_samples
from fourscore.models.forward import microbatches
from fourscore.models.one_token import seen_from
from fourscore.models.unpadded import Layout
from fourscore.runs.memory import keep_freed_memory


def of_samples(layer: nn.Module, heads: int, kept: int, size: int, samples: list[int], tokens: list[int]) -> Table:
    """Milliseconds of a layer's attention within samples that stand back to back."""
    table = Table("samples", "tokens", "forward: torch", "kernel", "with gradients: torch", "kernel")
    attention = ALL_ATTENTION_FUNCTIONS[unpadded._NAME]
    for n in samples:
        for longest in tokens:
            lens = torch.linspace(longest // 2, longest, n).long() if n > 1 else torch.tensor([longest])
            whole = int(lens.sum())
            states = [torch.randn(1, whole, h, size).transpose(1, 2).requires_grad_() for h in (heads, kept, kept)]
            back = torch.randn(1, whole, heads, size)
            layout = unpadded._layout.set(Layout.of(lens, microbatches(lens, n)))

            def attend(by_kernel: bool, states: list[Tensor] = states) -> Tensor:
                # The same way to torch's attention as where there is no kernel.
                with nullcontext() if by_kernel else patch.object(within_samples, "fits", lambda *args: False):
                    return attention(layer, *states, None)[0]

            def forward(by_kernel: bool, attend=attend) -> None:
                with torch.no_grad():
                    attend(by_kernel)

            def both(by_kernel: bool, attend=attend, states=states, back=back) -> None:
                torch.autograd.grad(attend(by_kernel), states, back)

            torch.testing.assert_close(attend(True), attend(False), rtol=1e-4, atol=1e-4)
            taken = [second for f in (forward, both) for second in seconds([lambda f=f: f(False), lambda f=f: f(True)])]
            table.add_row(str(n), str(longest), *(f"{1e3 * second:.2f}" for second in taken))
            unpadded._layout.reset(layout)
    return table


@torch.no_grad()
def of_one_token(layer: nn.Module, heads: int, kept: int, size: int, counts: list[int], lengths: list[int]) -> Table:
    """Microseconds of a layer's attention of one new token a row."""
    table = Table("rows", "tokens", "torch", "kernel")
    for rows in counts:
        for tokens in lengths:
            query = torch.randn(rows, heads, 1, size)
            key, value = (torch.randn(rows, kept, tokens + 64, size)[:, :, :tokens] for _ in range(2))
            begins = torch.linspace(0, tokens // 2, rows).long()
            mask = (torch.arange(tokens) >= begins[:, None])[:, None, None]
            with seen_from(begins):
                systems = [
                    lambda f=ALL_ATTENTION_FUNCTIONS[name], q=query, k=key, v=value, m=mask: f(layer, q, k, v, m)[0]
                    for name in ("sdpa", one_token._NAME)
                ]
                torch.testing.assert_close(systems[0](), systems[1]())
                table.add_row(str(rows), str(tokens), *(f"{1e6 * taken:.0f}" for taken in seconds(systems)))
    return table


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[60, 400, 1000], help="of the longest sample or row")
    options = parser.parse_args()
    if not openblas.is_there():
        raise SystemExit("no kernels to compare")
    keep_freed_memory(BEYOND_CACHES)  # as a run does
    shape = SHAPES[options.model]
    heads, kept = shape["num_attention_heads"], shape["num_key_value_heads"]
    layer = nn.Module().eval()
    layer.num_key_value_groups, layer.is_causal = heads // kept, True
    sizes = heads, kept, shape["hidden_size"] // heads
    console = Console()
    console.print(f"{options.model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    console.print("Within samples, milliseconds")
    console.print(of_samples(layer, *sizes, options.samples, options.tokens))
    console.print("Of one new token, microseconds")
    console.print(of_one_token(layer, *sizes, options.rows, options.tokens))


if __name__ == "__main__":
    main()

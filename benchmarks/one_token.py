"""Attention of one new token a row by torch and by fourscore's kernel on this CPU: `python benchmarks/one_token.py`.

In fp32, with all threads, each row of another length from half of the tokens on; microseconds a layer, the two in
turns, medians. It is what `src/fourscore/models/one_token.py` goes by.
"""

import argparse

import torch
from checkpoints import SHAPES
from products import seconds
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fourscore.models import kernels
from fourscore.models.one_token import _NAME, seen_from


@torch.no_grad()
def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", nargs="+", type=int, default=[60, 400, 1000], help="of the longest row")
    options = parser.parse_args()
    if kernels.library() is None:
        raise SystemExit("no kernel to compare")
    shape = SHAPES[options.model]
    heads, kept = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape["hidden_size"] // heads
    layer = nn.Module().eval()
    layer.num_key_value_groups, layer.is_causal = heads // kept, True
    table = Table("rows", "tokens", "torch", "kernel")
    for rows in options.rows:
        for tokens in options.tokens:
            query = torch.randn(rows, heads, 1, size)
            key, value = (torch.randn(rows, kept, tokens + 64, size)[:, :, :tokens] for _ in range(2))
            begins = torch.linspace(0, tokens // 2, rows).long()
            mask = (torch.arange(tokens) >= begins[:, None])[:, None, None]
            with seen_from(begins):
                systems = [
                    lambda f=ALL_ATTENTION_FUNCTIONS[name], q=query, k=key, v=value, m=mask: f(layer, q, k, v, m)[0]
                    for name in ("sdpa", _NAME)
                ]
                torch.testing.assert_close(systems[0](), systems[1]())
                table.add_row(str(rows), str(tokens), *(f"{1e6 * taken:.0f}" for taken in seconds(systems)))
    console = Console()
    console.print(f"{options.model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    console.print(table)


if __name__ == "__main__":
    main()

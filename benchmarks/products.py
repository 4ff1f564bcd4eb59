"""Products of a model's linear layers by MKL and by oneDNN on this CPU: `python benchmarks/products.py`.

In fp32, with all threads: a layer's output, and the gradients of its input and of its weights, in GFLOP/s. The two take
turns; medians. It is what `src/fourscore/models/onednn.py` goes by.

Then outputs of few rows, as decoding has them, in GB of weights a second, which come from memory and not from a cache:
by MKL, by oneDNN with weights in blocks, and by `src/fourscore/models/few_rows.py`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from checkpoints import SHAPES
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fourscore.models import few_rows, kernels
from fourscore.models.onednn import product

ROUNDS = 15
BEYOND_CACHES = 2**27
"""Bytes of weights."""


def seconds(systems: list[Callable[[], Tensor]]) -> list[float]:
    """Of each, in turn."""
    taken: list[list[float]] = [[] for _ in systems]
    for turn in range(ROUNDS + 2):
        for system, times in zip(systems, taken, strict=True):
            start = time.perf_counter()
            system()
            if turn > 1:  # the first ones warm up
                times.append(time.perf_counter() - start)
    return [median(times) for times in taken]


def by_few_rows(layers: dict[str, tuple[int, int]], counts: list[int]) -> Table:
    """GB of weights a second for each layer and number of rows."""
    table = Table("", "inputs", "outputs", "rows", "GB/s", "GFLOP/s")
    multiplies = kernels.library() is not None  # also on processors for which it is not taken
    for name, (inputs, outputs) in layers.items():
        weights = torch.randn(max(2, BEYOND_CACHES // (4 * inputs * outputs)), outputs, inputs).unbind()
        blocks = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
        for rows in counts:
            x = torch.randn(rows, inputs)

            def all_of(weights: Sequence[Tensor], multiply: Callable[..., Tensor], x: Tensor = x) -> Tensor:
                return [multiply(x, weight, None) for weight in weights][-1]

            systems = [partial(all_of, weights, F.linear), partial(all_of, blocks, product)]
            if multiplies:
                systems.append(partial(all_of, weights, few_rows.product))
            rates = [4e-9 * inputs * outputs * len(weights) / taken for taken in seconds(systems)]
            cells = (
                " ".join(f"{scale * rate:.{digits}f}" for rate in rates) for scale, digits in ((1, 1), (rows / 2, 0))
            )
            table.add_row(name, str(inputs), str(outputs), str(rows), *cells)
    return table


@torch.no_grad()
def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256, 960], help="tokens of a pass")
    parser.add_argument("--few_rows", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="rows of a step")
    options = parser.parse_args()
    shape = SHAPES[options.model]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    layers = {"query": (width, width), "up": (width, inner), "down": (inner, width)}
    layers["output layer"] = (width, shape["vocab_size"])
    table = Table("", "inputs", "outputs", "rows", "output", "input's gradient", "weights' gradient")
    for name, (inputs, outputs) in layers.items():
        for rows in options.rows:
            x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
            pairs: list[list[Callable[[], Tensor]]] = [
                [lambda x=x, w=weight: F.linear(x, w), lambda x=x, w=weight: product(x, w, None)],
                [lambda g=grad, w=weight: g @ w, lambda g=grad, w=weight: product(g, w.t(), None)],
                [lambda g=grad, x=x: g.t() @ x, lambda g=grad, x=x: product(g.t(), x.t(), None)],
            ]
            rates = [[2 * rows * inputs * outputs / s / 1e9 for s in seconds(pair)] for pair in pairs]
            cells = (f"{mkl:.0f} {onednn:.0f}" for mkl, onednn in rates)
            table.add_row(name, str(inputs), str(outputs), str(rows), *cells)
    console = Console()
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(f"{torch.get_num_threads()} threads, {capability}, GFLOP/s by MKL and by oneDNN")
    console.print(table)
    console.print("Few rows: by MKL, by oneDNN with weights in blocks, by fourscore's kernel")
    console.print(by_few_rows(layers, options.few_rows))


if __name__ == "__main__":
    main()

"""Products of a model's linear layers by MKL, oneDNN and OpenBLAS on this CPU: `python benchmarks/products.py`.

In fp32, with all threads: a layer's output, and the gradients of its input and of its weights, in GFLOP/s, with weights
that come from memory and not from a cache, as in a pass. They take turns; medians. It is what
`src/fourscore/models/products.py` goes by. OpenBLAS is left out where there is no compiler, or no package of it.

Then outputs of few rows, as decoding has them, in GB of weights a second: by MKL, by oneDNN with weights in blocks, and
by `src/fourscore/models/few_rows.py`.
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

from fourscore.models import few_rows, kernels, onednn, openblas, products
from fourscore.runs.memory import keep_freed_memory

ROUNDS = 15
BEYOND_CACHES = 2**27
"""Bytes of weights."""


def seconds(systems: list[Callable[[], None]]) -> list[float]:
    """Of each, in turn."""
    taken: list[list[float]] = [[] for _ in systems]
    for turn in range(ROUNDS + 2):
        for system, times in zip(systems, taken, strict=True):
            start = time.perf_counter()
            system()
            if turn > 1:  # the first ones warm up
                times.append(time.perf_counter() - start)
    return [median(times) for times in taken]


def beyond_caches(inputs: int, outputs: int) -> Sequence[Tensor]:
    """Weights of a layer, so many that none is in a cache when its turn comes again."""
    return torch.randn(max(2, BEYOND_CACHES // (4 * inputs * outputs)), outputs, inputs).unbind()


def all_of(weights: Sequence[Tensor], multiply: Callable[..., Tensor], x: Tensor) -> None:
    """Multiply x with each."""
    for weight in weights:
        multiply(x, weight, None)


def many_rows(layers: dict[str, tuple[int, int]], counts: list[int]) -> Table:
    """GFLOP/s for each layer and number of rows."""
    table = Table("", "inputs", "outputs", "rows", "output", "input's gradient", "weights' gradient")
    libraries = [products.ONEDNN] + [products.OPENBLAS] * openblas.is_there()
    for name, (inputs, outputs) in layers.items():
        weights = beyond_caches(inputs, outputs)
        for rows in counts:
            x, grad = torch.randn(rows, inputs), torch.randn(rows, outputs)
            systems: list[list[Callable[[], None]]] = [
                [partial(all_of, weights, f, x) for f in [F.linear, *(each.outputs for each in libraries)]],
                [
                    partial(all_of, weights, lambda g, w, _, f=f: f(g, w), grad)
                    for f in [torch.mm, *(each.of_inputs for each in libraries)]
                ],
                [
                    partial(all_of, weights, lambda g, w, _, f=f, x=x: f(g, x), grad)
                    for f in [lambda g, x: g.t() @ x, *(each.of_weights for each in libraries[1:])]
                ],
            ]
            done = 2 * rows * inputs * outputs * len(weights) / 1e9
            cells = (" ".join(f"{done / taken:.0f}" for taken in seconds(each)) for each in systems)
            table.add_row(name, str(inputs), str(outputs), str(rows), *cells)
    return table


def by_few_rows(layers: dict[str, tuple[int, int]], counts: list[int]) -> Table:
    """GB of weights a second for each layer and number of rows."""
    table = Table("", "inputs", "outputs", "rows", "GB/s", "GFLOP/s")
    multiplies = kernels.library() is not None  # also on processors for which it is not taken
    for name, (inputs, outputs) in layers.items():
        weights = beyond_caches(inputs, outputs)
        blocks = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
        for rows in counts:
            x = torch.randn(rows, inputs)
            systems = [partial(all_of, weights, F.linear, x), partial(all_of, blocks, onednn.product, x)]
            if multiplies:
                systems.append(partial(all_of, weights, few_rows.product, x))
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
    keep_freed_memory(BEYOND_CACHES)  # as a run does; otherwise the system zeroes pages for each product
    console = Console()
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(f"{torch.get_num_threads()} threads, {capability}, GFLOP/s by MKL, oneDNN and OpenBLAS")
    console.print("(the weights' gradient by MKL and OpenBLAS)")
    console.print(many_rows(layers, options.rows))
    console.print("Few rows: by MKL, by oneDNN with weights in blocks, by fourscore's kernel")
    console.print(by_few_rows(layers, options.few_rows))


if __name__ == "__main__":
    main()

"""Products of a model's linear layers by MKL and by oneDNN on this CPU: `python benchmarks/products.py`.

In fp32, with all threads: a layer's output, and the gradients of its input and of its weights, in GFLOP/s. The two take
turns; medians. It is what `src/fourscore/models/onednn.py` goes by.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from checkpoints import SHAPES
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fourscore.models.onednn import product

ROUNDS = 15


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


@torch.no_grad()
def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256, 960], help="tokens of a pass")
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


if __name__ == "__main__":
    main()

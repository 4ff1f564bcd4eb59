"""What this machine can do: multiply matrices, and read memory. `python benchmarks/limits.py` measures and prints it.

Both are the best of several shapes and of several rounds, with all threads, and on a CPU of every library that makes
products here, MKL, oneDNN and OpenBLAS: what is measured against them is never flattered by a bad limit.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fourscore.models import onednn, openblas

# Rows, inner dimension, columns. Square ones, and such as a model of some width has for a batch.
PRODUCTS = {
    "cpu": ((2048, 2048, 2048), (3072, 3072, 3072), (4096, 576, 1536), (4096, 1536, 576)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 14336), (16384, 14336, 4096)),
}
ROUNDS = 5
READ_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Far above any last-level cache."""


@dataclass(frozen=True)
class Limits:
    """Of a machine.

    Attributes:
        flops: floating-point operations a second in matrix products, an addition and a multiplication each counted.
        bandwidth: bytes a second that are read from memory.
    """

    flops: float
    bandwidth: float

    def best(self, other: "Limits") -> "Limits":
        """The higher ones."""
        return Limits(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth))

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s in matrix products, {self.bandwidth / 1e9:.1f} GB/s read from memory"


@torch.no_grad()
def measure(device: str, dtype: torch.dtype) -> Limits:
    """Take the time of large matrix products in that dtype, and of reading large tensors."""
    flops = []
    for rows, inner, columns in PRODUCTS[device]:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        products: list[Callable[[], object]] = [lambda a=left, b=right, c=out: torch.mm(a, b, out=c)]
        if device == "cpu" and dtype == torch.float32:
            if onednn.has_products():
                products.append(lambda a=left, b=right: onednn.product(a, b.t(), None))
            if openblas.is_there():
                products.append(lambda a=left, b=right: openblas.product(a, b))
        flops += [2 * rows * inner * columns / _seconds(each, device) for each in products]
    # A sum reads all and writes nothing; a matrix on a vector is what decoding one row does.
    numbers = torch.ones(READ_BYTES[device] // 4, device=device)
    matrix, vector = numbers.view(-1, 4096), torch.ones(4096, device=device)
    seconds = [_seconds(numbers.sum, device), _seconds(lambda: matrix @ vector, device)]
    return Limits(max(flops), numbers.numel() * 4 / min(seconds))


def _seconds(work: Callable[[], object], device: str) -> float:
    """The least of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads: {measure(options.device, getattr(torch, options.dtype))}")


if __name__ == "__main__":
    main()

"""What 16-bit numbers cost on this CPU: the figures in the warning about `--dtype`. `python benchmarks/emulated.py`.

A linear layer 1024 wide on 256 states, one thread; medians of seconds, in turn with float32.
"""

import time
from statistics import median

import torch
from torch import nn

ROUNDS = 5


def seconds(dtype: torch.dtype) -> tuple[float, float]:
    """Of a forward pass, and of forward and backward."""
    layer = nn.Linear(1024, 1024, dtype=dtype)
    states = torch.randn(256, 1024, dtype=dtype, requires_grad=True)
    start = time.perf_counter()
    out = layer(states)
    forward = time.perf_counter() - start
    out.sum().backward()
    return forward, time.perf_counter() - start


def main() -> None:
    """Measure, print."""
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    runs = {dtype: [] for dtype in dtypes}
    for dtype in dtypes:
        seconds(dtype)
    for _ in range(ROUNDS):
        for dtype in dtypes:
            runs[dtype].append(seconds(dtype))
    plain = [median(column) for column in zip(*runs[torch.float32], strict=True)]
    for dtype in dtypes[1:]:
        forward, both = (median(column) for column in zip(*runs[dtype], strict=True))
        print(f"{dtype}: forward {forward / plain[0]:.1f} times float32, with backward {both / plain[1]:.1f} times")


if __name__ == "__main__":
    main()

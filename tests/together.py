"""Several 'processes' in one: threads that put their tensors together at a barrier, as an all-reduce does."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Together:
    """A group of `size` threads; `sum` blocks until each of them has given its tensor."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: dict[int, Any] = {}
        self.ranks = threading.local()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all threads, on each of them."""
        return torch.stack(self.all(x)).sum(0)

    def all(self, x: Any) -> list[Any]:
        """What all threads have given, on each of them."""
        self.given[self.ranks.rank] = x
        self.barrier.wait()
        given = [self.given[rank] for rank in range(self.size)]
        self.barrier.wait()
        return given

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """The results of `work(rank)`, run at the same time on each rank."""

        def one(rank: int) -> Any:
            self.ranks.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))

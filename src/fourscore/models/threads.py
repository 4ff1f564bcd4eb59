"""Copies of many tensors in a few threads."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_MOST = 4


def map_in_threads(function: Callable[..., T], *items: Iterable[Any]) -> list[T]:
    """`list(map(function, *items))`, several at a time; for functions that copy tensors.

    One copy after the other is each split over all cores by torch, and waits for the slowest of them: where other
    processes want the cores, too, that took six times as long as whole tensors in threads of their own.
    """
    with ThreadPoolExecutor(min(_MOST, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, *items))

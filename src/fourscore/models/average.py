"""A moving average of what trains in a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """`a <- a + (1 - decay) (p - a)` for every parameter that trains, starting at the parameters.

    It lies where the parameters lie: a copy on each process, under FSDP2 a shard of it.

    Args:
        model: whose parameters; an adapter's under PEFT.
        decay: between 0 and 1; the average reaches back over about `1 / (1 - decay)` calls of `update`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._pairs = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        for parameter, average in self._pairs:
            average.add_(parameter - average, alpha=1 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the parameters as they are now."""
        for parameter, average in self._pairs:
            average.copy_(parameter)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In this context the model has the averages for its parameters, to be saved, loaded or tried."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """One parameter at a time, and in place: optimizers and other roles hold the parameters, too."""
        for parameter, average in self._pairs:
            before = parameter.clone()
            parameter.copy_(average)
            average.copy_(before)

"""Steps of decoding on a GPU as CUDA graphs: what starts a step's kernels one by one takes longer than they do.

A graph repeats its kernels on the same memory. So keys and values stay in their place from one rollout to the next,
where a row begins and which column comes next are numbers on the GPU, and a step attends to all columns, of which a
mask hides some. One graph is for as many rows as it was recorded with; with fewer of them the rest are nobody's.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fourscore.models.forward import without_peft
from fourscore.models.pass_graphs import first_line, on_current_gpu, recorded_in, recording, trains_little
from fourscore.models.unpadded import FAMILIES
from fourscore.rollout.decode import Rows

logger = logging.getLogger(__name__)

_GRANULE = 64
"""Columns are a multiple, or each longer prompt than any before would need graphs of its own."""


class StepGraphs:
    """The graphs of one policy, recorded when they are first needed."""

    def __init__(self) -> None:
        self._rows: FixedRows | None = None
        self._weights: tuple[int, ...] = ()
        self._fails = False

    def rows(self, policy: nn.Module, rows: int, capacity: int) -> Rows:
        """Empty rows: those of the last rollout, where there are as many and they are long enough.

        Args:
            policy: a causal LM for which `can_decode` holds.
            rows: most rows.
            capacity: most tokens of a row.
        """
        if self._fails or not can_record(policy):
            self.close()
            return Rows(policy, rows, capacity)
        weights = tuple(p.data_ptr() for p in policy.parameters())
        held = self._rows
        if held is None or held.rows < rows or held.capacity < capacity or weights != self._weights:
            most = max(rows, held.rows if held else 0), max(capacity, held.capacity if held else 0)
            self.close()  # before there are others
            self._rows = held = FixedRows(policy, *most, record=self._record)
            self._weights = weights
        held.clear()
        return held

    def close(self) -> None:
        """Let go of graphs, keys and values."""
        if self._rows is not None:
            self._rows.free()
        self._rows = None

    def _record(self, rows: "FixedRows", policy: nn.Module, size: int) -> "Step | None":
        if self._fails:
            return None
        try:
            return _recorded(rows, policy, size)
        except RuntimeError as error:
            self._fails = True
            logger.warning("steps of decoding are not made CUDA graphs, which is slower: %s", first_line(error))
            return None


Step = tuple["torch.cuda.CUDAGraph", Tensor]
"""A graph, and the logits `[rows, vocabulary]` that it writes."""
Record = Callable[["FixedRows", nn.Module, int], Step | None]


def can_record(policy: nn.Module) -> bool:
    """Whether steps of a policy may become graphs, and that is worth it.

    All of it is on this process's GPU, and its attention takes a mask as given. Where all of it trains under autocast,
    a graph would cast all weights in every step, where they are otherwise cast once.
    """
    config: Any = without_peft(policy).config.get_text_config()
    fits = config.model_type in FAMILIES and config._attn_implementation == "sdpa" and on_current_gpu(policy)
    return fits and (trains_little(policy) or not torch.is_autocast_enabled("cuda"))


class FixedRows(Rows):
    """Rows whose steps take nothing from this process but the next tokens."""

    def __init__(self, policy: nn.Module, rows: int, capacity: int, record: "Record | None" = None) -> None:
        """Nothing is in it yet.

        Args:
            policy: the model.
            rows: most rows.
            capacity: most tokens of a row; it is rounded up.
            record: makes a `Step` of these rows, the policy and a number of rows, or None; without it nothing is
                recorded.
        """
        super().__init__(policy, rows, -(-capacity // _GRANULE) * _GRANULE)
        device = next(policy.parameters()).device
        self._record = record
        self._steps: dict[int, Step | None] = {}
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._begins = torch.zeros(rows, dtype=torch.long, device=device)
        self._next = torch.zeros(1, dtype=torch.long, device=device)
        self._columns = torch.arange(self.capacity, device=device)
        self._uploaded: list[int] = []

    def clear(self) -> None:
        """Nothing is in it any more; what is left of keys and values the mask hides."""
        self.begins, self.filled = [], 0

    def free(self) -> None:
        """Let go of graphs, keys and values at once: rows and layers refer to each other."""
        self._steps.clear()
        self._layers.clear()
        self._named.clear()

    def step(self, policy: nn.Module, tokens: Tensor) -> Tensor:
        """Logits after one more token a row, `[rows, vocabulary]` fp32; the next step writes over them."""
        if self.filled == self.capacity:
            self._move_to_front()
        count = len(tokens)
        size = min(1 << (count - 1).bit_length(), self.rows)
        if self.begins != self._uploaded:
            self._begins.zero_()
            self._begins[:count] = torch.tensor(self.begins, device=tokens.device)
            self._uploaded = list(self.begins)
        self._next.fill_(self.filled)
        self._tokens.zero_()
        if size not in self._steps:
            # With zeros for tokens: a step that runs to be recorded is no one's.
            self._steps[size] = self._record(self, policy, size) if self._record is not None else None
        self._tokens[:count] = tokens
        if (step := self._steps[size]) is None:
            logits = self.forward(policy, size)
        else:
            graph, logits = step
            graph.replay()
        self.filled += 1
        return logits[:count]

    def forward(self, policy: nn.Module, size: int) -> Tensor:
        """What a graph repeats: a step of so many rows, `[size, vocabulary]` fp32."""
        begins = self._begins[:size, None]
        seen = (self._columns >= begins) & (self._columns <= self._next)
        return self._logits(policy, self._tokens[:size, None], seen[:, None, None], self._next - begins)

    def put(self, states: Tensor, new: Tensor) -> Tensor:
        """Put those of a step into the `states` of a layer; returns all columns."""
        seen = states[: len(new)]
        return seen.index_copy_(2, self._next, new)


def _recorded(rows: FixedRows, policy: nn.Module, size: int) -> Step:
    with recording() as warm_up:
        with warm_up():
            rows.forward(policy, size)
        graph = torch.cuda.CUDAGraph()
        with recorded_in(graph):
            logits = rows.forward(policy, size)
    return graph, logits

"""What the time of one update goes into, by phase: a trace to open, and the costliest operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

COSTLIEST = 10
"""Operations shown of each phase."""


class Profile:
    """Watches the phases of one update.

    Attributes:
        folder: where `<phase>.json.gz` is written, for Perfetto (ui.perfetto.dev) or chrome://tracing.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """`device` is where the roles are: on an accelerator its time is what counts."""
        self.folder = folder
        self._on_device = device.type != "cpu"
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch what happens in this context, then write its trace and print a table."""
        with profile(activities=self._activities) as found:
            yield
            if self._on_device:
                torch.accelerator.synchronize()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json.gz"
        found.export_chrome_trace(str(path))
        _show(name, path, found, "self_device_time_total" if self._on_device else "self_cpu_time_total")


def _show(name: str, path: Path, found: profile, cost: str) -> None:
    """Prints a table; times are of the operations themselves, without what they call."""
    rows = sorted(found.key_averages(), key=lambda row: getattr(row, cost), reverse=True)
    whole = sum(getattr(row, cost) for row in rows) or 1
    table = Table("operation", "ms", "share", "calls", title=f"{name}: costliest operations ({path})")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[:COSTLIEST]:
        spent = getattr(row, cost)
        table.add_row(row.key[:60], f"{spent / 1000:,.1f}", f"{spent / whole:.1%}", f"{row.count:,}")
    # print, not the console, writes: rich's own output would go straight into a live progress line.
    console = Console()
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="")

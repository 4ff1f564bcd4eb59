"""Samples as people read them."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_samples(rows: list[dict[str, Any]], title: str) -> None:
    """Print a table of samples to standard output.

    Args:
        rows: `prompt`, `completion` and `score` of each.
        title: above the table.
    """
    table = Table("prompt", "completion", "score", title=title)
    for row in rows:
        # As plain texts: a completion such as "[/x]" is broken rich markup.
        table.add_row(Text(row["prompt"]), Text(row["completion"]), f"{row['score']:.3f}")
    # print, not the console, writes: rich's own output would go straight into a live progress line.
    console = Console()
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="")

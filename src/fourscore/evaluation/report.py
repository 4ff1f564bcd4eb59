"""A comparison as people and machines read it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourscore.evaluation.compare import JUDGE, SIDES, Comparison, Row, Side
from fourscore.evaluation.stats import Estimate, Interval

SCORE = "weighted sum"


def as_json(found: Comparison) -> dict[str, Any]:
    """The measures as plain values."""
    return {
        "prompts": len(found.prompts) // found.num_generations,
        "rewards": {name: _plain(row) for name, row in found.rewards.items()},
        "score": _plain(found.score),
        "judge": None if found.judge is None else _plain(found.judge),
        "kl": asdict(found.kl),
        "length": _plain(found.length),
        "ended": _plain(found.ended),
        **{f"distinct_{n}": dict(zip(SIDES, pair, strict=True)) for n, pair in found.distinct.items()},
    }


def sample_rows(found: Comparison) -> Iterator[dict[str, Any]]:
    """One object a pair of completions."""
    for i, prompt in enumerate(found.prompts):
        row: dict[str, Any] = {"prompt": prompt, "sample": i % found.num_generations}
        row |= {name: _sample(side, i) for name, side in found.sides.items()}
        row["policy"]["kl"] = found.sides["policy"].log_ratios[i]
        if found.verdicts is not None:
            row["judge_prefers_policy"] = found.verdicts[i]
        yield row


def print_comparison(console: Console, found: Comparison, title: str, notes: Iterable[str], samples: int) -> None:
    """Samples side by side, then the measures; at most 100 columns.

    Args:
        console: to print on.
        found: the comparison.
        title: of the table of measures.
        notes: sentences below it.
        samples: how many pairs to show.
    """
    if samples:
        console.print(_samples_table(found, samples))
    console.print(_measures_table(found, title))
    for note in notes:
        console.print(Text(note))


def _samples_table(found: Comparison, samples: int) -> Table:
    table = Table(show_lines=True)
    table.add_column("prompt", ratio=3)
    for name in SIDES:
        table.add_column(name, ratio=4)
    # The first completion of each prompt.
    for i in range(0, len(found.prompts), found.num_generations)[:samples]:
        # As plain texts: a completion such as "[/x]" is broken rich markup.
        cells = [Text(found.prompts[i])]
        for name in SIDES:
            side = found.sides[name]
            score = "" if math.isnan(side.totals[i]) else f"  [{side.totals[i]:+.2f}]"
            cells.append(Text(f"{side.completions[i].strip()}{score}"))
        table.add_row(*cells)
    return table


def _measures_table(found: Comparison, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for column in (*SIDES, "policy - reference", "policy wins, %"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = dict(found.rewards)
    if len(rows) > 1:
        rows[SCORE] = found.score
    if found.judge is not None:
        rows[JUDGE] = found.judge
    for name, row in rows.items():
        table.add_row(Text(name), *_cells(row), _rate(row.win_rate))
    table.add_section()
    table.add_row("KL, nats", *_cells(Row(policy=found.kl)), "")
    table.add_row("length, tokens", *_cells(found.length), "")
    table.add_row("ended by itself", *_cells(found.ended), "")
    for n, pair in found.distinct.items():
        table.add_row(f"distinct-{n}", *(f"{share:.3f}" for share in pair), f"{pair[1] - pair[0]:+.3f}", "")
    return table


def _cells(row: Row) -> tuple[str, str, str]:
    """Reference, policy and difference, to the first digit of the smaller standard error, the second if that is a 1.

    At most three decimals, so that names have room.
    """
    errors = [e.standard_error for e in (row.reference, row.policy) if e is not None and e.standard_error > 0]
    decimals = min(3, max(0, -math.floor(math.log10(min(errors) / 2)))) if errors else 2

    def shown(value: float, sign: str = "") -> str:
        return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # + 0.0: no minus before a zero

    def mean(found: Estimate | None) -> str:
        if found is None or math.isnan(found.mean):
            return ""
        return shown(found.mean) + ("" if math.isnan(found.standard_error) else f" ± {shown(found.standard_error)}")

    difference = row.difference
    if difference is None or math.isnan(difference.value):
        return mean(row.reference), mean(row.policy), ""
    bounds = ""
    if not math.isnan(difference.low):
        bounds = f" [{shown(difference.low, '+')}, {shown(difference.high, '+')}]"
    return mean(row.reference), mean(row.policy), shown(difference.value, "+") + bounds


def _rate(found: Interval | None) -> str:
    if found is None or math.isnan(found.value):
        return ""
    return f"{100 * found.value:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def _sample(side: Side, i: int) -> dict[str, Any]:
    return {
        "completion": side.completions[i],
        "completion_length": int(side.lengths[i]),
        "ended": bool(side.ended[i]),
        "score": side.totals[i],
        "scores": {name: scores[i] for name, scores in side.scores.items()},
    }


def _plain(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if value is not None}

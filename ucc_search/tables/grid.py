"""A table before it is known where it will be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "-"


@dataclass(frozen=True)
class Grid:
    """A table before it is known where it will be shown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text: tuple[str, ...] = ()  # columns aligned to the left; numbers go to the right
    note: str = ""


def show(console: Console, grid: Grid) -> None:
    """A ruled table on a terminal; aligned plain text where the output is piped."""
    if not console.is_terminal:
        print_line(console, f"\n{grid.title}\n{plain_text(grid)}")
    else:
        table = Table(title=Text(grid.title), title_justify="left")
        for name in grid.columns:
            table.add_column(Text(name), justify="left" if name in grid.text else "right")
        for row in grid.rows:
            table.add_row(*map(Text, row))  # Text: a component's name is not markup
        console.print()
        console.print(table)
    if grid.note:
        print_line(console, grid.note)


def plain_text(grid: Grid) -> str:
    """Columns two spaces apart, one line a row, never wrapped."""
    lines = [grid.columns, *grid.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(grid.columns))]
    aligns: list[Callable[[str, int], str]] = [
        str.ljust if c in grid.text else str.rjust for c in grid.columns
    ]

    def joined(line: Sequence[str]) -> str:
        cells = (align(cell, width) for cell, width, align in zip(line, widths, aligns, strict=True))
        return "  ".join(cells).rstrip()

    return "\n".join(map(joined, lines))


def print_line(console: Console, text: str) -> None:
    console.out(text, highlight=False)

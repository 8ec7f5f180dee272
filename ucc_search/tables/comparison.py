"""Two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ucc_search.comparison import BudgetPair, MethodPair, RunComparison
from ucc_search.tables.grid import MISSING, Grid, print_line, show
from ucc_search.tables.wording import JSON_FORMAT, UNITS, hundredths


def print_comparison(found: RunComparison, console: Console) -> None:
    """Two runs side by side: what differs between them first, then per budget and method."""
    print_line(console, f"A: {found.a}\nB: {found.b}\n{UNITS}")
    if found.differences:
        show(console, _differences_grid(found))
    if any(d.decisive for d in found.differences):
        print_line(console, "Data, model or teacher differ: the numbers below do not answer one question.")
    show(console, _pairs_grid(found.methods))
    show(console, _budgets_grid(found.budgets))


def comparison_json(found: RunComparison) -> dict[str, Any]:
    """The comparison as JSON-able values; keys are the fields of the dataclasses in `comparison`."""
    return {"format": JSON_FORMAT, **asdict(found)}


def _differences_grid(found: RunComparison) -> Grid:
    return Grid(
        title="What differs between the runs",
        columns=("key", "A", "B"),
        rows=[(d.key, _cut(d.a), _cut(d.b)) for d in found.differences],
        text=("key", "A", "B"),
    )


def _cut(text: str, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _pairs_grid(pairs: Sequence[MethodPair]) -> Grid:
    def number(value: float | None) -> str:
        return hundredths(value) if trained else number(value)

    trained = not pairs or pairs[0].rung == "train"
    measure = "accuracy" if trained else "kl"

    def row(p: MethodPair) -> tuple[str, ...]:
        sides = [
            text
            for side in ("a", "b")
            for text in (
                number(getattr(p, f"{measure}_{side}")),
                hundredths(getattr(p, f"test_accuracy_{side}")),
                MISSING if getattr(p, f"macs_{side}") is None else f"{getattr(p, f'macs_{side}') / 1e6:.2f}",
            )
        ]
        return (p.target, p.method, *sides, _signed(p.difference, p.margin, trained), p.verdict)

    name = "acc. %" if trained else "KL"
    unit = "points" if trained else "nats less"
    sides = [f"{side} {what}" for side in "AB" for what in (name, "test %", "MMACs")]
    return Grid(
        title="Methods at each budget (best of each by selection quality)",
        columns=("target", "method", *sides, f"B - A ({unit})", "B is"),
        rows=[row(p) for p in pairs],
        text=("target", "method", "B is"),
        note="± is the 95 % interval over seeds; without repeated seeds there is none, and nothing can be said.",
    )


def _signed(difference: float | None, margin: float | None, percent: bool) -> str:
    if difference is None:
        return MISSING
    scale, digits = (100, 2) if percent else (1, 4)
    spread = "" if margin is None else f" ± {scale * margin:.{digits}f}"
    return f"{scale * difference:+.{digits}f}{spread}"


def _budgets_grid(budgets: Sequence[BudgetPair]) -> Grid:
    def ratio(pair: BudgetPair) -> str:
        if not pair.hypervolume_a or not pair.hypervolume_b:
            return MISSING
        return f"{pair.hypervolume_b / pair.hypervolume_a:.2f}"

    return Grid(
        title="Budgets",
        columns=("target", "A trials", "B trials", "hypervolume B / A"),
        rows=[(p.target, str(p.trials_a), str(p.trials_b), ratio(p)) for p in budgets],
        text=("target",),
    )

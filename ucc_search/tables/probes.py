"""What each block can spare."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ucc_search.sensitivity import Probe
from ucc_search.tables.grid import MISSING, Grid, show
from ucc_search.tables.wording import hundredths, number


def print_probes(found: Sequence[Probe], console: Console) -> None:
    """Cuts of single blocks, the cheapest first within each kind."""
    kinds = list(dict.fromkeys(p.kind for p in found))
    ordered = sorted(found, key=lambda p: (kinds.index(p.kind), p.price, p.block))
    rows: list[tuple[str, ...]] = [
        (
            p.kind,
            str(p.block),
            MISSING if p.tokens is None else str(p.tokens),
            f"{100 * p.saved:.1f}",
            number(p.kl),
            hundredths(p.accuracy),
            MISSING if p.saved <= 0 else f"{p.price:.5f}",
        )
        for p in ordered
    ]
    grid = Grid(
        title="One block cut at a time, without training (the cheapest first)",
        columns=("what", "block", "tokens left", "MACs saved %", "KL", "accuracy %", "KL per % saved"),
        rows=rows,
        text=("what",),
        note="tokens: cut from this block on; attention, mlp, block: this part is gone. Effects of several cuts do not add up.",
    )
    show(console, grid)

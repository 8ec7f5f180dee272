"""A run on the terminal, as plain text through a pipe, and as JSON. Decides nothing: see `analysis`."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ucc_search import analysis
from ucc_search.analysis import Point
from ucc_search.runs import Run
from ucc_search.store import TrialRow
from ucc_search.units import format_macs, format_params

JSON_FORMAT = 1
MISSING = "-"
UNITS = "MACs are for one image; what papers on Vision Transformers print as GFLOPs are GMACs."


@dataclass(frozen=True)
class Grid:
    """A table before it is known where it will be shown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text: tuple[str, ...] = ()  # columns aligned to the left; numbers go to the right
    note: str = ""


def print_analysis(run: Run, console: Console) -> None:
    """Front, methods per budget, failures, agreement of the rungs, and what to do next."""
    rows = run.rows
    _line(console, _headline(run))
    front = analysis.pareto_front(rows)
    if front:
        show(console, _front_grid(rows, front))
        show(console, _comparison_grid(analysis.compare_methods(rows)))
    else:
        _line(console, "No usable trial yet.")
    failures = analysis.failures_by_class(rows)
    if failures:
        show(console, _failures_grid(rows, failures))
    correlation = _correlation_line(analysis.rank_correlation(rows))
    for line in filter(None, (correlation, _next_line(run, front))):
        _line(console, f"\n{line}")


def analysis_json(run: Run) -> dict[str, Any]:
    """The analysis as JSON-able values; what was not measured is null.

    Keys:
        format: 1; changes when a key changes its meaning or goes.
        run: `Run.summary()`: path, name, model, data, trials, ok, failed, infeasible, rungs (trials by
            rung), targets, seconds.
        rung, fidelity: of the front: train or zero-shot, and optimiser steps; null without a front.
        dense: the uncompressed model as a point, or null.
        front: points, cheapest first. A point has the fields of `analysis.Point`: id, trials, origin,
            method, target, rung, fidelity, seeds, plan_key, parent, macs, macs_ratio, params,
            accuracy, accuracy_std, test_accuracy, test_accuracy_std (0..1), kl, kl_std (nats),
            tokens, saved (share of the dense MACs by method), scorer, aggregator, cascade, distiller,
            importance.
        knee: id of the knee, or null.
        hypervolume: {reference: [macs, quality] or null, history: [[trial id, value], ...]}, in MACs
            times accuracy (train) or nats (zero-shot).
        comparison: points; the best of every method at every target.
        failures: {class: trials}.
        rank_correlation: {pairs, across, within: {method: value}, by_target: {target: value}}.
        next: a command, or null.
    """
    rows = run.rows
    front = analysis.pareto_front(rows)
    knee = analysis.knee(front)
    dense = analysis.dense_reference(rows, front[0].rung if front else None)
    return {
        "format": JSON_FORMAT,
        "run": run.summary(),
        "rung": front[0].rung if front else None,
        "fidelity": front[0].fidelity if front else None,
        "dense": _plain(dense) if dense else None,
        "front": [_plain(p) for p in front],
        "knee": knee.id if knee else None,
        "hypervolume": {
            "reference": _plain(analysis.hypervolume_reference(rows)),
            "history": _plain(analysis.hypervolume_history(rows)),
        },
        "comparison": [_plain(p) for p in analysis.compare_methods(rows)],
        "failures": analysis.failures_by_class(rows),
        "rank_correlation": asdict(analysis.rank_correlation(rows)),
        "next": _pick_command(run, front),
    }


def pick_message(run: Run, row: TrialRow) -> str:
    """One trial in words, and how to use it."""
    folder = run.path / "trials" / str(row.id)
    measured = [
        f"{name} {text}"
        for name, value, text in (
            ("accuracy", row.accuracy, _percent(row.accuracy)),
            ("test accuracy", row.test_accuracy, _percent(row.test_accuracy)),
            ("KL", row.kl, f"{_number(row.kl)} nats"),
        )
        if value is not None
    ]
    lines = [
        f"trial {row.id}: {row.method} at {row.target}, {row.rung}, seed {row.seed}",
        f"  {format_macs(row.macs)} ({100 * row.macs_ratio:.1f}% of dense), {format_params(row.params)}",
        f"  {', '.join(measured) or 'nothing measured'}",
        f"  tokens per block: {compact_tokens(row.tokens)}",
        f"  components: {_components(row)}",
        "",
        *_usage(str(folder), row.rung, (folder / "arch.json").is_file()),
    ]
    return "\n".join(lines)


def _usage(folder: str, rung: str, saved: bool) -> list[str]:
    if saved:
        return ["Use it in Python:", "  import ucc_search", f"  model = ucc_search.load_model({folder!r})"]
    why = (
        ", since it was measured without training; search.promote trains the best" if rung != "train" else ""
    )
    return [f"The plan is {folder}/plan.json; no weights were saved with it{why}."]


def compact_tokens(tokens: Sequence[int]) -> str:
    """Runs of equal numbers drawn together: `49x2 25 16x3`."""
    runs = ((n, len(list(group))) for n, group in itertools.groupby(tokens))
    return " ".join(str(n) if times == 1 else f"{n}x{times}" for n, times in runs)


def show(console: Console, grid: Grid) -> None:
    """A ruled table on a terminal; aligned plain text where the output is piped."""
    if not console.is_terminal:
        _line(console, f"\n{grid.title}\n{plain_text(grid)}")
    else:
        table = Table(title=Text(grid.title), title_justify="left")
        for name in grid.columns:
            table.add_column(Text(name), justify="left" if name in grid.text else "right")
        for row in grid.rows:
            table.add_row(*map(Text, row))  # Text: a component's name is not markup
        console.print()
        console.print(table)
    if grid.note:
        _line(console, grid.note)


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


def _line(console: Console, text: str) -> None:
    console.out(text, highlight=False)


def _headline(run: Run) -> str:
    about = run.summary()
    states = [f"{about['ok']} ok", f"{about['failed']} failed" if about["failed"] else ""]
    states.append(f"{about['infeasible']} over budget" if about["infeasible"] else "")
    trials = f"{about['trials']} trials ({', '.join(filter(None, states))})"
    return f"{about['name']}: {about['model']} on {about['data']}, {trials}\n{UNITS}"


def _front_grid(rows: Sequence[TrialRow], front: Sequence[Point]) -> Grid:
    rung, fidelity = front[0].rung, front[0].fidelity
    dense, knee = analysis.dense_reference(rows, rung), analysis.knee(front)
    unit, scale = _unit([*front, dense] if dense else front)
    shown = [_front_row(p, scale, p is knee) for p in front]
    notes = ["* knee: beyond it, accuracy costs more MACs than on average"] if knee else []
    if dense is not None and rung == "train":
        notes.append("dense is the teacher as it is, without these training steps")
    how = f"trained {fidelity} steps, by selection accuracy" if rung == "train" else "zero-shot, by KL"
    return Grid(
        title=f"Pareto front ({how})",
        columns=(
            *("id", "method", "target", unit, "% dense", "accuracy % (seeds)", "test %", "KL"),
            *("params", "saved %", "tokens per block", "components"),
        ),
        rows=[*shown, _front_row(dense, scale, False)] if dense else shown,
        text=("method", "target", "saved %", "tokens per block", "components"),
        note="; ".join(notes),
    )


def _front_row(point: Point, scale: float, is_knee: bool) -> tuple[str, ...]:
    dense = point.origin == "dense"
    return (
        f"{point.id}*" if is_knee else str(point.id),
        point.method,
        MISSING if dense else point.target,
        f"{point.macs / scale:.2f}",
        f"{100 * point.macs_ratio:.1f}",
        _accuracy(point),
        _hundredths(point.test_accuracy),
        _number(point.kl),
        format_params(point.params).removesuffix(" parameters"),
        _saved(point.saved),
        compact_tokens(point.tokens),
        MISSING if dense else _components(point),
    )


def _comparison_grid(points: Sequence[Point]) -> Grid:
    unit, scale = _unit(points)
    return Grid(
        title="Methods at each budget (best of each by selection quality)",
        columns=("target", "method", "seeds", "accuracy %", "test %", "KL", unit),
        rows=[
            (
                p.target,
                p.method,
                str(p.seeds),
                _mean_std(p.accuracy, p.accuracy_std),
                _mean_std(p.test_accuracy, p.test_accuracy_std),
                _number(p.kl),
                f"{p.macs / scale:.2f}",
            )
            for p in points
        ],
        text=("target", "method"),
    )


def _failures_grid(rows: Sequence[TrialRow], failures: dict[str, int]) -> Grid:
    def example(name: str) -> str:
        row = next(r for r in rows if r.state == "failed" and (r.failure or "error") == name)
        return f"trial {row.id}: {row.error or 'no message'}"

    return Grid(
        title="Failed trials",
        columns=("class", "trials", "for example"),
        rows=[(name, str(count), example(name)) for name, count in failures.items()],
        text=("class", "for example"),
    )


def _correlation_line(found: analysis.RankCorrelation) -> str:
    """Empty where too little was measured on both rungs."""
    if found.across is None:
        return ""
    within = [f"{m} {v:+.2f}" for m, v in found.within.items() if v is not None]
    targets = [f"{t} {v:+.2f}" for t, v in found.by_target.items() if v is not None]
    parts = [f"{found.across:+.2f} over all {found.pairs} pairs"]
    parts += [f"within {', '.join(within)}"] if within else []
    parts += [f"at {', '.join(targets)}"] if targets else []
    return f"Rank correlation of zero-shot KL with trained accuracy (1: same order): {'; '.join(parts)}"


def _next_line(run: Run, front: Sequence[Point]) -> str:
    command = _pick_command(run, front)
    if command:
        return f"Next: {command}"
    if any(r.state == "failed" for r in run.rows):
        return "Next: mend what the failed trials name, then start again with another --out"
    return "Next: raise search.trials and continue with --resume"


def _pick_command(run: Run, front: Sequence[Point]) -> str | None:
    """Picks the knee; without one, the front's best point."""
    if not front:
        return None
    macs = (analysis.knee(front) or front[-1]).macs
    return f"ucc-search pick {shlex.quote(str(run.path))} --max-gmacs {_gmacs(macs)}"


def _gmacs(macs: int) -> str:
    """Three significant digits, rounded up: the point itself must fit."""
    digits = max(0, 2 - math.floor(math.log10(macs / 1e9)))
    return f"{math.ceil(macs / 1e9 * 10**digits) / 10**digits:.{digits}f}"


def _unit(points: Sequence[Point]) -> tuple[str, float]:
    """One unit for a whole column."""
    return ("GMACs", 1e9) if max(p.macs for p in points) >= 10**9 else ("MMACs", 1e6)


def _accuracy(point: Point) -> str:
    return f"{_mean_std(point.accuracy, point.accuracy_std)} ({point.seeds})"


def _mean_std(mean: float | None, std: float | None) -> str:
    return _hundredths(mean) + (f" ± {100 * std:.2f}" if std is not None else "")


def _hundredths(rate: float | None) -> str:
    return MISSING if rate is None else f"{100 * rate:.2f}"


def _percent(rate: float | None) -> str:
    return f"{_hundredths(rate)}%"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def _components(item: Point | TrialRow) -> str:
    names = (item.scorer, item.aggregator, item.cascade, item.distiller, item.importance)
    return "/".join(filter(None, names))


def _saved(shares: Mapping[str, float]) -> str:
    """What each method took of the dense MACs, the largest first."""
    largest = sorted(shares.items(), key=lambda s: -s[1])
    return ", ".join(f"{name} {100 * share:.0f}" for name, share in largest) or MISSING


def _plain(value: Any) -> Any:
    """Tuples as lists, a point as a mapping: as JSON would give it back."""
    if isinstance(value, Point):
        return {k: _plain(v) for k, v in asdict(value).items()}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value

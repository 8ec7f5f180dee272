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
from ucc_search.comparison import BudgetPair, MethodPair, RunComparison
from ucc_search.influence import (
    Importance,
    Sensitivity,
    block_importances,
    block_sensitivity,
    parameter_importances,
)
from ucc_search.runs import Run
from ucc_search.sensitivity import Probe
from ucc_search.spread import Standing, standings, statements
from ucc_search.store import TrialRow
from ucc_search.units import format_macs, format_params

JSON_FORMAT = 1
MISSING = "-"
_BEHIND = (
    "behind: points behind the best of the budget, ± the 95 % interval over seeds (their noise is pooled within the "
    "budget); =: not told apart; ?: one seed each, not known"
)
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
        standing = standings(rows)
        show(console, _front_grid(rows, front))
        show(console, _comparison_grid(analysis.compare_methods(rows), standing))
        for line in statements(standing):
            _line(console, line)
        importances = parameter_importances(rows)
        if importances:
            show(console, _influence_grid(importances, block_sensitivity(rows)))
    else:
        _line(console, "No usable trial yet.")
    failures = analysis.failures_by_class(rows)
    if failures:
        show(console, _failures_grid(rows, failures))
    correlation = "\n".join(filter(None, map(_correlation_line, analysis.rank_correlations(rows))))
    progress = "\n".join(filter(None, (_progress_line(rows, rung) for rung in analysis.RUNGS)))
    for line in filter(None, (progress, correlation, _late_line(rows), _next_line(run, front))):
        _line(console, f"\n{line}")


def analysis_json(run: Run) -> dict[str, Any]:
    """The analysis as JSON-able values; what was not measured is null.

    Keys:
        format: 1; changes when a key changes its meaning or goes.
        run: `Run.summary()`: path, name, model, data, trials, ok, stopped, failed, infeasible, rungs (trials by
            rung), targets, seconds.
        rung, fidelity: of the front: train or zero-shot, and optimiser steps; null without a front.
        dense: the uncompressed model as a point, or null.
        front: points, cheapest first. A point has the fields of `analysis.Point`: id, trials, origin,
            method, target, rung, fidelity, seeds, plan_key, parent, macs, macs_ratio, params,
            latency_ms, latency_ms_predicted (of a batch, or null),
            accuracy, accuracy_std, test_accuracy, test_accuracy_std (0..1), kl, kl_std (nats),
            tokens, saved (share of the dense MACs by method), scorer, aggregator, cascade, distiller,
            importance.
        knee: id of the knee, or null.
        hypervolume: {reference: [macs, quality] or null, history: [[trial id, value], ...]}, in MACs
            times accuracy (train) or nats (zero-shot).
        comparison: points; the best of every method at every target.
        standings: the same methods beside the best of their target; fields of `spread.Standing`.
        importances, blocks, sensitivity: what moved the quality; fields of `influence.Importance`,
            `influence.BlockImportance` and `influence.Sensitivity`.
        failures: {class: trials}.
        rank_correlation: {pairs, across, within: {method: value}, by_target: {target: value}, cheap, dear}, of
            zero-shot KL with trained accuracy.
        rank_correlations: the same for each pair of rungs.
        next: a command, or null.
    """
    rows = run.rows
    front = analysis.pareto_front(rows)
    knee = analysis.knee(front)
    dense = analysis.dense_reference(rows, front[0].rung if front else None)
    importances = parameter_importances(rows)
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
        "standings": [asdict(s) for s in standings(rows)],
        "importances": [asdict(i) for i in importances],
        "blocks": [asdict(b) for b in block_importances(importances)],
        "sensitivity": [asdict(s) for s in block_sensitivity(rows)],
        "failures": analysis.failures_by_class(rows),
        "rank_correlation": asdict(analysis.rank_correlation(rows)),
        "rank_correlations": [asdict(found) for found in analysis.rank_correlations(rows)],
        "next": _pick_command(run, front),
    }


def print_comparison(found: RunComparison, console: Console) -> None:
    """Two runs side by side: what differs between them first, then per budget and method."""
    _line(console, f"A: {found.a}\nB: {found.b}\n{UNITS}")
    if found.differences:
        show(console, _differences_grid(found))
    if any(d.decisive for d in found.differences):
        _line(console, "Data, model or teacher differ: the numbers below do not answer one question.")
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
        return _hundredths(value) if trained else _number(value)

    trained = not pairs or pairs[0].rung == "train"
    measure = "accuracy" if trained else "kl"

    def row(p: MethodPair) -> tuple[str, ...]:
        sides = [
            text
            for side in ("a", "b")
            for text in (
                number(getattr(p, f"{measure}_{side}")),
                _hundredths(getattr(p, f"test_accuracy_{side}")),
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
            _number(p.kl),
            _hundredths(p.accuracy),
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
    if row.latency_ms_predicted is not None:
        measured.append(f"latency {_latency(row)} ms, as measured (by table)")
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
    words = {"stopped": "stopped at a rung", "failed": "failed", "infeasible": "over budget"}
    states = [f"{about['ok']} ok", *(f"{about[k]} {word}" for k, word in words.items() if about[k])]
    trials = f"{about['trials']} trials ({', '.join(states)})"
    return f"{about['name']}: {about['model']} on {about['data']}, {trials}\n{UNITS}"


def _front_grid(rows: Sequence[TrialRow], front: Sequence[Point]) -> Grid:
    rung, fidelity = front[0].rung, front[0].fidelity
    dense, knee = analysis.dense_reference(rows, rung), analysis.knee(front)
    unit, scale = _unit([*front, dense] if dense else front)
    timed = any(p.latency_ms_predicted is not None for p in front)
    shown = [_front_row(p, scale, p is knee, timed) for p in front]
    notes = ["* knee: beyond it, accuracy costs more MACs than on average"] if knee else []
    if dense is not None and rung == "train":
        notes.append("dense is the teacher as it is, without these training steps")
    how = f"trained {fidelity} steps, by selection accuracy" if rung == "train" else "zero-shot, by KL"
    return Grid(
        title=f"Pareto front ({how})",
        columns=(
            *("id", "method", "target", unit, "% dense", "accuracy % (seeds)", "test %", "KL"),
            *(["ms (by table)"] if timed else []),
            *("params", "saved %", "tokens per block", "components"),
        ),
        rows=[*shown, _front_row(dense, scale, False, timed)] if dense else shown,
        text=("method", "target", "saved %", "tokens per block", "components"),
        note="; ".join(notes),
    )


def _front_row(point: Point, scale: float, is_knee: bool, timed: bool) -> tuple[str, ...]:
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
        *([_latency(point)] if timed else []),
        format_params(point.params).removesuffix(" parameters"),
        _saved(point.saved),
        compact_tokens(point.tokens),
        MISSING if dense else _components(point),
    )


def _latency(value: Point | TrialRow) -> str:
    """Milliseconds as measured, and by the table."""
    measured, predicted = value.latency_ms, value.latency_ms_predicted
    by_table = MISSING if predicted is None else f"{predicted:.3g}"
    return f"{MISSING if measured is None else f'{measured:.3g}'} ({by_table})"


def _late_line(rows: Sequence[TrialRow]) -> str:
    """Finished models that took clearly longer than their limit when they were timed; empty if none did."""
    timed = [
        (r.latency_ms / r.limit_latency_ms, r)
        for r in rows
        if r.latency_ms is not None and r.limit_latency_ms is not None
    ]
    late = [share for share, _ in timed if share > 1.05]
    if not late:
        return ""
    _, worst = max(timed, key=lambda pair: pair[0])
    return (
        f"Latency: {len(late)} of {len(timed)} finished models took over 5 % more than their limit, most of all trial "
        f"{worst.id} ({worst.latency_ms:.3g} of {worst.limit_latency_ms:.3g} ms); beside other trials such timings "
        "are noisy: ucc-search bench times one alone"
    )


def _comparison_grid(points: Sequence[Point], standing: Sequence[Standing]) -> Grid:
    unit, scale = _unit(points)
    beside = {s.id: _behind(s) for s in standing}
    return Grid(
        title="Methods at each budget (best of each by selection quality)",
        columns=("target", "method", "seeds", "accuracy %", "behind", "test %", "KL", unit),
        rows=[
            (
                p.target,
                p.method,
                str(p.seeds),
                _mean_std(p.accuracy, p.accuracy_std),
                beside.get(p.id, MISSING),
                _mean_std(p.test_accuracy, p.test_accuracy_std),
                _number(p.kl),
                f"{p.macs / scale:.2f}",
            )
            for p in points
        ],
        text=("target", "method"),
        note=_BEHIND if standing else "",
    )


def _behind(standing: Standing) -> str:
    """Points behind the best of the budget; = where the two cannot be told apart, ? where nothing was repeated."""
    if standing.verdict == "best":
        return "best"
    mark = {"not told apart": " =", "unknown": " ?"}.get(standing.verdict, "")
    spread = "" if standing.margin is None else f" ± {100 * standing.margin:.2f}"
    return f"{100 * standing.behind:.2f}{spread}{mark}"


def _influence_grid(importances: Sequence[Importance], sensitivity: Sequence[Sensitivity]) -> Grid:
    """The parameters with the largest importance at each budget, and which way they went."""
    ratios = {(s.target, s.kind, s.block): s for s in sensitivity}
    rows: list[tuple[str, ...]] = []
    for target in dict.fromkeys(i.target for i in importances):
        for one in [i for i in importances if i.target == target][:5]:
            ratio = ratios.get((target, one.kind, one.block)) if one.block is not None else None
            shown = (
                (_two(ratio.correlation), f"{ratio.best:.2f}", f"{ratio.rest:.2f}")
                if ratio is not None
                else (MISSING,) * 3
            )
            rows.append((target, one.parameter, f"{100 * one.importance:.0f}", *shown, str(one.trials)))
    return Grid(
        title="What the search found to matter (functional ANOVA, first five of each budget)",
        columns=("target", "parameter", "importance %", "rank corr.", "best quarter", "others", "trials"),
        rows=rows,
        text=("target", "parameter"),
        note="rank corr. is of ratio and quality: above 0, keeping more there went with better. With few trials, "
        "importances a few points apart are noise.",
    )


def _two(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}"


def _progress_line(rows: Sequence[TrialRow], rung: str) -> str:
    """Hypervolume at some trials as a share of the last; empty for a handful of trials."""
    history = analysis.hypervolume_history(rows, rung)
    if len(history) < 5 or not history[-1][1]:
        return ""
    count = len(history)
    shown = sorted({max(1, round(count * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
    parts = [f"{100 * history[n - 1][1] / history[-1][1]:.1f}% after {n}" for n in shown]
    return f"Hypervolume over the {rung} trials (share of the last): {', '.join(parts)}"


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
    rungs = f"{_measured_by(found.cheap)} with {_measured_by(found.dear)}"
    return f"Rank correlation of {rungs} (1: same order): {'; '.join(parts)}"


def _measured_by(rung: str) -> str:
    if rung == "zero-shot":
        return "zero-shot KL"
    return rung.replace("train", "trained accuracy", 1).replace(" to step", " at step")


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
    return f"ucc-search pick {shlex.quote(str(run.path))} --max-gmacs {gmacs_limit(macs)}"


def gmacs_limit(macs: int) -> str:
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

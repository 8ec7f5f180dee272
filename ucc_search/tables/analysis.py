"""One run: front, methods, influence, failures, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ucc_search import analysis
from ucc_search.analysis import Point
from ucc_search.budget import LATENCY
from ucc_search.influence import (
    Importance,
    Sensitivity,
    block_importances,
    block_sensitivity,
    parameter_importances,
)
from ucc_search.runs import Run
from ucc_search.spread import Standing, standings, statements
from ucc_search.store import TrialRow
from ucc_search.tables.grid import MISSING, Grid, print_line, show
from ucc_search.tables.wording import (
    JSON_FORMAT,
    UNITS,
    accuracy_of,
    compact_tokens,
    component_names,
    gmacs_limit,
    hundredths,
    mean_and_std,
    milliseconds,
    number,
    plain_values,
    rounded_up,
)
from ucc_search.units import format_params

_BEHIND = (
    "behind: points behind the best of the budget, ± the 95 % interval over seeds (their noise is pooled within the "
    "budget); =: not told apart; ?: one seed each, not known"
)

_OVER = "! slower than its limit when it was timed; the search holds the limit by the table"


def print_analysis(run: Run, console: Console) -> None:
    """Front, methods per budget, failures, agreement of the rungs, and what to do next."""
    rows = run.rows
    print_line(console, _headline(run))
    front = analysis.pareto_front(rows)
    if front:
        standing = standings(rows)
        show(console, _front_grid(rows, front))
        show(console, _comparison_grid(analysis.compare_methods(rows), standing))
        for line in statements(standing):
            print_line(console, line)
        importances = parameter_importances(rows)
        if importances:
            show(console, _influence_grid(importances, block_sensitivity(rows)))
    else:
        print_line(console, "No usable trial yet.")
    failures = analysis.failures_by_class(rows)
    if failures:
        show(console, _failures_grid(rows, failures))
    correlation = "\n".join(filter(None, map(_correlation_line, analysis.rank_correlations(rows))))
    progress = "\n".join(filter(None, (_progress_line(rows, rung) for rung in analysis.RUNGS)))
    for line in filter(None, (progress, correlation, _late_line(rows), _next_line(run, front))):
        print_line(console, f"\n{line}")


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
            latency_ms, latency_ms_predicted (of a batch, or null), latency_over (its limit, as a share; or null),
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
        "dense": plain_values(dense) if dense else None,
        "front": [plain_values(p) for p in front],
        "knee": knee.id if knee else None,
        "hypervolume": {
            "reference": plain_values(analysis.hypervolume_reference(rows)),
            "history": plain_values(analysis.hypervolume_history(rows)),
        },
        "comparison": [plain_values(p) for p in analysis.compare_methods(rows)],
        "standings": [asdict(s) for s in standings(rows)],
        "importances": [asdict(i) for i in importances],
        "blocks": [asdict(b) for b in block_importances(importances)],
        "sensitivity": [asdict(s) for s in block_sensitivity(rows)],
        "failures": analysis.failures_by_class(rows),
        "rank_correlation": asdict(analysis.rank_correlation(rows)),
        "rank_correlations": [asdict(found) for found in analysis.rank_correlations(rows)],
        "next": _pick_command(run, front),
    }


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
    if any((p.latency_over or 0.0) > 0 for p in front):
        notes.append(_OVER)
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
        accuracy_of(point),
        hundredths(point.test_accuracy),
        number(point.kl),
        *([milliseconds(point)] if timed else []),
        format_params(point.params).removesuffix(" parameters"),
        _saved(point.saved),
        compact_tokens(point.tokens),
        MISSING if dense else component_names(point),
    )


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
    timed = any(p.latency_ms_predicted is not None for p in points)
    beside = {s.id: _behind(s) for s in standing}
    return Grid(
        title="Methods at each budget (best of each by selection quality)",
        columns=("target", "method", "seeds", "accuracy %", "behind", "test %", "KL", unit)
        + (("ms (by table)",) if timed else ()),
        rows=[
            (
                p.target,
                p.method,
                str(p.seeds),
                mean_and_std(p.accuracy, p.accuracy_std),
                beside.get(p.id, MISSING),
                mean_and_std(p.test_accuracy, p.test_accuracy_std),
                number(p.kl),
                f"{p.macs / scale:.2f}",
                *([milliseconds(p)] if timed else []),
            )
            for p in points
        ],
        text=("target", "method"),
        note="; ".join(
            [_BEHIND] * bool(standing) + [_OVER] * any((p.latency_over or 0.0) > 0 for p in points)
        ),
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
    """Picks the knee, or else the front's best point, under a limit of the kind that the run had."""
    if not front:
        return None
    point = analysis.knee(front) or front[-1]
    limit = f"--max-gmacs {gmacs_limit(point.macs)}"
    if point.latency_ms is not None and point.target.startswith(LATENCY):
        limit = f"--max-latency-ms {rounded_up(point.latency_ms)}"
    return f"ucc-search pick {shlex.quote(str(run.path))} {limit}"


def _unit(points: Sequence[Point]) -> tuple[str, float]:
    """One unit for a whole column."""
    return ("GMACs", 1e9) if max(p.macs for p in points) >= 10**9 else ("MMACs", 1e6)


def _saved(shares: Mapping[str, float]) -> str:
    """What each method took of the dense MACs, the largest first."""
    largest = sorted(shares.items(), key=lambda s: -s[1])
    return ", ".join(f"{name} {100 * share:.0f}" for name, share in largest) or MISSING

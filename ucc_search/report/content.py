"""What the report says, gathered from a run: plain values for the template, no HTML but the charts.

Everything comes from the rows, the configuration and the environment; a section whose data a run does
not have is empty, and the template leaves it out or says why.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ucc_search import analysis
from ucc_search.analysis import Point
from ucc_search.influence import block_sensitivity, parameter_importances, searched_trials
from ucc_search.plan import CompressionPlan
from ucc_search.report import charts
from ucc_search.report.svg import responsive
from ucc_search.runs import Run
from ucc_search.spread import Standing, standings, statements
from ucc_search.store import ENVIRONMENT, TrialRow
from ucc_search.tables import compact_tokens
from ucc_search.units import format_macs, format_params

MISSING = "–"
_METRICS = {"macs": "MACs", "flops": "FLOPs", "params": "parameters", "latency_ms": "latency in ms"}


def content(run: Run) -> dict[str, Any]:
    """The template's variables; see `assets/report/report.html.j2`."""
    rows = _dearest_first(run.rows)
    front = analysis.pareto_front(rows)
    rung = front[0].rung if front else None
    points = analysis.measured(rows, rung)
    standing = standings(rows)
    knee = analysis.knee(front)
    dense = analysis.dense_reference(rows, rung)
    plans = {p.id: plan_of(run, p.id) for p in [*front, *(_leaders(points) if points else [])]}
    return {
        "run": run.summary(),
        "targets": list(dict.fromkeys(r.target for r in rows if r.origin != "dense")),
        "unit": charts.unit_of([*points, dense] if dense else points)[0] if points else "MACs",
        "rung": rung,
        "fidelity": front[0].fidelity if front else None,
        "hours": sum(r.seconds for r in rows) / 3600,
        "findings": findings(front, knee, dense, standing),
        "front": _front(points, front, knee, dense),
        "models": [_model(run, p, plans.get(p.id), knee) for p in _to_take(front, points)],
        "methods": _methods(rows, standing, dense),
        "space": _space(run),
        "influence": _influence(rows),
        "progress": _progress(rows, run.rows),
        "correlation": asdict(analysis.rank_correlation(rows)),
        "failures": [asdict(f) for f in analysis.failure_classes(rows)],
        "environment": _environment(run),
        "command": _environment(run).get("command"),
        "folder": shlex.quote(str(run.path)),
        "details": json.dumps({str(p.id): _detail(run, p) for p in [*points, *([dense] if dense else [])]}),
    }


def _dearest_first(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Budgets from the largest to the smallest, the order within each kept."""
    most: dict[str, float] = {}
    for row in rows:
        most[row.target] = max(most.get(row.target, 0), row.limit_macs or row.limit_latency_ms or 0)
    return sorted(rows, key=lambda r: -most[r.target])


def in_words(text: str) -> str:
    """Budgets as a reader knows them: `macs=50%` becomes `MACs ≤ 50%`."""
    return re.sub(rf"\b({'|'.join(_METRICS)})=", lambda m: f"{_METRICS[m[1]]} ≤ ", text)


def findings(
    front: Sequence[Point], knee: Point | None, dense: Point | None, standing: Sequence[Standing]
) -> list[str]:
    """The run in a few sentences, for somebody who reads nothing else."""
    if not front:
        return ["No trial was usable: nothing finished within its budget."]
    said = []
    for name, point in (("the knee of the front", knee), ("the best model found", front[-1])):
        if point is not None and not (name.startswith("the best") and knee is front[-1]):
            said.append(f"{name[0].upper()}{name[1:]} is {_in_words(point, dense)}.")
    return [*said, *statements(standing)]


def _in_words(point: Point, dense: Point | None) -> str:
    share = f"trial {point.id} ({point.method}), with {100 * point.macs_ratio:.1f} % of the MACs"
    if point.accuracy is None:
        return share
    text = f"{share} and {percent(point.accuracy)} % selection accuracy"
    if point.test_accuracy is not None:
        text += f", {percent(point.test_accuracy)} % on the test split"
        if dense is not None and dense.test_accuracy is not None:
            text += f" (uncompressed: {percent(dense.test_accuracy)} %)"
    return text


def percent(rate: float | None, std: float | None = None) -> str:
    """In hundredths of a percent, as the printed tables have it."""
    if rate is None:
        return MISSING
    return f"{100 * rate:.2f}" + (f" ± {100 * std:.2f}" if std is not None else "")


def _leaders(points: Sequence[Point]) -> list[Point]:
    """The best point of every budget, whatever its method."""
    targets = dict.fromkeys(p.target for p in points)
    return [max((p for p in points if p.target == t), key=analysis.quality) for t in targets]


def _to_take(front: Sequence[Point], points: Sequence[Point]) -> list[Point]:
    """The front, and the best of each budget that is not on it: what somebody may want to use."""
    ids = {p.id for p in front}
    more = [p for p in _leaders(points) if p.id not in ids] if points else []
    return sorted([*front, *more], key=lambda p: (p.macs, p.id))


def _front(
    points: Sequence[Point], front: Sequence[Point], knee: Point | None, dense: Point | None
) -> dict[str, Any] | None:
    if not front:
        return None
    scale = charts.unit_of([*points, dense] if dense else points)[1]
    return {
        "chart": responsive(lambda width: charts.front_chart(points, front, knee, dense, width)),
        "origins": sorted({p.origin for p in points}),
        "rows": [_row(p, p is knee, scale) for p in front],
        "dense": _row(dense, False, scale) if dense else None,
    }


def _row(point: Point, is_knee: bool, scale: float = 1e6) -> dict[str, Any]:
    """A table row: what is shown, beside the exact values.

    Args:
        scale: MACs in the unit of the column.
    """
    return {
        **asdict(point),
        "is_knee": is_knee,
        "macs_text": format_macs(point.macs),
        "macs_short": f"{point.macs / scale:.2f}",
        "params_text": format_params(point.params).removesuffix(" parameters"),
        "accuracy_text": percent(point.accuracy, point.accuracy_std),
        "test_text": percent(point.test_accuracy, point.test_accuracy_std),
        "kl_text": MISSING if point.kl is None else f"{point.kl:.4f}",
        "latency_text": MISSING if point.latency_ms is None else f"{point.latency_ms:.2f}",
        "tokens_text": compact_tokens(point.tokens),
        "saved_text": ", ".join(f"{k} {100 * v:.0f} %" for k, v in point.saved.items()) or MISSING,
        "components": components_of(point),
    }


def components_of(point: Point) -> str:
    names = (point.scorer, point.aggregator, point.cascade, point.distiller, point.importance)
    return " / ".join(filter(None, names))


def plan_of(run: Run, trial: int) -> CompressionPlan | None:
    """None where the run folder was copied without its trials."""
    try:
        return CompressionPlan.from_json(
            (run.path / "trials" / str(trial) / "plan.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shares_of(
    plan: CompressionPlan,
) -> tuple[dict[str, list[float | None]], dict[str, list[str]]]:
    """What is left in each block, by kind, as shares of the dense model and as counts; constant kinds are left out."""
    full = plan.shape.blocks
    counts: dict[str, list[tuple[int | None, int]]] = {
        "tokens": [
            (b.tokens_out, plan.shape.tokens if not plan.shape.stages else b.tokens_out) for b in plan.blocks
        ],
        "attention": [
            (b.heads * b.v_dim if b.attention else None, f.heads * f.v_dim)
            for b, f in zip(plan.blocks, full, strict=True)
        ],
        "MLP": [
            (b.mlp_hidden if b.mlp else None, f.mlp_hidden) for b, f in zip(plan.blocks, full, strict=True)
        ],
    }
    if any(b.mlp_rank is not None for b in plan.blocks):
        counts["MLP rank"] = [
            (
                b.mlp_rank if b.mlp_rank is not None else min(b.mlp_hidden, plan.embed_dim),
                min(f.mlp_hidden, plan.shape.embed_dims[-1]),
            )
            for b, f in zip(plan.blocks, full, strict=True)
        ]
    changed = {k: v for k, v in counts.items() if any(left != of for left, of in v)}
    shares = {k: [None if left is None else left / of for left, of in v] for k, v in changed.items()}
    texts = {k: ["gone" if left is None else str(left) for left, _ in v] for k, v in changed.items()}
    return shares, texts


def _model(run: Run, point: Point, plan: CompressionPlan | None, knee: Point | None) -> dict[str, Any]:
    """One model that may be taken: numbers, what is left of it, and how to get it."""
    chart = None
    if plan is not None:
        shares, texts = shares_of(plan)
        if shares:
            chart = responsive(lambda width: charts.shares_chart(shares, texts, width))
    folder = run.path / "trials" / str(point.id)
    return {
        **_row(point, knee is not None and point.id == knee.id),
        "chart": chart,
        "saved_weights": (folder / "arch.json").is_file(),
        "folder": str(folder),
        "embed": f"{plan.embed_dim} of {plan.shape.embed_dims[-1]}"
        if plan and plan.embed_dims != plan.shape.embed_dims
        else None,
    }


def _detail(run: Run, point: Point) -> dict[str, Any]:
    """What is shown when a point of the front chart is hovered or focused."""
    plan = plan_of(run, point.id)
    shares, texts = shares_of(plan) if plan is not None else ({}, {})
    if not shares and plan is None and point.tokens:
        most = max(point.tokens)
        shares, texts = (
            {"tokens": [t / most for t in point.tokens]},
            {"tokens": [str(t) for t in point.tokens]},
        )
    row = _row(point, False)
    facts = {
        "method": point.method,
        "budget": in_words(point.target) or MISSING,
        "MACs": f"{row['macs_text']} ({100 * point.macs_ratio:.1f} %)",
        "parameters": row["params_text"],
        "selection accuracy": f"{row['accuracy_text']} %" if point.accuracy is not None else MISSING,
        "test accuracy": f"{row['test_text']} %" if point.test_accuracy is not None else MISSING,
        "KL": row["kl_text"],
        "latency, ms": row["latency_text"],
        "latency by the table, ms": MISSING
        if point.latency_ms_predicted is None
        else f"{point.latency_ms_predicted:.2f}",
        "seeds": str(point.seeds),
        "components": row["components"] or MISSING,
    }
    shown = {k: v for k, v in facts.items() if v != MISSING}
    bars = {k: [[texts[k][i], share] for i, share in enumerate(v)] for k, v in shares.items()}
    return {"id": point.id, "facts": shown, "bars": bars}


def _methods(
    rows: Sequence[TrialRow], standing: Sequence[Standing], dense: Point | None
) -> list[dict[str, Any]]:
    """One entry a budget: the chart, where there are intervals to draw, and the rows."""
    compared = analysis.compare_methods(rows)
    beside = {s.id: s for s in standing}
    scale = charts.unit_of([*compared, dense] if dense else compared)[1] if compared else 1.0
    found = []
    for target in dict.fromkeys(p.target for p in compared):
        here = [p for p in compared if p.target == target]
        trained = [s for s in standing if s.target == target]

        def draw(width: int, target: str = target) -> str:
            return charts.standings_chart(standing, target, width)

        found.append(
            {
                "target": target,
                "chart": responsive(draw) if len(trained) > 1 else None,
                "sentence": next(iter(statements(trained)), ""),
                "rows": [{**_row(p, False, scale), "standing": _standing(beside.get(p.id))} for p in here],
            }
        )
    return found


def _standing(standing: Standing | None) -> dict[str, Any]:
    if standing is None:
        return {"behind": None, "text": MISSING, "verdict": ""}
    spread = "" if standing.margin is None else f" ± {100 * standing.margin:.2f}"
    text = "best" if standing.verdict == "best" else f"{100 * standing.behind:.2f}{spread}"
    return {"behind": standing.behind, "text": text, "verdict": standing.verdict}


def _space(run: Run) -> dict[str, Any]:
    """What was searched, in the words of the space file."""
    config = run.config.model_dump(mode="python", exclude_none=True)
    space, search, train = config["space"], config["search"], config["train"]
    names = {
        kind: ", ".join(ref.name for ref in getattr(run.config.space, kind))
        for kind in ("scorer", "aggregator", "cascade", "distiller", "importance")
    }
    widths = {k: v for k, v in space.get("widths", {}).items() if v != 1.0}
    dimensions = sorted(
        {name for group in searched_trials(run.rows).values() for r in group for name in r.params_searched}
    )
    return {
        "facts": {
            "model": _flat_text({k: v for k, v in config["model"].items() if v not in ({}, False)}),
            "data": _flat_text(config["data"]),
            "budget": _flat_text(config["budget"]),
            "keep ratio per block": _flat_text(space.get("keep_ratio", {})),
            "widths": _flat_text(widths) or "not searched",
            **{kind: text for kind, text in names.items() if text},
            "search": _flat_text(search),
            "training of candidates": _flat_text(train),
        },
        "baselines": [b.name for b in run.config.baselines],
        "dimensions": dimensions,
    }


def _flat_text(data: Mapping[str, Any]) -> str:
    from ucc_search.comparison import flatten

    found = flatten({"": dict(data)} if "low" in data else dict(data))
    return "; ".join(f"{k} {v}".strip(" .") for k, v in found.items() if v not in ("", "None"))


def _influence(rows: Sequence[TrialRow]) -> list[dict[str, Any]]:
    importances, sensitivity = parameter_importances(rows), block_sensitivity(rows)
    found = []
    for target in dict.fromkeys(i.target for i in importances):

        def bars(width: int, target: str = target) -> str:
            return charts.importance_chart(importances, target, width)

        def ratios(width: int, target: str = target) -> str:
            return charts.sensitivity_chart(sensitivity, target, width)

        found.append(
            {
                "target": target,
                "trials": next(i.trials for i in importances if i.target == target),
                "importances": responsive(bars),
                "sensitivity": responsive(ratios) if any(s.target == target for s in sensitivity) else None,
            }
        )
    return found


def _progress(rows: Sequence[TrialRow], as_finished: Sequence[TrialRow]) -> dict[str, Any]:
    """Best quality so far by budget, and hypervolume, over the proposals of the search."""
    best: dict[str, list[tuple[int, float]]] = {}
    trained = False
    for target, trials in searched_trials(rows).items():
        trained = trials[0].rung == "train"
        values = [float((t.accuracy if trained else t.kl) or 0.0) for t in trials]
        best_of = max if trained else min
        so_far = [best_of(values[: i + 1]) for i in range(len(values))]
        best[in_words(target)] = [(i + 1, v * (100 if trained else 1)) for i, v in enumerate(so_far)]
    name = "best selection accuracy so far, %" if trained else "least KL so far, nats"
    rung = "train" if trained else "zero-shot"
    history = analysis.hypervolume_history(as_finished, rung)
    volume = (
        {"": [(i + 1, v / history[-1][1]) for i, (_, v) in enumerate(history)]}
        if history and history[-1][1]
        else {}
    )
    return {
        "rung": rung,
        "best": responsive(lambda w: charts.progress_chart(best, name, "proposals at the budget", w))
        if best
        else None,
        "volume": responsive(
            lambda w: charts.progress_chart(
                volume, "hypervolume, share of the last", f"usable {rung} trials", w
            )
        )
        if len(history) > 1 and volume
        else None,
    }


def _environment(run: Run) -> dict[str, Any]:
    path: Path = run.path / ENVIRONMENT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}

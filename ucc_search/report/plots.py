"""Plots on disk for papers and slides, as PNG and SVG. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ucc_search import analysis
from ucc_search.influence import parameter_importances, searched_trials
from ucc_search.report.charts import shown_quality, unit_of
from ucc_search.runs import Run

FOLDER = "plots"
BLUE, GREY, ORANGE = "#1d5fd0", "#8d8f98", "#b8501c"


def write_plots(run: Run, folder: Path | None = None) -> list[Path]:
    """`front`, `progress`, `tokens` and `importances`, those that the run has data for.

    Returns:
        The files written, in `plots/` of the run folder by default; none without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    out = folder or run.path / FOLDER
    written: list[Path] = []
    draws: dict[str, Callable[[Run, Any], bool]] = {
        "front": _front,
        "progress": _progress,
        "tokens": _tokens,
        "importances": _importances,
    }
    # A font's digest and the date would make equal plots differ.
    with matplotlib.rc_context({"svg.hashsalt": "ucc-search", "font.size": 10, "axes.spines.top": False}):
        for name, draw in draws.items():
            figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
            axes.spines["right"].set_visible(False)
            if draw(run, axes):
                out.mkdir(parents=True, exist_ok=True)
                for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
                    path = out / f"{name}.{suffix}"
                    figure.savefig(path, dpi=160, metadata=metadata)
                    written.append(path)
            pyplot.close(figure)
    return written


def _front(run: Run, axes: Any) -> bool:
    rows = run.rows
    front = analysis.pareto_front(rows)
    if not front:
        return False
    points, knee = analysis.measured(rows, front[0].rung), analysis.knee(front)
    unit, scale = unit_of(points)
    on_front = {p.id for p in front}
    for point in points:
        value, deviation = shown_quality(point)
        colour = BLUE if point.origin == "search" else GREY
        axes.errorbar(
            point.macs / scale,
            value,
            yerr=deviation,
            fmt="o" if point.origin == "search" else "s",
            color=colour,
            markerfacecolor=colour if point.id in on_front else "white",
            markersize=6,
            capsize=2,
            linewidth=1,
            zorder=3 if point.id in on_front else 2,
        )
    line = [(p.macs / scale, shown_quality(p)[0]) for p in front]
    axes.plot(*zip(*line, strict=True), color=BLUE, alpha=0.5, zorder=1, label="front")
    dense = analysis.dense_reference(rows, front[0].rung)
    if dense is not None:
        axes.axhline(
            shown_quality(dense)[0], color="black", linewidth=0.8, linestyle=":", label="uncompressed"
        )
    if knee is not None:
        at = knee.macs / scale, shown_quality(knee)[0]
        axes.plot(*at, "o", markersize=13, markerfacecolor="none", color=ORANGE, label="knee")
    axes.set_xlabel(f"{unit} for one image")
    trained = front[0].rung == "train"
    axes.set_ylabel("selection accuracy, %" if trained else "KL to the teacher, nats")
    axes.legend(frameon=False)
    return True


def _progress(run: Run, axes: Any) -> bool:
    found = searched_trials(run.rows)
    trained = any(trials[0].rung == "train" for trials in found.values())
    for target, trials in found.items():
        best: list[float] = []
        for trial in trials:
            value = float((trial.accuracy if trained else trial.kl) or 0.0)
            best.append(value if not best else (max if trained else min)(best[-1], value))
        axes.step(range(1, len(best) + 1), best, where="post", label=target)
    if not found:
        return False
    if not trained:
        axes.set_yscale("log")
    axes.set_xlabel("proposals at the budget")
    axes.set_ylabel("best selection accuracy so far" if trained else "least KL so far, nats")
    axes.legend(frameon=False)
    return True


def _tokens(run: Run, axes: Any) -> bool:
    front = [p for p in analysis.pareto_front(run.rows) if len(set(p.tokens)) > 1]
    for point in front:
        label = f"{point.id}: {point.method}, {100 * point.macs_ratio:.0f} % of the MACs"
        axes.step(range(len(point.tokens)), point.tokens, where="mid", marker="o", markersize=4, label=label)
    axes.set_xlabel("block")
    axes.set_ylabel("patch tokens left")
    if front:
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return bool(front)


def _importances(run: Run, axes: Any) -> bool:
    found = parameter_importances(run.rows)
    if not found:
        return False
    targets = list(dict.fromkeys(f.target for f in found))
    mean = {
        name: sum(f.importance for f in found if f.parameter == name) / len(targets)
        for name in dict.fromkeys(f.parameter for f in found)
    }
    names = sorted(mean, key=lambda n: mean[n])[-12:]
    height = 0.8 / len(targets)
    for i, target in enumerate(targets):
        values = {f.parameter: f.importance for f in found if f.target == target}
        places = [n + i * height for n in range(len(names))]
        axes.barh(places, [values.get(name, 0.0) for name in names], height=height, label=target)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names)
    axes.set_xlabel("importance (functional ANOVA)")
    axes.legend(frameon=False)
    return True

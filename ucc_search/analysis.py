"""What a run's trials say: fronts, picks, comparisons. Pure functions over rows; no pandas, no torch.

Three rules hold throughout. Only usable trials compete: finished, and within their budget. Trials of
different fidelity never meet on a front. Choices are made by the selection split (or by KL), never by
the test accuracy, which rides along for the report.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ucc_search.errors import RunError
from ucc_search.store import TrialRow
from ucc_search.units import format_macs, format_params

RUNGS = ("train", "zero-shot")  # most expensive first
QUALITIES = ("accuracy", "kl")
SAVED = ("tokens", "widths", "depth", "ranks", "unread")  # what takes MACs away (costs.saved_macs)


@dataclass(frozen=True, slots=True)
class Point:
    """One architecture under one method, its repeated seeds averaged.

    `*_std` is the sample standard deviation over the seeds, None for a single one. Rates are from 0
    to 1, KL in nats, MACs and parameters for one image.
    """

    id: int  # the first of its trials
    trials: tuple[int, ...]  # all of them, one a seed
    origin: str  # search, baseline or dense
    method: str  # search, dense or the baseline's name
    target: str  # the budget as the user wrote it
    rung: str  # zero-shot or train
    fidelity: int  # optimiser steps; 0 is zero-shot
    seeds: int  # how many were averaged
    plan_key: str  # short hash of the plan
    parent: int | None  # of the first of its trials
    macs: int  # for one image
    macs_ratio: float  # of the dense model
    params: int  # weights
    latency_ms: float | None  # of a batch, where it was measured; a mean over seeds
    latency_ms_predicted: float | None  # by the table, where there is one
    accuracy: float | None  # on the selection split; a mean over seeds, as all that follow
    accuracy_std: float | None  # sample standard deviation over seeds
    test_accuracy: float | None  # for the report only, never for a choice
    test_accuracy_std: float | None
    kl: float | None  # mean KL(teacher || student) on the calibration images
    kl_std: float | None
    tokens: tuple[int, ...]  # patch tokens after each block
    saved: Mapping[str, float]
    """Share of the dense MACs that each method took: tokens, widths, depth, ranks, unread."""
    scorer: str
    aggregator: str
    cascade: str
    distiller: str
    importance: str


def usable(rows: Iterable[TrialRow], rung: str | None = None) -> list[TrialRow]:
    """Finished, feasible trials of one rung, and there of the highest fidelity alone.

    Args:
        rung: the most expensive one with such a trial by default.

    Raises:
        RunError: there is no rung of that name.
    """
    if rung is not None and rung not in RUNGS:
        raise RunError(f"rung is {rung!r}, expected one of {', '.join(RUNGS)}")
    good = [r for r in rows if r.state == "ok" and r.feasible and r.origin != "dense"]
    wanted = rung or next((name for name in RUNGS if any(r.rung == name for r in good)), None)
    of_rung = [r for r in good if r.rung == wanted]
    highest = max((r.fidelity for r in of_rung), default=0)
    return [r for r in of_rung if r.fidelity == highest]


def aggregate_seeds(rows: Iterable[TrialRow]) -> list[Point]:
    """One point for each plan under one method and set of components, in the order of the first trial.

    Rungs, fidelities and targets are kept apart as well. A seed that was run twice counts once: it is
    the same measurement, and would make the deviation look smaller than it is.
    """
    groups: dict[tuple[object, ...], dict[int, TrialRow]] = defaultdict(dict)
    for row in sorted(rows, key=lambda r: r.id):
        key = (row.rung, row.fidelity, row.target, row.method, row.plan_key, _components_key(row))
        groups[key].setdefault(row.seed, row)
    return [_point(list(group.values())) for group in groups.values()]


def _components_key(row: TrialRow) -> tuple[object, ...]:
    names = (row.scorer, row.aggregator, row.cascade, row.distiller, row.importance)
    return (*names, repr(sorted(row.components.items())))


def _point(group: Sequence[TrialRow]) -> Point:
    first = group[0]
    accuracy, accuracy_std = _mean_std([r.accuracy for r in group])
    test, test_std = _mean_std([r.test_accuracy for r in group])
    kl, kl_std = _mean_std([r.kl for r in group])
    return Point(
        id=first.id,
        trials=tuple(r.id for r in group),
        origin=first.origin,
        method=first.method,
        target=first.target,
        rung=first.rung,
        fidelity=first.fidelity,
        seeds=len(group),
        plan_key=first.plan_key,
        parent=first.parent,
        macs=first.macs,
        macs_ratio=first.macs_ratio,
        params=first.params,
        latency_ms=_mean_std([r.latency_ms for r in group])[0],
        latency_ms_predicted=first.latency_ms_predicted,
        accuracy=accuracy,
        accuracy_std=accuracy_std,
        test_accuracy=test,
        test_accuracy_std=test_std,
        kl=kl,
        kl_std=kl_std,
        tokens=tuple(first.tokens),
        saved={k: v for k in SAVED if (v := getattr(first, f"saved_{k}"))},
        scorer=first.scorer,
        aggregator=first.aggregator,
        cascade=first.cascade,
        distiller=first.distiller,
        importance=first.importance,
    )


def _mean_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def dense_reference(rows: Iterable[TrialRow], rung: str | None = None) -> Point | None:
    """The uncompressed model, if it was measured; on `rung` where it was measured on several."""
    dense = [r for r in rows if r.origin == "dense" and r.state == "ok"]
    on_rung = [r for r in dense if r.rung == rung]
    return next(iter(aggregate_seeds(on_rung or dense)), None)


def quality(point: Point, by: str | None = None) -> float:
    """Larger is better: selection accuracy, or minus the KL; minus infinity where it was not measured.

    Args:
        by: `accuracy` or `kl`; by default accuracy of trained models and KL of untrained ones.

    Raises:
        RunError: another `by`; the test accuracy in particular may not choose.
    """
    by = by or ("accuracy" if point.rung == "train" else "kl")
    if by not in QUALITIES:
        raise RunError(f"by is {by!r}, expected one of {', '.join(QUALITIES)} (the test split never chooses)")
    value = point.accuracy if by == "accuracy" else (None if point.kl is None else -point.kl)
    return -math.inf if value is None else value


def measured(rows: Iterable[TrialRow], rung: str | None = None, by: str | None = None) -> list[Point]:
    """Points of the usable trials whose quality was measured."""
    return [p for p in aggregate_seeds(usable(rows, rung)) if quality(p, by) > -math.inf]


def pareto_front(rows: Iterable[TrialRow], rung: str | None = None, by: str | None = None) -> list[Point]:
    """Points that no other matches at fewer or equal MACs, cheapest first; of equal points the first.

    The dense model takes no part. It is the reference that candidates are compared with, was not
    trained as they were, and would end every front although no budget asked for it; reports show it
    beside the front (`dense_reference`).
    """
    return front_of(measured(rows, rung, by), by)


def front_of(points: Iterable[Point], by: str | None = None) -> list[Point]:
    """The undominated ones of points of one fidelity, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.macs, -quality(p, by), p.id)):
        if not front or quality(point, by) > quality(front[-1], by):
            front.append(point)
    return front


def knee(front: Sequence[Point], by: str | None = None) -> Point | None:
    """The point farthest above the line between the front's ends, both axes scaled to 0..1.

    None where no point is above it: the trade is then even, or gets better with every MAC.
    """
    if len(front) < 3:
        return None
    first, last = front[0], front[-1]
    width = last.macs - first.macs
    height = quality(last, by) - quality(first, by)

    def above(p: Point) -> float:
        return (quality(p, by) - quality(first, by)) / height - (p.macs - first.macs) / width

    best = max(front[1:-1], key=above)
    return best if above(best) > 1e-9 else None


def hypervolume(front: Iterable[Point], reference: tuple[float, float], by: str | None = None) -> float:
    """Area that the front dominates, in MACs times accuracy (or nats).

    Args:
        front: any points; dominated ones and those beyond the reference add nothing.
        reference: (MACs, quality) of a point worse than all that should count.
    """
    max_macs, level = reference
    area = 0.0
    for point in front_of(front, by):
        if point.macs < max_macs and quality(point, by) > level:
            area += (max_macs - point.macs) * (quality(point, by) - level)
            level = quality(point, by)
    return area


def hypervolume_reference(rows: Sequence[TrialRow], rung: str | None = None) -> tuple[float, float] | None:
    """(MACs of the dense model, worst quality measured) over a whole run, so that histories compare."""
    points = measured(rows, rung)
    if not points:
        return None
    dense = dense_reference(rows)
    most = max(p.macs for p in points)
    return float(max(dense.macs, most) if dense else most), min(quality(p) for p in points)


def hypervolume_history(rows: Sequence[TrialRow], rung: str | None = None) -> list[tuple[int, float]]:
    """(trial id, hypervolume once it had finished) over the usable trials, in the order they finished.

    It falls only where a further seed lowers the mean of a point on the front.
    """
    reference = hypervolume_reference(rows, rung)
    if reference is None:
        return []
    done = usable(rows, rung)
    return [(row.id, hypervolume(measured(done[: i + 1], rung), reference)) for i, row in enumerate(done)]


def best_under(
    rows: Sequence[TrialRow],
    *,
    max_macs: int | None = None,
    max_params: int | None = None,
    max_latency_ms: float | None = None,
    where: str = "the run",
) -> TrialRow:
    """The first trial of the best point within the limits.

    The point is chosen by its mean over seeds. Of its trials the first is returned, not the luckiest.

    Args:
        max_latency_ms: a trial whose latency was not measured does not fit.
        where: what the error names.

    Raises:
        RunError: there is none; names the smallest there is.
    """
    points = measured(rows)
    if not points:
        raise RunError(f"{where}: no usable trial yet; ucc-search analyze shows what failed and why")
    limits = {"macs": max_macs, "params": max_params, "latency_ms": max_latency_ms}
    asked = {name: limit for name, limit in limits.items() if limit is not None}
    within = [p for p in points if all(_price(p, name) <= limit for name, limit in asked.items())]
    if not within:
        raise _none_fits(points, asked, where)
    best = max(within, key=lambda p: (quality(p), -p.macs, -p.params, -p.id))
    return next(r for r in rows if r.id == best.id)


_WORDS: Mapping[str, Callable[[float], str]] = {
    "macs": lambda v: format_macs(round(v)),
    "params": lambda v: format_params(round(v)),
    "latency_ms": lambda v: f"{v:.3g} ms",
}


def _price(point: Point, name: str) -> float:
    """Infinity where it was not measured."""
    value = getattr(point, name)
    return math.inf if value is None else float(value)


def _none_fits(points: Sequence[Point], asked: Mapping[str, float], where: str) -> RunError:
    limits = " and ".join(_WORDS[name](limit) for name, limit in asked.items())
    least = {name: min(_price(p, name) for p in points) for name in dict.fromkeys(("macs", "params", *asked))}
    if math.isinf(least.get("latency_ms", 0.0)):
        return RunError(
            f"{where}: no trial's latency was measured; limit MACs or parameters, or search with budget.latency_ms"
        )
    named = [_WORDS[name](value) for name, value in least.items()]
    return RunError(
        f"{where}: no trial fits {limits}; the fewest of any trial are {', '.join(named[:-1])} and {named[-1]}; "
        "allow more, or search again with a smaller budget"
    )


def compare_methods(rows: Iterable[TrialRow], rung: str | None = None) -> list[Point]:
    """The best point of every method at every target, best method first within a target.

    The search's entry is chosen by selection quality, as any user would choose it.
    """
    best: dict[tuple[str, str], Point] = {}
    for point in measured(rows, rung):
        key = (point.target, point.method)
        if key not in best or quality(point) > quality(best[key]):
            best[key] = point
    targets = list(dict.fromkeys(target for target, _ in best))
    return sorted(best.values(), key=lambda p: (targets.index(p.target), -quality(p)))


def failures_by_class(rows: Iterable[TrialRow]) -> dict[str, int]:
    """Failed trials by class, the most frequent first."""
    return dict(Counter(r.failure or "error" for r in rows if r.state == "failed").most_common())


@dataclass(frozen=True, slots=True)
class FailureClass:
    """Trials that failed in one way."""

    failure: str  # the class: nan_loss, out_of_memory, ...
    trials: int  # how many
    first: int  # the id of one of them
    error: str | None  # what that one said


def failure_classes(rows: Sequence[TrialRow]) -> list[FailureClass]:
    """`failures_by_class` with an example of each."""
    failed = [r for r in rows if r.state == "failed"]
    first = {
        name: next(r for r in failed if (r.failure or "error") == name) for name in failures_by_class(rows)
    }
    counts = failures_by_class(rows)
    return [FailureClass(name, counts[name], row.id, row.error) for name, row in first.items()]


def lost_search(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The search's failed trials where not one can stand beside the baselines; empty if some trial can.

    They are those of the rung that the tables show, or all where none got so far.
    """
    shown = usable(rows)
    searched = [r for r in rows if r.origin == "search"]
    levels = {(r.rung, r.fidelity) for r in shown}
    there = [r for r in searched if (r.rung, r.fidelity) in levels] or searched
    return there if all(r.state == "failed" for r in there) else []


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman correlation of the quality on a cheap rung with that on a dearer one.

    Quality is minus the KL without training, and selection accuracy after it. 1: the cheap rung ranks as
    the dear one does. None: fewer than three pairs, or one side does not vary. Values over several
    budgets are flattered by them, since more MACs help on both rungs; `by_target` is free of that.
    """

    pairs: int
    across: float | None  # all methods and targets together
    within: dict[str, float | None]  # by method
    by_target: dict[str, float | None]  # all methods at one budget
    cheap: str = "zero-shot"
    dear: str = "train"


Measurement = tuple[str, int, str]
"""How a trial was measured: rung, fidelity and state (training that was stopped is not training to the end)."""


def rank_correlations(rows: Sequence[TrialRow]) -> list[RankCorrelation]:
    """How well each rung foretold each dearer one, over what was measured on both; cheap ones first."""
    ladder = sorted({_measurement(r) for r in rows if _counts(r)}, key=lambda m: m[1])
    return [_correlation(rows, cheap, dear) for cheap, dear in itertools.combinations(ladder, 2)]


def rank_correlation(rows: Sequence[TrialRow]) -> RankCorrelation:
    """How well zero-shot KL foretold the accuracy of whole trainings."""
    whole = [_measurement(r) for r in usable(rows, "train")]
    return _correlation(rows, ("zero-shot", 0, "ok"), whole[0] if whole else ("train", 0, "ok"))


def _measurement(row: TrialRow) -> Measurement:
    return row.rung, row.fidelity, row.state


def _counts(row: TrialRow) -> bool:
    return row.state in ("ok", "stopped") and row.feasible and row.origin != "dense"


def _correlation(rows: Sequence[TrialRow], cheap: Measurement, dear: Measurement) -> RankCorrelation:
    pairs = _measured_twice(rows, cheap, dear)

    def over(method: str | None = None, target: str | None = None) -> float | None:
        chosen = [p for p in pairs if method in (None, p[1].method) and target in (None, p[1].target)]
        return spearman([quality(p) for p, _ in chosen], [quality(p) for _, p in chosen])

    return RankCorrelation(
        pairs=len(pairs),
        across=over(),
        within={m: over(method=m) for m in dict.fromkeys(p.method for _, p in pairs)},
        by_target={t: over(target=t) for t in dict.fromkeys(p.target for _, p in pairs)},
        cheap=_rung_name(cheap),
        dear=_rung_name(dear),
    )


def _rung_name(measurement: Measurement) -> str:
    rung, fidelity, state = measurement
    return f"{rung} to step {fidelity}" if state == "stopped" else rung


def _measured_twice(
    rows: Sequence[TrialRow], cheap: Measurement, dear: Measurement
) -> list[tuple[Point, Point]]:
    """Cheap and dear measurements of the same trial, seeds averaged.

    The cheap one is an ancestor; for a baseline, which is promoted from nothing, that of the same plan.
    """
    good = [r for r in rows if _counts(r)]
    below, above = (
        [p for p in aggregate_seeds(r for r in good if _measurement(r) == m) if quality(p) > -math.inf]
        for m in (cheap, dear)
    )
    by_trial = {trial: p for p in below for trial in p.trials}
    by_plan = {(p.method, p.target, p.plan_key): p for p in below}
    parents = {r.id: r.parent for r in rows}
    pairs = []
    for point in above:
        found, at = None, point.parent
        if at is None:
            found = by_plan.get((point.method, point.target, point.plan_key))
        while found is None and at is not None:
            found, at = by_trial.get(at), parents.get(at)
        if found is not None:
            pairs.append((found, point))
    return pairs


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties averaged; None below three pairs or where one side does not vary."""
    if len(a) < 3:
        return None
    try:
        return statistics.correlation(_ranks(a), _ranks(b))
    except statistics.StatisticsError:
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    def rank(value: float) -> float:
        below = sum(v < value for v in values)
        return below + (sum(v == value for v in values) + 1) / 2

    return [rank(v) for v in values]

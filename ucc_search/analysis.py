"""What a run's trials say: fronts, picks, comparisons. Pure functions over rows; no pandas, no torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ucc_search.errors import RunError
from ucc_search.store import TrialRow
from ucc_search.units import format_macs, format_params

RUNGS = ("train", "zero-shot")  # most expensive first; rungs never share a front


@dataclass(frozen=True, slots=True)
class Point:
    """One architecture under one method, its repeated seeds averaged.

    `*_std` is the sample standard deviation over the seeds, None for a single one. Rates are from 0
    to 1, KL in nats.
    """

    id: int  # the first of its trials
    method: str
    target: str
    rung: str
    seeds: int
    macs: int
    macs_ratio: float
    params: int
    accuracy: float | None
    accuracy_std: float | None
    test_accuracy: float | None
    test_accuracy_std: float | None
    kl: float | None
    tokens: tuple[int, ...]
    scorer: str
    aggregator: str
    cascade: str
    distiller: str


def usable(rows: Iterable[TrialRow], rung: str | None = None) -> list[TrialRow]:
    """Finished, feasible trials of one rung; the most expensive rung present by default."""
    good = [r for r in rows if r.state == "ok" and r.feasible and r.origin != "dense"]
    wanted = rung or next((name for name in RUNGS if any(r.rung == name for r in good)), None)
    return [r for r in good if r.rung == wanted]


def average_seeds(rows: Sequence[TrialRow]) -> list[Point]:
    """One point for each method, target, plan and set of components, in the order of the first trial."""
    groups: dict[tuple[object, ...], list[TrialRow]] = defaultdict(list)
    for row in rows:
        groups[(row.method, row.target, row.rung, row.plan_key, repr(sorted(row.components.items())))].append(row)
    return [_point(group) for group in groups.values()]


def _point(group: Sequence[TrialRow]) -> Point:
    first = min(group, key=lambda r: r.id)
    accuracy, accuracy_std = _mean_std([r.accuracy for r in group])
    test, test_std = _mean_std([r.test_accuracy for r in group])
    return Point(
        first.id,
        first.method,
        first.target,
        first.rung,
        len(group),
        first.macs,
        first.macs_ratio,
        first.params,
        accuracy,
        accuracy_std,
        test,
        test_std,
        _mean_std([r.kl for r in group])[0],
        tuple(first.tokens),
        first.scorer,
        first.aggregator,
        first.cascade,
        first.distiller,
    )


def _mean_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [v for v in values if v is not None]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def quality(point: Point) -> float:
    """Larger is better: selection accuracy of trained models, minus the KL of untrained ones.

    The test accuracy plays no part.
    """
    value = point.accuracy if point.rung == "train" else (None if point.kl is None else -point.kl)
    return -math.inf if value is None else value


def pareto_front(rows: Sequence[TrialRow], rung: str | None = None) -> list[Point]:
    """Points that no other matches at fewer MACs, cheapest first; of equal points the first trial.

    The dense model is a reference, not a candidate, and takes no part.
    """
    points = sorted(average_seeds(usable(rows, rung)), key=lambda p: (p.macs, -quality(p), p.id))
    front: list[Point] = []
    for point in points:
        if quality(point) > (quality(front[-1]) if front else -math.inf):
            front.append(point)
    return front


def knee(front: Sequence[Point]) -> Point | None:
    """The point farthest above the line between the front's ends, both axes scaled to 0..1."""
    if len(front) < 3:
        return None
    first, last = front[0], front[-1]
    width = last.macs - first.macs
    height = quality(last) - quality(first)
    return max(front, key=lambda p: (quality(p) - quality(first)) / height - (p.macs - first.macs) / width)


def hypervolume(front: Sequence[Point], *, max_macs: int, worst_quality: float) -> float:
    """Area dominated by the front up to a reference point, in MACs times quality."""
    area, best = 0.0, worst_quality
    for point in front:
        gain = quality(point) - best
        if gain > 0 and point.macs < max_macs:
            area += (max_macs - point.macs) * gain
            best = quality(point)
    return area


def best_under(
    rows: Sequence[TrialRow],
    *,
    max_macs: int | None = None,
    max_params: int | None = None,
    where: str = "the run",
) -> TrialRow:
    """The first trial of the best point within the limits.

    Raises:
        RunError: there is none; names the smallest there is.
    """
    points = average_seeds(usable(rows))
    if not points:
        raise RunError(f"{where}: no usable trial yet; see ucc-search analyze for failures")
    within = [
        p
        for p in points
        if (max_macs is None or p.macs <= max_macs) and (max_params is None or p.params <= max_params)
    ]
    if not within:
        least = min(points, key=lambda p: (p.macs, p.params))
        raise RunError(
            f"{where}: no trial fits; the smallest has {format_macs(least.macs)} and {format_params(least.params)}"
        )
    best = max(within, key=lambda p: (quality(p), -p.macs, -p.id))
    return next(r for r in rows if r.id == best.id)


def compare_methods(rows: Sequence[TrialRow], rung: str | None = None) -> list[Point]:
    """The best point of every method at every target, best method first within a target.

    The search's entry is chosen by selection quality, as any user would choose it.
    """
    best: dict[tuple[str, str], Point] = {}
    for point in average_seeds(usable(rows, rung)):
        key = (point.target, point.method)
        if key not in best or quality(point) > quality(best[key]):
            best[key] = point
    targets = list(dict.fromkeys(target for target, _ in best))
    return sorted(best.values(), key=lambda p: (targets.index(p.target), -quality(p)))


def failures(rows: Sequence[TrialRow]) -> dict[str, int]:
    """Failed trials by class."""
    return dict(Counter(r.failure or "error" for r in rows if r.state == "failed"))


def rung_correlation(rows: Sequence[TrialRow]) -> float | None:
    """Spearman correlation of zero-shot quality with trained accuracy over what was measured on both.

    1 means that the cheap rung ranks as training does; None below three pairs.
    """
    cheap = {_same(p): quality(p) for p in average_seeds(usable(rows, "zero-shot"))}
    pairs = [
        (cheap[_same(p)], quality(p)) for p in average_seeds(usable(rows, "train")) if _same(p) in cheap
    ]
    if len(pairs) < 3:
        return None
    return spearman([a for a, _ in pairs], [b for _, b in pairs])


def _same(point: Point) -> tuple[object, ...]:
    return (point.method, point.target, point.tokens, point.scorer, point.aggregator)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties averaged; None where one side does not vary."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    try:
        return statistics.correlation(ranks_a, ranks_b)
    except statistics.StatisticsError:
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    def rank(value: float) -> float:
        below = sum(v < value for v in values)
        return below + (sum(v == value for v in values) + 1) / 2

    return [rank(v) for v in values]


def by(rows: Iterable[TrialRow], key: Callable[[TrialRow], str]) -> dict[str, list[TrialRow]]:
    """Rows grouped by a text, in order of appearance."""
    groups: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)

"""The best trials: front, knee, hypervolume, and the pick under limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ucc_search.analysis.points import Point, dense_reference, measured, quality, usable
from ucc_search.errors import RunError
from ucc_search.store import TrialRow
from ucc_search.units import format_macs, format_params


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

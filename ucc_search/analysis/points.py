"""Trials that may compete, and what repeated seeds come to."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ucc_search.errors import RunError
from ucc_search.store import TrialRow
from ucc_search.units import target_order

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
    latency_over: float | None  # measured over allowed, minus 1; a mean over seeds
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
        latency_over=_mean_std([r.latency_over for r in group])[0],
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


def compare_methods(rows: Iterable[TrialRow], rung: str | None = None) -> list[Point]:
    """The best point of every method at every target, best method first within a target.

    The search's entry is chosen by selection quality, as any user would choose it.
    """
    best: dict[tuple[str, str], Point] = {}
    for point in measured(rows, rung):
        key = (point.target, point.method)
        if key not in best or quality(point) > quality(best[key]):
            best[key] = point
    return sorted(best.values(), key=lambda p: (target_order(p.target), -quality(p)))

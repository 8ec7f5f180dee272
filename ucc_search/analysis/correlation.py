"""Whether a cheap rung ranks as a dearer one does."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ucc_search.analysis.points import Point, aggregate_seeds, quality, usable
from ucc_search.store import TrialRow


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

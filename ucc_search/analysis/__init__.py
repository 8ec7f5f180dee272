"""What a run's trials say: fronts, picks, comparisons. Pure functions over rows; no pandas, no torch.

Three rules hold throughout. Only usable trials compete: finished, and within their budget. Trials of
different fidelity never meet on a front. Choices are made by the selection split (or by KL), never by
the test accuracy, which rides along for the report.
"""

from __future__ import annotations

from ucc_search.analysis.correlation import (
    Measurement,
    RankCorrelation,
    rank_correlation,
    rank_correlations,
    spearman,
)
from ucc_search.analysis.failures import FailureClass, failure_classes, failures_by_class, lost_search
from ucc_search.analysis.fronts import (
    best_under,
    front_of,
    hypervolume,
    hypervolume_history,
    hypervolume_reference,
    knee,
    pareto_front,
)
from ucc_search.analysis.points import (
    QUALITIES,
    RUNGS,
    SAVED,
    Point,
    aggregate_seeds,
    compare_methods,
    dense_reference,
    measured,
    quality,
    usable,
)

__all__ = [
    "FailureClass",
    "Measurement",
    "Point",
    "QUALITIES",
    "RUNGS",
    "RankCorrelation",
    "SAVED",
    "aggregate_seeds",
    "best_under",
    "compare_methods",
    "dense_reference",
    "failure_classes",
    "failures_by_class",
    "front_of",
    "hypervolume",
    "hypervolume_history",
    "hypervolume_reference",
    "knee",
    "lost_search",
    "measured",
    "pareto_front",
    "quality",
    "rank_correlation",
    "rank_correlations",
    "spearman",
    "usable",
]

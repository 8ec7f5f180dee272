"""Which models can be told apart: differences with the spread of repeated seeds. No torch, no pandas.

The noise of a seed is pooled over all models that were trained alike at one budget, as an analysis of
variance does: with two seeds a model, one model's own deviation says next to nothing, that of nine says
enough. Assumed is that training is equally noisy for all of them, and close to normal. Not included is
what other images would change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ucc_search.analysis import Point, compare_methods, measured, quality
from ucc_search.store import TrialRow

CONFIDENCE = 0.95
Verdict = Literal["higher", "lower", "not told apart", "unknown"]


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviation of one seed, and the degrees of freedom it was estimated from."""

    std: float | None  # None where nothing was repeated
    freedom: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference of two means over seeds, with its interval at 95 % confidence."""

    difference: float
    margin: float | None  # half the width of the interval; None where nothing was repeated

    @property
    def verdict(self) -> Verdict:
        """`unknown` without repeated seeds: then no statement can be made."""
        if self.margin is None:
            return "unknown"
        if abs(self.difference) <= self.margin:
            return "not told apart"
        return "higher" if self.difference > 0 else "lower"


@dataclass(frozen=True, slots=True)
class Standing:
    """One method at one budget, beside the best of that budget."""

    target: str  # the budget
    method: str  # search or the baseline's name
    id: int  # the first of its trials
    seeds: int  # how many were averaged
    accuracy: float  # mean over seeds, on the selection split
    behind: float  # the best's accuracy minus this one's; 0 for the best itself
    margin: float | None  # half the width of the interval around `behind`
    verdict: str  # best, behind, not told apart or unknown


def seed_noise(samples: Iterable[tuple[float | None, int]]) -> Noise:
    """Pooled over (standard deviation, seeds) of each model.

    Models with one seed add nothing.
    """
    repeated = [(std, seeds - 1) for std, seeds in samples if std is not None and seeds > 1]
    freedom = sum(f for _, f in repeated)
    if not freedom:
        return Noise(None, 0)
    return Noise(math.sqrt(sum(std**2 * f for std, f in repeated) / freedom), freedom)


def gap(a: float, b: float, *, seeds: tuple[int, int], noise: Noise, comparisons: int = 1) -> Gap:
    """a - b with a t-interval.

    Args:
        seeds: how many each mean is over.
        comparisons: how many such intervals must hold at once (Bonferroni).
    """
    if noise.std is None:
        return Gap(a - b, None)
    from scipy.stats import t

    quantile = float(t.ppf(1 - (1 - CONFIDENCE) / (2 * max(1, comparisons)), noise.freedom))
    return Gap(a - b, quantile * noise.std * math.sqrt(sum(1 / n for n in seeds)))


def standings(rows: Sequence[TrialRow]) -> list[Standing]:
    """Every method's best trained model beside the best of its budget, in the order of `compare_methods`.

    The noise is pooled over all models of the budget; the intervals of one budget hold together.
    """
    compared = [p for p in compare_methods(rows) if p.rung == "train"]
    found = []
    for target in dict.fromkeys(p.target for p in compared):
        here = [p for p in compared if p.target == target]
        alike = [p for p in measured(rows, "train") if p.target == target]
        noise = seed_noise((p.accuracy_std, p.seeds) for p in alike)
        found += [_standing(here[0], p, noise, len(here) - 1) for p in here]
    return found


def _standing(best: Point, point: Point, noise: Noise, comparisons: int) -> Standing:
    seen = gap(
        quality(best), quality(point), seeds=(best.seeds, point.seeds), noise=noise, comparisons=comparisons
    )
    words = {"higher": "behind", "lower": "not told apart"}
    verdict = "best" if point is best else words.get(seen.verdict, seen.verdict)
    return Standing(
        target=point.target,
        method=point.method,
        id=point.id,
        seeds=point.seeds,
        accuracy=quality(point),
        behind=seen.difference,
        margin=None if point is best else seen.margin,
        verdict=verdict,
    )


def statements(found: Sequence[Standing]) -> list[str]:
    """One plain sentence per budget: who is ahead, and who cannot be told from it."""
    lines = []
    for target in dict.fromkeys(s.target for s in found):
        here = [s for s in found if s.target == target]
        best, others = here[0], here[1:]
        if not others:
            continue
        level = [s.method for s in others if s.verdict == "not told apart"]
        behind = [s.method for s in others if s.verdict == "behind"]
        if any(s.verdict == "unknown" for s in others):
            text = f"{best.method} has the highest mean; with one seed each it cannot be known whether it is better"
        elif not level:
            text = f"{best.method} is better than all others"
        else:
            text = f"{best.method} has the highest mean, but cannot be told apart from {', '.join(level)}"
            text += f"; clearly behind: {', '.join(behind)}" if behind else ""
        lines.append(f"At {target}, {text}.")
    return lines

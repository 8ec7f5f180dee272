"""The ladder of rungs: how trials are measured on each, and which of one climb onto the next. Pure; no torch.

Successive halving: a rung is measured to its end before the next one begins, so that what climbs does
not depend on the order in which trials finish (nor on kills). Each budget and set of components sends
its own best, see DESIGN 14.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ucc_search.analysis import Point, aggregate_seeds, front_of, quality
from ucc_search.config import RunConfig
from ucc_search.errors import ConfigError
from ucc_search.store import TrialRow


@dataclass(frozen=True)
class Level:
    """A rung of one run, its length in optimiser steps."""

    rung: str
    steps: int  # that a trial has behind it; 0 is zero-shot
    stops: bool  # before the end of training: trials go on from here, or were stopped
    keep: int | float | None
    seeds: tuple[int, ...]


def levels(config: RunConfig, images: int) -> tuple[Level, ...]:
    """The ladder of a run, the lowest rung first.

    Args:
        images: of the training split.

    Raises:
        ConfigError: a rung is not longer than the one below it.
    """
    found = tuple(
        Level(r.rung, r.stop(config.train, images), r.rung == "train" and not r.whole, r.keep, r.seeds)
        for r in config.search.rungs
    )
    for number, (below, level) in enumerate(itertools.pairwise(found), start=2):
        if below.steps >= level.steps:
            raise ConfigError(
                f"search.ladder: rung {number} ends at step {level.steps}, expected more than the "
                f"{below.steps} of the rung below; shorten that, or lengthen train.steps or train.epochs"
            )
    return found


def at_level(rows: Sequence[TrialRow], level: Level) -> list[Point]:
    """The search's finished, feasible trials of one rung, seeds averaged, in the order of their ids."""
    measured = [
        r
        for r in rows
        if (r.rung, r.fidelity, r.origin) == (level.rung, level.steps, "search")
        and r.state in ("ok", "stopped")
        and r.feasible
    ]
    return [p for p in aggregate_seeds(measured) if quality(p) > -math.inf]


def climbing(
    rows: Sequence[TrialRow], below: Level, keep: int | float, *, together: bool = False
) -> list[Point]:
    """Which trials of a rung climb onto the next, by set of components and budget.

    Args:
        keep: how many of each group; below 1 a share of it, rounded up.
        together: all budgets are one group, which sends as many as they would one by one, but whole fronts of
            them: fewer MACs count as quality does.
    """
    groups: dict[tuple[str, ...], list[Point]] = defaultdict(list)
    for point in at_level(rows, below):
        # Cheap measurements rank schedules within a method, but not one method against another.
        components = (point.scorer, point.aggregator, point.cascade, point.distiller)
        groups[("" if together else point.target, *components)].append(point)
    chosen: list[Point] = []
    for members in groups.values():
        budgets = len({p.target for p in members})
        count = keep * budgets if isinstance(keep, int) else math.ceil(keep * len(members))
        chosen += (_by_fronts(members) if together else sorted(members, key=_best_first))[:count]
    return chosen


def _best_first(point: Point) -> tuple[float, float, int]:
    """By quality; accuracies on few images are often equal, and then KL tells more."""
    return -quality(point), math.inf if point.kl is None else point.kl, point.id


def _by_fronts(points: Sequence[Point]) -> list[Point]:
    """Undominated ones first, of one front the loneliest first (NSGA-II)."""
    rest, ordered = list(points), list[Point]()
    while rest:
        front = front_of(rest)
        gaps = _gaps(front)
        ordered += sorted(front, key=lambda p: (-gaps[p.id], *_best_first(p)))
        rest = [p for p in rest if p.id not in gaps]
    return ordered


def _gaps(front: Sequence[Point]) -> dict[int, float]:
    """Crowding distance (NSGA-II) of each point of a front, cheapest first; infinite at its ends."""
    gaps = dict.fromkeys((p.id for p in front), math.inf)
    width = front[-1].macs - front[0].macs
    height = quality(front[-1]) - quality(front[0])
    for left, point, right in zip(front, front[1:], front[2:], strict=False):
        across, up = right.macs - left.macs, quality(right) - quality(left)
        gaps[point.id] = across / width + up / height
    return gaps

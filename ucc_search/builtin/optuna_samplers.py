"""Optuna's samplers behind our interface, and a grid. Optuna is imported when a search starts.

Optuna is asked in memory, its own trial is closed at once, and what was measured is added as a new
one: it learns where proposals landed, not where it aimed.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ucc_search.errors import UserError
from ucc_search.interfaces import Dimension, Measured, Sampler, SamplerRequest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


class OptunaSampler(Sampler):
    """A study in memory, whose sampler `make` gives."""

    def make(self, request: SamplerRequest) -> BaseSampler:
        """Optuna's sampler, seeded."""
        raise NotImplementedError

    def start(self, request: SamplerRequest) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._distributions = {d.name: distribution(d) for d in request.dimensions}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = self.make(request)
        kinds = optuna.study.StudyDirection
        directions = [kinds.MAXIMIZE if m else kinds.MINIMIZE for m in request.maximize]
        self._study = optuna.create_study(sampler=sampler, directions=directions)
        for point in request.starts:
            known = {k: v for k, v in point.items() if k in self._distributions}
            if known:
                self._study.enqueue_trial(known)

    def propose(self) -> dict[str, Any]:
        import optuna

        with warnings.catch_warnings():
            # Enqueued points are partial on purpose.
            warnings.simplefilter("ignore")
            trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return dict(trial.params)

    def tell(self, measured: Measured) -> None:
        self._study.add_trial(closed_trial(measured, self._distributions))


def closed_trial(
    measured: Measured,
    distributions: Mapping[str, BaseDistribution],
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """Optuna's form of a measured point, with every constraint set (a trial without counts as feasible)."""
    from optuna.trial import TrialState, create_trial

    trial = create_trial(
        params=dict(measured.point),
        distributions=dict(distributions),
        values=None if measured.values is None else list(measured.values),
        state=TrialState.FAIL if measured.values is None else TrialState.COMPLETE,
        user_attrs=dict(attributes or {}),
    )
    for name, over in measured.constraints.items():
        trial.set_constraint(name, over)
    return trial


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's form of a dimension."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    low, high, step = dimension.low, dimension.high, dimension.step
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return IntDistribution(low, high, step=step)
    return FloatDistribution(low, high, log=dimension.log, step=step)


class Random(OptunaSampler):
    """Uniform in every dimension, after the known good points."""

    def make(self, request: SamplerRequest) -> BaseSampler:
        import optuna

        return optuna.samplers.RandomSampler(seed=request.seed)


class TPE(OptunaSampler):
    """Tree-structured Parzen estimator over all dimensions together.

    Args:
        startup: points before the first estimate.
    """

    def __init__(self, startup: int = 8) -> None:
        self.startup = startup

    def make(self, request: SamplerRequest) -> BaseSampler:
        import optuna

        return optuna.samplers.TPESampler(seed=request.seed, multivariate=True, n_startup_trials=self.startup)


class NSGA2(OptunaSampler):
    """Genetic algorithm with non-dominated sorting; with one objective a plain genetic algorithm.

    Args:
        population: points per generation, 2 or more.
    """

    def __init__(self, population: int = 20) -> None:
        if population < 2:
            raise ValueError(f"population is {population}, expected 2 or more")
        self.population = population

    def make(self, request: SamplerRequest) -> BaseSampler:
        import optuna

        return optuna.samplers.NSGAIISampler(seed=request.seed, population_size=self.population)


class NSGA3(NSGA2):
    """NSGA-II with reference directions in place of crowding distances.

    Args:
        population: points per generation, 2 or more.
    """

    def make(self, request: SamplerRequest) -> BaseSampler:
        import optuna

        return optuna.samplers.NSGAIIISampler(seed=request.seed, population_size=self.population)


class CMAES(OptunaSampler):
    """Covariance matrix adaptation; numbers only, one budget per study."""

    def make(self, request: SamplerRequest) -> BaseSampler:
        import optuna

        if len(request.maximize) > 1:
            raise UserError(
                "search.sampler cmaes knows one objective, a range of budgets has two; list the budgets, or use "
                "shell, tpe, nsga2, nsga3 or gp"
            )
        if importlib.util.find_spec("cmaes") is None:
            raise UserError("search.sampler cmaes needs a package: pip install 'ucc-search[samplers]'")
        return optuna.samplers.CmaEsSampler(seed=request.seed)


class GP(OptunaSampler):
    """Optuna's Gaussian process in the space of the proposals."""

    def make(self, request: SamplerRequest) -> BaseSampler:
        import optuna

        return optuna.samplers.GPSampler(seed=request.seed, deterministic_objective=True)


class Grid(Sampler):
    """Every combination of a few values per dimension, in random order, after the known good points.

    Args:
        levels: values of a dimension that is a range without step; 2 or more.
    """

    def __init__(self, levels: int = 3) -> None:
        if levels < 2:
            raise ValueError(f"levels is {levels}, expected 2 or more")
        self.levels = levels

    def start(self, request: SamplerRequest) -> None:
        """Lays out the grid.

        Raises:
            UserError: more than a million points.
        """
        axes = {d.name: _axis(d, self.levels) for d in request.dimensions}
        size = math.prod(len(values) for values in axes.values())
        if size > 1_000_000:
            raise UserError(
                f"search.sampler grid has {size} points in {len(axes)} dimensions, expected a million at most; search "
                "fewer things, or use another sampler"
            )
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        random.Random(request.seed).shuffle(points)
        middle = points[0]
        self._queue = [{**middle, **point} for point in request.starts] + points
        self._next = 0

    def propose(self) -> dict[str, Any]:
        point = self._queue[self._next % len(self._queue)]
        self._next += 1
        return dict(point)

    def tell(self, measured: Measured) -> None:
        return None


def _axis(dimension: Dimension, levels: int) -> Sequence[Any]:
    if dimension.choices is not None:
        return dimension.choices
    low, high, step = dimension.low, dimension.high, dimension.step
    if step:
        return [low + i * step for i in range(int((high - low) / step + 1e-9) + 1)]
    if dimension.log:
        return [low * (high / low) ** (i / (levels - 1)) for i in range(levels)]
    return [low + (high - low) * i / (levels - 1) for i in range(levels)]

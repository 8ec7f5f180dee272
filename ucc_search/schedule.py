"""From components and keep ratios to a plan on a budget. No torch, no optuna."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from ucc_search.budget import LATENCY, Budget, budgets, project, whole_tokens, with_tokens
from ucc_search.config import Baseline, RunConfig
from ucc_search.costs import Pricer, cost
from ucc_search.errors import BudgetError, ConfigError, PluginError
from ucc_search.interfaces import (
    INFERENCE_KINDS,
    ComponentRef,
    Components,
    DistillContext,
    ScheduleRequest,
)
from ucc_search.latency import Latency, LatencyTable
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins
from ucc_search.space import KINDS, Candidate, SearchSpace, spares_last_block
from ucc_search.widths import Widths

Profile = Callable[[float], Sequence[float]]
Evaluate = Callable[[Sequence[int]], float]
MakeEvaluate = Callable[[Components, CompressionPlan], Evaluate]
DepthOrder = Callable[[ComponentRef], Sequence[int]]
NO_TABLE = "not measured here yet; `ucc-search latency SPACE` does it now, a search does it first"


class Scheduler:
    """Turns components and keep ratios into a plan on a budget.

    Args:
        make_evaluate: gives the accuracy function that calibrated cascades ask; None where no model
            is loaded.
        depth_order: gives, for an importance criterion, the depth units with the least important
            first; None where nothing was measured.
        latency: the table that prices latencies; needed for a limit on them.

    Raises:
        BudgetError: latency is limited, and there is no table.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        plugins: Plugins,
        make_evaluate: MakeEvaluate | None = None,
        depth_order: DepthOrder | None = None,
        latency: LatencyTable | None = None,
    ) -> None:
        self._config, self._plugins, self._make_evaluate = config, plugins, make_evaluate
        self._depth_order = depth_order
        dense = CompressionPlan.identity(shape)
        self.base = dense.replace(head_tokens_only=spares_last_block(config.space, shape))
        self.dense_cost = cost(dense)
        metrics = {n: plugins.build("metric", ComponentRef(n)) for n in config.budget.metrics}
        corner = (
            plugins.components(*(getattr(config.space, k)[0] for k in INFERENCE_KINDS)) if metrics else None
        )
        limits = {n: (m, m.value(dense, corner)) for n, m in metrics.items()}
        self.latency = Latency(latency) if latency is not None else None
        if config.budget.latency_ms is not None:
            if self.latency is None:
                raise BudgetError(f"budget.{LATENCY}: {NO_TABLE}")
            limits[LATENCY] = (self.latency, self.latency.table.dense_ms)
        self.budgets = budgets(config.budget, self.dense_cost, limits)
        self._profiles: dict[str, Profile] = {}
        self._pricers: dict[str, Pricer] = {}

    def plan(self, candidate: Candidate, budget: Budget) -> CompressionPlan:
        """The projected plan.

        Raises:
            BudgetError: the candidate cannot meet the budget.
            PluginError: the components do not fit the model.
        """
        parts, family = self._family(candidate)
        price = self._pricers.setdefault(_inference_key(candidate.components), Pricer(parts))
        return project(self.base, family, budget, parts, self.widths(candidate), candidate.ratios, price)

    def smallest(self, candidate: Candidate) -> CompressionPlan:
        """The cheapest plan that the cascade and the widths can make."""
        _, family = self._family(candidate)
        narrow = self.widths(candidate).at(self.base, candidate.ratios, 1.0)
        return with_tokens(narrow, whole_tokens(family(1.0), self.base.shape.tokens))

    def largest(self, candidate: Candidate) -> CompressionPlan:
        """The dearest: nothing pruned but what is fixed."""
        return self.widths(candidate).at(self.base, candidate.ratios, 0.0)

    def widths(self, candidate: Candidate) -> Widths:
        """What may become narrower, knowing which half-blocks leave first."""
        order, ref = self._depth_order, candidate.components["importance"]
        known = functools.partial(order, ref) if order is not None else None
        return Widths(candidate.widths, self.base.shape, known)

    def _family(self, candidate: Candidate) -> tuple[Components, Profile]:
        refs = candidate.components
        parts = self._plugins.components(*(refs[k] for k in INFERENCE_KINDS))
        return parts, self.profile(refs, parts, candidate.keep_ratios)

    def profile(
        self, refs: Mapping[str, ComponentRef], parts: Components, keep_ratios: Sequence[float] | None
    ) -> Profile:
        """The cascade's family of schedules; calibrated ones are made once."""
        cascade, shape = parts.cascade, self.base.shape
        key = _inference_key(refs)
        if key in self._profiles:
            return self._profiles[key]
        evaluate: Evaluate | None = None
        if cascade.needs_model and self._make_evaluate is not None:
            evaluate = self._make_evaluate(parts, self.base)
        low = self._config.space.keep_ratio.low if cascade.searched else 0.0
        try:
            family = cascade.profile(ScheduleRequest(shape, keep_ratios, low, evaluate))
        except ValueError as error:
            raise PluginError(f"cascade {refs['cascade'].name!r}: {error}") from None
        if cascade.needs_model:
            self._profiles[key] = family
        return family


def _inference_key(refs: Mapping[str, ComponentRef]) -> str:
    return "/".join(refs[k].key for k in INFERENCE_KINDS)


def candidate_of(baseline: Baseline) -> Candidate:
    """A baseline as a point without ratios."""
    return Candidate({}, {kind: getattr(baseline, kind)[0] for kind in KINDS}, None, baseline.widths)


def scored_kinds(config: RunConfig, shape: ModelShape) -> dict[str, set[str]]:
    """The kinds of unit groups whose importance decides something, by the criterion's canonical text."""
    asked: dict[str, set[str]] = {}
    for refs, widths in (
        (config.space.importance, config.space.widths),
        *((b.importance, b.widths) for b in config.baselines),
    ):
        kinds = Widths(widths, shape).kinds_scored()
        for ref in refs if kinds else ():
            asked.setdefault(ref.key, set()).update(kinds)
    return asked


def check_budgets(config: RunConfig, scheduler: Scheduler, space: SearchSpace, plugins: Plugins) -> None:
    """Refuse a run some part of which could never be made, before anything is measured.

    Raises:
        BudgetError: a budget is out of reach, naming the reachable range.
        PluginError: a component does not fit the model.
    """
    searched = space.corners() if config.search.trials else []
    baselines = {b.name: candidate_of(b) for b in config.baselines}
    for candidate in [*searched, *baselines.values()]:
        _check_training(candidate, scheduler.base, plugins)
        if config.space.fewer_heads == "fuse":
            _check_fusion(candidate, scheduler.base)
    for budget in scheduler.budgets:
        for candidate in searched:
            if not _needs_model(candidate, plugins):
                scheduler.plan(candidate, budget)
        for name, candidate in baselines.items():
            try:
                if not _needs_model(candidate, plugins):
                    scheduler.plan(candidate, budget)
            except BudgetError as error:
                raise BudgetError(
                    f"baseline {name!r}: {error}, or leave the baseline out (--set baselines=[] leaves out all)"
                ) from None


def _needs_model(candidate: Candidate, plugins: Plugins) -> bool:
    needs: bool = plugins.build("cascade", candidate.components["cascade"]).needs_model
    return needs


def _check_training(candidate: Candidate, plan: CompressionPlan, plugins: Plugins) -> None:
    """That importance and distiller can be built, and that the distiller serves this model."""
    plugins.build("importance", candidate.components["importance"])
    ref = candidate.components["distiller"]
    try:
        plugins.build("distiller", ref).blocks(DistillContext(plan, plan.shape))
    except ValueError as error:
        raise PluginError(f"distiller {ref.name!r}: {error}") from None


def _check_fusion(candidate: Candidate, plan: CompressionPlan) -> None:
    if candidate.widths.heads != 1.0 and any(b.qk_norm_vectors for b in plan.shape.blocks):
        raise ConfigError(
            f"heads of {plan.shape.name} cannot be fused, as they share the norm of queries and keys; set "
            "space.fewer_heads: remove"
        )

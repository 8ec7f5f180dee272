"""From components and keep ratios to a plan on a budget. No torch, no optuna."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ucc_search.budget import Budget, budgets, project, whole_tokens, with_tokens
from ucc_search.config import Baseline, RunConfig
from ucc_search.costs import cost
from ucc_search.errors import BudgetError, PluginError
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef, Components, ScheduleRequest
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins
from ucc_search.space import KINDS, SearchSpace, spares_last_block

Profile = Callable[[float], Sequence[float]]
Evaluate = Callable[[Sequence[int]], float]
MakeEvaluate = Callable[[Components, CompressionPlan], Evaluate]


class Scheduler:
    """Turns components and keep ratios into a plan on a budget.

    Args:
        make_evaluate: gives the accuracy function that calibrated cascades ask; None where no model
            is loaded.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        plugins: Plugins,
        make_evaluate: MakeEvaluate | None = None,
    ) -> None:
        self._config, self._plugins, self._make_evaluate = config, plugins, make_evaluate
        dense = CompressionPlan.identity(shape)
        self.base = dense.replace(head_tokens_only=spares_last_block(config.space, shape))
        self.dense_cost = cost(dense)
        self.budgets = budgets(config.budget, self.dense_cost)
        self._profiles: dict[str, Profile] = {}

    def plan(
        self, refs: Mapping[str, ComponentRef], keep_ratios: Sequence[float] | None, budget: Budget
    ) -> CompressionPlan:
        """The projected plan.

        Raises:
            BudgetError: the cascade cannot meet the budget.
            PluginError: the components do not fit the model.
        """
        parts = self._plugins.components(*(refs[k] for k in INFERENCE_KINDS))
        return project(self.base, self.profile(refs, parts, keep_ratios), budget, parts)

    def smallest(
        self, refs: Mapping[str, ComponentRef], keep_ratios: Sequence[float] | None
    ) -> CompressionPlan:
        """The cheapest plan that the cascade can make."""
        parts = self._plugins.components(*(refs[k] for k in INFERENCE_KINDS))
        family = self.profile(refs, parts, keep_ratios)
        return with_tokens(self.base, whole_tokens(family(1.0), self.base.shape.tokens))

    def profile(
        self, refs: Mapping[str, ComponentRef], parts: Components, keep_ratios: Sequence[float] | None
    ) -> Profile:
        """The cascade's family of schedules; calibrated ones are made once."""
        cascade, shape = parts.cascade, self.base.shape
        key = repr([sorted(refs[k].to_dict().items()) for k in INFERENCE_KINDS])
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


def components_of(baseline: Baseline) -> dict[str, ComponentRef]:
    """The four components of a baseline."""
    return {kind: getattr(baseline, kind)[0] for kind in KINDS}


def check_budgets(config: RunConfig, scheduler: Scheduler, space: SearchSpace, plugins: Plugins) -> None:
    """Refuse a run some part of which could never meet a budget, before anything is measured.

    Raises:
        BudgetError: naming the reachable range.
    """
    for budget in scheduler.budgets:
        for candidate in space.corners():
            cascade = plugins.build("cascade", candidate.components["cascade"])
            if not cascade.needs_model:
                scheduler.plan(candidate.components, candidate.keep_ratios, budget)
        for baseline in config.baselines:
            refs = components_of(baseline)
            plugins.build("distiller", refs["distiller"])
            if plugins.build("cascade", refs["cascade"]).needs_model:
                continue
            try:
                scheduler.plan(refs, None, budget)
            except BudgetError as error:
                raise BudgetError(f"baseline {baseline.name!r}: {error}, or leave the baseline out") from None

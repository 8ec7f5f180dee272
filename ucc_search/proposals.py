"""What the search proposes: a sampler per budget, brought back to where it was when a run is resumed.

Proposal number n follows from the seed and from what had been measured when it was made. Rows hold
both (`proposal`, `known`), so a resumed run asks and tells its samplers in the order of the run that
was stopped: with one worker it goes on exactly as that run would have.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ucc_search.budget import LATENCY, Budget
from ucc_search.config import RunConfig
from ucc_search.costs import cost
from ucc_search.errors import BudgetError
from ucc_search.interfaces import (
    INFERENCE_KINDS,
    ComponentRef,
    Components,
    Dimension,
    Measured,
    SamplerRequest,
)
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.proposer import Proposer
from ucc_search.schedule import Scheduler
from ucc_search.space import Candidate, SearchSpace
from ucc_search.store import RunStore, TrialRow, heal_journal, plan_key

BUDGET = "budget"
"""The dimension that numbers the targets, where one study covers a range of them."""
_REPROPOSE = 20
_SPENT = 0.99  # a proposal that leaves more of its budget unused is made again


@dataclass(frozen=True)
class Proposal:
    """A plan to measure."""

    number: int
    known: int
    """How many proposals had been measured when this one was made."""
    budget: Budget
    candidate: Candidate
    """Its parameters are those of the plan, not those that were sampled."""
    plan: CompressionPlan


class Proposals:
    """Samplers of one run, in the state in which its rows leave them.

    Args:
        store: its rows say what was measured; the study for optuna-dashboard is kept beside them.
        starts: points to begin with, by the budget's label, before the hand-made ones.
    """

    def __init__(
        self,
        config: RunConfig,
        plugins: Plugins,
        scheduler: Scheduler,
        space: SearchSpace,
        store: RunStore,
        rows: Sequence[TrialRow],
        starts: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._config, self._plugins, self._scheduler, self._space = config, plugins, scheduler, space
        self._store, self._budgets = store, scheduler.budgets
        self._seen: set[str] = set()
        self._known = 0
        with store.writing():
            heal_journal(store.path / JOURNAL)
            self._proposers = self._make_proposers(starts)
        self._lost = self._replay(rows)

    def _make_proposers(self, starts: Mapping[str, Mapping[str, Any]]) -> dict[str, Proposer]:
        """By the budget's label: one for each, or one for all of a range."""
        budgets, known_good = self._budgets, self._space.known_good()
        if not self._config.budget.one_study:
            return {
                b.label: self._proposer(
                    b.label, i, [*([starts[b.label]] if b.label in starts else []), *known_good]
                )
                for i, b in enumerate(budgets)
            }
        chosen = [{**starts[b.label], BUDGET: i} for i, b in enumerate(budgets) if b.label in starts]
        proposer = self._proposer(f"{budgets[0].label} to {budgets[-1].label}", None, [*chosen, *known_good])
        return {b.label: proposer for b in budgets}

    def _proposer(self, label: str, index: int | None, starts: Sequence[Mapping[str, Any]]) -> Proposer:
        """A study; of all budgets, as one dimension more, where no index is given."""
        search, count = self._config.search, len(self._budgets)
        whole = [Dimension(BUDGET, 0, count - 1, step=1)] if index is None else []
        request = SamplerRequest(
            dimensions=[*self._space.dimensions, *whole],
            maximize=[search.rungs[0].rung == "train", *([False] if index is None else [])],
            seed=search.seed + 1000 * (index or 0),
            trials=search.trials if index is None else -(-search.trials // count),
            starts=starts,
            project=functools.partial(self._projected, index),
        )
        return Proposer(
            self._plugins.build("sampler", search.sampler),
            request,
            storage=self._store.path / JOURNAL,
            study=f"{self._config.name} {label}",
        )

    def __iter__(self) -> Iterator[Proposal]:
        """What is left to measure: first what was in flight when the run was stopped."""
        while self._lost:
            yield self._lost.pop(0)
        while self._next < self._config.search.trials:
            self._next += 1
            yield self._make(self._next - 1)

    def _replay(self, rows: Sequence[TrialRow]) -> list[Proposal]:
        """Ask and tell as the stopped run did; returns the proposals that it lost."""
        # Runs from before proposals were numbered had them measured in the order of their rows.
        made = {
            i if r.proposal is None else r.proposal: i if r.known is None else r.known
            for i, r in enumerate(rows)
        }
        self._next = max(made, default=-1) + 1
        lost = []
        for number in range(self._next):
            later = next(n for n in range(number, self._next) if n in made)
            while self._known < made[later]:
                self.tell(rows[self._known])
            proposal = self._make(number)
            if number not in made:
                lost.append(proposal)
        while self._known < len(rows):
            self.tell(rows[self._known])
        return lost

    def _make(self, number: int) -> Proposal:
        """A point on the budget, preferably one that was not measured yet."""
        budget = self._budgets[number % len(self._budgets)]
        for _ in range(_REPROPOSE):
            params = self._proposers[budget.label].propose()
            budget = self._budgets[params[BUDGET]] if BUDGET in params else budget
            candidate = self._space.decode(params)
            plan = self._scheduler.plan(candidate, budget)
            signature = _signature(plan_key(plan), _dicts(candidate.components), budget.label)
            if signature not in self._seen and self._spends(budget, candidate, plan):
                break
        self._seen.add(signature)
        measured = replace(candidate, params=self._space.at_plan(params, plan))
        return Proposal(number, self._known, budget, measured, plan)

    def _projected(self, index: int | None, point: Mapping[str, Any]) -> dict[str, Any] | None:
        """Where a proposal would be measured; None if it cannot meet the budget."""
        budget = self._budgets[point[BUDGET] if index is None else index]
        try:
            return self._space.at_plan(point, self._scheduler.plan(self._space.decode(point), budget))
        except BudgetError:
            return None

    def _spends(self, budget: Budget, candidate: Candidate, plan: CompressionPlan) -> bool:
        """Whether the plan uses the budget up; few tokens in few blocks make a coarse lattice.

        Where there are other limits, MACs need not be the one that is used up.
        """
        if budget.limits:
            return True
        parts = self._parts(candidate)
        return budget.max_macs is None or cost(plan, parts).macs >= _SPENT * min(
            budget.max_macs, cost(self._scheduler.largest(candidate), parts).macs
        )

    def _parts(self, candidate: Candidate) -> Components:
        return self._plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))

    def tell(self, row: TrialRow) -> None:
        """Learn from a measured proposal, and see that the study on disk has it."""
        self._known += 1
        self._seen.add(_signature(row.plan_key, row.components, row.target))
        value = row.kl if row.rung == "zero-shot" else row.accuracy
        values = [value] if value is not None and row.state != "failed" else None
        if values and self._config.budget.one_study:
            weights = row.params / self._scheduler.dense_cost.params
            values.append(weights if self._config.budget.targets()[0] == "params" else row.macs_ratio)
        attributes = {
            "trial": row.id,
            "macs": row.macs,
            "macs_percent": round(100 * row.macs_ratio, 2),
            "tokens": row.tokens,
            "accuracy": row.accuracy,
            "kl": row.kl,
        }
        budget = next(b for b in self._budgets if b.label == row.target)
        measured = Measured(row.params_searched, values, self._over(budget, row))
        with self._store.writing():
            self._proposers[row.target].tell(measured, attributes)

    def _over(self, budget: Budget, row: TrialRow) -> dict[str, float]:
        """By limit, how far over it a trial is; what the row does not hold is priced again."""
        over = budget.over(row.macs, row.params)
        for limit in budget.limits:
            if limit.name == LATENCY and row.latency_ms_predicted is not None:
                value = row.latency_ms_predicted  # by the table of that day
            else:
                parts = self._parts(self._space.decode(row.params_searched))
                value = limit.metric.value(self._store.plan(row.id), parts)
            over[limit.name] = limit.over(value)
        return over


JOURNAL = "study.journal"
"""Optuna's own form of the study, which optuna-dashboard opens; derived from the rows."""


def _dicts(refs: Mapping[str, ComponentRef]) -> dict[str, Any]:
    return {kind: ref.to_dict() for kind, ref in refs.items()}


def _signature(key: str, components: Mapping[str, Any], target: str) -> str:
    """Equal for trials that would measure the same thing."""
    return key + repr(sorted((k, sorted(v.items())) for k, v in components.items())) + target

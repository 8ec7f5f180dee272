"""What is measured next, and what is made of it. Decides; runs nothing; imports neither torch nor ray.

A run measures the baselines and the search's proposals on the first rung, then trains the baselines
and the promoted proposals. Everything that was finished is in the store, so a resumed run goes on
from there.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from ucc_search.analysis import aggregate_seeds, quality, usable
from ucc_search.budget import Budget
from ucc_search.config import Baseline, RunConfig
from ucc_search.costs import cost, saved_macs
from ucc_search.errors import BudgetError
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef, Measured, SamplerRequest
from ucc_search.observers import Observers
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.proposer import Proposer
from ucc_search.schedule import Scheduler, candidate_of
from ucc_search.space import KINDS, Candidate, SearchSpace
from ucc_search.store import RunStore, TrialRow, plan_key

_REPROPOSE = 20
_SPENT = 0.99  # a proposal that leaves more of its budget unused is made again


@dataclass(frozen=True)
class Job:
    """One measurement to make."""

    id: int
    rung: str
    origin: str
    method: str
    budget: Budget
    seed: int
    plan: CompressionPlan
    components: Mapping[str, ComponentRef]
    params: Mapping[str, Any]
    parent: int | None = None
    scratch: bool = False  # start from random weights
    factorize: str = "plain"  # how ranks are lowered, see `config.Factorization`

    def to_dict(self) -> dict[str, Any]:
        """What a worker needs, as JSON."""
        return {
            "id": self.id,
            "rung": self.rung,
            "origin": self.origin,
            "seed": self.seed,
            "scratch": self.scratch,
            "factorize": self.factorize,
            "plan": self.plan.to_dict(),
            "components": {k: r.to_dict() for k, r in self.components.items()},
        }


class Campaign:
    """Hands out jobs and files their outcomes.

    Args:
        store: holds what is already finished.
        starts: points to begin with, by the budget's label, before the hand-made ones.
        observers: are told of every trial that is filed.
    """

    def __init__(
        self,
        config: RunConfig,
        plugins: Plugins,
        scheduler: Scheduler,
        space: SearchSpace,
        store: RunStore,
        starts: Mapping[str, Mapping[str, Any]] | None = None,
        observers: Observers | None = None,
    ) -> None:
        self._observers = observers or Observers(())
        self._starts = starts or {}
        self.config, self.plugins, self.scheduler, self.space = config, plugins, scheduler, space
        self.store = store
        self._rows = store.rows()
        self._next_id = store.next_id()
        self._open: dict[int, Job] = {}
        self._proposers = self._make_proposers()
        self._seen = {
            _signature(r.plan_key, r.components) + r.target for r in self._rows if r.origin == "search"
        }
        self._issued = sum(1 for r in self._rows if r.origin == "search" and r.parent is None)
        self._stages: Iterator[Job | None] = self._all_jobs()

    @property
    def rows(self) -> list[TrialRow]:
        return self._rows

    def next_job(self) -> Job | None:
        """The next job; None while the ones in flight must finish first.

        Raises:
            StopIteration: there is no more.
        """
        job = next(self._stages)
        if job is not None:
            self._open[job.id] = job
        return job

    def _all_jobs(self) -> Iterator[Job | None]:
        rung = self.config.search.fidelity
        yield from self._baselines(rung)
        yield from self._proposals(rung)
        yield from self._dense()
        while self._open:
            yield None
        if rung == "zero-shot" and self.config.search.promote:
            yield from self._baselines("train")
            yield from self._promotions()
            while self._open:
                yield None

    def _baselines(self, rung: str) -> Iterator[Job]:
        done = {(r.method, r.target, r.rung, r.seed) for r in self._rows}
        for baseline in self.config.baselines:
            candidate = candidate_of(baseline)
            for budget in self.scheduler.budgets:
                seeds = self.config.search.seeds if rung == "train" else (self.config.search.seed,)
                missing = [s for s in seeds if (baseline.name, budget.label, rung, s) not in done]
                if missing:
                    plan = self.scheduler.plan(candidate, budget)
                for seed in missing:
                    refs = candidate.components
                    job = self._job(rung, "baseline", baseline.name, budget, seed, plan, refs, {})
                    scratch = baseline.weights == "random"
                    yield replace(job, scratch=scratch, factorize=baseline.factorize)

    def _proposals(self, rung: str) -> Iterator[Job]:
        search = self.config.search
        while self._issued < search.trials:
            budget = self.scheduler.budgets[self._issued % len(self.scheduler.budgets)]
            self._issued += 1
            candidate, plan = self._propose(budget)
            yield self._job(
                rung, "search", "search", budget, search.seed, plan, candidate.components, candidate.params
            )

    def _propose(self, budget: Budget) -> tuple[Candidate, CompressionPlan]:
        """A point on the budget, preferably one that was not measured yet."""
        for _ in range(_REPROPOSE):
            params = self._proposers[budget.label].propose()
            candidate = self.space.decode(params)
            plan = self.scheduler.plan(candidate, budget)
            signature = _signature(plan_key(plan), _dicts(candidate.components)) + budget.label
            if signature not in self._seen and self._spends(budget, candidate, plan):
                break
        self._seen.add(signature)
        return replace(candidate, params=self.space.at_plan(params, plan)), plan

    def _projected(self, budget: Budget, point: Mapping[str, Any]) -> dict[str, Any] | None:
        """Where a proposal would be measured; None if it cannot meet the budget."""
        try:
            return self.space.at_plan(point, self.scheduler.plan(self.space.decode(point), budget))
        except BudgetError:
            return None

    def _spends(self, budget: Budget, candidate: Candidate, plan: CompressionPlan) -> bool:
        """Whether the plan uses the budget up; few tokens in few blocks make a coarse lattice."""
        parts = self.plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))
        return budget.max_macs is None or cost(plan, parts).macs >= _SPENT * min(
            budget.max_macs, cost(self.scheduler.largest(candidate), parts).macs
        )

    def _dense(self) -> Iterator[Job]:
        """The uncompressed model: the reference that every table shows."""
        if not any(r.origin == "dense" for r in self._rows):
            search = self.config.search
            rung = "train" if search.fidelity == "train" or search.promote else "zero-shot"
            refs = self.space.corners()[0].components
            dense = CompressionPlan.identity(self.scheduler.base.shape)
            yield self._job(rung, "dense", "dense", Budget("dense"), search.seed, dense, refs, {})

    def _promotions(self) -> Iterator[Job]:
        done = {(r.parent, r.seed) for r in self._rows if r.parent is not None}
        rows = {r.id: r for r in self._rows}
        by_id = {b.label: b for b in self.scheduler.budgets}
        for trial in promoted(self._rows, self.config.search.promote):
            row = rows[trial]
            plan = CompressionPlan.from_json((self.store.folder(trial) / "plan.json").read_text())
            refs = _refs(row.components)
            for seed in self.config.search.seeds:
                if (trial, seed) not in done:
                    yield self._job(
                        "train",
                        "search",
                        "search",
                        by_id[row.target],
                        seed,
                        plan,
                        refs,
                        row.params_searched,
                        trial,
                    )

    def _job(
        self,
        rung: str,
        origin: str,
        method: str,
        budget: Budget,
        seed: int,
        plan: CompressionPlan,
        refs: Mapping[str, ComponentRef],
        params: Mapping[str, Any],
        parent: int | None = None,
    ) -> Job:
        self._next_id += 1
        number, how = self._next_id - 1, self.config.space.factorize
        return Job(number, rung, origin, method, budget, seed, plan, refs, params, parent, factorize=how)

    def finish(self, job_id: int, outcome: Mapping[str, Any]) -> TrialRow:
        """File what a worker measured (or how it failed)."""
        job = self._open.pop(job_id)
        row = self._row(job, outcome)
        self.store.write_trial(
            job.id, dict(job.params), job.plan, outcome.get("metrics") or (), outcome.get("files")
        )
        self.store.append(row)
        self._rows.append(row)
        self._observers.trial_finished(row.to_dict())
        if job.origin == "search" and job.parent is None:
            self._tell(row, record=True)
        return row

    def _row(self, job: Job, outcome: Mapping[str, Any]) -> TrialRow:
        parts = self.plugins.components(*(job.components[k] for k in INFERENCE_KINDS))
        price = cost(job.plan, parts)
        saved = saved_macs(job.plan, parts)
        narrowed = saved["widths"] > 0 or saved["depth"] > 0
        return TrialRow(
            id=job.id,
            state=outcome["state"],
            method=job.method,
            origin=job.origin,
            rung=job.rung,
            fidelity=outcome.get("steps", 0),
            seed=job.seed,
            target=job.budget.label,
            macs=price.macs,
            params=price.params,
            macs_ratio=price.macs / self.scheduler.dense_cost.macs,
            limit_macs=job.budget.max_macs,
            feasible=job.budget.holds(price),
            tokens=list(job.plan.tokens),
            plan_key=plan_key(job.plan),
            kl=outcome.get("kl"),
            accuracy=outcome.get("accuracy"),
            test_accuracy=outcome.get("test_accuracy"),
            loss=outcome.get("loss"),
            failure=outcome.get("failure"),
            error=outcome.get("error"),
            scorer=job.components["scorer"].name,
            aggregator=job.components["aggregator"].name,
            cascade=job.components["cascade"].name,
            distiller=job.components["distiller"].name,
            importance=job.components["importance"].name if narrowed else "",
            **{f"saved_{k}": v / self.scheduler.dense_cost.macs for k, v in saved.items()},
            components=_dicts(job.components),
            identities={kind: self.plugins.identity(kind, job.components[kind].name) for kind in KINDS},
            params_searched=dict(job.params),
            parent=job.parent,
            seconds=outcome.get("seconds", 0.0),
            compute_seconds=outcome.get("compute_seconds", 0.0),
            finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _tell(self, row: TrialRow, *, record: bool) -> None:
        value = row.kl if row.rung == "zero-shot" else row.accuracy
        values = [value] if value is not None and row.state == "ok" else None
        attributes = {
            "trial": row.id,
            "macs": row.macs,
            "macs_percent": round(100 * row.macs_ratio, 2),
            "tokens": row.tokens,
            "accuracy": row.accuracy,
            "kl": row.kl,
        }
        budget = next(b for b in self.scheduler.budgets if b.label == row.target)
        over = budget.over(row.macs, row.params)
        self._proposers[row.target].tell(
            Measured(row.params_searched, values, over), attributes, record=record
        )

    def _make_proposers(self) -> dict[str, Proposer]:
        search, told = self.config.search, defaultdict(list)
        for row in self._rows:
            if row.origin == "search" and row.parent is None:
                told[row.target].append(row)
        self._proposers = {}
        for index, budget in enumerate(self.scheduler.budgets):
            label = budget.label
            starts = [*([self._starts[label]] if label in self._starts else []), *self.space.known_good()]
            request = SamplerRequest(
                dimensions=self.space.dimensions,
                maximize=[search.fidelity == "train"],
                seed=search.seed + 1000 * index + 100_000 * len(told[label]),
                trials=-(-search.trials // len(self.scheduler.budgets)),
                starts=() if told[label] else starts,
                project=functools.partial(self._projected, budget),
            )
            self._proposers[label] = Proposer(
                self.plugins.build("sampler", search.sampler),
                request,
                storage=self.store.path / "study.journal",
                study=f"{self.config.name} {label}",
            )
            for row in told[label]:
                self._tell(row, record=False)
        return self._proposers


def promoted(rows: Sequence[TrialRow], count: int) -> list[int]:
    """The best `count` zero-shot proposals per budget and set of components, by KL.

    Zero-shot quality ranks schedules within a method, but not one method against another, so each
    set of components promotes its own.
    """
    groups: dict[tuple[str, ...], list[tuple[float, int]]] = defaultdict(list)
    searched = [r for r in usable(rows, "zero-shot") if r.origin == "search"]
    for point in aggregate_seeds(searched):
        group = (point.target, point.scorer, point.aggregator, point.cascade, point.distiller)
        groups[group].append((-quality(point), point.id))
    return [trial for members in groups.values() for _, trial in sorted(members)[:count]]


def _dicts(refs: Mapping[str, ComponentRef]) -> dict[str, Any]:
    return {kind: ref.to_dict() for kind, ref in refs.items()}


def _refs(components: Mapping[str, Any]) -> dict[str, ComponentRef]:
    found = {kind: ComponentRef.from_dict(value) for kind, value in components.items()}
    # Runs from before widths were pruned name no importance, and need none.
    return {"importance": Baseline.model_fields["importance"].default[0], **found}


def _signature(key: str, components: Mapping[str, Any]) -> str:
    """Equal for trials that would measure the same thing."""
    return key + repr(sorted((k, sorted(v.items())) for k, v in components.items()))


def describe(row: TrialRow) -> str:
    """One line for a finished trial."""
    if row.state != "ok":
        return f"[{row.id}] {row.method} {row.target} {row.rung}: failed ({row.failure}: {row.error})"
    values = {"KL": row.kl, "accuracy": row.accuracy}
    shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None)
    return f"[{row.id}] {row.method} {row.target} {row.rung}: {shown}  ({100 * row.macs_ratio:.1f}% of MACs)"

"""What is measured next, and what is made of it. Decides; runs nothing; imports neither torch nor ray.

A run measures the baselines and the search's proposals on the lowest rung of its ladder, then the
proposals that climb on every further rung, and the baselines again on the last. Everything that was
finished is in the store, so a resumed run goes on from there; and what was measured once on the lowest
rung is answered from there.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ucc_search.binding import identities
from ucc_search.budget import LATENCY, Budget
from ucc_search.config import Baseline, RunConfig
from ucc_search.costs import cost, saved_macs
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef
from ucc_search.ladder import Level, climbing, levels
from ucc_search.observers import Observers
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.proposals import Proposals
from ucc_search.schedule import Scheduler, candidate_of
from ucc_search.shapes import train_images
from ucc_search.space import KINDS, SearchSpace
from ucc_search.store import RunStore, TrialRow, disk_error, plan_key

STATES = "states"
"""Folder for trainings that were stopped at a rung, while they may still climb."""


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
    steps: int = 0  # that training ends at; 0 without training
    stops: bool = False  # before the end of the schedule
    resume: Path | None = None  # the training to go on with
    save: Path | None = None  # where to leave what is needed to go on
    parent: int | None = None
    scratch: bool = False  # start from random weights
    factorize: str = "plain"  # how ranks are lowered, see `config.Factorization`
    latency: Mapping[str, Any] | None = None  # how to time the finished model, see `Latency.to_measure`
    proposal: int | None = None
    known: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a worker needs, as JSON."""
        return {
            "id": self.id,
            "rung": self.rung,
            "origin": self.origin,
            "seed": self.seed,
            "scratch": self.scratch,
            "factorize": self.factorize,
            "latency": self.latency,
            "steps": self.steps,
            "resume": None if self.resume is None else str(self.resume),
            "save": None if self.save is None else str(self.save),
            "plan": self.plan.to_dict(),
            "components": {k: r.to_dict() for k, r in self.components.items()},
        }


class Campaign:
    """Hands out jobs and files their outcomes.

    Args:
        store: holds what is already finished.
        starts: points to begin with, by the budget's label, before the hand-made ones.
        observers: are told of every trial that is filed.
        log: gets a line for each.
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
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._observers, self._log = observers or Observers(()), log
        self.config, self.plugins, self.scheduler, self.space = config, plugins, scheduler, space
        self.store = store
        self._rows = store.rows()
        # Jobs come in one order, killed or not: the ids that are free are those of the jobs that are missing.
        taken = {r.id for r in self._rows}
        self._ids = (n for n in itertools.count() if n not in taken)
        self._open: dict[int, Job] = {}
        self._under_way: dict[int, str] = {}  # what the open jobs of the lowest rung measure
        self._fixed = {b.name: b for b in config.baselines}
        self._known: dict[str, TrialRow] = {}
        for row in self._rows:
            self._remember(row)
        self._levels = levels(config, train_images(config))
        proposed = [r for r in self._rows if _is_proposal(r)]
        self._proposals = Proposals(config, plugins, scheduler, space, store, proposed, starts or {})
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
        lowest, *higher = self._levels
        yield from self._baselines(lowest)
        yield from self._proposed(lowest)
        yield from self._dense()
        yield from self._wait()
        for below, level in zip(self._levels, higher, strict=False):
            yield from self._baselines(level)
            yield from self._promotions(below, level)
            yield from self._wait()
        shutil.rmtree(self.store.path / STATES, ignore_errors=True)

    def _wait(self) -> Iterator[None]:
        while self._open:
            yield None

    def _baselines(self, level: Level) -> Iterator[Job | None]:
        """Fixed methods are measured without training and trained to the end; nothing stops them halfway."""
        if level.stops:
            return
        search = self.config.search
        seeds = level.seeds if level.rung == "train" else (search.seed,)
        done = {(r.method, r.target, r.rung, r.seed) for r in self._rows}
        for baseline in self.config.baselines:
            candidate = candidate_of(baseline)
            for budget in self.scheduler.budgets:
                missing = [s for s in seeds if (baseline.name, budget.label, level.rung, s) not in done]
                if missing:
                    plan = self.scheduler.plan(candidate, budget)
                for seed in missing:
                    job = Job(
                        next(self._ids),
                        level.rung,
                        "baseline",
                        baseline.name,
                        budget,
                        seed,
                        plan,
                        candidate.components,
                        {},
                        steps=level.steps,
                        scratch=baseline.weights == "random",
                        factorize=baseline.factorize,
                    )
                    yield from self._unless_known(self._timed(level, job))

    def _proposed(self, level: Level) -> Iterator[Job | None]:
        for made in self._proposals:
            candidate = made.candidate
            job = Job(
                next(self._ids),
                level.rung,
                "search",
                "search",
                made.budget,
                self.config.search.seed,
                made.plan,
                candidate.components,
                candidate.params,
                proposal=made.number,
                known=made.known,
            )
            yield from self._unless_known(self._on(level, job))

    def _unless_known(self, job: Job) -> Iterator[Job | None]:
        """The job; or nothing, and the values are those of the trial that measured the same."""
        key = _measurement(self._row(job, {"state": "ok"}), job.factorize, scratch=job.scratch)
        while key in self._under_way.values():
            yield None
        known = self._known.get(key)
        if known is None:
            self._under_way[job.id] = key
            yield job
            return
        measured = ("kl", "accuracy", "test_accuracy", "loss", "latency_ms")
        values = {name: getattr(known, name) for name in measured}
        self._file(self._row(job, {"state": "ok", "same_as": known.id, **values}), job, {})

    def _remember(self, row: TrialRow) -> None:
        """Keep a finished trial's values for whatever would measure the same; a failed one is made again."""
        fixed = self._fixed.get(row.method)
        if row.state == "failed" or row.same_as is not None or (row.origin == "baseline" and fixed is None):
            return
        factorize = fixed.factorize if fixed else self.config.space.factorize
        key = _measurement(row, factorize, scratch=fixed is not None and fixed.weights == "random")
        self._known.setdefault(key, row)

    def _dense(self) -> Iterator[Job]:
        """The uncompressed model: the reference that every table shows."""
        if not any(r.origin == "dense" for r in self._rows):
            refs = self.space.corners()[0].components
            dense = CompressionPlan.identity(self.scheduler.base.shape)
            rung, seed = self._levels[-1].rung, self.config.search.seed
            yield Job(next(self._ids), rung, "dense", "dense", Budget("dense"), seed, dense, refs, {})

    def _promotions(self, below: Level, level: Level) -> Iterator[Job]:
        assert level.keep is not None, "the reader demands it above the lowest rung"
        done = {(r.parent, r.seed) for r in self._rows if r.parent is not None}
        rows = {r.id: r for r in self._rows}
        budgets = {b.label: b for b in self.scheduler.budgets}
        # Fronts are of MACs: budgets of parameters send their own best, one by one.
        together = self.config.budget.one_study and self.config.budget.targets()[0] != "params"
        climbers = climbing(self._rows, below, level.keep, together=together)
        self._forget_all_but({trial for point in climbers for trial in point.trials})
        for point in climbers:
            first = rows[point.id]
            same_seed = {rows[trial].seed: trial for trial in point.trials}
            plan = self.store.plan(point.id)
            for seed in level.seeds:
                if (point.id, seed) in done:
                    continue
                job = Job(
                    next(self._ids),
                    level.rung,
                    "search",
                    "search",
                    budgets[first.target],
                    seed,
                    plan,
                    _refs(first.components),
                    first.params_searched,
                    resume=self._state(same_seed[seed]) if below.stops and seed in same_seed else None,
                    parent=point.id,
                )
                yield self._on(level, job)

    def _on(self, level: Level, job: Job) -> Job:
        """The job at the length of its rung."""
        save = None
        if level.stops:
            save = self._state(job.id)
            with self.store.writing():
                save.parent.mkdir(exist_ok=True)
        how = self.config.space.factorize
        return self._timed(
            level, replace(job, steps=level.steps, stops=level.stops, save=save, factorize=how)
        )

    def _timed(self, level: Level, job: Job) -> Job:
        """The job with what times its model, on the last rung alone."""
        settings, latency = self.config.timing, self.scheduler.latency
        if latency is None or settings is None or not settings.measure or level is not self._levels[-1]:
            return job
        return replace(job, latency=latency.to_measure())

    def _state(self, trial: int) -> Path:
        return (self.store.path / STATES / str(trial)).resolve()

    def _forget_all_but(self, wanted: set[int]) -> None:
        """Trainings that were stopped for good need no state: several times the size of the model, each."""
        for folder in (self.store.path / STATES).glob("*"):
            if folder.name not in map(str, wanted):
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self, job_id: int, outcome: Mapping[str, Any]) -> TrialRow:
        """File what a worker measured (or how it failed).

        Raises:
            RunError: the disk is full, here or where the worker is; nothing is filed then.
        """
        job = self._open.pop(job_id)
        if outcome.get("failure") == "disk_full":
            raise disk_error(self.store.path, str(outcome.get("error")))
        row = self._row(job, outcome)
        self._file(row, job, outcome)
        return row

    def _file(self, row: TrialRow, job: Job, outcome: Mapping[str, Any]) -> None:
        self.store.write_trial(
            job.id, dict(job.params), job.plan, outcome.get("metrics") or (), outcome.get("files")
        )
        self.store.append(row)
        self._rows.append(row)
        self._remember(row)
        self._under_way.pop(job.id, None)
        if job.proposal is not None:
            self._proposals.tell(row)
        if job.resume is not None:
            shutil.rmtree(job.resume, ignore_errors=True)
        self._observers.trial_finished(row.to_dict())
        self._log(describe(row))

    def _row(self, job: Job, outcome: Mapping[str, Any]) -> TrialRow:
        parts = self.plugins.components(*(job.components[k] for k in INFERENCE_KINDS))
        price = cost(job.plan, parts)
        saved = saved_macs(job.plan, parts)
        latency = self.scheduler.latency
        limits = {x.name: x.most for x in job.budget.limits}
        timed = outcome.get("latency_ms")
        if latency is not None and job.origin == "dense":
            timed = latency.table.dense_ms
        narrowed = saved["widths"] > 0 or saved["depth"] > 0
        return TrialRow(
            id=job.id,
            state="stopped" if job.stops and outcome["state"] == "ok" else outcome["state"],
            method=job.method,
            origin=job.origin,
            rung=job.rung,
            fidelity=job.steps,
            seed=job.seed,
            target=job.budget.label,
            macs=price.macs,
            params=price.params,
            macs_ratio=price.macs / self.scheduler.dense_cost.macs,
            limit_macs=job.budget.max_macs,
            feasible=job.budget.admits(job.plan, price, parts),
            tokens=list(job.plan.tokens),
            plan_key=plan_key(job.plan),
            kl=outcome.get("kl"),
            accuracy=outcome.get("accuracy"),
            test_accuracy=outcome.get("test_accuracy"),
            loss=outcome.get("loss"),
            latency_ms=timed,
            latency_ms_predicted=None if latency is None else latency.value(job.plan, parts),
            limit_latency_ms=limits.get(LATENCY),
            failure=outcome.get("failure"),
            error=outcome.get("error"),
            scorer=job.components["scorer"].name,
            aggregator=job.components["aggregator"].name,
            cascade=job.components["cascade"].name,
            distiller=job.components["distiller"].name,
            importance=job.components["importance"].name if narrowed else "",
            **{f"saved_{k}": v / self.scheduler.dense_cost.macs for k, v in saved.items()},
            components=_dicts(job.components),
            identities={
                **{kind: self.plugins.identity(kind, job.components[kind].name) for kind in KINDS},
                **identities(self.config, self.plugins),
            },
            params_searched=dict(job.params),
            parent=job.parent,
            proposal=job.proposal,
            known=job.known,
            same_as=outcome.get("same_as"),
            continued=outcome.get("continued", 0),
            seconds=outcome.get("seconds", 0.0),
            compute_seconds=outcome.get("compute_seconds", 0.0),
            finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _measurement(row: TrialRow, factorize: str, *, scratch: bool) -> str:
    """Equal for trials that would measure the same thing.

    Without training the distiller plays no part, nor does the budget that a plan was made for. With it
    they may not be exchanged: each keeps its own weights.
    """
    kinds = {*INFERENCE_KINDS, *(["importance"] if row.importance else [])}
    trained = [row.method, row.target] if row.rung == "train" else []
    kinds |= {"distiller"} if trained else set()
    parts = sorted((kind, sorted(ref.items())) for kind, ref in row.components.items() if kind in kinds)
    return repr([row.plan_key, row.rung, row.fidelity, row.seed, factorize, scratch, *trained, parts])


def _is_proposal(row: TrialRow) -> bool:
    return row.origin == "search" and row.parent is None


def _dicts(refs: Mapping[str, ComponentRef]) -> dict[str, Any]:
    return {kind: ref.to_dict() for kind, ref in refs.items()}


def _refs(components: Mapping[str, Any]) -> dict[str, ComponentRef]:
    found = {kind: ComponentRef.from_dict(value) for kind, value in components.items()}
    # Runs from before widths were pruned name no importance, and need none.
    return {"importance": Baseline.model_fields["importance"].default[0], **found}


def describe(row: TrialRow) -> str:
    """One line for a finished trial."""
    if row.state == "failed":
        return f"[{row.id}] {row.method} {row.target} {row.rung}: failed ({row.failure}: {row.error})"
    values = {"KL": row.kl, "accuracy": row.accuracy}
    shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if v is not None)
    shown += f"  {row.latency_ms:.3g} ms" if row.latency_ms is not None else ""
    rung = f"{row.rung} (stopped at step {row.fidelity})" if row.state == "stopped" else row.rung
    known = "" if row.same_as is None else f", the same as trial {row.same_as}"
    return (
        f"[{row.id}] {row.method} {row.target} {rung}: {shown}  ({100 * row.macs_ratio:.1f}% of MACs{known})"
    )

"""Whole runs of a tiny model: what is measured, what is kept, and what choices may look at."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter

import optuna
import pytest
from rows import saved_plan
from tiny import tiny_config

from ucc_search import estimate, workbench, worker
from ucc_search.analysis import pareto_front
from ucc_search.campaign import Campaign, Job
from ucc_search.costs import cost
from ucc_search.data import load_data
from ucc_search.errors import ConfigError, RunError
from ucc_search.interfaces import ComponentRef
from ucc_search.ladder import climbing, levels
from ucc_search.live import status_text
from ucc_search.plugins import Plugins
from ucc_search.proposer import Proposer
from ucc_search.runner import Interrupted, exit_code, search
from ucc_search.runs import Run
from ucc_search.schedule import Scheduler
from ucc_search.shapes import model_shape
from ucc_search.space import SearchSpace
from ucc_search.status import run_status
from ucc_search.store import RunStore, TrialRow

KINDS = ("scorer", "aggregator", "cascade")

CONFIG = tiny_config(
    space={
        "scorer": ["class_attention", "random"],
        "distiller": {"name": "logits", "weight": {"low": 0.5, "high": 2.0, "log": True}},
    },
    search={"trials": 8, "seeds": [0, 1]},
    baselines=[{"name": "random"}],
)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def finished(own_cache, tmp_path_factory) -> Run:
    """A run that nothing disturbed; read, never written."""
    return search(CONFIG, out=tmp_path_factory.mktemp("runs") / "undisturbed")


def job_of(row: TrialRow) -> tuple:
    """What a run must do exactly once; proposals differ by their number alone."""
    return row.method, row.target, row.rung, row.seed


def outcome_of(row: TrialRow) -> tuple:
    """All of a row that does not depend on the clock."""
    measured = (row.state, row.kl, row.accuracy, row.test_accuracy, row.loss)
    return (*job_of(row), row.id, row.parent, row.proposal, row.plan_key, row.params_searched, *measured)


def first_rung(run: Run) -> list[TrialRow]:
    return [r for r in run.rows if r.origin == "search" and r.parent is None]


# Rows


def test_a_run_does_what_the_plan_command_promised(finished):
    done = Counter(r.rung for r in finished.rows if r.origin != "dense")
    assert done == estimate.jobs(CONFIG)
    assert [r.id for r in finished.rows] == list(range(len(finished.rows)))
    assert sum(r.origin == "dense" for r in finished.rows) == 1
    assert exit_code(finished) == 0


def test_rows_are_complete(finished):
    for row in finished.rows:
        assert row.state == "ok", row.error
        assert row.kl is not None
        assert math.isfinite(row.kl)
        assert row.accuracy is not None
        assert 0 <= row.accuracy <= 1
        assert row.seconds >= (row.compute_seconds or math.inf) or row.same_as is not None
        assert (row.test_accuracy is not None) == (row.rung == "train")
        trained = row.rung == "train" and row.origin != "dense"
        assert row.fidelity == (2 if trained else 0)
        assert (row.loss is not None) == trained
        assert (finished.path / "trials" / str(row.id) / "arch.json").is_file() == trained


def test_every_trial_is_within_its_budget(finished):
    """Judged again from the plan on disk: the row's own word is not enough."""
    plugins = Plugins.load()
    for row in finished.rows:
        if row.origin == "dense":
            continue
        refs = {kind: ComponentRef(row.components[kind]["name"]) for kind in KINDS}
        macs = cost(saved_plan(finished, row), plugins.components(**refs)).macs
        assert macs == row.macs
        assert row.limit_macs is not None
        assert macs <= row.limit_macs
        assert row.feasible


def test_searched_weights_and_components_are_recorded(finished):
    """Else nobody can tell which loss weights a model was trained with."""
    scorers = ("class_attention", "random")
    for row in finished.rows:
        if row.origin != "search":
            continue
        chosen = row.params_searched
        assert row.scorer == scorers[chosen["scorer"]]
        assert 0.5 <= chosen["distiller.logits.weight"] <= 2.0
        assert row.components["distiller"]["weight"] == chosen["distiller.logits.weight"]
        on_disk = json.loads((finished.path / "trials" / str(row.id) / "params.json").read_text())
        assert on_disk == chosen
    weights = {r.params_searched["distiller.logits.weight"] for r in first_rung(finished)}
    assert len(weights) == CONFIG.search.trials


def test_every_set_of_components_promotes_its_own_best(finished):
    """Zero-shot quality does not rank one scorer against another, so neither may crowd the other out."""
    for target in ("macs=70%", "macs=50%"):
        for scorer in ("class_attention", "random"):
            rows = [r for r in first_rung(finished) if (r.target, r.scorer) == (target, scorer)]
            trained = {
                r.parent
                for r in finished.rows
                if r.parent is not None and (r.target, r.scorer) == (target, scorer)
            }
            assert trained == {min(rows, key=lambda r: r.kl).id}


def test_promoted_models_are_the_ones_that_were_measured(finished):
    rows = {r.id: r for r in finished.rows}
    children = [r for r in finished.rows if r.parent is not None]
    assert {r.seed for r in children} == {0, 1}
    for row in children:
        assert row.plan_key == rows[row.parent].plan_key
        assert row.components == rows[row.parent].components


# Proposals


def test_the_study_on_disk_holds_the_points_that_were_measured(finished):
    """Not those proposed: many are projected onto one plan, and the dashboard would show them as run."""
    backend = optuna.storages.journal.JournalFileBackend(str(finished.path / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    for target in ("macs=70%", "macs=50%"):
        study = optuna.load_study(study_name=f"tiny {target}", storage=storage)
        rows = {r.id: r for r in first_rung(finished) if r.target == target}
        assert [t.user_attrs["trial"] for t in study.trials] == list(rows)
        for trial in study.trials:
            row = rows[trial.user_attrs["trial"]]
            assert trial.params == pytest.approx(row.params_searched)
            assert trial.value == pytest.approx(row.kl)
            plan = saved_plan(finished, row)
            kept = [out / into for out, into in zip(plan.tokens, plan.tokens_in, strict=True)]
            asked = [trial.params[f"keep.{i}"] for i in range(len(kept) - 1)]
            low = CONFIG.space.keep_ratio.low
            assert asked == pytest.approx([max(low, k) for k in kept[:-1]])


def test_a_point_that_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    """Trials are few; here each point is proposed twice in a row."""
    fresh, repeated = Proposer.propose, {}

    def propose(self):
        key = id(self)
        if key in repeated:
            return repeated.pop(key)
        repeated[key] = fresh(self)
        return dict(repeated[key])

    monkeypatch.setattr(Proposer, "propose", propose)
    shorter = CONFIG.search.model_copy(update={"trials": 8, "promote": 0})
    config = CONFIG.model_copy(update={"baselines": (), "search": shorter})
    rows = first_rung(search(config, out=tmp_path / "run"))
    measured = Counter((r.target, r.plan_key, repr(r.components)) for r in rows)
    assert len(rows) == 8
    assert max(measured.values()) == 1


def test_what_was_measured_is_answered_from_the_store(tmp_path, monkeypatch):
    """A space of two plans: a baseline has one of them, and the search soon has both; other distillers
    and budgets that are no tighter than another measure the same without training."""
    measured = []

    def counting(task, measure=worker.measure):
        measured.append(task["job"]["plan"])
        return measure(task)

    monkeypatch.setattr(worker, "measure", counting)
    fixed = {"scorer": "class_attention", "aggregator": "drop", "cascade": "constant"}
    config = tiny_config(
        budget={"macs": ["70%", "100%"]},
        space={**fixed, "distiller": ["none", "logits"]},
        search={"trials": 10, "promote": 0, "sampler": "random"},
        baselines=[{"name": "fixed", **fixed, "distiller": "none"}, {"name": "again", **fixed}],
    )
    path = tmp_path / "run"
    run = search(config, out=path)
    rows = [r for r in run.rows if r.origin != "dense"]
    distinct = {r.plan_key for r in rows}
    assert len(rows) == 2 * 2 + 10
    assert len(measured) == len(distinct) + 1  # the dense model
    by_id = {r.id: r for r in rows}
    answered = [r for r in rows if r.same_as is not None]
    assert len(answered) == len(rows) - len(distinct)
    for row in answered:
        original = by_id[row.same_as]
        assert (row.plan_key, row.kl, row.accuracy) == (original.plan_key, original.kl, original.accuracy)
        assert (row.seconds, original.same_as) == (0.0, None)
    assert run_status(path).answered == len(answered)
    assert f"{len(answered)} answered" in status_text(run_status(path))
    journal = (path / "trials.jsonl").read_text().splitlines(keepends=True)
    (path / "trials.jsonl").write_text("".join(journal[:9]))
    resumed = search(config, out=path, resume=True)
    assert [outcome_of(r) for r in resumed.rows] == [outcome_of(r) for r in run.rows]
    assert [r.same_as for r in resumed.rows] == [r.same_as for r in run.rows]


def test_a_proposal_waits_for_the_same_one_in_flight(tmp_path):
    fixed = {"scorer": "class_attention", "aggregator": "drop", "cascade": "constant"}
    config = tiny_config(budget={"macs": "70%"}, space=fixed, search={"trials": 3, "promote": 0})
    plugins, shape = Plugins.load(), model_shape(config)
    space = SearchSpace.of(config.space, shape, plugins)
    store = RunStore.create(tmp_path / "run", config, {})
    campaign = Campaign(config, plugins, Scheduler(config, shape, plugins), space, store)
    job = campaign.next_job()
    assert campaign.next_job() is None
    campaign.finish(job.id, {"state": "failed", "failure": "timeout", "error": "too slow"})
    again = campaign.next_job()  # a failure answers nothing
    assert again.plan == job.plan
    campaign.finish(again.id, {"state": "ok", "kl": 0.5, "accuracy": 0.5})
    assert campaign.next_job().origin == "dense"
    assert [(r.id, r.same_as, r.kl) for r in campaign.rows] == [(0, None, None), (1, None, 0.5), (2, 1, 0.5)]


def test_a_range_of_budgets_with_baselines_and_a_trained_rung(tmp_path):
    """One study; baselines at every budget; fronts of as many as the budgets would send one by one climb."""
    config = tiny_config(
        budget={"macs": {"low": "40%", "high": "80%", "step": "20%"}},
        search={"trials": 9, "promote": 1},
        baselines=[{"name": "random", "cascade": {"name": "geometric", "first_block": 0}}],
    )
    run = search(config, out=tmp_path / "run")
    targets = {"macs=40%", "macs=60%", "macs=80%"}
    assert all(r.state == "ok" and r.feasible for r in run.rows if r.origin != "dense")
    assert Counter(r.rung for r in run.rows if r.origin == "baseline") == {"zero-shot": 3, "train": 3}
    assert {r.target for r in first_rung(run)} == targets
    assert len(first_rung(run)) == 9
    climbed = [r for r in run.rows if r.parent is not None]
    assert 1 <= len(climbed) <= 3
    assert len({r.parent for r in climbed}) == len(climbed)
    assert Counter(r.rung for r in run.rows if r.origin != "dense") == estimate.jobs(config)
    assert pareto_front(run.rows)


def test_targets_of_parameters_are_one_study_or_a_list(tmp_path):
    config = tiny_config(
        budget={"macs": None, "params": {"low": "60%", "high": "90%", "step": "15%"}},
        space={"cascade": "keep_all", "widths": {"mlp": {"low": 0.25}, "attention": {"low": 0.5}}},
        search={"trials": 6, "promote": 1},
    )
    run = search(config, out=tmp_path / "run")
    rows = [r for r in run.rows if r.origin != "dense"]
    dense = next(r for r in run.rows if r.origin == "dense")
    for row in rows:
        assert row.state == "ok"
        assert row.params <= dense.params * float(row.target.removeprefix("params=").rstrip("%")) / 100
    assert {r.target for r in rows if r.parent is None} == {"params=60%", "params=75%", "params=90%"}
    assert tiny_config(budget={"macs": None, "params": ["60%", "90%"]}).budget.targets() == (
        "params",
        ("60%", "90%"),
    )
    with pytest.raises(ConfigError, match="lists several targets of params beside macs"):
        tiny_config(budget={"macs": "50%", "params": ["60%", "90%"]})


# Interruption


@pytest.mark.parametrize(
    ("where", "after"),
    [("within", 0), ("between", 4), ("within", 12), ("between", 18)],
    ids=["first trial", "proposals", "baselines' training", "promotions' training"],
)
def test_an_interrupted_run_goes_on_with_every_trial_exactly_once(
    where, after, finished, tmp_path, monkeypatch
):
    path, lines = tmp_path / "run", []

    def log(line: str) -> None:
        lines.append(line)
        if where == "between" and sum(text.startswith("[") for text in lines) == after + 1:
            raise KeyboardInterrupt

    if where == "within":
        measure, calls = worker.measure, []

        def stopped(task):
            calls.append(task)
            if len(calls) == after + 1:
                raise KeyboardInterrupt
            return measure(task)

        monkeypatch.setattr(worker, "measure", stopped)
    with pytest.raises(Interrupted, match="--resume"):
        search(CONFIG, out=path, log=log)
    before = Run(path).rows
    # What was answered from the store was not measured.
    counted = [r for r in before if where == "between" or r.same_as is None]
    assert len(counted) == after + (where == "between")
    monkeypatch.undo()
    resumed = search(CONFIG, out=path, resume=True)
    assert resumed.rows[: len(before)] == before
    assert [outcome_of(r) for r in resumed.rows] == [outcome_of(r) for r in finished.rows]
    assert len({r.id for r in resumed.rows}) == len(resumed.rows)
    fixed = [job_of(r) for r in resumed.rows if r.parent is None]
    assert Counter(fixed) == Counter(job_of(r) for r in finished.rows if r.parent is None)
    lowest = levels(CONFIG, 0)[0]
    trained = Counter((r.parent, r.seed) for r in resumed.rows if r.parent is not None)
    assert set(trained) == {(p.id, s) for p in climbing(resumed.rows, lowest, 1) for s in (0, 1)}
    assert set(trained.values()) == {1}
    backend = optuna.storages.journal.JournalFileBackend(str(path / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    told = [
        t.user_attrs["trial"]
        for s in optuna.get_all_study_names(storage)
        for t in optuna.load_study(study_name=s, storage=storage).trials
    ]
    assert sorted(told) == sorted(r.id for r in first_rung(resumed))


@pytest.mark.parametrize("where", ["here", "in the worker"])
def test_a_full_disk_stops_the_run_in_a_sentence_and_loses_nothing(where, finished, tmp_path, monkeypatch):
    path = tmp_path / "run"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def log(line: str) -> None:
        if line.startswith("[4]"):
            monkeypatch.setattr(*((os, "fsync", full) if where == "here" else (worker, "_measure", full)))

    with pytest.raises(RunError, match=r"run: cannot be written \(.*No space left.*--resume"):
        search(CONFIG, out=path, log=log)
    monkeypatch.undo()
    kept = Run(path).rows
    assert len(kept) >= 5
    assert all(r.same_as is not None for r in kept[5:])
    resumed = search(CONFIG, out=path, resume=True)
    assert [outcome_of(r) for r in resumed.rows] == [outcome_of(r) for r in finished.rows]


def test_proposals_in_flight_when_a_run_is_killed_are_made_again_as_they_were(tmp_path):
    """Several at a time, finished in another order: what was lost comes first, on the same plans and ids."""
    config = tiny_config(search={"trials": 12, "promote": 0})
    plugins = Plugins.load()
    shape = model_shape(config)
    space = SearchSpace.of(config.space, shape, plugins)
    store = RunStore.create(tmp_path / "run", config, {})

    def start() -> Campaign:
        return Campaign(config, plugins, Scheduler(config, shape, plugins), space, store)

    def outcome(job: Job) -> dict:
        return {"state": "ok", "kl": float(sum(job.plan.tokens)), "accuracy": 0.5}

    campaign = start()
    jobs = [campaign.next_job() for _ in range(4)]
    for number in (2, 0, 3):
        campaign.finish(jobs[number].id, outcome(jobs[number]))
        jobs.append(campaign.next_job())
    campaign.finish(jobs[5].id, outcome(jobs[5]))
    lost = [jobs[1], jobs[4]]
    again = start()
    made = [again.next_job() for _ in lost]
    assert [(j.id, j.proposal, j.plan, j.params) for j in made] == [
        (j.id, j.proposal, j.plan, j.params) for j in lost
    ]
    assert again.next_job().proposal == jobs[6].proposal, "and then the one that nobody knew of"
    assert again.next_job().proposal == 7
    numbers = [r.known for r in store.rows()]
    assert numbers == [0, 0, 0, 2]


def test_resuming_a_finished_run_measures_nothing(finished, monkeypatch):
    before = finished.rows
    monkeypatch.setattr(worker, "measure", lambda task: pytest.fail("measured again"))
    assert search(CONFIG, out=finished.path, resume=True).rows == before


# What choices may look at


class Watched:
    """A split that counts what is read of it, and lies about its labels."""

    def __init__(self, inner):
        self.inner, self.read = inner, 0

    def __len__(self):
        return len(self.inner)

    def batch(self, indices, *, train=False):
        self.read += len(indices)
        images, labels = self.inner.batch(indices, train=train)
        return images, (labels + 1) % 10


def test_no_choice_depends_on_the_test_split(finished, tmp_path, monkeypatch):
    """Each trained model reads it once, for the report; with other labels every choice is the same."""
    watched: list[Watched] = []

    def load(*arguments):
        splits = load_data(*arguments)
        watched.append(Watched(splits.test))
        return splits.__class__(**{**vars(splits), "test": watched[-1]})

    monkeypatch.setattr(workbench, "load_data", load)
    monkeypatch.setattr(workbench, "_benches", {})
    run = search(CONFIG, out=tmp_path / "run")
    reports = sum(r.test_accuracy is not None for r in run.rows)
    assert sum(w.read for w in watched) == reports * len(watched[0])

    def choices(rows):
        return [(job_of(r), r.parent, r.plan_key, r.params_searched, r.kl, r.accuracy) for r in rows]

    assert choices(run.rows) == choices(finished.rows)
    assert [r.test_accuracy for r in run.rows] != [r.test_accuracy for r in finished.rows]
    assert [p.id for p in pareto_front(run.rows)] == [p.id for p in pareto_front(finished.rows)]
    assert run.pick().id == finished.pick().id


# Training


def test_keep_ratios_are_annealed_down_to_the_plan(tmp_path, monkeypatch):
    """EViT: a pretrained model meets the cuts gradually, and ends on the plan it will be used with."""
    seen: dict[int, list[tuple[int, ...]]] = {}
    set_tokens = workbench.set_tokens

    def spy(model, tokens):
        seen.setdefault(id(model), []).append(tuple(tokens))
        set_tokens(model, tokens)

    monkeypatch.setattr(workbench, "set_tokens", spy)
    config = tiny_config(
        budget={"macs": "50%"},
        search={"trials": 1},
        train={"steps": 8, "anneal": {"start": 0.0, "end": 0.5}},
    )
    run = search(config, out=tmp_path / "run")
    (row,) = [r for r in run.rows if r.parent is not None]
    (schedules,) = seen.values()
    steps, final = schedules[:8], schedules[8:]
    plan = saved_plan(run, row).tokens
    dense = (saved_plan(run, row).shape.tokens,) * len(plan)
    assert steps[0] == dense
    assert len(set(steps)) > 2, "gradually, not at once"
    for block in zip(*steps, strict=True):
        assert list(block) == sorted(block, reverse=True)
    assert steps[4:] == [plan] * 4
    assert set(final) == {plan}

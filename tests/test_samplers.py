"""Samplers behind one name: what they propose, what they learn from, and that they come back after a resume."""

from __future__ import annotations

import math

import pytest
from tiny import tiny_config

from ucc_search.errors import UserError
from ucc_search.interfaces import ComponentRef, Dimension, Measured, SamplerRequest
from ucc_search.plugins import Plugins
from ucc_search.runner import search

PLUGINS = Plugins.load(entry_points=False, environment=False)
KEEP = [Dimension(f"keep.{i}", 0.2, 1.0) for i in range(4)]
BEST = [0.9, 0.5, 0.8, 0.7]


def project(point):
    """Onto ratios whose product is 0.25; pure and idempotent, as the real one."""
    names = [d.name for d in KEEP]
    logs = [math.log(point[n]) for n in names]
    total = sum(logs)
    if total == 0:
        return None
    power = math.log(0.25) / total
    return {**point, **{n: math.exp(v * power) for n, v in zip(names, logs, strict=True)}}


def loss(point):
    return 0.01 + sum((math.log(point[d.name]) - math.log(b)) ** 2 for d, b in zip(KEEP, BEST, strict=True))


def run(name, trials, *, dimensions=KEEP, maximize=(False,), starts=(), seed=0, **params):
    sampler = PLUGINS.build("sampler", ComponentRef(name, params))
    sampler.start(SamplerRequest(dimensions, maximize, seed, trials, starts, project))
    points, values = [], []
    for _ in range(trials):
        proposed = dict(sampler.propose())
        assert set(proposed) == {d.name for d in dimensions}
        point = project(proposed) or proposed
        points.append(point)
        values.append(loss(point))
        told = [-values[-1] if maximize[0] else values[-1], *([0.5] * (len(maximize) - 1))]
        sampler.tell(Measured(point, told, {"macs": 0.0}))
    return points, values


@pytest.mark.parametrize("name", ["shell", "random", "tpe", "nsga2", "nsga3", "gp", "grid"])
def test_every_sampler_measures_the_known_good_points_first_and_repeats_with_its_seed(name):
    start = {"keep.0": 1.0, "keep.1": 0.5, "keep.2": 1.0, "keep.3": 0.5}
    points, values = run(name, 9, starts=[start])
    assert points[0] == pytest.approx(project(start))
    assert (points, values) == run(name, 9, starts=[start])


@pytest.mark.parametrize("name", ["shell", "random", "tpe", "nsga2", "nsga3", "gp", "grid", "cmaes"])
def test_every_sampler_carries_a_whole_search(name, tmp_path):
    if name == "cmaes":
        pytest.importorskip("cmaes")
    config = tiny_config(
        budget={"macs": "60%"}, baselines=[], search={"trials": 6, "promote": 0, "sampler": name}
    )
    rows = [r for r in search(config, out=tmp_path / "run").rows if r.origin == "search"]
    assert len(rows) == 6
    assert all(r.state == "ok" and r.feasible for r in rows)


def test_shell_finds_in_thirty_trials_what_random_does_not_in_ninety():
    ours = sorted(min(run("shell", 30, seed=s)[1]) for s in range(3))
    others = sorted(min(run("random", 90, seed=s)[1]) for s in range(3))
    assert ours[1] < others[1]


def test_shell_maximizes_where_more_is_better_and_outlives_failures():
    assert min(run("shell", 25, maximize=(True,))[1]) < min(run("random", 25)[1])
    sampler = PLUGINS.build("sampler", ComponentRef("shell"))
    sampler.start(SamplerRequest(KEEP, [False], 0, 20, (), project))
    for _ in range(12):
        sampler.tell(Measured(project(dict(sampler.propose())), None, {}))


def test_shell_proposes_what_lies_on_the_budget_and_nothing_twice():
    sampler = PLUGINS.build("sampler", ComponentRef("shell"))
    sampler.start(SamplerRequest(KEEP, [False], 0, 40, (), project))
    seen = set()
    for number in range(24):
        point = dict(sampler.propose())
        assert math.prod(point[d.name] for d in KEEP) == pytest.approx(0.25)
        seen.add(tuple(point.values()))
        if number % 3 == 0:  # two are always in flight
            sampler.tell(Measured(point, [loss(point)], {}))
    assert len(seen) == 24


def test_a_range_of_budgets_is_gone_round_evenly():
    levels = Dimension("budget", 0, 4, step=1)
    points, _ = run("shell", 20, dimensions=[*KEEP, levels], maximize=(False, False))
    visited = [p["budget"] for p in points]
    assert all(visited.count(level) == 4 for level in range(5))


def test_a_grid_that_is_too_large_is_refused():
    many = [Dimension(f"keep.{i}", 0.2, 1.0) for i in range(20)]
    with pytest.raises(UserError, match="a million at most"):
        run("grid", 1, dimensions=many)


def test_constraints_reach_optuna_on_every_trial():
    from ucc_search.builtin.optuna_samplers import closed_trial, distribution

    found = {d.name: distribution(d) for d in KEEP}
    point = dict.fromkeys(found, 0.5)
    trial = closed_trial(Measured(point, [0.1], {"macs": -0.01, "params": 0.2}), found)
    assert trial.constraints == {"macs": -0.01, "params": 0.2}

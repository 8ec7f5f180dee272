"""Runs on Ray clusters: what a worker is sent, where a trial is placed, and nodes that come and go."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rows import row
from tiny import tiny_config

from ucc_search import checkpoints, cluster, tuning, workbench
from ucc_search.errors import ClusterError, ConfigError, DataError, RunError
from ucc_search.parcel import Parcel, folders_of_teacher
from ucc_search.plugins import Plugins
from ucc_search.runner import search
from ucc_search.runs import Run
from ucc_search.saving import load_model
from ucc_search.supervisor import DEATHS
from ucc_search.teachers import load_teacher
from ucc_search.train import combine_statistics

QUICK = {"steps": 2}
NORM = """
from ucc_search import Scorer, hookimpl


class Norm(Scorer):
    def score(self, view):
        return view.patches_BND.norm(dim=-1)


@hookimpl
def ucc_scorers():
    return {"norm": Norm}
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UCC_SEARCH_PLUGINS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


# What a worker is sent


def test_the_teacher_reaches_a_machine_that_has_none(tmp_path, monkeypatch):
    """Trained again there it would be another model, and its candidates could not be compared."""
    config = tiny_config(teacher=QUICK)
    splits = workbench.load_data(config.data)
    teacher = load_teacher(config, splits, log=lambda line: None)
    parcel = Parcel.of(config, Plugins.load(), folders_of_teacher(config))
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "elsewhere"))
    parcel.open()
    again = load_teacher(config, splits, log=pytest.fail)
    assert all(bool((a == b).all()) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))


# Bad input is refused without loading what was loaded before


def test_data_and_teacher_are_loaded_once_and_again_when_they_change(tmp_path, monkeypatch):
    config = tiny_config(budget={"macs": "50%"}, search={"trials": 1, "promote": 0}, teacher=QUICK)
    search(config, out=tmp_path / "first")
    assert checkpoints.was_loaded(config)
    weights = checkpoints.checkpoint_path(config) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert not checkpoints.was_loaded(config)
    assert not checkpoints.was_loaded(tiny_config(data={"select": 0.25}))
    monkeypatch.setattr(workbench, "_benches", {})
    with pytest.raises(Exception, match="safetensors"):
        search(config, out=tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_images_of_another_size_are_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "_benches", {})
    config = tiny_config(data={"image_size": 16}, teacher=None, model={"checkpoint": None})
    with pytest.raises((DataError, ConfigError, AssertionError)):
        search(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Where a trial is placed


BIG, SMALL, GPUS = {"CPU": 8.0}, {"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("settings", "workers", "nodes", "placed", "room"),
    [
        ({}, 1, [SMALL], (1, 0, 1), 2),
        ({}, 2, [SMALL], (2, 0, 1), 1),
        ({"concurrency": 1}, 1, [SMALL], (2, 0, 2), 1),
        ({"concurrency": 1}, 1, [SMALL, SMALL], (2, 0, 2), 1),
        ({"cpus_per_trial": 4}, 2, [BIG, SMALL], (4, 0, 2), 2),
        ({"cpus_per_trial": 2}, 1, [BIG, SMALL], (2, 0, 2), 5),
        ({}, 1, [GPUS, SMALL], (1, 1, 1), 4),
        ({}, 2, [GPUS], (2, 2, 1), 2),
        ({"gpus_per_trial": 0.5}, 1, [GPUS], (1, 0.5, 1), 8),
        ({"gpus_per_trial": 0}, 1, [GPUS], (1, 0, 1), 16),
        ({"concurrency": 3}, 1, [GPUS], (5, 1, 5), 3),
    ],
)
def test_a_trial_takes_what_the_space_file_says_and_the_nodes_have(settings, workers, nodes, placed, room):
    config = tiny_config(search=settings, train={"engine": "deepspeed", "workers": workers})
    one = cluster.placement(config, nodes)
    assert (one.cpus, one.gpus, one.threads) == placed
    assert cluster.at_once(config, one, nodes) == room


def test_a_trial_that_fits_on_no_node_is_refused():
    config = tiny_config(search={"cpus_per_trial": 4})
    with pytest.raises(ClusterError, match=r"needs 4 CPU.* at most 2"):
        cluster.placement(config, [SMALL, SMALL])
    with pytest.raises(ConfigError, match="a GPU for each worker"):
        tiny_config(search={"gpus_per_trial": 1}, train={"engine": "deepspeed", "workers": 2})


# Workers that die


class Stub:
    """A campaign of three jobs, and what was made of them."""

    def __init__(self):
        self.config = tiny_config(search={"trials": 3})
        self.waiting = [SimpleNamespace(id=n, to_dict=dict) for n in range(3)]
        self.done: list[tuple[int, str]] = []

    def next_job(self):
        if not self.waiting:
            raise StopIteration
        return self.waiting.pop(0)

    def finish(self, job, outcome):
        self.done.append((job, outcome["state"]))
        return row(job, state=outcome["state"], failure=outcome.get("failure"))


@pytest.fixture
def searcher(monkeypatch):
    stub, alive = Stub(), {"a": SMALL, "b": SMALL}
    monkeypatch.setattr(tuning, "nodes", lambda: dict(alive))
    made = tuning.CampaignSearcher(stub, cluster.Placement(1, 0, 1), lambda line: None)
    made.stub, made.alive = stub, alive
    return made


def test_lost_nodes_cost_no_trial(searcher):
    for attempt in range(5):
        searcher.alive["c"] = SMALL
        searcher._seen = (0.0, {})
        assert searcher.suggest(f"t{attempt}")
        del searcher.alive["c"]
        searcher.on_trial_complete(f"t{attempt}", error=True)
    assert searcher.stub.done == []
    searcher.suggest("t5")
    searcher.on_trial_complete("t5", {"state": "ok"})
    assert searcher.stub.done == [(0, "ok")]


def test_a_trial_that_takes_its_worker_down_again_and_again_has_failed(searcher):
    for attempt in range(DEATHS):
        assert searcher.stub.done == []
        searcher.suggest(f"t{attempt}")
        searcher.on_trial_complete(f"t{attempt}", error=True)
    assert searcher.stub.done == [(0, "failed")]


def test_a_node_that_is_missed_only_later_is_to_blame_all_the_same(searcher):
    for attempt in range(DEATHS):
        searcher.suggest(f"t{attempt}")
        if attempt == DEATHS - 1:
            del searcher.alive["b"]  # until now, Ray had not noticed
        searcher.on_trial_complete(f"t{attempt}", error=True)
    assert searcher.stub.done == []


def test_a_full_disk_ends_the_run_and_not_the_process(searcher):
    def full(job, outcome):
        raise RunError("cannot be written")

    searcher.stub.finish = full
    searcher.suggest("t0")
    searcher.on_trial_complete("t0", {"state": "ok"})
    assert searcher.suggest("t1") == tuning.Searcher.FINISHED
    assert str(searcher.problem) == "cannot be written"
    assert not searcher.finished


def test_the_cluster_is_filled_and_not_more(searcher):
    assert all(searcher.suggest(f"t{n}") for n in range(3))
    searcher.stub.waiting = [SimpleNamespace(id=9, to_dict=dict), SimpleNamespace(id=10, to_dict=dict)]
    assert searcher.suggest("t3")
    assert searcher.suggest("t4") is None
    searcher.alive["c"] = SMALL
    searcher._seen = (0.0, {})
    assert searcher.suggest("t5")


# Several processes per trial


def test_batch_norms_of_all_ranks_become_those_of_all_images(monkeypatch):
    """Each rank sees its share; what is saved and measured must not depend on which."""
    images = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    ranks = []
    for share in images.chunk(2):
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
        model[0].running_mean.copy_(share.mean((0, 2, 3)))
        model[0].running_var.copy_(share.var((0, 2, 3), unbiased=False))
        ranks.append(model)
    other = torch.stack((ranks[1][0].running_mean, ranks[1][0].running_var + ranks[1][0].running_mean ** 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda moments: moments.add_(other))
    combine_statistics(ranks[0], 2)
    assert torch.allclose(ranks[0][0].running_mean, images.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(ranks[0][0].running_var, images.var((0, 2, 3), unbiased=False), atol=1e-5)


TOGETHER = """
import os
from pathlib import Path

import torch

from ucc_search import Distiller, hookimpl


class Watches(Distiller):
    fails: bool

    def __init__(self, fails=0.0):
        self.fails = fails

    def losses(self, student, teacher, progress):
        rank = torch.distributed.get_rank()
        with open(Path(__file__).with_name("ranks"), "a") as file:
            file.write(f"{rank} {os.getpid()} {torch.distributed.get_world_size()}\\n")
        if self.fails and rank == 1:
            raise RuntimeError("rank 1 broke")
        return {}


@hookimpl
def ucc_distillers():
    return {"watches": Watches}
"""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_two_warm_processes_train_every_candidate_together_with_zero(executor, tmp_path):
    plugin = tmp_path / "watches.py"
    plugin.write_text(TOGETHER, encoding="utf-8")
    broken = {"name": "broken", "distiller": {"name": "watches", "fails": 1.0}}
    config = tiny_config(
        plugins=[str(plugin)],
        budget={"macs": "50%"},
        space={"distiller": "watches"},
        baselines=[{"name": "random", "distiller": "watches"}, broken],
        search={"trials": 2, "executor": executor},
        train={"engine": "deepspeed", "workers": 2, "zero_stage": 1, "steps": 3, "batch_size": 32},
    )
    run = search(config, out=tmp_path / "run")
    trained = {r.method: r for r in run.rows if r.rung == "train" and r.origin != "dense"}
    assert (trained["broken"].failure, trained["broken"].error) == ("error", "RuntimeError: rank 1 broke")
    assert trained["random"].state == trained["search"].state == "ok", [r.error for r in run.rows]
    seen = [tuple(map(int, line.split())) for line in (tmp_path / "ranks").read_text().splitlines()]
    assert {world for _, _, world in seen} == {2}
    processes = {rank: list(dict.fromkeys(p for r, p, _ in seen if r == rank)) for rank in (0, 1)}
    assert [len(p) for p in processes.values()] == [2, 2], "a pair that stays, and one after the broken trial"
    assert os.getpid() not in processes[0]
    model = load_model(
        tmp_path / "run" / "trials" / str(trained["search"].id), plugins=Plugins.load([str(plugin)])
    )
    assert sum(p.numel() for p in model.parameters()) == trained["search"].params


# Whole runs


def test_an_address_where_no_cluster_answers_is_refused_before_a_folder_is_made(tmp_path):
    config = tiny_config(search={"executor": "ray", "ray_address": "127.0.0.1:9"})
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127.0.0.1:9"):
        search(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


CLUSTER = """
import sys, os
from pathlib import Path
from ray.cluster_utils import Cluster
from tiny import tiny_config
from ucc_search.cluster import _quiet_ray
_quiet_ray()
from ucc_search.runner import search

folder = Path(sys.argv[1])
plugin = folder / "norm.py"
machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

def machine(name):  # with a disk of its own, as far as the cache goes
    return machines.add_node(num_cpus=1, env_vars={"UCC_SEARCH_CACHE": str(folder / name)})

nodes, trials, joined = [machine("one"), machine("two")], [], []

def log(line):
    print(line, flush=True)
    if line.startswith("["):
        trials.append(line)
    if len(trials) == 4 and len(nodes) == 2:
        machines.remove_node(nodes.pop(), allow_graceful=False)
    if len(trials) == 8 and not joined:
        plugin.unlink()
        joined.append(machine("three"))
        machines.remove_node(nodes.pop(), allow_graceful=False)  # what is left is left to the new one

config = tiny_config(
    budget={"macs": ["50%"]},
    plugins=[str(plugin)],
    space={"scorer": ["norm", "class_attention"]},
    search={"trials": 30, "executor": "ray", "ray_address": machines.address},
    train={"engine": "deepspeed", "steps": 2},
)
search(config, out=folder / "run", log=log)
machines.shutdown()
"""


@pytest.mark.slow
def test_nodes_join_and_are_killed_and_every_trial_is_made_once(tmp_path):
    (tmp_path / "norm.py").write_text(NORM, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", textwrap.dedent(CLUSTER), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = Run(tmp_path / "run").rows
    assert Counter(r.state for r in rows) == {"ok": 33}, [r.error for r in rows if r.error]
    assert sorted(r.id for r in rows) == list(range(33))
    assert Counter(r.rung for r in rows) == {"zero-shot": 30, "train": 3}
    assert "is made again" in done.stdout
    assert "raylet" not in done.stderr + done.stdout, "Ray is silent"
    for machine in ("one", "two", "three"):
        assert list((tmp_path / machine / "teachers").glob("*/model.safetensors")), "sent, not trained again"
    trained = [r for r in rows if r.rung == "train" and r.origin == "search"]
    assert all((tmp_path / "run" / "trials" / str(r.id) / "model.safetensors").is_file() for r in trained)

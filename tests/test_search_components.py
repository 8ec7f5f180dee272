"""Whole runs of a tiny model with components of one's own: some that fail, and some that tell where they run."""

from __future__ import annotations

import os

import pytest
from tiny import tiny_config

from ucc_search.runner import search

pytestmark = pytest.mark.usefixtures("own_cache")

FAILING = """
import torch
from ucc_search import Distiller, Scorer, hookimpl


class Raises(Scorer):
    def score(self, view):
        raise RuntimeError("boom")


class Nan(Scorer):
    def score(self, view):
        return view.patches_BND.sum(-1) * float("nan")


class NanLoss(Distiller):
    def losses(self, student, teacher, progress):
        return {"bad": student.logits_BC.sum() * float("nan")}


@hookimpl
def ucc_scorers():
    return {"raises": Raises, "nan": Nan}


@hookimpl
def ucc_distillers():
    return {"nan_loss": NanLoss}
"""


def test_a_failing_candidate_is_a_row_and_the_run_goes_on(tmp_path):
    plugin = tmp_path / "failing.py"
    plugin.write_text(FAILING, encoding="utf-8")
    config = tiny_config(
        plugins=[str(plugin)],
        budget={"macs": "50%"},
        space={"scorer": "class_attention"},
        search={"trials": 1},
        baselines=[
            {"name": "raises", "scorer": "raises"},
            {"name": "nan", "scorer": "nan", "aggregator": "fuse"},
            {"name": "nan-drop", "scorer": "nan", "aggregator": "drop"},
            {"name": "nan-loss", "distiller": "nan_loss"},
        ],
    )
    run = search(config, out=tmp_path / "run")
    failed = {(r.method, r.rung): r for r in run.rows if r.state == "failed"}
    assert {k: r.failure for k, r in failed.items()} == {
        ("raises", "zero-shot"): "error",
        ("raises", "train"): "error",
        ("nan", "zero-shot"): "not_finite",
        ("nan", "train"): "nan_loss",
        ("nan-drop", "zero-shot"): "not_finite",
        ("nan-drop", "train"): "not_finite",
        ("nan-loss", "train"): "nan_loss",
    }
    assert failed["raises", "train"].error == "RuntimeError: boom"
    assert all(r.kl is None and r.accuracy is None for r in failed.values())
    good = {(r.method, r.rung) for r in run.rows if r.state == "ok"}
    assert {("search", "zero-shot"), ("search", "train"), ("nan-loss", "zero-shot")} <= good
    assert not {"raises", "nan"} & set(run.pareto()["method"])


TELLS = """
import os
import sys
from pathlib import Path
from ucc_search import Distiller, hookimpl


def tell(name, what):
    with open(Path(__file__).with_name(name), "a") as file:
        file.write(f"{what}\\n")


tell("processes", os.getpid())


class Tells(Distiller):
    def losses(self, student, teacher, progress):
        tell("training", f"{os.getpid()} {'deepspeed' in sys.modules}")
        return {}


@hookimpl
def ucc_distillers():
    return {"tells": Tells}
"""


def test_ray_tune_and_deepspeed_carry_out_a_run_on_warm_workers(tmp_path):
    """A worker that starts anew for every trial pays seconds of imports for milliseconds of work."""
    plugin = tmp_path / "tells.py"
    plugin.write_text(TELLS, encoding="utf-8")
    config = tiny_config(
        plugins=[str(plugin)],
        budget={"macs": "50%"},
        space={"distiller": "tells"},
        search={"trials": 2, "executor": "ray", "concurrency": 1},
        train={"engine": "deepspeed", "steps": 2},
    )
    run = search(config, out=tmp_path / "run")
    assert [(r.origin, r.rung, r.state) for r in run.rows] == [
        ("search", "zero-shot", "ok"),
        ("search", "zero-shot", "ok"),
        ("dense", "train", "ok"),
        ("search", "train", "ok"),
    ], [r.error for r in run.rows]
    loads = (tmp_path / "processes").read_text(encoding="utf-8").split()
    # This process loads it once or, where it has not yet seen data and model of this configuration, twice.
    workers = [process for process in loads if process != str(os.getpid())]
    assert len(workers) == 1, "one process measured every trial"
    training = (tmp_path / "training").read_text(encoding="utf-8").splitlines()
    assert training == [f"{workers[0]} True"] * 2, "both steps by DeepSpeed, in that process"
    assert not (run.path / "ray").exists()

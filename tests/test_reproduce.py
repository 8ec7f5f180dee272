"""A trial measured again gives the same digits, and says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from test_learned import PLUGIN
from tiny import tiny_config
from typer.testing import CliRunner

from ucc_search.cli import app
from ucc_search.errors import RunError
from ucc_search.plugins import Plugins
from ucc_search.reproduce import reproduce, reproduce_text
from ucc_search.runner import search
from ucc_search.store import RunStore


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a learned scorer from a file that the space file does not name, and a baseline from scratch."""
    folder = tmp_path_factory.mktemp("reproduce")
    plugin = folder / "predictor.py"
    plugin.write_text(PLUGIN)
    config = tiny_config(
        budget={"macs": "60%"},
        space={"scorer": {"name": "predictor", "ratio_weight": "search"}, "aggregator": "drop"},
        search={"trials": 1, "promote": 1},
        train={"engine": "torch", "steps": 3, "batch_size": 32},
        baselines=[{"name": "scratch", "weights": "random"}],
    )
    search(config, out=folder / "run", plugins=Plugins.load([str(plugin)], entry_points=False))
    return folder / "run"


def test_every_trial_is_reproduced_to_the_last_digit(run):
    rows = RunStore.open(run).rows()
    assert {(r.origin, r.rung) for r in rows} >= {
        ("search", "zero-shot"),
        ("search", "train"),
        ("baseline", "zero-shot"),
        ("baseline", "train"),
        ("dense", "train"),
    }
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for row in rows:
        assert row.state == "ok", row.error
        found = reproduce(run, row.id)
        assert found["equal"], reproduce_text(found)
        assert (found["changes"], found["environment"]) == ([], [])
        assert found["numbers"]["accuracy"]["now"] == row.accuracy
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_another_seed_gives_other_numbers(run):
    """Else the comparison would prove nothing."""
    row = next(r for r in RunStore.open(run).rows() if r.rung == "train" and r.origin == "search")
    path = run / "trials" / str(row.id) / "job.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"seed": 7}))
    try:
        done = CliRunner().invoke(app, ["reproduce", str(run), "--trial", str(row.id)])
        assert done.exit_code == 1
        assert "differs" in done.output
        assert "no change of components or packages is known" in done.output
    finally:
        path.write_text(kept)


def test_a_component_that_has_changed_is_refused(run):
    row = next(r for r in RunStore.open(run).rows() if r.origin == "search" and r.rung == "zero-shot")
    plugin = run.parent / "predictor.py"
    plugin.write_text(PLUGIN + "\n# edited\n")
    try:
        with pytest.raises(
            RunError, match=r"scorer 'predictor' of plugin 'predictor' has changed \(sha256 "
        ) as error:
            reproduce(run, row.id)
        assert "--allow-changes" in str(error.value)
        told: list[str] = []
        found = reproduce(run, row.id, allow_changes=True, log=told.append)
        assert found["equal"]  # a comment changes no number
        assert len(found["changes"]) == 1
        assert told == [f"changed: {found['changes'][0]}"]
        plugin.unlink()
        with pytest.raises(
            RunError, match="scorer 'predictor' of plugin 'predictor' is needed: unknown scorer"
        ):
            reproduce(run, row.id, allow_changes=True)
    finally:
        plugin.write_text(PLUGIN)


def test_what_is_not_there_is_said(run, tmp_path):
    with pytest.raises(RunError, match="has no trial 99; its trials are 0 to"):
        reproduce(run, 99)
    path = run / "trials" / "0" / "job.json"
    kept = path.read_text()
    path.unlink()
    try:
        with pytest.raises(RunError, match="only trials whose worker kept what it was given"):
            reproduce(run, 0)
    finally:
        path.write_text(kept)


def test_a_declared_range_was_searched(run):
    resolved = yaml.safe_load((run / "config.resolved.yaml").read_text())
    assert resolved["space"]["scorer"] == [{"name": "predictor", "ratio_weight": "search"}]
    weights = [
        r.components["scorer"]["ratio_weight"] for r in RunStore.open(run).rows() if r.origin == "search"
    ]
    assert weights
    assert all(isinstance(w, float) and 0.1 <= w <= 10.0 for w in weights)

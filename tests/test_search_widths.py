"""Whole runs of a tiny model over widths and depth, beside tokens and alone."""

from __future__ import annotations

from collections import Counter

import pytest
from rows import saved_plan
from shapes import small_shape
from tiny import tiny_config

from ucc_search import workbench
from ucc_search.analysis import pareto_front
from ucc_search.builtin import importances
from ucc_search.errors import ConfigError, PlanError, PluginError
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.runner import search
from ucc_search.saving import load_model
from ucc_search.scoring import score_units

pytestmark = pytest.mark.usefixtures("own_cache")

WIDTHS = {"attention": {"low": 0.5}, "mlp": {"low": 0.25}, "embed": {"low": 0.5}, "depth": {"low": 0.5}}
UNIFORM = {
    "name": "uniform",
    "cascade": "keep_all",
    "widths": {"attention": {"low": 0.25}, "mlp": {"low": 0.25}},
}


def test_tokens_and_widths_are_searched_under_one_budget(tmp_path):
    config = tiny_config(
        budget={"macs": ["50%"]},
        data={"proxy": 40},
        space={"widths": WIDTHS, "importance": ["fisher", "random"]},
        search={"trials": 8, "promote": 1},
        baselines=[UNIFORM, {**UNIFORM, "name": "scratch", "weights": "random"}],
    )
    run = search(config, out=tmp_path / "run")
    assert [r.error for r in run.rows if r.state != "ok"] == []
    assert pareto_front(run.rows)
    searched = [r for r in run.rows if r.origin == "search"]
    assert all(r.feasible and r.macs <= r.limit_macs for r in searched)
    assert any(r.saved_tokens and r.saved_widths for r in searched), "no trial mixed the methods"
    for row in searched:
        parts = [row.saved_tokens, row.saved_widths, row.saved_depth, row.saved_ranks, row.saved_unread]
        assert sum(parts) == pytest.approx(1 - row.macs_ratio, abs=1e-9)
    uniform = next(r for r in run.rows if r.method == "uniform")
    assert uniform.importance == "fisher" and uniform.saved_tokens == 0.0


def test_a_pyramid_is_searched_by_its_widths(tmp_path):
    args = {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 2, 2, 4], "depths": [2, 1, 1, 1]}
    config = tiny_config(
        model={"name": "pvt_v2_b0", "args": args, "checkpoint": "auto"},
        data={"image_size": 32, "proxy": 20},
        budget={"macs": ["60%"]},
        space={"cascade": "keep_all", "widths": WIDTHS, "distiller": "features", "keep_ratio": {"low": 0.2}},
        search={"trials": 2, "promote": 1},
        teacher={"engine": "torch", "steps": 2, "batch_size": 32},
    )
    run = search(config, out=tmp_path / "run")
    trained = [r for r in run.rows if r.rung == "train" and r.origin == "search"]
    assert trained and all(r.state == "ok" and r.saved_widths for r in trained)
    model = load_model(run.path / "trials" / str(trained[0].id))
    assert sum(p.numel() for p in model.parameters()) == trained[0].params


def test_fixed_methods_alone_need_no_search(tmp_path):
    half = {"name": "half", "cascade": "keep_all", "importance": "magnitude", "widths": {"mlp": 0.5}}
    config = tiny_config(
        budget={"macs": ["90%"]},
        search={"trials": 0, "fidelity": "train"},
        baselines=[half],
    )
    run = search(config, out=tmp_path / "run")
    assert Counter(r.method for r in run.rows) == {"half": 1, "dense": 1}
    plan = saved_plan(run, run.rows[0])
    assert [b.mlp_hidden for b in plan.blocks] == [b.mlp_hidden // 2 for b in plan.shape.blocks]


def test_scores_are_measured_once_and_shown(tmp_path, monkeypatch):
    config = tiny_config(data={"proxy": 20}, space={"widths": {"mlp": {"low": 0.5}}, "importance": "kl"})
    found = score_units(config, Plugins.load())
    (groups,) = found.values()
    assert set(groups) == {f"mlp {i}" for i in range(4)}
    assert all(g["max"] >= g["median"] >= g["min"] for g in groups.values())
    monkeypatch.setattr(workbench, "_benches", {})
    monkeypatch.setattr(importances.KL, "score", lambda *_: pytest.fail("measured again"))
    assert score_units(config, Plugins.load()) == found


def test_heads_that_cannot_be_fused_are_refused_before_the_run(tmp_path):
    args = tiny_config().model.args
    config = tiny_config(
        model={"args": {**args, "qk_norm": True}}, space={"widths": {"heads": {"low": 0.5}}}, teacher=None
    )
    with pytest.raises(ConfigError, match=r"cannot be fused.*fewer_heads: remove"):
        search(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_without_any_block_is_refused():
    plan = CompressionPlan.identity(small_shape())
    with pytest.raises(PlanError, match="leaves no block of small, expected one at least"):
        plan.replace(attention=False, mlp=False)


def test_a_criterion_that_fails_leaves_no_run_behind(tmp_path):
    plugin = tmp_path / "wrong.py"
    plugin.write_text(
        "import torch\n"
        "from ucc_search import Importance, hookimpl\n"
        "class Wrong(Importance):\n"
        "    def score(self, probe, group):\n"
        "        return torch.ones(3)\n"
        "@hookimpl\n"
        "def ucc_importances():\n"
        "    return {'wrong': Wrong}\n",
        encoding="utf-8",
    )
    config = tiny_config(
        data={"proxy": 20},
        space={"widths": {"mlp": {"low": 0.5}}, "importance": "wrong"},
        plugins=[str(plugin)],
    )
    with pytest.raises(PluginError, match=r"Wrong gave mlp\[0\] scores of shape \(3,\), expected \(32,\)"):
        search(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

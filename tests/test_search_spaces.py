"""Every space file that is shipped can be run: it is read, resolved, costed, and its budgets reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from ucc_search import data
from ucc_search.budget import budgets
from ucc_search.config import RunConfig, dump_config, load_config
from ucc_search.costs import cost
from ucc_search.data import Splits
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.preview import preview, preview_text
from ucc_search.schedule import Scheduler, candidate_of
from ucc_search.shapes import model_shape
from ucc_search.space import SearchSpace

ROOT = Path(__file__).resolve().parent.parent
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
PEERS = [str(p) for p in sorted((ROOT / "plugins").glob("*/ucc_plugin_*")) if p.suffix != ".egg-info"]
"""The shipped packages, which some files take their baselines from."""
DATA = {"digits": (10, 1), "fashion-mnist": (10, 1), "folder": (1000, 3)}
"""Classes and channels: neither images nor weights are needed to know what a run would cost."""


@pytest.fixture(params=SPACES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def config(path) -> RunConfig:
    return load_config(path)


@pytest.fixture(autouse=True)
def _no_images(monkeypatch, tmp_path):
    def load(config, augment=None) -> Splits:
        classes, channels = DATA[config.name.partition(":")[0]]
        return Splits(range(50_000), [], [], classes, channels, config.image_size or 224)

    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "load_data", load)


def test_there_are_space_files_and_no_two_share_a_run_folder():
    names = [load_config(p).name for p in SPACES]
    assert len(names) >= 3
    assert len(set(names)) == len(names)


def test_it_opens_with_what_it_is_and_a_command_that_runs_it(path):
    comment = path.read_text(encoding="utf-8").partition("\nname:")[0].splitlines()
    assert all(line.startswith("# ") for line in comment)
    assert f"ucc-search search {path.relative_to(ROOT).as_posix()}" in "\n".join(comment)


def test_resolving_it_again_changes_nothing(config, tmp_path):
    """The run folder keeps the resolved file, and resuming compares with it."""
    resolved = tmp_path / "config.resolved.yaml"
    resolved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(resolved) == config


def test_plan_accepts_it(config):
    found = preview(config, Plugins.load(PEERS, entry_points=False))
    assert found["dense"]["macs"] > found["budgets"][0]["max_macs"]
    assert found["trials"]["train"] >= len(config.baselines)
    assert config.name in preview_text(found)


def test_every_method_meets_every_budget_and_uses_it(config):
    """A baseline that wastes its budget would lose for the wrong reason."""
    plugins, shape = Plugins.load(PEERS, entry_points=False), model_shape(config)
    scheduler = Scheduler(config, shape, plugins)
    methods = {b.name: candidate_of(b) for b in config.baselines}
    corners = SearchSpace.of(config.space, shape, plugins).corners() if config.search.trials else []
    for i, candidate in enumerate(corners):
        methods[f"search {i}"] = candidate
    assert scheduler.budgets == budgets(config.budget, scheduler.dense_cost)
    for name, candidate in methods.items():
        parts = plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))
        if parts.cascade.needs_model:
            continue
        for budget in scheduler.budgets:
            macs = cost(scheduler.plan(candidate, budget), parts).macs
            assert macs <= budget.max_macs, f"{name} at {budget.label}"
            # A standard architecture has a size of its own, whatever the budget.
            if scheduler.smallest(candidate) != scheduler.largest(candidate):
                assert macs > 0.97 * budget.max_macs, f"{name} at {budget.label}"


def test_deit_small_costs_what_its_paper_says():
    """4.6 GMACs and 22 M parameters: the class count and the image size of the file are ImageNet's."""
    config = load_config(ROOT / "search_spaces" / "imagenet_folder_deit_small_ucc.yaml")
    price = cost(CompressionPlan.identity(model_shape(config)))
    assert round(price.macs / 1e9, 1) == 4.6
    assert round(price.params / 1e6) == 22

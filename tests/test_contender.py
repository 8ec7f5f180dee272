"""`compare` adds one method to the baselines, and changes nothing else that could favour it."""

from __future__ import annotations

import pytest
from tiny import tiny_config, write_space

from ucc_search import cli
from ucc_search.config import dump_config, load_config
from ucc_search.contender import with_contender
from ucc_search.errors import ConfigError
from ucc_search.interfaces import ComponentRef, Measured, SamplerRequest
from ucc_search.plugins import Plugins
from ucc_search.runs import load_run

BASELINE = {"name": "evit", "scorer": "class_attention", "aggregator": "fuse"}


def test_it_stands_last_with_the_rest_from_the_space_section():
    config = tiny_config(baselines=[BASELINE])
    found = with_contender(config, {"scorer": "{name: spectral, kappa: 0.3}"})
    assert [b.name for b in found.baselines] == ["evit", "spectral"]
    mine = found.baselines[-1]
    assert mine.scorer[0].to_dict() == {"name": "spectral", "kappa": 0.3}
    assert (mine.aggregator, mine.cascade, mine.distiller) == (
        config.space.aggregator,
        config.space.cascade,
        config.space.distiller,
    )
    assert found.search.trials == 0
    assert found.name == "tiny-spectral"
    same = found.model_copy(update={"name": "tiny", "baselines": config.baselines, "search": config.search})
    assert same == config


def test_the_resolved_file_reads_back_so_that_it_can_be_resumed(tmp_path):
    found = with_contender(tiny_config(), {"scorer": "builtin/random", "aggregator": "drop"})
    assert found.name == "tiny-builtin-random-drop"
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(found), encoding="utf-8")
    assert load_config(path) == found


@pytest.mark.parametrize(
    ("chosen", "changes", "message"),
    [
        ({}, {}, "name your method"),
        ({"scorer": "evit"}, {"baselines": [BASELINE]}, "'evit' is among the baselines"),
        ({"scorer": "[a, b]"}, {}, r"--scorer '\[a, b\]': expected a name, or a mapping"),
        ({"scorer": "{name: 3}"}, {}, "expected a name, or a mapping"),
        ({"scorer": "{a"}, {}, "expected a name, or a mapping"),
        ({"scorer": "{name: spectral, kappa: {low: 0.1, high: 0.2}}"}, {}, "fixed parameters"),
        (
            {"scorer": "random"},
            {"space": {"distiller": {"name": "logits", "weight": {"low": 1, "high": 2}}}},
            "distiller of a contender must be one component with fixed parameters; name one",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(chosen, changes, message):
    with pytest.raises(ConfigError, match=message):
        with_contender(tiny_config(**changes), chosen)


def test_the_command_measures_baselines_and_contender_alike(tmp_path, monkeypatch, capsys):
    write_space(
        tmp_path,
        baselines=[BASELINE],
        search={"seeds": [0, 1]},
        space={"cascade": "geometric"},
        budget={"macs": "60%"},
        teacher={"steps": 10},
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["ucc-search", "compare", "space.yaml", "--scorer", "spectral"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    rows = load_run(tmp_path / "results" / "tiny-spectral").rows
    measured = sorted((r.method, r.rung, r.seed) for r in rows if r.origin != "dense")
    each = [("train", 0), ("train", 1), ("zero-shot", 0)]
    assert measured == [(method, *what) for method in ("evit", "spectral") for what in each]
    assert len({r.limit_macs for r in rows if r.origin != "dense"}) == 1
    assert "spectral" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shell", "tpe", "random"])
def test_samplers_bear_a_space_where_nothing_is_searched(name):
    """Fixed components and a fixed schedule: a comparison asks for no proposal, yet a study is opened."""
    sampler = Plugins.load(entry_points=False, environment=False).build("sampler", ComponentRef(name))
    sampler.start(SamplerRequest((), (False,), 0, 3, (), dict))
    for _ in range(10):
        point = sampler.propose()
        assert dict(point) == {}
        sampler.tell(Measured(point, (1.0,), {}))

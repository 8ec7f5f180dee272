"""The ladder: what climbs, what never meets on a front, and what training that stops halfway gives."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from rows import row, zero_shot
from tiny import tiny_config

from ucc_search import estimate
from ucc_search.analysis import front_of, pareto_front, rank_correlations, usable
from ucc_search.config import dump_config, parse_config
from ucc_search.errors import ConfigError
from ucc_search.ladder import Level, at_level, climbing, levels
from ucc_search.runner import search

SHORT = Level("train", 10, True, 0.5, (0,))
LADDER = [
    {"rung": "zero-shot"},
    {"rung": "train", "steps": 2, "keep": 0.5},
    {"rung": "train", "keep": 1, "seeds": [0, 1]},
]


def stopped(id, **changes):
    return row(id, **{"state": "stopped", "fidelity": 10, "test_accuracy": None, **changes})


# Configuration


def test_the_short_keys_are_a_ladder():
    short = tiny_config(search={"promote": 3, "seeds": [0, 1]})
    long = tiny_config(
        search={
            "promote": 1,
            "ladder": [{"rung": "zero-shot"}, {"rung": "train", "keep": 3, "seeds": [0, 1]}],
        }
    )
    assert levels(short, 240) == levels(long, 240)
    assert [r.rung for r in tiny_config(search={"promote": 0}).search.rungs] == ["zero-shot"]
    assert [r.rung for r in tiny_config(search={"fidelity": "train"}).search.rungs] == ["train"]


def test_a_ladder_survives_the_resolved_file():
    config = tiny_config(search={"ladder": LADDER})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("page", ["ladder", "robustness"])
def test_what_the_pages_show_is_accepted(page):
    text = (Path(__file__).resolve().parent.parent / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        shown = yaml.safe_load(block)
        config = tiny_config(**{**shown, "search": {"promote": 1, **shown["search"]}}, train={"steps": 400})
        assert levels(config, 240)


@pytest.mark.parametrize(
    ("ladder", "told"),
    [
        ([], "is empty"),
        ([{"rung": "zero-shot", "keep": 3}], "takes every proposal"),
        ([{"rung": "train", "steps": 3, "seeds": [1]}], "leave its seeds out"),
        ([{"rung": "zero-shot", "steps": 3}], "trains nothing"),
        ([{"rung": "zero-shot"}, {"rung": "train"}], "rung 2 needs `keep`"),
        ([{"rung": "zero-shot"}, {"rung": "train", "keep": 1.0}], "whole number of trials or a share"),
        ([{"rung": "zero-shot"}, {"rung": "train", "keep": 0}], "whole number of trials or a share"),
        ([{"rung": "zero-shot"}, {"rung": "zero-shot", "keep": 1}], "can be the lowest only"),
        ([{"rung": "train"}, {"rung": "train", "keep": 1}], "rung 1 trains to the end"),
        ([*LADDER[:2], {"rung": "train", "steps": 2, "keep": 1}], "rung 3 has steps 2, expected more than"),
        (LADDER[:2], "the last rung trains to the end"),
        ([{"rung": "train", "steps": 2, "epochs": 1}], "either `steps` or `epochs`"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused_in_a_sentence(ladder, told):
    with pytest.raises(ConfigError, match=told) as caught:
        tiny_config(search={"ladder": ladder})
    assert "search.ladder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ladder_is_given_in_one_way():
    with pytest.raises(ConfigError, match="either `ladder` or `promote`"):
        tiny_config(search={"ladder": LADDER, "promote": 3})


def test_rungs_must_rise_up_to_the_whole_training():
    """Epochs and steps can be compared only once the number of images is known."""
    config = tiny_config(search={"ladder": [LADDER[0], {"rung": "train", "epochs": 3, "keep": 1}, LADDER[2]]})
    with pytest.raises(ConfigError, match=r"rung 3 ends at step 2, expected more than the 21"):
        levels(config, 240)


# What climbs


def test_every_budget_and_set_of_components_sends_its_best():
    rows = [
        stopped(0, accuracy=0.9),
        stopped(1, accuracy=0.8),
        stopped(2, accuracy=0.5, scorer="random"),
        stopped(3, accuracy=0.4, scorer="random"),
        stopped(4, accuracy=0.1, target="macs=70%"),
    ]
    assert [p.id for p in climbing(rows, SHORT, 1)] == [0, 2, 4]


@pytest.mark.parametrize(("keep", "count"), [(0.5, 3), (0.2, 1), (0.01, 1), (2, 2), (9, 5)])
def test_a_share_is_rounded_up(keep, count):
    rows = [stopped(i, accuracy=i / 10) for i in range(5)]
    assert [p.id for p in climbing(rows, SHORT, keep)] == [4, 3, 2, 1, 0][:count]


def test_of_equal_accuracies_the_smaller_divergence_climbs():
    rows = [stopped(0, accuracy=0.5, kl=0.3), stopped(1, accuracy=0.5, kl=0.2)]
    assert [p.id for p in climbing(rows, SHORT, 1)] == [1]


def test_only_finished_feasible_trials_of_that_rung_climb():
    rows = [
        row(0, accuracy=0.99, fidelity=10, origin="baseline", method="evit"),
        row(1, accuracy=0.99),
        stopped(2, accuracy=0.98, feasible=False),
        stopped(3, accuracy=None, state="failed"),
        stopped(4, accuracy=0.1),
        zero_shot(5),
    ]
    assert [p.id for p in at_level(rows, SHORT)] == [4]
    assert [p.id for p in climbing(rows, Level("zero-shot", 0, False, None, (0,)), 1)] == [5]


def test_of_a_range_of_budgets_whole_fronts_climb():
    """Else the dearest would climb, or one of each budget however bad; of a front its ends come first."""
    macs = [5_000_000, 4_000_000, 3_000_000, 2_000_000, 4_500_000]
    accuracies = [0.9, 0.8, 0.7, 0.5, 0.6]
    rows = [
        stopped(i, macs=m, target=f"macs={m}", accuracy=a)
        for i, (m, a) in enumerate(zip(macs, accuracies, strict=True))
    ]
    assert {p.id for p in climbing(rows, SHORT, 0.8, together=True)} == {0, 1, 2, 3}
    assert {p.id for p in climbing(rows, SHORT, 0.4, together=True)} == {0, 3}
    assert len(climbing(rows, SHORT, 0.2)) == 5


def test_of_a_range_as_many_climb_as_of_its_budgets_one_by_one():
    """The second best of a wide budget is worth more than the best of one that it dominates."""
    wide = [stopped(i, macs=3_000_000 + i, target="macs=50%", accuracy=a) for i, a in enumerate((0.9, 0.8))]
    wider = [stopped(2, macs=4_000_000, target="macs=60%", accuracy=0.5)]
    first = stopped(3, macs=2_000_000, target="macs=30%", accuracy=0.85)
    last = stopped(4, macs=2_900_000, target="macs=30%", accuracy=0.86)
    rows = [*wide, *wider, first, last]
    assert {p.id for p in climbing(rows, SHORT, 1, together=True)} == {0, 3, 4}
    assert {p.id for p in climbing(rows, SHORT, 1)} == {0, 2, 4}


# Rungs never meet


def test_a_stopped_training_is_on_no_front():
    rows = [row(0, accuracy=0.6), stopped(1, accuracy=0.9), stopped(2, accuracy=0.95, fidelity=100)]
    assert [p.id for p in pareto_front(rows)] == [0]
    assert usable(rows[1:]) == []


def test_each_pair_of_rungs_has_its_correlation():
    cheap = [zero_shot(i, kl=i / 10, plan_key=f"p{i}") for i in range(4)]
    short = [stopped(4 + i, parent=i, accuracy=i / 10, plan_key=f"p{i}") for i in range(4)]
    whole = [row(8 + i, parent=4 + i, accuracy=i / 20, plan_key=f"p{i}") for i in range(3)]
    found = {(f.cheap, f.dear): (f.pairs, f.across) for f in rank_correlations([*cheap, *short, *whole])}
    assert found == {
        ("zero-shot", "train to step 10"): (4, pytest.approx(-1)),
        ("zero-shot", "train"): (3, pytest.approx(-1)),
        ("train to step 10", "train"): (3, pytest.approx(1)),
    }


# A run


def test_a_run_climbs_its_ladder(tmp_path, monkeypatch):
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        budget={"macs": "50%"},
        search={"trials": 4, "ladder": LADDER, "promote": 1},
        train={"steps": 6},
        baselines=[{"name": "random"}],
    )
    run = search(config, out=tmp_path / "run")
    rows = {r.id: r for r in run.rows}
    assert Counter((r.method, r.state, r.rung, r.fidelity) for r in run.rows) == {
        ("search", "ok", "zero-shot", 0): 4,
        ("random", "ok", "zero-shot", 0): 1,
        ("dense", "ok", "train", 0): 1,
        ("search", "stopped", "train", 2): 2,
        ("search", "ok", "train", 6): 2,
        ("random", "ok", "train", 6): 2,
    }
    counts = estimate.jobs(config)
    assert counts == {"zero-shot": 5, "train to step 2": 2, "train": 4}
    best = sorted((r for r in run.rows if r.proposal is not None), key=lambda r: r.kl)[:2]
    short = [r for r in run.rows if r.state == "stopped"]
    assert {r.parent for r in short} == {r.id for r in best}
    assert all(r.test_accuracy is None for r in short), "the test split is for whole trainings"
    assert not any((run.path / "trials" / str(r.id) / "model.safetensors").exists() for r in short)
    whole = {r.seed: r for r in run.rows if r.method == "search" and r.fidelity == 6}
    assert {rows[r.parent].fidelity for r in whole.values()} == {2}
    assert (whole[0].continued, whole[1].continued) == (2, 0), "one seed goes on, the other starts"
    assert not (run.path / "states").exists()
    front = pareto_front(run.rows)
    assert front == front_of(front)
    assert {p.fidelity for p in front} == {6}


def test_a_training_whose_state_is_gone_gives_the_same_model(tmp_path, monkeypatch):
    """On another machine than the one that stopped it, a training starts again."""
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        budget={"macs": "50%"},
        search={"trials": 2, "ladder": [{"rung": "train", "steps": 2}, {"rung": "train", "keep": 1}]},
        train={"steps": 6},
    )
    first = search(config, out=tmp_path / "first").rows[-1]
    monkeypatch.setattr("ucc_search.worker._here", lambda state: None)
    again = search(config, out=tmp_path / "again").rows[-1]
    assert (first.continued, again.continued) == (2, 0)
    assert (first.loss, first.accuracy, first.kl) == (again.loss, again.accuracy, again.kl)

"""Fronts, picks and comparisons: the dominated, infeasible or foreign never win; test data never chooses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rows import DENSE_MACS, config, row, zero_shot

from ucc_search import analysis
from ucc_search.analysis import Point
from ucc_search.errors import RunError
from ucc_search.runs import Run
from ucc_search.store import RunStore, TrialRow
from ucc_search.tables import analysis_json, compact_tokens, pick_message, print_analysis
from ucc_search.units import target_order

light = settings(max_examples=60, deadline=None)
clouds = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=14).map(
    lambda cloud: [row(i, macs=m * 10**6, accuracy=a / 12) for i, (m, a) in enumerate(cloud)]
)


def ids(points: list[Point]) -> list[int]:
    return [p.id for p in points]


def dominates(a: TrialRow, b: TrialRow) -> bool:
    assert a.accuracy is not None
    assert b.accuracy is not None
    better = a.macs < b.macs or a.accuracy > b.accuracy
    return a.macs <= b.macs and a.accuracy >= b.accuracy and better


@light
@given(clouds)
def test_front_is_what_nothing_dominates_and_the_first_of_equals(rows):
    undominated = [r for r in rows if not any(dominates(o, r) for o in rows)]
    firsts = {(r.macs, r.accuracy): r.id for r in reversed(undominated)}
    front = analysis.pareto_front(rows)
    assert ids(front) == [firsts[key] for key in sorted(firsts)]


@light
@given(clouds, st.randoms(use_true_random=False))
def test_front_does_not_depend_on_the_order_of_rows(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert analysis.pareto_front(shuffled) == analysis.pareto_front(rows)


@light
@given(clouds)
def test_hypervolume_is_the_dominated_area(rows):
    reference = (13e6, -1 / 12)
    cells = sum(
        any(r.macs <= x * 10**6 and r.accuracy * 12 > y - 0.5 for r in rows)
        for x in range(1, 13)
        for y in range(13)
    )
    points = analysis.measured(rows)
    assert analysis.hypervolume(points, reference) == pytest.approx(cells * 1e6 / 12)
    assert analysis.hypervolume(analysis.pareto_front(rows), reference) == pytest.approx(cells * 1e6 / 12)


@light
@given(clouds)
def test_hypervolume_of_single_seeds_never_falls(rows):
    history = analysis.hypervolume_history(rows)
    assert [trial for trial, _ in history] == [r.id for r in rows]
    values = [v for _, v in history]
    assert values == sorted(values)


@light
@given(clouds)
def test_knee_is_above_the_chord(rows):
    front = analysis.pareto_front(rows)
    knee = analysis.knee(front)
    if knee is not None:
        assert knee in front[1:-1]
        first, last = front[0], front[-1]
        share = (knee.macs - first.macs) / (last.macs - first.macs)
        chord = analysis.quality(first) + share * (analysis.quality(last) - analysis.quality(first))
        assert analysis.quality(knee) > chord


def test_knee_of_known_fronts():
    bent = [row(0, macs=10, accuracy=0.1), row(1, macs=20, accuracy=0.8), row(2, macs=100, accuracy=0.9)]
    assert analysis.knee(analysis.pareto_front(bent)).id == 1
    hollow = [row(0, macs=10, accuracy=0.1), row(1, macs=90, accuracy=0.2), row(2, macs=100, accuracy=0.9)]
    assert analysis.knee(analysis.pareto_front(hollow)) is None
    assert analysis.knee(analysis.pareto_front(bent[:2])) is None


def test_only_usable_trials_compete():
    rows = [
        row(0, accuracy=0.7),
        row(1, accuracy=0.99, feasible=False),
        row(2, accuracy=0.99, state="failed", failure="nan_loss"),
        row(3, accuracy=None),
        row(4, accuracy=float("nan")),
        row(5, accuracy=0.99, origin="dense", method="dense", macs=1),
    ]
    assert ids(analysis.pareto_front(rows)) == [0]
    assert analysis.best_under(rows).id == 0
    assert ids(analysis.compare_methods(rows)) == [0]


def test_rungs_and_fidelities_never_mix():
    cheap = [zero_shot(0, macs=1_000_000, accuracy=0.99, kl=0.2), zero_shot(1, macs=2_000_000, kl=0.1)]
    short = [row(2, macs=1_000_000, accuracy=0.99, fidelity=10)]
    full = [row(3, macs=4_000_000, accuracy=0.8), row(4, macs=5_000_000, accuracy=0.9)]
    assert ids(analysis.pareto_front([*cheap, *short, *full])) == [3, 4]
    assert ids(analysis.pareto_front([*cheap, *short, *full], "zero-shot")) == [0, 1]
    assert ids(analysis.pareto_front(cheap)) == [0, 1]
    with pytest.raises(RunError, match="expected one of train, zero-shot"):
        analysis.pareto_front(cheap, "zeroshot")


def test_zero_shot_goes_by_kl_unless_asked():
    rows = [zero_shot(0, kl=0.1, accuracy=0.5), zero_shot(1, kl=0.2, accuracy=0.6)]
    assert ids(analysis.pareto_front(rows)) == [0]
    assert ids(analysis.pareto_front(rows, by="accuracy")) == [1]


def test_the_test_split_never_chooses():
    def run(flip: float) -> tuple[object, ...]:
        rows = [
            row(i, macs=(i + 1) * 10**6, accuracy=a, test_accuracy=abs(flip - a), method=f"m{i % 2}")
            for i, a in enumerate([0.6, 0.7, 0.65, 0.9, 0.85])
        ]
        hypervolumes = analysis.hypervolume_history(rows)
        front = analysis.pareto_front(rows)
        compared = ids(analysis.compare_methods(rows))
        return ids(front), analysis.knee(front), compared, analysis.best_under(rows).id, hypervolumes

    plain, flipped = run(0.0), run(1.0)
    assert [plain[0], *plain[2:]] == [flipped[0], *flipped[2:]]
    assert (plain[1] and plain[1].id) == (flipped[1] and flipped[1].id)
    with pytest.raises(RunError, match="never chooses"):
        analysis.pareto_front([row(0)], by="test_accuracy")


def test_seeds_are_averaged():
    rows = [row(i, plan_key="same", seed=i, accuracy=0.8 + i / 100, kl=None) for i in range(3)]
    point = analysis.aggregate_seeds(rows)[0]
    assert (point.id, point.trials, point.seeds) == (0, (0, 1, 2), 3)
    assert point.accuracy == pytest.approx(0.81)
    assert point.accuracy_std == pytest.approx(0.01)
    assert (point.kl, point.kl_std) == (None, None)
    assert analysis.aggregate_seeds(rows[:1])[0].accuracy_std is None


def test_a_repeated_seed_counts_once():
    rows = [row(0, plan_key="same", accuracy=0.8), row(1, plan_key="same", accuracy=0.8)]
    point = analysis.aggregate_seeds(rows)[0]
    assert (point.seeds, point.accuracy_std) == (1, None)


@pytest.mark.parametrize(
    "other",
    [
        {"method": "evit", "origin": "baseline"},
        {"plan_key": "other"},
        {"scorer": "random"},
        {"components": {"scorer": {"name": "joint", "weight": 2}}},
        {"fidelity": 50},
        {"rung": "zero-shot"},
        {"target": "macs=75%"},
    ],
)
def test_different_things_are_not_averaged(other):
    assert (
        len(analysis.aggregate_seeds([row(0, plan_key="p"), row(1, seed=1, **{"plan_key": "p", **other})]))
        == 2
    )


def test_best_under_honours_every_limit_and_returns_the_first_seed():
    rows = [
        row(0, macs=2_000_000, params=50_000, accuracy=0.7),
        row(1, macs=4_000_000, params=80_000, accuracy=0.8, plan_key="p"),
        row(2, macs=4_000_000, params=80_000, accuracy=0.9, plan_key="p", seed=1),
        row(3, macs=5_000_000, params=50_000, accuracy=0.84),
    ]
    assert analysis.best_under(rows, max_macs=4_000_000).id == 1
    assert analysis.best_under(rows, max_params=60_000).id == 3
    assert analysis.best_under(rows, max_macs=4_000_000, max_params=60_000).id == 0


def test_best_under_names_the_smallest():
    with pytest.raises(RunError, match=r"no trial fits 1\.00 MMACs; .* 5\.00 MMACs and 90\.0 k parameters"):
        analysis.best_under([row(0)], max_macs=1_000_000)
    with pytest.raises(RunError, match="results/x: no usable trial yet"):
        analysis.best_under([row(0, state="failed")], where="results/x")


def test_methods_are_compared_within_a_budget():
    rows = [
        row(0, accuracy=0.8),
        row(1, accuracy=0.85),
        row(2, accuracy=0.84, method="evit", origin="baseline"),
        row(3, accuracy=0.95, method="evit", origin="baseline", target="macs=75%"),
    ]
    compared = analysis.compare_methods(rows)
    assert [(p.target, p.method, p.id) for p in compared] == [
        ("macs=75%", "evit", 3),
        ("macs=50%", "search", 1),
        ("macs=50%", "evit", 2),
    ]


def test_failures_are_counted_by_class():
    rows = [
        row(0),
        *(row(i, state="failed", failure=f) for i, f in enumerate(["a", "b", "b", None], start=1)),
    ]
    assert analysis.failures_by_class(rows) == {"b": 2, "a": 1, "error": 1}


@pytest.mark.parametrize(
    ("rows", "lost"),
    [
        ([zero_shot(0)], []),
        ([], []),
        ([row(0, origin="baseline")], []),
        ([zero_shot(0, state="failed"), row(1, origin="baseline")], [0]),
        ([zero_shot(0), row(1, state="failed"), row(2, state="failed"), row(3, origin="baseline")], [1, 2]),
        ([zero_shot(0), row(1, state="failed"), row(2), row(3, origin="baseline")], []),
        ([zero_shot(0), zero_shot(1, state="failed"), row(2, origin="baseline")], []),
        ([row(0, state="stopped", fidelity=10), row(1, state="failed"), row(2, origin="baseline")], [1]),
    ],
)
def test_a_search_is_lost_where_none_of_its_trials_stands_beside_the_baselines(rows, lost):
    assert [r.id for r in analysis.lost_search(rows)] == lost


def test_rank_correlation_pairs_parents_and_baselines():
    kls, accuracies = [0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.85, 0.7]
    cheap = [zero_shot(i, kl=kl) for i, kl in enumerate(kls)]
    trained = [row(10 + i, parent=i, accuracy=a) for i, a in enumerate(accuracies)]
    evit = [
        zero_shot(20, kl=0.5, method="evit", origin="baseline", plan_key="e"),
        row(21, accuracy=0.95, method="evit", origin="baseline", plan_key="e"),
    ]
    found = analysis.rank_correlation([*cheap, *trained, *evit])
    assert found.pairs == 5
    assert found.within == {"search": pytest.approx(0.8), "evit": None}
    assert found.across == found.by_target["macs=50%"] == pytest.approx(-0.1)


def test_rank_correlation_needs_three_pairs():
    rows = [*(zero_shot(i) for i in range(2)), *(row(10 + i, parent=i) for i in range(2))]
    assert analysis.rank_correlation(rows).across is None
    assert analysis.rank_correlation(rows).pairs == 2


@light
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_spearman_agrees_with_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    a, b = zip(*pairs, strict=True)
    ours = analysis.spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    store = RunStore.create(tmp_path / "run", config(), {})
    rows = [
        row(0, origin="dense", method="dense", target="", macs=DENSE_MACS, limit_macs=None, accuracy=0.95),
        *(zero_shot(1 + i, kl=0.1 * (i + 1)) for i in range(3)),
        *(row(4 + i, macs=(3 + i) * 10**6, accuracy=a, parent=1 + i) for i, a in enumerate([0.7, 0.88, 0.9])),
        row(7, seed=1, plan_key="plan6", macs=5_000_000, accuracy=0.92),
        row(8, method="evit", origin="baseline", accuracy=0.85, scorer="[bold]x"),
        row(9, state="failed", failure="out_of_memory", error="no memory left"),
    ]
    for one in rows:
        store.append(one)
    return Run(store.path)


def printed(run: Run, *, terminal: bool) -> str:
    stream = io.StringIO()
    print_analysis(run, Console(file=stream, force_terminal=terminal, width=200))
    return stream.getvalue()


def test_piped_analysis_is_plain(run):
    text = printed(run, terminal=False)
    assert "\x1b" not in text
    assert not set(text) & set("─│┃━┏┓└┘╭╮╰╯")
    front = text.split("Pareto front")[1].split("\n\n")[0].splitlines()
    assert front[0] == " (trained 100 steps, by selection accuracy)"
    assert [line.split()[0] for line in front[2:6]] == ["4", "5*", "6", "0"]
    assert "91.00 ± 1.41 (2)" in front[4]
    assert "49x2 25 16x3" in front[4]
    assert "[bold]x" not in text.split("Methods at each budget")[0]
    for part in ("evit", "out_of_memory", "no memory left", "Rank correlation", "Next: ucc-search pick"):
        assert part in text


def test_lines_are_not_wrapped_through_a_pipe(run):
    stream = io.StringIO()
    print_analysis(run, Console(file=stream, force_terminal=False, width=40))
    assert stream.getvalue() == printed(run, terminal=False)


def test_terminal_gets_ruled_tables(run):
    text = printed(run, terminal=True)
    assert set(text) & set("─━")
    assert "Pareto front" in text


def test_the_suggested_pick_takes_the_knee(run):
    command = analysis_json(run)["next"]
    gmacs = float(command.rsplit(" ", 1)[1])
    assert run.pick(max_macs=math.floor(gmacs * 1e9)).id == analysis_json(run)["knee"]


def test_run_without_a_usable_trial_says_so(tmp_path):
    store = RunStore.create(tmp_path / "run", config(), {})
    store.append(row(0, state="failed", failure="timeout", error=None))
    text = printed(Run(store.path), terminal=False)
    assert "No usable trial yet." in text
    assert "timeout" in text
    assert analysis_json(Run(store.path))["front"] == []


def test_json_survives_a_round_trip(run):
    found = analysis_json(run)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [p["id"] for p in found["front"]] == [4, 5, 6]
    assert (found["rung"], found["fidelity"], found["knee"]) == ("train", 100, 5)
    assert found["dense"]["method"] == "dense"
    assert found["rank_correlation"]["pairs"] == 3
    assert found["hypervolume"]["history"][-1][0] == 8


def test_pick_message_gives_what_can_be_used(run):
    chosen = run.pick(max_macs="4M")
    assert "no weights were saved" in pick_message(run, chosen)
    folder = run.path / "trials" / str(chosen.id)
    folder.mkdir(parents=True)
    (folder / "arch.json").write_text("{}")
    text = pick_message(run, chosen)
    assert f"ucc_search.load_model({str(folder)!r})" in text
    assert "4.00 MMACs (40.0% of dense)" in text


def test_tokens_are_drawn_together():
    assert compact_tokens([49, 49, 25, 16, 16, 16]) == "49x2 25 16x3"
    assert compact_tokens([7]) == "7"
    assert compact_tokens([]) == ""


def test_budgets_are_ordered_by_what_they_limit_and_the_loosest_first():
    labels = ["macs=50%", "latency_ms=7", "macs=600M", "macs=7.5%", "macs=2.1G", "dense", "macs=70%"]
    ordered = sorted(labels, key=target_order)
    assert ordered == ["dense", "latency_ms=7", "macs=2.1G", "macs=600M", "macs=70%", "macs=50%", "macs=7.5%"]

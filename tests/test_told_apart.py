"""What the analysis claims: differences with their spread, what mattered, two runs side by side."""

from __future__ import annotations

import io
import json
import math
import random

import pytest
from rich.console import Console
from rows import config, row, zero_shot

from ucc_search import influence, spread
from ucc_search.comparison import compare_runs
from ucc_search.errors import RunError
from ucc_search.runs import Run
from ucc_search.store import RunStore
from ucc_search.tables import comparison_json, print_comparison


def seeds(first: int, method: str, accuracies: list[float], **changes):
    return [
        row(first + i, method=method, plan_key=method, seed=i, accuracy=a, **changes)
        for i, a in enumerate(accuracies)
    ]


# Spread


def test_noise_is_pooled_by_degrees_of_freedom():
    noise = spread.seed_noise([(0.1, 2), (0.2, 3), (None, 1), (0.3, 1)])
    assert noise.freedom == 3
    assert noise.std == pytest.approx(math.sqrt((0.1**2 + 2 * 0.2**2) / 3))


def test_two_models_alone_give_students_interval():
    stats = pytest.importorskip("scipy.stats")
    a, b = [0.90, 0.92, 0.91], [0.85, 0.88]
    rows = [*seeds(0, "a", a), *seeds(5, "b", b)]
    best, other = spread.standings(rows)
    low, high = stats.ttest_ind(a, b).confidence_interval(0.95)
    assert (best.method, best.verdict, best.margin) == ("a", "best", None)
    assert other.behind - other.margin == pytest.approx(low)
    assert other.behind + other.margin == pytest.approx(high)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Four equal methods, two seeds each: in 95 % of the runs all are level with the best, or more."""
    generator, level = random.Random(0), 0
    for _ in range(200):
        rows = [
            r for m in range(4) for r in seeds(2 * m, f"m{m}", [generator.gauss(0.9, 0.01) for _ in "ab"])
        ]
        level += all(s.verdict != "behind" for s in spread.standings(rows))
    # The best is chosen by its luck, which an interval around a fixed pair does not know of.
    assert 170 <= level < 200


def test_one_seed_each_is_no_statement():
    found = spread.standings([row(0, method="a", accuracy=0.9), row(1, method="b", accuracy=0.1)])
    assert [s.verdict for s in found] == ["best", "unknown"]
    assert spread.statements(found) == [
        "At macs=50%, a has the highest mean; with one seed each it cannot be known whether it is better."
    ]


def test_statements_name_who_is_level_and_who_is_behind():
    rows = [
        *seeds(0, "a", [0.90, 0.91]),
        *seeds(2, "b", [0.905, 0.90]),
        *seeds(4, "c", [0.70, 0.71]),
        *seeds(6, "a", [0.90, 0.91], target="macs=75%"),
    ]
    (line,) = spread.statements(spread.standings(rows))
    assert line == "At macs=50%, a has the highest mean, but cannot be told apart from b; clearly behind: c."
    (line,) = spread.statements(spread.standings([r for r in rows if r.method != "b"]))
    assert line == "At macs=50%, a is better than all others."


def test_another_budgets_noise_does_not_count():
    quiet = [*seeds(0, "a", [0.90, 0.901]), *seeds(2, "b", [0.88, 0.881])]
    loud = seeds(4, "c", [0.5, 0.9], target="macs=75%")
    assert spread.standings([*quiet, *loud])[1:] == spread.standings(quiet)


# What mattered


def proposals(count: int = 40, target: str = "macs=50%") -> list:
    generator = random.Random(1)
    rows = []
    for i in range(count):
        keep = [generator.uniform(0.3, 1.0) for _ in range(3)]
        params = {**{f"keep.{b}": k for b, k in enumerate(keep)}, "width.mlp.1": 0.5, "scorer": i % 2}
        rows.append(
            zero_shot(i, kl=1.0 - 0.8 * keep[1] + 0.1 * keep[2], params_searched=params, target=target)
        )
    return rows


def test_the_parameter_that_decides_is_found():
    found = influence.parameter_importances(proposals())
    assert found[0].parameter == "keep.1"
    assert found[0].importance > 0.8
    assert sum(f.importance for f in found) == pytest.approx(1.0)
    assert "width.mlp.1" not in {f.parameter for f in found}, "what never varied has no importance"
    blocks = influence.block_importances(found)
    assert [b.block for b in blocks] == [0, 1, 2]
    assert max(blocks, key=lambda b: b.importance).block == 1


def test_sensitivity_has_the_sign_of_the_effect():
    found = {(s.kind, s.block): s for s in influence.block_sensitivity(proposals())}
    assert found["keep", 1].correlation > 0.9
    assert found["keep", 2].correlation < 0.1
    assert found["keep", 1].best > 0.8 > found["keep", 1].rest
    assert found["mlp", 1].correlation is None


def test_budgets_are_not_mixed_and_few_trials_say_nothing():
    rows = [*proposals(20), *proposals(20, "macs=75%")]
    assert {f.target for f in influence.parameter_importances(rows)} == {"macs=50%", "macs=75%"}
    assert {f.trials for f in influence.parameter_importances(rows)} == {20}
    few = proposals(influence.LEAST_TRIALS - 1)
    assert influence.parameter_importances(few) == []
    assert influence.block_sensitivity(few) == []


def test_failed_trials_baselines_and_repeats_do_not_count():
    good = proposals(12)
    noise = [
        zero_shot(50, state="failed", params_searched={"keep.0": 1.0}, kl=None),
        zero_shot(51, origin="baseline", method="evit"),
        zero_shot(52, feasible=False, params_searched={"keep.0": 1.0}),
        row(53, params_searched=good[0].params_searched, plan_key="plan0", parent=0),
    ]
    assert influence.searched_trials([*good, *noise]) == influence.searched_trials(good)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keep.3", ("keep", 3)),
        ("width.mlp.0", ("mlp", 0)),
        ("width.embed.0", ("width.embed.0", None)),
        ("width.depth", ("width.depth", None)),
        ("distiller.two_level.logits", ("distiller.two_level.logits", None)),
    ],
)
def test_parameters_know_their_block(name, expected):
    assert influence.block_of(name) == expected


# Two runs


def folder(path, rows, **changes) -> Run:
    store = RunStore.create(path, config(**changes), {})
    for one in rows:
        store.append(one)
    return Run(store.path)


def dense(accuracy: float = 0.95):
    return row(90, origin="dense", method="dense", target="", accuracy=accuracy, plan_key="dense")


def test_runs_are_compared_per_budget_and_method(tmp_path):
    a = folder(tmp_path / "a", [dense(), *seeds(0, "search", [0.90, 0.91]), *seeds(2, "old", [0.8, 0.8])])
    b = folder(tmp_path / "b", [dense(), *seeds(0, "search", [0.93, 0.94]), *seeds(2, "new", [0.7, 0.7])])
    found = compare_runs(a, b)
    assert found.differences == []
    pairs = {p.method: p for p in found.methods}
    assert pairs["search"].difference == pytest.approx(0.03)
    # Pooled over the four models: two with a spread of 0.00707, two without any.
    assert pairs["search"].margin == pytest.approx(2.776445 * 0.005, rel=1e-4)
    assert (pairs["search"].verdict, pairs["old"].verdict, pairs["new"].verdict) == (
        "higher",
        "only A",
        "only B",
    )
    assert found.budgets[0].hypervolume_b > found.budgets[0].hypervolume_a
    back = compare_runs(b, a)
    assert {p.method: p for p in back.methods}["search"].verdict == "lower"
    frame = a.compare(b)
    assert set(frame["method"]) == set(pairs)


def test_other_data_or_another_teacher_are_refused_and_named(tmp_path):
    a = folder(tmp_path / "a", [dense(), row(0)])
    b = folder(tmp_path / "b", [dense(), row(0)], data={"name": "fashion-mnist"})
    c = folder(tmp_path / "c", [dense(0.91), row(0)])
    with pytest.raises(
        RunError, match=r"data\.name is digits in the one and fashion-mnist in the other.*--anyway"
    ):
        compare_runs(a, b)
    with pytest.raises(RunError, match=r"the uncompressed model's accuracy is 0\.95 in the one and 0.91"):
        compare_runs(a, c)
    assert any(d.decisive for d in compare_runs(a, b, anyway=True).differences)


def test_what_differs_is_told_before_the_numbers(tmp_path):
    a = folder(tmp_path / "a", [row(0)], train={"epochs": 1})
    b = folder(tmp_path / "b", [row(0, accuracy=0.95)], train={"epochs": 2}, search={"trials": 9})
    found = compare_runs(a, b)
    stream = io.StringIO()
    print_comparison(found, Console(file=stream, width=60))
    text = stream.getvalue()
    assert text.index("train.epochs") < text.index("Methods at each budget")
    assert "search.trials" in text
    assert "unknown" in text, "one seed each: no statement"
    assert json.loads(json.dumps(comparison_json(found)))["differences"][0]["key"]


def test_a_run_and_itself_cannot_be_told_apart(tmp_path):
    a = folder(tmp_path / "a", [*seeds(0, "search", [0.90, 0.91]), *seeds(2, "evit", [0.8, 0.82])])
    assert {p.verdict for p in compare_runs(a, a).methods} == {"not told apart"}


def test_frames_of_a_run_without_trials_have_their_columns(tmp_path):
    run = folder(tmp_path / "empty", [])
    frames = [run.trials(), run.pareto(), run.importances(), run.importances("blocks"), run.sensitivity()]
    frames += [run.standings(), run.failures(), run.hypervolume(), run.compare(run)]
    assert all(len(frame) == 0 and len(frame.columns) > 1 for frame in frames)
    assert run.knee() is None


def test_failures_come_with_an_example(tmp_path):
    bad = {"state": "failed", "accuracy": None, "kl": None}
    rows = [
        row(0, failure="nan_loss", error="loss is nan", **bad),
        row(1, failure="out_of_memory", error="no memory", **bad),
        row(2, failure="out_of_memory", error="none left", **bad),
    ]
    frame = folder(tmp_path / "run", rows).failures()
    assert frame.to_dict("records")[0] == {
        "failure": "out_of_memory",
        "trials": 2,
        "first": 1,
        "error": "no memory",
    }


def test_the_best_within_a_latency(tmp_path):
    run = folder(tmp_path / "run", [row(0)])
    with pytest.raises(RunError, match="no trial's latency was measured"):
        run.pick(max_latency_ms=2.0)

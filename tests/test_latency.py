from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latencies import CONDITIONS, microseconds, table_by_hand
from rows import row
from shapes import deit_shape, pvt_shape
from tiny import tiny_config, write_space
from typer.testing import CliRunner

from ucc_search.analysis import pareto_front
from ucc_search.budget import LATENCY, Budget, Limit, budgets, project
from ucc_search.cli import app
from ucc_search.costs import cost
from ucc_search.errors import BudgetError, ConfigError
from ucc_search.interfaces import ComponentRef, ScheduleRequest
from ucc_search.latency import Grid, Latency, LatencyTable, Part, block_kinds, components_key
from ucc_search.latency import measure as latency_measure
from ucc_search.latency.kept import table_for
from ucc_search.latency.layout import layout
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.preview import preview, preview_text
from ucc_search.runner import search
from ucc_search.runs import load_run
from ucc_search.schedule import Scheduler, candidate_of
from ucc_search.shapes import model_shape
from ucc_search.space import SearchSpace
from ucc_search.store import RunStore
from ucc_search.tables.wording import rounded_up
from ucc_search.timing import Timings
from ucc_search.widths import Widths

PLUGINS = Plugins.load(())
SHAPE = deit_shape("tiny")
DENSE = CompressionPlan.identity(SHAPE)
UCC = PLUGINS.components(ComponentRef("joint"), ComponentRef("host"), ComponentRef("per_block"))
CONFIG = tiny_config(space={"scorer": "joint", "aggregator": "host"}, latency={"batch": 4})
WIDE = tiny_config(
    space={
        "scorer": "joint",
        "aggregator": "host",
        "widths": {
            "embed": {"low": 0.5},
            "heads": {"low": 0.34},
            "mlp": {"low": 0.25},
            "depth": {"low": 0.5},
        },
    }
)
RANKED = tiny_config(
    space={
        "cascade": "keep_all",
        "widths": {"qk_rank": {"low": 0.25}, "v_rank": {"low": 0.5}, "mlp_rank": {"low": 0.2}},
    }
)
TABLE, WIDE_TABLE = (table_by_hand(c, SHAPE, PLUGINS) for c in (CONFIG, WIDE))
LATENCIES = Latency(TABLE)
quickly = settings(max_examples=25, deadline=None)


# Grids


def test_a_grid_is_exact_at_its_levels_and_straight_between_them():
    grid = Grid(((1, 3), (10, 20)), (1.0, 2.0, 5.0, 6.0))
    assert [grid(a, b) for a in (1, 3) for b in (10, 20)] == [1.0, 2.0, 5.0, 6.0]
    assert grid(2, 10) == 3.0
    assert grid(2, 15) == 3.5
    assert (grid(0, 5), grid(9, 99)) == (1.0, 6.0)  # held beyond the ends


def test_a_product_of_sizes_is_met_everywhere():
    axes = ((2, 10, 50), (8, 64), (16, 32))
    grid = Grid(axes, tuple(3 + 2.0 * a * b * c for a, b, c in itertools.product(*axes)))
    for a, b, c in ((2, 8, 16), (7, 33, 20), (49, 63, 31)):
        assert grid(a, b, c) == pytest.approx(3 + 2 * a * b * c)


@quickly
@given(st.lists(st.floats(0.1, 9.0), min_size=24, max_size=24), st.sampled_from([0.0, 0.5, math.inf]))
def test_a_measured_grid_never_falls(ms, saw_tooth):
    axes = ((1, 2, 3), (5, 6), (1, 4, 8, 9))
    grid = Grid.rising(axes, ms, saw_tooth=saw_tooth)
    points = list(itertools.product(*axes))
    for low, high in itertools.product(points, points):
        if all(a <= b for a, b in zip(low, high, strict=True)):
            assert grid(*low) <= grid(*high)
    assert min(ms) <= grid(1, 5, 1) and grid(3, 6, 9) <= max(ms)
    assert Grid.rising(axes, grid.ms) == grid  # what rises already stays


def test_an_outlier_raises_no_larger_point():
    axes = ((1, 2, 3, 4),)
    assert Grid.rising(axes, [1.0, 9.0, 2.0, 3.0]).ms == (1.0, 2.0, 2.0, 3.0)
    saw = Grid.rising(axes, [1.0, 2.4, 2.0, 3.0], saw_tooth=0.5).ms  # a fall within it: half-way
    assert saw == pytest.approx((1.0, 2.2, 2.2, 3.0))
    far = Grid.rising(axes, [1.0, 9.0, 2.0, 3.0], saw_tooth=0.5).ms  # beyond it: half of the tooth
    assert far == pytest.approx((1.0, 2.5, 2.5, 3.0))


def test_an_axis_may_be_left_free_to_fall():
    assert Grid.rising(((1, 2), (1, 2)), [4.0, 1.0, 5.0, 2.0], but=1).ms == (4.0, 1.0, 5.0, 2.0)
    with pytest.raises(ValueError, match="3 times for a grid of 4"):
        Grid.rising(((1, 2), (1, 2)), [1.0, 2.0, 3.0])


def test_a_width_that_was_not_measured_is_refused():
    with pytest.raises(BudgetError, match="knows a width of 48 alone where 40 is asked for"):
        Grid(((48,),), (1.0,))(40)


# What is measured


def test_only_what_the_space_moves_has_levels():
    parts = layout(CONFIG, SHAPE, PLUGINS).parts
    tokens, *widths = parts[Part.of("attention 0")]
    assert (tokens[0], tokens[-1]) == (2, 197)
    assert widths == [(192,), (3,), (64,), ()]
    wide = layout(WIDE, SHAPE, PLUGINS).parts
    assert [a and (a[0], a[-1]) for a in wide[Part.of("attention 0")]] == [
        (2, 197),
        (96, 192),
        (1, 3),
        (64, 64),
        (),
    ]
    assert (wide[Part.of("mlp 0")][2][0], wide[Part.of("mlp 0")][2][-1]) == (192, 768)
    ranked = layout(RANKED, SHAPE, PLUGINS).parts
    assert ranked[Part.of("attention 0")][0] == (197,)  # keep_all cuts no tokens
    assert (ranked[Part.of("attention 0")][3][0], ranked[Part.of("attention 0")][4]) == (
        16,
        (),
    )  # both of one width
    assert (ranked[Part.of("uneven attention 0")][3][0], ranked[Part.of("uneven attention 0")][4][0]) == (
        16,
        32,
    )
    assert ranked[Part.of("low mlp 0")][3][-1] == 192 * 768 // (192 + 768)
    assert not [name for name in ranked if name.what == "cut"]


def test_tokens_are_measured_off_the_multiples_of_a_vector_but_for_all_of_them():
    tokens = layout(CONFIG, SHAPE, PLUGINS).parts[Part.of("attention 0")][0]
    assert tokens[-1] == 197
    assert {n % 16 for n in tokens[:-1] if n >= 16} == {8}


def test_every_pair_of_components_that_may_meet_is_measured():
    config = tiny_config(
        space={"scorer": ["joint", {"name": "spectral", "fft_axis": {"choices": ["token", "channel"]}}]},
        baselines=[{"name": "tome", "scorer": "random", "aggregator": "bipartite", "cascade": "constant"}],
    )
    keys = [c.key for c in layout(config, SHAPE, PLUGINS).combinations]
    assert len(keys) == 4
    assert any("channel" in k for k in keys) and keys[-1] == '{"name": "bipartite"}'
    assert Part.of("biased attention 0") in layout(config, SHAPE, PLUGINS).parts


def test_numbers_among_parameters_are_taken_not_to_matter():
    one, other = (ComponentRef("joint", {"mix": m, "sign": "low"}) for m in (0.2, 0.9))
    host = ComponentRef("host")
    assert components_key(one, host, needs_scores=True) == components_key(other, host, needs_scores=True)
    high = ComponentRef("joint", {"sign": "high"})
    assert components_key(one, host, needs_scores=True) != components_key(high, host, needs_scores=True)


def test_blocks_of_a_pyramid_are_of_four_kinds():
    assert len(set(block_kinds(pvt_shape("b2")))) == 4
    parts = layout(tiny_config(space={"cascade": "keep_all"}), pvt_shape("b2"), PLUGINS).parts
    assert [name for name in parts if name.what == "stem"] == [Part("stem", s) for s in range(4)]


# Prices


def test_a_plan_is_the_sum_of_its_parts():
    plan = DENSE.replace(tokens_out=[196] * 5 + [98] * 7, head_tokens_only=True)
    key = components_key(*UCC.refs, needs_scores=True)
    grids = TABLE.grids
    expected = (
        grids[Part.of("stem 0")](3, 192)
        + 6 * grids[Part.of("attention 0")](197, 192, 3, 64, 64)
        + 5 * grids[Part.of("attention 0")](99, 192, 3, 64, 64)
        + grids[Part.of("head attention 0")](99, 192, 3, 64, 64)
        + 5 * grids[Part.of("mlp 0")](197, 192, 768)
        + 6 * grids[Part.of("mlp 0")](99, 192, 768)
        + grids[Part.of("mlp 0")](1, 192, 768)
        + grids[Part.of(f"cut 0 {key}")](196, 500, 192, 3)
        + grids[Part.of("head")](1, 192)
        + grids[Part.of("carry")](192)
    )
    assert LATENCIES.value(plan, UCC) == pytest.approx(expected)
    assert Latency(TABLE).value(plan, UCC) == LATENCIES.value(plan, UCC)  # what is remembered changes nothing
    assert LATENCIES.value(DENSE, UCC) == pytest.approx(TABLE.dense_ms)


def test_half_blocks_and_ranks_have_prices_of_their_own():
    table = table_by_hand(RANKED, SHAPE, PLUGINS)
    latency, parts = (
        Latency(table),
        PLUGINS.components(*(ComponentRef(n) for n in ("random", "drop", "keep_all"))),
    )
    full = latency.value(DENSE, parts)
    without = latency.value(DENSE.replace(mlp=[False] + [True] * 11), parts)
    assert full - without == pytest.approx(table.grids[Part.of("mlp 0")](197, 192, 768))
    low = latency.value(DENSE.replace(mlp_rank=[40] + [None] * 11), parts)
    saved = microseconds("mlp 0", (197, 192, 768)) - microseconds("low mlp 0", (197, 192, 768, 40))
    assert full - low == pytest.approx(saved / 1e3)
    thin = latency.value(DENSE.replace(qk_dim=16, low_rank_attention=True), parts)
    uneven = table.grids[Part.of("uneven attention 0")](197, 192, 3, 16, 64)
    even = table.grids[Part.of("attention 0")](197, 192, 3, 64, 64)
    assert full - thin == pytest.approx(12 * (even - uneven))


@quickly
@given(st.lists(st.integers(1, 196), min_size=12, max_size=12), st.integers(0, 11))
def test_one_token_more_in_a_cut_block_is_never_faster(tokens, block):
    tokens = sorted(tokens, reverse=True)
    more = [*tokens[:block], tokens[block] + 1, *tokens[block + 1 :]]
    before = ([196, *tokens])[block]
    if tokens[block] + 1 >= before or (block < 11 and tokens[block + 1] == tokens[block]):
        return  # a cut would end, or begin
    small, large = (DENSE.replace(tokens_out=t) for t in (tokens, more))
    assert LATENCIES.value(small, UCC) <= LATENCIES.value(large, UCC) + 1e-12


def test_other_models_and_components_are_refused():
    cut = DENSE.replace(tokens_out=[196] * 6 + [100] * 6)
    other = PLUGINS.components(ComponentRef("random"), ComponentRef("drop"), ComponentRef("per_block"))
    with pytest.raises(BudgetError, match=r"has no part 'cut 0 .*random"):
        LATENCIES.value(cut, other)
    with pytest.raises(BudgetError, match="knows a width of 192 alone"):
        LATENCIES.value(DENSE.replace(embed_dim=96), UCC)


def test_a_table_survives_its_file(tmp_path):
    assert LatencyTable.from_json(TABLE.to_json()).shape == SHAPE
    for table in (TABLE, table_by_hand(RANKED, SHAPE, PLUGINS)):
        assert list(LatencyTable.from_json(table.to_json()).grids) == list(table.grids)
    again = Latency(LatencyTable.from_json(TABLE.to_json()))
    assert again.value(DENSE, UCC) == pytest.approx(TABLE.dense_ms, rel=1e-4)
    for damage in ({"format": 0}, {"grids": {"head": {"axes": [[1, 2]], "ms": [1.0]}}}, {"conditions": {}}):
        with pytest.raises(ValueError, match=r"format is 0|is not whole|no latency table"):
            LatencyTable.from_json(json.dumps({**json.loads(TABLE.to_json()), **damage}))


# Projection


def limited(table, share, latency=None, macs=None):
    metric = latency or Latency(table)
    limit = Limit(LATENCY, table.dense_ms * share, metric, table.dense_ms)
    return Budget(f"latency_ms={share:.0%}", macs, None, (limit,))


def family(keep):
    return UCC.cascade.profile(ScheduleRequest(SHAPE, keep_ratios=keep, min_keep=0.2))


def kept(plan):
    return [out / before for out, before in zip(plan.tokens, plan.tokens_in, strict=True)]


ratios = st.lists(st.floats(0.2, 1.0), min_size=12, max_size=12)
starts = st.sampled_from([DENSE, DENSE.replace(head_tokens_only=True)])


@quickly
@given(ratios, st.floats(0.45, 1.0), starts)
def test_a_plan_is_within_its_latency_and_projecting_it_again_gives_it_back(keep, share, start):
    budget = limited(TABLE, share, LATENCIES)
    plan = project(start, family(keep), budget, UCC)
    assert LATENCIES.value(plan, UCC) <= budget.limits[0].most
    assert project(start, family(keep), budget, UCC) == plan
    assert project(start, family(kept(plan)), budget, UCC) == plan


@quickly
@given(ratios, st.floats(0.45, 0.95), starts)
def test_no_token_fits_and_no_cut_is_wasted(keep, share, start):
    budget = limited(TABLE, share, LATENCIES)
    plan = project(start, family(keep), budget, UCC)
    for i, (out, arriving) in enumerate(zip(plan.tokens, plan.tokens_in, strict=True)):
        if out == arriving or i == plan.head_block:
            continue
        run = next((j for j in range(i, 12) if plan.tokens[j] != out), 12)
        for tokens in (out + 1, arriving):
            more = plan.replace(tokens_out=[tokens if i <= j < run else n for j, n in enumerate(plan.tokens)])
            assert LATENCIES.value(more, UCC) > budget.limits[0].most


@quickly
@given(st.floats(0.5, 0.95), st.floats(0.5, 0.95))
def test_limits_on_latency_and_macs_both_hold(share, macs):
    dense = cost(DENSE).macs
    budget = limited(TABLE, share, LATENCIES, macs=int(macs * dense))
    plan = project(DENSE, family([0.8] * 12), budget, UCC)
    assert cost(plan, UCC).macs <= macs * dense
    assert LATENCIES.value(plan, UCC) <= share * TABLE.dense_ms


@quickly
@given(st.floats(0.3, 0.95))
def test_widths_depth_and_tokens_answer_to_one_latency(share):
    latency, widths = Latency(WIDE_TABLE), Widths(WIDE.space.widths, SHAPE)
    budget = limited(WIDE_TABLE, share, latency)
    plan = project(DENSE, family([0.9] * 12), budget, UCC, widths)
    assert share - 0.05 < latency.value(plan, UCC) / WIDE_TABLE.dense_ms <= share


def test_a_latency_out_of_reach_names_what_is_in_reach():
    low = UCC.cascade.profile(ScheduleRequest(SHAPE, keep_ratios=[0.9] * 12, min_keep=0.9))
    with pytest.raises(BudgetError) as caught:
        project(DENSE, low, limited(TABLE, 0.2), UCC)
    assert "latency_ms=20%" in str(caught.value)
    assert f"to 100% of {TABLE.dense_ms:.4g} ms; raise the budget" in str(caught.value)
    reachable = float(str(caught.value).partition("reachable are ")[2].partition("%")[0])
    assert project(DENSE, low, limited(TABLE, (reachable + 0.1) / 100), UCC)


# Configuration


def test_limits_are_milliseconds_or_percentages():
    limits = {LATENCY: (LATENCIES, 8.0)}
    found = [
        [
            (b.label, b.max_macs, [x.most for x in b.limits])
            for b in budgets(tiny_config(budget=b).budget, cost(DENSE), limits)
        ]
        for b in (
            {"macs": None, "latency_ms": ["50%", 3]},
            {"macs": "50%", "latency_ms": "25%"},
            {"macs": None, "latency_ms": 2.5},
        )
    ]
    half = cost(DENSE).macs // 2
    assert found == [
        [("latency_ms=50%", None, [4.0]), ("latency_ms=3", None, [3.0])],
        [("macs=50%,latency_ms=25%", half, [2.0])],
        [("latency_ms=2.5", None, [2.5])],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"macs": ["50%"], "latency_ms": ["50%", "60%"]}}, "only one may list several"),
        ({"budget": {"macs": None, "latency_ms": []}}, "latency_ms is empty"),
        ({"latency": {"batch": 0}}, "batch"),
        (
            {
                "budget": {"macs": None, "latency_ms": "50%"},
                "search": {"ranks": {}},
                "space": {"widths": {"mlp_rank": {"low": 0.2}}},
            },
            "search.ranks weighs MACs and parameters alone",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("value", ["150%", "fast", -1, "0%"])
def test_values_that_are_no_latency_are_refused(value):
    config = tiny_config(budget={"macs": None, "latency_ms": value})
    with pytest.raises(BudgetError, match=r"budget\.latency_ms is"):
        budgets(config.budget, cost(DENSE), {LATENCY: (LATENCIES, 8.0)})


def test_without_a_table_there_is_no_limit_to_hold():
    config = tiny_config(budget={"macs": None, "latency_ms": "50%"})
    with pytest.raises(BudgetError, match="not measured here yet; `ucc-search latency SPACE`"):
        Scheduler(config, SHAPE, PLUGINS)


# Measuring


@pytest.fixture(scope="module")
def measured():
    """A real table of the tiny model, in a single round."""
    config = tiny_config(
        budget={"macs": None, "latency_ms": "90%"},
        space={"widths": {"embed": {"low": 0.5}, "mlp_rank": {"low": 0.3}, "qk_rank": {"low": 0.5}}},
        baselines=[
            {"name": "tome", "scorer": "random", "aggregator": "bipartite", "cascade": "constant"},
            {
                "name": "every",
                "scorer": "joint",
                "aggregator": "host",
                "cascade": {"name": "per_block", "score_every_block": True},
            },
        ],
    )
    shape = model_shape(config)
    table = latency_measure.measure_table(
        config.model, shape, layout(config, shape, PLUGINS), CONDITIONS, PLUGINS, rounds=1
    )
    return config, shape, table


def test_a_measured_table_prices_every_plan_of_its_space(measured):
    config, shape, table = measured
    latency = Latency(table)
    assert all(math.isfinite(v) and v >= 0 for g in table.grids.values() for v in g.ms)
    assert latency.value(CompressionPlan.identity(shape), UCC) == pytest.approx(table.dense_ms)
    space = SearchSpace.of(config.space, shape, PLUGINS)
    scheduler = Scheduler(config, shape, PLUGINS, latency=table)
    for candidate in (*space.corners(), *map(candidate_of, config.baselines)):
        parts = PLUGINS.components(*(candidate.components[k] for k in ("scorer", "aggregator", "cascade")))
        for plan in (scheduler.smallest(candidate), scheduler.largest(candidate)):
            assert 0 < latency.value(plan, parts) < math.inf


def test_a_finished_model_is_timed_beside_the_dense_one(measured):
    from ucc_search.models import build_model

    config, shape, table = measured
    model = build_model(config.model, classes=shape.classes, channels=shape.channels).eval()
    beside = latency_measure.time_beside(model, model, shape, table.conditions, rounds=2)
    assert set(beside.seconds) == {"model", "dense"} and beside.rounds == 2


def test_a_finished_model_takes_its_share_of_what_the_dense_one_takes_by_the_table(monkeypatch):
    rounds = Timings({"model": (1.0, 2.0, 5.0), "dense": (4.0, 4.0, 5.0)})  # 4, 2 and 1 times as fast
    monkeypatch.setattr(latency_measure, "time_beside", lambda *given: rounds)
    found = latency_measure.finished_ms(None, None, SHAPE, LATENCIES.to_measure())
    assert found == pytest.approx(TABLE.dense_ms / 2)
    elsewhere = {**LATENCIES.to_measure(), "conditions": {**asdict(CONDITIONS), "device": "cuda"}}
    monkeypatch.setattr(latency_measure.torch.cuda, "is_available", lambda: False)
    assert latency_measure.finished_ms(None, None, SHAPE, elsewhere) is None


def test_what_rounds_disagree_on_is_timed_again_until_they_agree():
    taken = {"steady": [1.0, 1.01, 1.02], "shaken": [1.0, 2.0, 3.0], "once": [1.0]}
    asked = []

    def time_all(calls, **how):
        asked.append(sorted(calls))
        return Timings(dict.fromkeys(calls, (1.0, 1.0)))

    latency_measure._again_where_noisy(time_all, dict.fromkeys(taken), {}, taken, 60.0)
    assert asked == [["once", "shaken"]]
    assert [len(v) for v in taken.values()] == [3, 5, 3]
    taken["shaken"] = [1.0, 2.0, 3.0]
    latency_measure._again_where_noisy(time_all, dict.fromkeys(taken), {}, taken, -1.0)
    assert len(asked) == 1  # the time is over


def test_a_correction_that_is_cut_short_is_told():
    plan, said = DENSE.replace(tokens_out=[98] * 12), []
    key = components_key(*UCC.refs, needs_scores=True)
    right = LATENCIES.value(plan, UCC)
    same = latency_measure._right_for_cuts(TABLE, plan, UCC, key, right, said.append)
    assert Latency(same).value(plan, UCC) == pytest.approx(right) and not said
    far = latency_measure._right_for_cuts(TABLE, plan, UCC, key, 3 * right, said.append)
    cut = microseconds(f"cut 0 {key}", (196, 500, 192, 3)) / 1e3
    assert Latency(far).value(plan, UCC) == pytest.approx(right + cut)
    assert "corrected by 2 alone" in said[0]


def test_pyramids_are_measured_stage_by_stage():
    from ucc_search.compression import shape_of
    from ucc_search.config import ModelConfig
    from ucc_search.models import build_model

    model = ModelConfig(
        name="pvt_v2_b0",
    )
    shape = shape_of(build_model(model, classes=10, channels=3), "pvt_v2_b0", image_size=(32, 32))
    config = tiny_config(
        space={
            "cascade": "keep_all",
            "widths": {"embed": {"low": 0.5}, "mlp": {"low": 0.5}, "depth": {"low": 0.5}},
        }
    )
    wanted = layout(config, shape, PLUGINS)
    table = latency_measure.measure_table(model, shape, wanted, CONDITIONS, PLUGINS, rounds=1)
    dense = CompressionPlan.identity(shape)
    narrow = Widths(config.space.widths, shape).at(dense, None, 1.0)
    assert (
        0
        < Latency(table).value(narrow, UCC)
        < Latency(table).value(dense, UCC)
        == pytest.approx(table.dense_ms)
    )


# Where tables come from


@pytest.fixture
def by_hand(monkeypatch, tmp_path):
    """Measuring gives tables by hand of the configuration in the second list, as noisy as the third says; the first has what was asked for."""
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    asked, of, noise = [], [], [0.05]

    def measure(model, shape, wanted, conditions, plugins, *, log):
        asked.append(conditions)
        return replace(table_by_hand(of[0], shape, plugins), noise=noise[0])

    monkeypatch.setattr(latency_measure, "measure_table", measure)
    return asked, of, noise


def test_a_table_is_measured_once_and_a_damaged_one_again(by_hand, tmp_path):
    asked, of, _ = by_hand
    config = tiny_config(budget={"macs": None, "latency_ms": "90%"}, latency={"batch": 4})
    of.append(config)
    shape, said = model_shape(config), []
    assert table_for(config, shape, PLUGINS) is None  # nothing is measured unasked
    first = table_for(config, shape, PLUGINS, log=said.append)
    assert (asked[0].batch, asked[0].threads, asked[0].precision) == (4, 1, "fp32")
    assert "timing" in said[0] and "a batch of 4 in fp32" in said[0]
    kept_now = table_for(config, shape, PLUGINS)
    assert len(asked) == 1 and kept_now.dense_ms == first.dense_ms
    (path,) = (tmp_path / "cache" / "latency").glob("*.json")
    path.write_text(path.read_text()[:-40])
    assert table_for(config, shape, PLUGINS) is None
    table_for(config, shape, PLUGINS, log=said.append)
    assert len(asked) == 2
    other = tiny_config(budget={"macs": None, "latency_ms": "90%"}, latency={"batch": 8})
    assert table_for(other, shape, PLUGINS) is None  # other conditions, another table
    assert table_for(tiny_config(), shape, PLUGINS) is None  # nobody asks for latencies


def test_a_table_of_a_busy_machine_serves_once_and_replaces_none(by_hand, tmp_path):
    asked, of, noise = by_hand
    config = tiny_config(budget={"macs": None, "latency_ms": "90%"}, latency={"batch": 4})
    of.append(config)
    shape, said = model_shape(config), []
    noise[0] = 0.8
    assert table_for(config, shape, PLUGINS, log=said.append).noisy
    assert "differ by up to 80 % between rounds" in said[-1] and "--again" in said[-1]
    assert table_for(config, shape, PLUGINS) is None  # nothing was kept
    noise[0] = 0.1
    table_for(config, shape, PLUGINS, log=said.append)
    assert len(asked) == 2 and "kept for the next run" in said[-1]
    noise[0] = 0.9
    assert table_for(config, shape, PLUGINS, log=said.append, again=True).noisy
    assert table_for(config, shape, PLUGINS).noise == 0.1


def test_a_file_serves_the_model_it_was_made_for(tmp_path):
    config = tiny_config(budget={"macs": None, "latency_ms": "90%"})
    shape, path = model_shape(config), tmp_path / "table.json"
    path.write_text(table_by_hand(config, shape, PLUGINS).to_json())

    def found(**changes):
        named = tiny_config(
            budget={"macs": None, "latency_ms": "90%"}, latency={"table": str(path)}, **changes
        )
        return table_for(named, shape, PLUGINS)

    assert found().conditions.hardware == "a machine by hand"
    with pytest.raises(BudgetError, match=r"does not reach as far as this space file \(stem 0\)"):
        found(space={"widths": {"embed": {"low": 0.5}}})
    path.write_text(TABLE.to_json())
    with pytest.raises(BudgetError, match="of another model than this small_vit"):
        found()
    path.write_text("{")
    with pytest.raises(BudgetError, match=r"table\.json"):
        found()
    path.unlink()
    with pytest.raises(BudgetError, match="cannot be read"):
        found()


def test_a_plan_says_that_nothing_was_measured_yet_and_then_what_was(by_hand):
    _, of, _ = by_hand
    config = tiny_config(budget={"macs": "90%", "latency_ms": "90%"})
    of.append(config)
    text = preview_text(preview(config, PLUGINS))
    assert "latency       not measured here yet; `ucc-search latency SPACE`" in text
    assert "latency_ms=90%: not judged yet, no table (ucc-search latency SPACE)" in text
    table = table_for(config, model_shape(config), PLUGINS, log=lambda text: None)
    text = preview_text(preview(config, PLUGINS))
    assert f"latency       {table.dense_ms:.3g} ms uncompressed" in text
    assert f" and {0.9 * table.dense_ms:.4g} ms" in text and "not judged" not in text


# Whole runs

LIMITED = {
    "budget": {"macs": None, "latency_ms": ["90%", "80%"]},
    "space": {"widths": {"mlp": {"low": 0.25}}},
    "search": {"trials": 4, "seeds": [0]},
    "baselines": [{"name": "random", "widths": {"mlp": {"low": 0.25}}}],
}


def test_a_run_stays_within_its_latency_and_times_what_it_finishes(tmp_path):
    path = tmp_path / "table.json"
    config = tiny_config(**LIMITED, latency={"table": str(path)})
    table = table_by_hand(config, model_shape(config), PLUGINS)
    path.write_text(table.to_json())
    run = search(config, out=tmp_path / "run")
    found = [r for r in run.rows if r.origin != "dense"]
    assert {r.state for r in found} == {"ok"} and all(r.feasible for r in found)
    limits = sorted({r.limit_latency_ms for r in found})
    assert limits == pytest.approx([0.8 * table.dense_ms, 0.9 * table.dense_ms])
    assert all(0 < r.latency_ms_predicted <= r.limit_latency_ms for r in found)
    assert max(r.latency_ms_predicted / r.limit_latency_ms for r in found) > 0.95
    assert {r.rung for r in found if r.latency_ms is not None} == {"train"}
    assert all(r.latency_ms > 0 for r in found if r.rung == "train")
    (dense,) = (r for r in run.rows if r.origin == "dense")
    assert dense.latency_ms == dense.latency_ms_predicted == pytest.approx(table.dense_ms)
    slowest = max(r.latency_ms for r in found if r.rung == "train")
    assert run.pick(max_latency_ms=slowest).latency_ms <= slowest
    trained = next(r for r in found if r.rung == "train")
    job = json.loads((run.path / "trials" / str(trained.id) / "job.json").read_text())
    assert job["latency"] == Latency(table).to_measure()  # all that is needed to measure the trial again
    shown = CliRunner().invoke(app, ["analyze", str(run.path)]).stdout
    assert "ms (by table)" in shown
    point = pareto_front(run.rows)[0]
    over = "!" if point.latency_ms > limits[0 if "80" in point.target else 1] else ""
    assert f"{point.latency_ms:.3g}{over} ({point.latency_ms_predicted:.3g})" in shown
    resumed = search(config, out=tmp_path / "run", resume=True)
    assert len(resumed.rows) == len(run.rows)


@pytest.mark.parametrize(("ms", "late"), [(2.0, False), (2.09, False), (2.2, True)])
def test_models_that_took_clearly_more_than_their_limit_are_named(ms, late, tmp_path):
    store = RunStore.create(tmp_path / "run", tiny_config(latency={}), {})
    for number, took in enumerate((1.9, ms)):
        store.append(row(number, latency_ms=took, latency_ms_predicted=1.95, limit_latency_ms=2.0))
    shown = CliRunner().invoke(app, ["analyze", str(store.path)]).stdout
    assert ("Latency: 1 of 2 finished models took over 5 % more than their limit" in shown) is late
    assert (f"trial 1 ({ms:.3g} of 2 ms)" in shown) is late
    assert load_run(store.path).trials()["latency_over"].tolist() == pytest.approx([-0.05, ms / 2 - 1])
    better = row(2, accuracy=0.99, macs=6_000_000, latency_ms=ms, latency_ms_predicted=1.95)
    store.append(replace(better, limit_latency_ms=2.0, latency_over=None, target="latency_ms=50%"))
    shown = CliRunner().invoke(app, ["analyze", str(store.path)]).stdout
    mark = "!" if ms > 2 else ""
    assert shown.count(f"{ms:.3g}{mark} (1.95)") >= 2  # in the front, and beside its rivals
    assert ("! slower than its limit when it was timed" in shown) is (ms > 2)
    assert f"--max-latency-ms {rounded_up(ms)}" in shown


def test_latencies_may_be_recorded_without_a_limit(tmp_path):
    path = tmp_path / "table.json"
    config = tiny_config(latency={"table": str(path), "measure": False}, search={"trials": 2, "promote": 0})
    path.write_text(table_by_hand(config, model_shape(config), PLUGINS).to_json())
    rows = search(config, out=tmp_path / "run").rows
    assert all(r.latency_ms_predicted > 0 and r.limit_latency_ms is None for r in rows)
    assert [r.latency_ms for r in rows if r.origin != "dense"] == [None, None]


def test_a_latency_out_of_reach_stops_before_anything_is_written(tmp_path):
    path = tmp_path / "table.json"
    config = tiny_config(budget={"macs": None, "latency_ms": "1%"}, latency={"table": str(path)})
    path.write_text(table_by_hand(config, model_shape(config), PLUGINS).to_json())
    with pytest.raises(BudgetError, match="latency_ms=1%: latency_ms of at most"):
        search(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_measures_and_writes_a_table(by_hand, tmp_path):
    _, of, _ = by_hand
    of.append(tiny_config())
    space, out = write_space(tmp_path), tmp_path / "table.json"
    done = CliRunner().invoke(app, ["latency", str(space), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    table = LatencyTable.from_json(out.read_text())
    assert json.loads(done.stdout)["dense_ms"] == pytest.approx(table.dense_ms)
    assert "latency: timing" in done.stderr
    again = CliRunner().invoke(app, ["latency", str(space)])
    assert again.stderr == "" and "ms uncompressed" in again.stdout

"""Widths as ratios: from a strength to integers, onto a budget, and back into the search."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import deit_shape, pvt_shape, random_plan, small_shape
from tiny import tiny_config

from ucc_search.budget import Budget, project, whole_tokens, with_tokens
from ucc_search.builtin.aggregators import Bipartite, Drop, Host
from ucc_search.builtin.cascades import KeepAll, PerBlock
from ucc_search.builtin.scorers import Joint, Random
from ucc_search.config import WidthRange, WidthsConfig
from ucc_search.costs import cost, saved_macs
from ucc_search.errors import BudgetError, ConfigError, PlanError
from ucc_search.interfaces import Components, ScheduleRequest
from ucc_search.plan import AffineCost, BlockShape, CompressionPlan, StageShape
from ucc_search.plugins import Plugins
from ucc_search.space import SearchSpace
from ucc_search.widths import Widths, halves_left, towards

KINDS = ("embed", "heads", "attention", "mlp", "depth")
# Four blocks whose widths leave several steps of each kind, and a pyramid of two stages.
SHAPE = dataclasses.replace(
    small_shape(),
    embed_dim=32,
    blocks=(BlockShape(heads=4, qk_dim=8, v_dim=8, mlp_hidden=60),) * 4,
    stem=AffineCost(macs_per_channel=50, params_per_channel=40),
    head=AffineCost(macs_per_channel=10, params=10, params_per_channel=12),
)
PYRAMID = dataclasses.replace(
    pvt_shape("b0"),
    embed_dim=40,
    blocks=(
        *(BlockShape(1, 16, 16, 60, kv_reduction=8, kv_tokens=49, mlp_kernel=9),) * 2,
        *(BlockShape(2, 20, 20, 90, kv_reduction=4, kv_tokens=49, mlp_kernel=9),) * 2,
    ),
    stages=tuple(map(StageShape, ((56, 56), (28, 28)), (16, 40), (2, 2), (49, 9))),
)
SHAPES = {"small": SHAPE, "pyramid": PYRAMID}

FREE = Components(Random(), Drop(), PerBlock())  # scoring and merging cost nothing
UCC = Components(Joint(), Host(), PerBlock())  # every cut costs something
MERGE = Components(Random(), Bipartite(), PerBlock())
NO_CUTS = Components(Random(), Drop(), KeepAll())

cheaply = settings(max_examples=50, deadline=None)


def depth_units(shape):
    return shape.unit_groups()[-1].units


def full_width(shape, name):
    """Units of a coordinate in the dense model."""
    kind, _, index = name.partition(".")
    if kind == "depth":
        return shape.depth
    if kind == "embed":
        return shape.embed_dims[int(index)]
    return getattr(
        shape.blocks[int(index)], {"heads": "heads", "attention": "qk_dim", "mlp": "mlp_hidden"}[kind]
    )


def step_of(widths, name):
    """Units by which a coordinate moves."""
    kind = name.partition(".")[0]
    default = {"embed": 8, "attention": 4, "mlp": 8}.get(kind, 1)
    return 1 if kind == "depth" else widths.searched()[name].multiple or default


ranges = st.builds(
    WidthRange, low=st.sampled_from([0.2, 0.25, 0.5, 0.7]), multiple=st.sampled_from([None, 1, 3])
)
settings_of_kinds = st.dictionaries(
    st.sampled_from(KINDS), ranges | st.sampled_from([0.5, 0.75]), min_size=1, max_size=5
)


@st.composite
def proposals(draw, shapes=tuple(SHAPES)):
    """(widths, ratios proposed for them): some at their bounds, depth in any order."""
    shape = SHAPES[draw(st.sampled_from(shapes))]
    order = draw(st.permutations(range(depth_units(shape))))
    widths = Widths(WidthsConfig(**draw(settings_of_kinds)), shape, lambda: order)
    searched = widths.searched().items()
    ratios = {name: draw(st.floats(r.low, r.high) | st.sampled_from([r.low, r.high])) for name, r in searched}
    return widths, ratios


def dense(shape):
    return CompressionPlan.identity(shape)


def integers(plan):
    """Every number of a plan that pruning changes."""
    blocks = [(b.heads, b.qk_dim, b.v_dim, b.mlp_hidden, b.attention, b.mlp) for b in plan.blocks]
    return [*plan.embed_dims, *itertools.chain.from_iterable(blocks)]


# From a strength to integers


@cheaply
@given(proposals(), st.floats(0, 1), st.floats(0, 1))
def test_no_width_grows_with_the_strength(proposal, one, other):
    widths, ratios = proposal
    weak, strong = sorted([one, other])
    pairs = zip(*(integers(widths.at(dense(widths.shape), ratios, s)) for s in (weak, strong)), strict=True)
    assert all(wide >= narrow for wide, narrow in pairs)


@cheaply
@given(proposals())
def test_strength_goes_from_everything_over_the_proposal_to_the_bounds(proposal):
    widths, ratios = proposal
    plans = [widths.at(dense(widths.shape), ratios, strength) for strength in (0.0, 0.5, 1.0)]
    whole, proposed, least = map(widths.ratios, plans)
    assert set(whole.values()) <= {1.0}
    for name in widths.searched().keys() - {"depth"}:  # depth may leave fewer: half-steps overlap
        full, step = full_width(widths.shape, name), step_of(widths, name)
        for found, wanted in ((proposed, ratios[name]), (least, widths.searched()[name].low)):
            units = round(found[name] * full)
            assert units % step == 0 or units == full
            assert abs(units - wanted * full) <= step / 2 + 1e-9 or units == min(step, full) > wanted * full


@cheaply
@given(proposals(), st.floats(0, 1))
def test_the_ratios_of_a_plan_give_it_back(proposal, strength):
    widths, ratios = proposal
    plan = widths.at(dense(widths.shape), ratios, strength)
    assert widths.at(dense(widths.shape), widths.ratios(plan), 0.5) == plan


def test_a_number_is_kept_at_every_strength_and_may_be_any_width():
    # DeiT-B's step to DeiT-T: a quarter of the embedding, of the heads and of the hidden units.
    fixed = Widths(WidthsConfig(embed=0.25, heads=0.25, mlp=0.25, depth=0.5), deit_shape("base"))
    plans = [fixed.at(dense(deit_shape("base")), None, s) for s in (0.0, 0.3, 1.0)]
    assert plans[0] == plans[1] == plans[2]
    tiny = deit_shape("tiny")
    assert plans[0].embed_dim == tiny.embed_dim
    kept = [plans[0].blocks[i] for i in plans[0].present]
    assert {(b.heads, b.qk_dim, b.mlp_hidden) for b in kept} == {(3, 64, 768)}
    assert plans[0].present == tuple(range(6))  # nothing was measured: the deepest leave
    assert (bool(fixed), fixed.searched()) == (True, {})
    # 0.3 of 768 is no multiple of 8, and is taken as it is.
    odd = Widths(WidthsConfig(embed=0.3), deit_shape("base"))
    assert odd.at(dense(deit_shape("base")), None, 1.0).embed_dim == 230


def test_without_settings_nothing_is_narrowed():
    widths = Widths(WidthsConfig(), SHAPE)
    assert (bool(widths), widths.searched(), widths.kinds_scored()) == (False, {}, set())
    assert widths.at(dense(SHAPE), None, 1.0) == dense(SHAPE)


def test_what_is_scored_is_what_is_narrowed():
    config = WidthsConfig(heads=0.5, mlp=WidthRange(), depth=WidthRange())
    assert Widths(config, SHAPE).kinds_scored() == {"attention", "mlp", "depth"}


def test_coordinates_are_per_stage_per_block_or_one():
    everything = WidthsConfig(**dict.fromkeys(KINDS, WidthRange()))
    per_block = [f"{kind}.{i}" for kind in ("heads", "attention", "mlp") for i in range(4)]
    assert list(Widths(everything, SHAPE).searched()) == ["embed.0", *per_block, "depth"]
    assert list(Widths(everything, PYRAMID).searched()) == ["embed.0", "embed.1", *per_block, "depth"]


# Single steps


@cheaply
@given(proposals(), st.floats(0, 1))
def test_growing_takes_one_step_of_one_coordinate_the_least_kept_first(proposal, strength):
    widths, ratios = proposal
    plan = widths.at(dense(widths.shape), ratios, strength)
    before, moved = widths.ratios(plan), []
    for name, grown in widths.grown(plan):
        after = widths.ratios(grown)
        assert [n for n in after if after[n] != before[n]] == [name]
        more, step = (after[name] - before[name]) * full_width(widths.shape, name), step_of(widths, name)
        assert round(more) == step or (0 < round(more) < step and after[name] == 1.0)
        moved.append(name)
    assert moved == sorted(moved, key=lambda n: before[n])
    assert set(moved) == {name for name, ratio in before.items() if ratio < 1.0}
    assert [name for name, _ in widths.grown(plan, but=moved[:2])] == moved[2:]


@cheaply
@given(proposals())
def test_growing_ends_with_everything_that_is_not_fixed(proposal):
    widths, ratios = proposal
    plan = widths.at(dense(widths.shape), ratios, 1.0)
    while larger := next(iter(widths.grown(plan)), None):
        plan = larger[1]
    assert plan == widths.at(dense(widths.shape), ratios, 0.0)


# Depth


@cheaply
@given(st.sampled_from([SHAPE, PYRAMID, deit_shape("tiny"), pvt_shape("b2")]), st.data())
def test_half_steps_leave_in_order_and_never_overlap(shape, data):
    order = data.draw(st.permutations(range(depth_units(shape))))
    previous = [True] * 2 * shape.depth
    for count in range(shape.depth):
        attention, mlp = halves_left(shape, order, count)
        # A unit is one attention and one MLP.
        assert shape.depth - sum(attention) == shape.depth - sum(mlp) <= count
        if shape.stages:
            assert attention == mlp
            assert all(attention[shape.stage_of.index(stage)] for stage in range(len(shape.stages)))
        # What left for a smaller count has left for a larger one.
        assert all(now <= then for now, then in zip(attention + mlp, previous, strict=True))
        previous = attention + mlp
    first = next(u for u in order if not shape.stages or u not in map(shape.stage_of.index, shape.stage_of))
    assert halves_left(shape, order, 1) == halves_left(shape, [first], 1)


def test_a_half_step_is_an_mlp_with_the_attention_after_it():
    keep, gone = True, False
    assert halves_left(SHAPE, [1], 1) == ([keep, gone, keep, keep], [gone, keep, keep, keep])
    assert halves_left(SHAPE, [2], 1) == ([keep, gone, keep, keep], [keep, gone, keep, keep])
    # 0 and 2 overlap with 1, so the next in order leaves instead.
    assert halves_left(SHAPE, [1, 0, 2, 6], 2) == ([keep, gone, keep, gone], [gone, keep, keep, gone])
    assert halves_left(SHAPE, [], 2) == ([keep] * 4, [keep] * 4)


def test_a_pyramid_loses_no_stage():
    attention, mlp = halves_left(PYRAMID, [0, 2, 3, 1], 3)
    assert attention == mlp == [True, False, True, False]


# Standard smaller architectures


def test_towards_a_narrower_model_keeps_every_block():
    plan = towards(deit_shape("base"), deit_shape("small"))
    small = deit_shape("small")
    assert plan.embed_dims == (384,)
    assert {(b.heads, b.qk_dim, b.v_dim, b.mlp_hidden) for b in plan.blocks} == {(6, 64, 64, 1536)}
    assert cost(plan) == cost(dense(small))


def test_towards_a_shallower_model_the_least_important_blocks_of_each_stage_leave():
    order = [15, 13, 12, 0, 3, 4, 1, 2, 5, 6, 8, 9, 7, 10, 11, 14]
    plan = towards(pvt_shape("b2"), pvt_shape("b1"), order)
    # Stages begin at 0, 3, 7 and 13, and keep their first blocks whatever the order says.
    assert plan.present == (0, 2, 3, 6, 7, 11, 13, 14)
    assert cost(plan) == cost(dense(pvt_shape("b1")))
    assert cost(towards(pvt_shape("b2"), pvt_shape("b0"))) == cost(dense(pvt_shape("b0")))


def test_towards_itself_is_the_identity():
    for shape in (deit_shape("tiny"), pvt_shape("b2"), SHAPE):
        assert towards(shape, shape) == dense(shape)


BASE = deit_shape("base")
NOT_CONTAINED = {
    "cannot become deit_base_patch16_224: it has another number of stages": lambda: (pvt_shape("b2"), BASE),
    "it sees other images or patches": lambda: (BASE, dataclasses.replace(BASE, image_size=(384, 384))),
    "it has other classes or channels": lambda: (BASE, dataclasses.replace(BASE, classes=10)),
    "it has more blocks in stage 0": lambda: (pvt_shape("b1"), pvt_shape("b2")),
    "it has other tokens beside the patches": lambda: (BASE, dataclasses.replace(BASE, prefix_tokens=2)),
    "embed_dim is 768, expected 1 to 192": lambda: (deit_shape("tiny"), BASE),
    r"blocks\[0\]\.mlp_hidden is 4000, expected 1 to 3072": lambda: (
        BASE,
        dataclasses.replace(BASE, blocks=(dataclasses.replace(BASE.blocks[0], mlp_hidden=4000),) * 12),
    ),
}


@pytest.mark.parametrize("message", NOT_CONTAINED)
def test_a_target_that_is_not_contained_is_refused(message):
    shape, target = NOT_CONTAINED[message]()
    with pytest.raises(PlanError, match=message):
        towards(shape, target)


def test_an_order_of_too_few_blocks_is_refused():
    with pytest.raises(PlanError, match="depth_order names too few of the blocks that must leave"):
        towards(pvt_shape("b2"), pvt_shape("b1"), [1, 2])


# Onto a budget


class Problem:
    """A family of plans, and budgets that it can meet."""

    def __init__(self, widths, ratios, keep, parts, metric, spared):
        self.widths, self.ratios, self.keep, self.parts, self.metric = widths, ratios, keep, parts, metric
        self.start = dense(widths.shape).replace(head_tokens_only=spared)

    def family(self, keep):
        return self.parts.cascade.profile(ScheduleRequest(self.widths.shape, keep_ratios=keep))

    def budget(self, share):
        """From the smallest plan's cost at 0 to the dense model's at 1."""
        shape = self.widths.shape
        narrow = self.widths.at(self.start, self.ratios, 1.0)
        smallest = with_tokens(narrow, whole_tokens(self.family(self.keep)(1.0), shape.tokens))
        least, most = cost(smallest, self.parts), cost(dense(shape))
        macs = least.macs + int(share * (most.macs - least.macs))
        params = least.params + int(share * (most.params - least.params))
        return Budget(
            "", macs if self.metric != "params" else None, params if self.metric != "macs" else None
        )

    def project(self, budget, keep=None, ratios=None):
        family = self.family(keep or self.keep)
        return project(self.start, family, budget, self.parts, self.widths, ratios or self.ratios)


@st.composite
def problems(draw, metrics=("macs", "params", "both")):
    widths, ratios = draw(proposals())
    pyramid, depth = bool(widths.shape.stages), widths.shape.depth
    return Problem(
        widths,
        ratios,
        keep=draw(st.lists(st.floats(0.2, 1.0) | st.just(1.0), min_size=depth, max_size=depth)),
        parts=NO_CUTS if pyramid else draw(st.sampled_from([FREE, UCC, MERGE, NO_CUTS])),
        metric=draw(st.sampled_from(metrics)),
        spared=not pyramid and draw(st.booleans()),
    )


shares = st.floats(0.0, 1.0)


@cheaply
@given(problems(), shares)
def test_a_projected_plan_is_within_its_budget_and_no_step_more_is(problem, share):
    budget, parts = problem.budget(share), problem.parts
    plan = problem.project(budget)
    assert budget.holds(cost(plan, parts))
    for _, wider in problem.widths.grown(plan):
        grown = with_tokens(wider, plan.tokens)
        assert grown == plan or not budget.holds(cost(grown, parts))
    if parts is NO_CUTS:
        assert plan.tokens == plan.shape.block_tokens
        return
    for i in range(plan.shape.depth):
        tokens = [n + (i == j) for j, n in enumerate(plan.tokens)]
        if tokens[i] <= plan.tokens_in[i] and with_tokens(plan, tokens) != plan:
            assert not budget.holds(cost(with_tokens(plan, tokens), parts))


@pytest.mark.parametrize("share", range(60, 100, 5))
def test_what_an_ended_cut_no_longer_costs_is_spent_on_widths(share):
    # Where a token given back ends a cut, nothing is scored there any more, and a step of width may fit.
    widths = Widths(WidthsConfig(mlp=WidthRange(), embed=WidthRange()), SHAPE)
    problem = Problem(widths, dict.fromkeys(widths.searched(), 0.7), [0.7] * 4, UCC, "macs", spared=False)
    budget = limit(SHAPE, share / 100, "macs")
    plan = problem.project(budget)
    for _, wider in widths.grown(plan):
        assert not budget.holds(cost(with_tokens(wider, plan.tokens), UCC))


@cheaply
@given(problems(), shares)
def test_projecting_the_ratios_of_a_plan_gives_it_back(problem, share):
    budget = problem.budget(share)
    plan = problem.project(budget)
    keep = [out / before for out, before in zip(plan.tokens, plan.tokens_in, strict=True)]
    assert problem.project(budget, keep, problem.widths.ratios(plan)) == plan


@cheaply
@given(problems(metrics=("macs", "params")), shares, shares)
def test_a_larger_budget_never_gives_a_cheaper_narrow_plan(problem, one, other):
    found = [cost(problem.project(problem.budget(s)), problem.parts) for s in sorted([one, other])]
    cheap, dear = (getattr(c, problem.metric) for c in found)
    assert cheap <= dear


def limit(shape, share, metric):
    full = getattr(cost(dense(shape)), metric)
    return Budget("", **{f"max_{metric}": int(full * share)})


@pytest.mark.parametrize("shape", [deit_shape("small"), pvt_shape("b2")], ids=lambda s: s.name)
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_widths_use_the_budget_of_a_real_model(shape, metric):
    widths = Widths(WidthsConfig(embed=WidthRange(), mlp=WidthRange(), heads=WidthRange(low=0.2)), shape)
    budget = limit(shape, 0.5, metric)
    plan = project(dense(shape), KeepAll().profile(ScheduleRequest(shape)), budget, NO_CUTS, widths)
    # Single hidden units times 8 are less than half a percent of the model.
    assert 0.495 < getattr(cost(plan), metric) / getattr(cost(dense(shape)), metric) <= 0.5


def test_a_budget_below_the_bounds_of_the_widths_says_what_to_lower():
    widths = Widths(WidthsConfig(mlp=WidthRange(low=0.9)), SHAPE)
    family = KeepAll().profile(ScheduleRequest(SHAPE))
    for metric, advice in (
        ("macs", r"reachable are \d+\.\d% to 100% .* lower the bounds of space\.widths"),
        ("params", r"below the smallest plan's .*lower the bounds of space\.widths"),
    ):
        with pytest.raises(BudgetError, match=advice):
            project(dense(SHAPE), family, limit(SHAPE, 0.5, metric), NO_CUTS, widths)


# Into the search


@functools.cache
def plugins():
    return Plugins.load(entry_points=False, environment=False)


def space_of(shape, **options):
    return SearchSpace.of(tiny_config(space=options).space, shape, plugins())


RANGES = {
    "embed": {"low": 0.5},
    "heads": 0.5,
    "attention": {"low": 0.25, "high": 0.75},
    "mlp": {"low": 0.25},
    "depth": {"low": 0.5},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_range_of_widths_is_a_dimension(name):
    shape = SHAPES[name]
    space = space_of(shape, widths=RANGES)
    keep = [] if shape.stages else ["keep.0", "keep.1", "keep.2"]  # the last block spares unread tokens
    blocks = [f"width.{kind}.{i}" for kind in ("attention", "mlp") for i in range(4)]
    embeds = [f"width.embed.{i}" for i in range(len(shape.embed_dims))]
    assert [d.name for d in space.dimensions] == [*keep, *embeds, *blocks, "width.depth"]
    bounds = {d.name: (d.low, d.high) for d in space.dimensions}
    assert bounds["width.attention.2"] == (0.25, 0.75)
    assert bounds["width.depth"] == (0.5, 1.0)


def test_decoding_gives_every_coordinate_its_ratio():
    space = space_of(SHAPE, widths=RANGES)
    params = {d.name: d.low + i / 1000 for i, d in enumerate(space.dimensions)}
    candidate = space.decode(params)
    assert candidate.ratios == {name: params[f"width.{name}"] for name in space.widths.searched()}
    assert candidate.keep_ratios == (*(params[f"keep.{i}"] for i in range(3)), 1.0)
    assert candidate.params == params
    assert space_of(SHAPE).decode({f"keep.{i}": 0.5 for i in range(3)}).ratios is None


@cheaply
@given(st.data())
def test_the_optimiser_is_told_of_the_plan_that_was_measured(data):
    space = space_of(SHAPE, widths=RANGES)
    params = {d.name: data.draw(st.floats(d.low, d.high)) for d in space.dimensions}
    candidate = space.decode(params)
    family = PerBlock().profile(ScheduleRequest(SHAPE, keep_ratios=candidate.keep_ratios, min_keep=0.2))
    start = dense(SHAPE).replace(head_tokens_only=True)
    plan = project(start, family, limit(SHAPE, 0.5, "macs"), UCC, space.widths, candidate.ratios)
    told = space.at_plan(params, plan)
    assert list(told) == list(params)
    for dimension in space.dimensions:
        assert dimension.low <= told[dimension.name] <= dimension.high
    for name, ratio in space.widths.ratios(plan).items():
        high = space.widths.searched()[name].high
        assert (
            told[f"width.{name}"] == pytest.approx(min(ratio, high))
            or ratio < RANGES[name.split(".")[0]]["low"]
        )
    for i in range(3):
        assert told[f"keep.{i}"] == pytest.approx(max(0.2, plan.tokens[i] / plan.tokens_in[i]))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("widths", [RANGES, {"mlp": {"low": 0.9}}, {"embed": {"low": 0.1, "high": 0.3}}, {}])
def test_hand_made_points_lie_inside_the_bounds(name, widths):
    space = space_of(SHAPES[name], widths=widths)
    bounds = {d.name: d for d in space.dimensions}
    points = space.known_good()
    assert bool(points) == bool(bounds)
    for point in points:
        assert point.keys() == bounds.keys()
        assert all(bounds[key].low <= value <= bounds[key].high for key, value in point.items())
        space.decode(point)


def test_widths_that_a_model_cannot_have_are_refused_before_a_run():
    normed = dataclasses.replace(
        SHAPE, blocks=tuple(dataclasses.replace(b, qk_norm_vectors=4) for b in SHAPE.blocks)
    )
    with pytest.raises(PlanError, match="the norm of queries and keys is shared by all heads"):
        space_of(normed, widths={"attention": {"low": 0.5}})
    with pytest.raises(PlanError, match="the attention pooling of small is not pruned"):
        space_of(dataclasses.replace(SHAPE, pool="map", head_tokens=0), widths={"embed": 0.5})


@pytest.mark.parametrize("value", [{"low": 0.5, "high": 0.5}, {"low": 0}, 0, 1.5, {"multiple": 0}])
def test_a_width_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"space\.widths\.mlp"):
        tiny_config(space={"widths": {"mlp": value}})


# What each method saved

COMPONENTS = [UCC, FREE, MERGE]


@pytest.mark.parametrize("shape", [SHAPE, PYRAMID, deit_shape("tiny")], ids=lambda s: s.name)
def test_what_the_methods_saved_sums_to_what_is_saved(shape):
    for seed in range(12):
        plan, parts = random_plan(shape, random.Random(seed)), COMPONENTS[seed % 3]
        saved = saved_macs(plan, parts)
        assert set(saved) == {"tokens", "widths", "depth", "ranks", "unread"}
        assert sum(saved.values()) == pytest.approx(
            cost(dense(shape)).macs - cost(plan, parts).macs, abs=1e-3
        )
        assert saved["widths"] > 0
        assert saved["ranks"] == 0


ALONE = {
    "tokens": {"tokens_out": [12, 8, 8, 3]},
    "widths": {"embed_dim": 20, "heads": 2, "mlp_hidden": [60, 30, 20, 9]},
    "depth": {"attention": [True, True, False, True], "mlp": [True, False, True, True]},
    "unread": {"head_tokens_only": True},
}


@pytest.mark.parametrize("method", ALONE)
def test_a_method_alone_saved_everything(method):
    plan = dense(SHAPE).replace(**ALONE[method])
    saved = saved_macs(plan, UCC)
    assert saved.pop(method) == cost(dense(SHAPE)).macs - cost(plan, UCC).macs > 0
    assert not any(saved.values())


def test_two_methods_share_what_neither_saves_alone():
    # In either order; the mean of both is Shapley's.
    tokens, widths = (dense(SHAPE).replace(**ALONE[m]) for m in ("tokens", "widths"))
    both = tokens.replace(**ALONE["widths"])
    full, t, w, tw = (cost(p, UCC).macs for p in (dense(SHAPE), tokens, widths, both))
    saved = saved_macs(both, UCC)
    assert saved["tokens"] == pytest.approx(((full - t) + (w - tw)) / 2)
    assert saved["widths"] == pytest.approx(((full - w) + (t - tw)) / 2)

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import deit_shape

from ucc_search.budget import Budget, budgets, project, whole_tokens, with_tokens
from ucc_search.builtin.aggregators import Bipartite, Drop, Host
from ucc_search.builtin.cascades import Constant, Geometric, PerBlock, Staged
from ucc_search.builtin.scorers import Joint, Random
from ucc_search.config import BudgetConfig
from ucc_search.costs import Pricer, cost
from ucc_search.errors import BudgetError
from ucc_search.interfaces import Components, ScheduleRequest
from ucc_search.plan import CompressionPlan

SHAPE = deit_shape("tiny")
DENSE = CompressionPlan.identity(SHAPE)
DENSE_COST = cost(DENSE)

FREE = Components(Random(), Drop(), PerBlock())  # scoring and merging cost nothing
UCC = Components(Joint(), Host(), PerBlock())  # every cut costs something
MERGE = Components(Random(), Bipartite(), PerBlock())

ratios = st.lists(st.floats(0.2, 1.0), min_size=12, max_size=12)
shares = st.floats(0.45, 1.0)
components = st.sampled_from([FREE, UCC, MERGE])
starts = st.sampled_from([DENSE, DENSE.replace(head_tokens_only=True)])
cheaply = settings(max_examples=25, deadline=None)


def family(keep, parts=UCC):
    return parts.cascade.profile(ScheduleRequest(SHAPE, keep_ratios=keep))


def share_of(share):
    return Budget(f"macs={share:.0%}", max_macs=int(DENSE_COST.macs * share))


def kept(plan):
    return [out / before for out, before in zip(plan.tokens, plan.tokens_in, strict=True)]


# Projection


@cheaply
@given(ratios, shares, components, starts, st.booleans())
def test_remembered_prices_are_the_cost(keep, share, parts, start, often):
    parts = Components(parts.scorer, parts.aggregator, PerBlock(score_every_block=often))
    price = Pricer(parts)
    for strength in (0.0, share / 2, share / 2, 0.9):
        plan = with_tokens(start, whole_tokens(family(keep)(strength), SHAPE.tokens))
        assert price(plan) == (cost(plan, parts).macs, cost(plan, parts).params)


@cheaply
@given(ratios, shares, components, starts)
def test_a_plan_is_within_its_budget_and_projecting_it_again_gives_it_back(keep, share, parts, start):
    budget = share_of(share)
    plan = project(start, family(keep), budget, parts)
    assert budget.holds(cost(plan, parts))
    assert all(a >= b >= 1 for a, b in itertools.pairwise([SHAPE.tokens, *plan.tokens]))
    assert project(start, family(kept(plan)), budget, parts) == plan


@cheaply
@given(ratios, shares, components, starts)
def test_no_block_can_take_one_more_token(keep, share, parts, start):
    budget = share_of(share)
    plan = project(start, family(keep), budget, parts)
    reduced = SHAPE.depth - (1 if plan.head_tokens_only else 0)
    for i in range(reduced):
        tokens = list(plan.tokens)
        tokens[i] += 1
        if tokens[i] <= plan.tokens_in[i]:
            assert not budget.holds(cost(with_tokens(plan, tokens), parts))


@cheaply
@given(ratios, shares, shares, starts)
def test_a_larger_budget_never_gives_a_cheaper_plan(keep, one, other, start):
    small, large = sorted([one, other])
    cheap, dear = (cost(project(start, family(keep), share_of(s), FREE), FREE) for s in (small, large))
    assert cheap.macs <= dear.macs


@pytest.mark.parametrize(
    "cascade", [PerBlock(), Constant(), Geometric(), Staged()], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("share", [0.5, 0.6, 0.8])
def test_a_plan_uses_its_budget(cascade, share):
    parts = Components(Joint(), Host(), cascade)
    profile = cascade.profile(ScheduleRequest(SHAPE))
    plan = project(DENSE, profile, share_of(share), parts)
    # One token through the 12 blocks is 0.5 % of the model.
    assert share - 0.005 < cost(plan, parts).macs / DENSE_COST.macs <= share


def test_a_budget_the_dense_model_meets_leaves_it_as_it_is():
    assert project(DENSE, family([0.5] * 12), share_of(1.0), UCC) == DENSE


def test_what_nothing_reads_is_never_cut():
    plan = project(DENSE.replace(head_tokens_only=True), family([0.8] * 12), share_of(0.5), UCC)
    assert plan.tokens[-1] == plan.tokens[-2]


def test_an_unreachable_budget_names_the_reachable_range():
    low = ScheduleRequest(SHAPE, keep_ratios=[0.9] * 12, min_keep=0.9)
    smallest = cost(with_tokens(DENSE, [max(1, round(v)) for v in PerBlock().profile(low)(1.0)]), FREE)
    with pytest.raises(BudgetError) as caught:
        project(DENSE, PerBlock().profile(low), share_of(0.2), FREE)
    assert f"reachable are {100 * smallest.macs / DENSE_COST.macs:.1f}% to 100%" in str(caught.value)
    assert "macs=20%" in str(caught.value)
    # The range that is named can be reached.
    reached = project(DENSE, PerBlock().profile(low), Budget("", max_macs=smallest.macs), FREE)
    assert cost(reached, FREE).macs == smallest.macs


def test_tokens_cannot_meet_a_limit_on_parameters():
    budget = Budget("macs=50%", DENSE_COST.macs // 2, max_params=DENSE_COST.params - 1)
    with pytest.raises(
        BudgetError, match=r"pruning tokens removes none: raise the budget or give space.widths"
    ):
        project(DENSE, family([0.5] * 12), budget, UCC)
    within = Budget("macs=50%", DENSE_COST.macs // 2, max_params=DENSE_COST.params)
    assert within.holds(cost(project(DENSE, family([0.5] * 12), within, UCC), UCC))


# Reading budgets


def limits(**config):
    return [(b.label, b.max_macs, b.max_params) for b in budgets(BudgetConfig(**config), DENSE_COST)]


def test_targets_are_percentages_or_amounts():
    macs = DENSE_COST.macs
    assert limits(macs=["50%", "600M", 7e8]) == [
        ("macs=50%", macs // 2, None),
        ("macs=600M", 600_000_000, None),
        ("macs=700000000", 700_000_000, None),
    ]
    assert limits(macs="12.5 %") == [("macs=12.5%", macs // 8, None)]


def test_a_flop_is_half_a_mac():
    assert limits(flops="50%")[0][1:] == limits(macs="50%")[0][1:]
    assert limits(flops="1.2G")[0][1:] == limits(macs="600M")[0][1:]


def test_limits_are_anded():
    params = DENSE_COST.params
    found = budgets(BudgetConfig(macs=["50%", "80%"], params="90%"), DENSE_COST)
    assert [b.max_params for b in found] == [int(params * 0.9)] * 2
    assert not found[1].holds(DENSE_COST)  # over both
    half = cost(with_tokens(DENSE, [60] * 12), FREE)
    assert not found[1].holds(half)  # over the parameters alone
    assert Budget("", max_macs=found[1].max_macs).holds(half)
    assert limits(params="5.7M") == [("params=5.7M", None, 5_700_000)]


@pytest.mark.parametrize("value", ["0%", "101%", "-5%", "half", "%", "nan%", "2.1X", 0, "1e-3"])
def test_what_is_no_budget_is_refused_by_its_key(value):
    for key in ("macs", "flops", "params"):
        with pytest.raises(BudgetError, match=rf"budget\.{key} is '{value}', expected"):
            budgets(BudgetConfig(**{key: value}), DENSE_COST)


@pytest.mark.parametrize(
    "budget",
    [
        {"macs": ["70%", {"low": "40%", "high": "60%"}]},
        {"latency_ms": {"low": "40%", "high": "60%"}},
        {"params": [["50%"]]},
    ],
)
def test_a_range_stands_alone(budget):
    with pytest.raises(ValueError, match="holds a range or a list where single values are expected"):
        BudgetConfig(**budget)


def test_a_budget_is_named_by_all_its_limits():
    several = budgets(BudgetConfig(macs=["60%", "40%"], params="80%"), DENSE_COST)
    assert [b.label for b in several] == ["macs=60%,params=80%", "macs=40%,params=80%"]
    assert {b.max_params for b in several} == {DENSE_COST.params * 80 // 100}

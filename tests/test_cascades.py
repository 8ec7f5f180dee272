from __future__ import annotations

import itertools
import math
import random

import pytest
from shapes import deit_shape, small_shape

from ucc_search.builtin.aggregators import Drop
from ucc_search.builtin.cascades import Calibrated, Constant, Geometric, PerBlock, Staged, bottom_up
from ucc_search.builtin.scorers import Random
from ucc_search.costs import cost
from ucc_search.errors import PlanError
from ucc_search.interfaces import Cascade, Components, ScheduleRequest
from ucc_search.plan import CompressionPlan

FREE = Components(Random(), Drop(), Constant(gamma=0.0))  # adds no MACs


def toy_accuracy(tokens) -> float:
    """Falls with every token that leaves, faster early on; needs no model."""
    return 0.9 - sum((1 - n / 196) ** 2 / (2 + i) for i, n in enumerate(tokens)) / 10


def whole(values) -> list[int]:
    return [max(1, math.floor(v + 0.5)) for v in values]


def request(**changes) -> ScheduleRequest:
    return ScheduleRequest(deit_shape("base"), evaluate=toy_accuracy)._replace(**changes)


CASCADES: list[Cascade] = [PerBlock(), Constant(), Geometric(), Staged(), Staged(blocks=[5]), Calibrated()]
MIXED = [1.0, 0.9, 1.0, 0.5, 0.97, 1.0, 0.8, 0.7, 1.0, 0.6, 0.99, 1.0]


@pytest.mark.parametrize("cascade", CASCADES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("min_keep", [0.0, 0.4, 0.9])
def test_families_are_ordered_and_respect_their_bounds(cascade, min_keep):
    profile = cascade.profile(request(min_keep=min_keep))
    assert list(profile(0.0)) == [196.0] * 12
    before = profile(0.0)
    for step in range(1, 65):
        values = profile(step / 64)
        assert all(b <= a + 1e-9 for a, b in zip(before, values, strict=True))
        chain = [196.0, *values]
        for a, b in itertools.pairwise(chain):
            assert 0.0 < b <= a + 1e-9
            # PerBlock's own proposals may lie below the bound; one token is always kept.
            assert b >= a * min(min_keep, 0.5 if isinstance(cascade, PerBlock) else 1) - 1e-6
        before = values
    assert sum(before) < 12 * 196


@pytest.mark.parametrize("cascade", [PerBlock(), Constant(), Calibrated(), Geometric(first_block=0)])
def test_without_a_bound_the_strongest_schedule_leaves_one_token(cascade):
    assert cascade.profile(request())(1.0)[-1] == pytest.approx(1.0)


def test_every_proposal_reaches_the_smallest_schedule():
    # Else a proposal that spares most blocks could not meet a budget that others meet.
    assert PerBlock().profile(request(keep_ratios=MIXED))(1.0) == [1.0] * 12
    profile = PerBlock().profile(request(keep_ratios=MIXED, min_keep=0.8))
    expected = 196.0
    for value, ratio in zip(profile(1.0), MIXED, strict=True):
        expected = max(1.0, expected * min(0.8, ratio))
        assert value == pytest.approx(expected)
    assert profile(1 - 1e-12) == pytest.approx(profile(1.0))  # no jump at the end


@pytest.mark.parametrize("seed", range(20))
def test_half_strength_returns_the_proposal(seed):
    # The projection onto a budget is then idempotent: a plan's own ratios give the plan.
    draw = random.Random(seed)
    tokens, left = [], 196
    for _ in range(12):
        left = left if draw.random() < 0.3 else draw.randint(max(1, left // 3), left)
        tokens.append(left)
    ratios = [b / a for a, b in zip([196, *tokens], tokens, strict=False)]
    profile = PerBlock().profile(request(keep_ratios=ratios, min_keep=0.25))
    assert profile(0.5) == pytest.approx(tokens, abs=1e-9)


@pytest.mark.parametrize("ratios", [[0.5] * 11, [0.5] * 11 + [0.0], [0.5] * 11 + [1.1]])
def test_proposals_that_fit_no_model_are_refused(ratios):
    with pytest.raises(PlanError, match="keep_ratios"):
        PerBlock().profile(request(keep_ratios=ratios))


def test_constant_removes_the_same_number_everywhere():
    values = [196.0, *Constant().profile(request())(0.06)]
    steps = [a - b for a, b in itertools.pairwise(values)]
    assert steps == pytest.approx([0.06 * 195] * 12)


def test_constant_goes_on_with_one_token_once_the_others_are_gone():
    # Else merging a fixed number could never halve the cost of a deep model.
    assert Constant().profile(request())(0.5) == pytest.approx([98.5] + [1.0] * 11)


def test_staged_cuts_where_told():
    profile = Staged().profile(request())(0.5)
    assert profile == pytest.approx([196] + [98] * 4 + [49] * 4 + [24.5] * 3)
    published = Staged(blocks=[3, 6, 9]).profile(request())(0.5)
    assert published == pytest.approx([196] * 3 + [98] * 3 + [49] * 3 + [24.5] * 3)
    tiny = ScheduleRequest(small_shape(depth=1))
    assert Staged().profile(tiny)(0.5) == pytest.approx([8])
    with pytest.raises(PlanError, match="block 12"):
        Staged(blocks=[3, 12]).profile(request())
    with pytest.raises(PlanError, match="block 12"):
        Geometric(first_block=12).profile(request())


@pytest.mark.parametrize(
    ("ratio", "tokens"),
    [
        # Printed as 0.951; from 0.95105 to 0.95127 give these integers.
        (0.9511, [196, 186, 177, 169, 160, 153, 145, 138, 131, 125, 119, 113]),
        (0.8275, [196, 162, 134, 111, 92, 76, 63, 52, 43, 36, 30, 24]),
    ],
)
def test_geometric_gives_the_published_schedules(ratio, tokens):
    assert whole(Geometric().profile(request())(1 - ratio)) == tokens


@pytest.mark.parametrize(("size", "gmacs"), [("tiny", 1.254), ("small", 4.599), ("base", 17.564)])
def test_dense_costs_are_the_known_ones(size, gmacs):
    dense = cost(CompressionPlan.identity(deit_shape(size)), FREE)
    assert dense.macs / 1e9 == pytest.approx(gmacs, abs=5e-4)


def test_parameters_are_those_of_deit_base():
    assert cost(CompressionPlan.identity(deit_shape("base")), FREE).params == 86_567_656


@pytest.mark.parametrize(
    ("tokens", "percent"),
    [
        ([196, 186, 177, 169, 160, 153, 145, 138, 131, 125, 119, 113], 22.0),
        ([196, 162, 134, 111, 92, 76, 63, 52, 43, 36, 30, 24], 54.1),
        ([196] * 3 + [163] * 3 + [135] * 3 + [112] * 3, 21.7),
        # 53.75 with these integers, which the source rounds up.
        ([196] * 3 + [87] * 3 + [39] * 3 + [18] * 3, 53.8),
    ],
)
def test_published_schedules_save_what_is_printed(tokens, percent):
    # Of the whole model, patch embedding and classifier included; scoring and merging are not.
    dense = CompressionPlan.identity(deit_shape("base"))
    saved = 1 - cost(dense.replace(tokens_out=tokens), FREE).macs / cost(dense, FREE).macs
    assert 100 * saved == pytest.approx(percent, abs=0.06)


def test_bottom_up_spends_no_more_than_the_allowance_by_much():
    for allowance in (0.01, 0.05, 0.2):
        tokens = bottom_up(toy_accuracy, 196, 12, allowance)
        assert tokens == sorted(tokens, reverse=True)
        assert tokens[0] >= 190
        drop = toy_accuracy([196] * 12) - toy_accuracy(tokens)
        assert 0 < drop < 1.2 * allowance


def test_bottom_up_cuts_all_it_may_where_nothing_is_lost():
    # The first block keeps 190 of 196; each later one has eight growing steps.
    assert bottom_up(lambda tokens: 0.8, 196, 12, 0.1)[0] == 190
    assert bottom_up(lambda tokens: 0.8, 196, 12, 0.1)[-1] == 1
    assert bottom_up(lambda tokens: 0.8, 196, 12, 0.1, min_keep=0.9)[:2] == [190, 171]


def test_bottom_up_keeps_what_is_needed():
    assert bottom_up(lambda tokens: 1.0 if min(tokens) == 196 else 0.0, 196, 12, 0.1) == [196] * 12


def test_calibration_asks_rarely_and_never_twice():
    asked: list[tuple[int, ...]] = []

    def evaluate(tokens) -> float:
        asked.append(tuple(tokens))
        return toy_accuracy(tokens) + random.Random(sum(tokens)).uniform(-0.01, 0.01)  # noisy

    profile = Calibrated().profile(request(evaluate=evaluate))
    assert len(asked) == len(set(asked)) <= 4 * (1 + 9 * 12)
    assert len(asked) < 300
    count = len(asked)
    profile(0.3)
    assert len(asked) == count


def test_the_first_calibrated_schedule_is_in_the_family():
    profile = Calibrated(allowances=[0.05]).profile(request())
    assert profile(0.5) == bottom_up(toy_accuracy, 196, 12, 0.05)


def test_calibration_without_a_model_says_what_to_do():
    with pytest.raises(PlanError, match="calibration images"):
        Calibrated().profile(request(evaluate=None))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Geometric(first_block=-1),
        lambda: Staged(blocks=[]),
        lambda: Calibrated(allowances=[]),
        lambda: Calibrated(allowances=[0.0]),
        lambda: Constant(gamma=2.0),
    ],
)
def test_bad_parameters_are_refused(build):
    with pytest.raises(ValueError, match="expected"):
        build()

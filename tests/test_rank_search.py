"""Ranks chosen by gradient descent (COMCAT, section 3.3): nested gates, prices, and the start of a search."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import family
from tiny import tiny_config

from ucc_search.budget import Budget, budgets
from ucc_search.builtin import default_components
from ucc_search.compression import assemble, compress, shape_of
from ucc_search.compression.selection import first_units
from ucc_search.config import BudgetConfig, RankSearchConfig, WidthsConfig
from ucc_search.costs import cost
from ucc_search.data import TensorImages
from ucc_search.plan import CompressionPlan
from ucc_search.rank_search import GatedRanks, gated, rank_choices, select_ranks
from ucc_search.runner import search
from ucc_search.widths import Widths

RANGES = {kind: {"low": 0.25, "multiple": 1} for kind in ("qk_rank", "v_rank", "mlp_rank", "head_rank")}
CONFIG = RankSearchConfig(levels=3, rounds=2, gate_steps=6, weight_steps=2, batch_size=8)


def setting(name="vit"):
    model = family(name)
    shape = shape_of(model)
    plan = CompressionPlan.identity(shape)
    widths = Widths(WidthsConfig.model_validate(RANGES), shape)
    return model, plan, rank_choices(plan, widths, default_components(), 3), widths


def factorised(model, plan):
    dim = plan.embed_dim
    full = plan.replace(
        low_rank_attention=True,
        mlp_rank=[min(b.mlp_hidden, dim) for b in plan.blocks],
        head_rank=min(dim, plan.shape.classes),
    )
    return assemble(model, full, default_components(), first_units(full))


def images(shape, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, shape.channels, *shape.image_size, generator=generator, dtype=torch.float64)


def one_hot(choices, place):
    return [torch.nn.functional.one_hot(torch.tensor(place), len(c.ranks)).double() for c in choices]


def test_a_gate_of_one_rank_is_that_rank():
    model, plan, choices, _ = setting()
    low = plan.replace(
        low_rank_attention=True,
        qk_dim=[c.ranks[0] for c in choices if c.name.startswith("qk")],
        v_dim=[c.ranks[0] for c in choices if c.name.startswith("v_")],
        mlp_rank=[c.ranks[0] for c in choices if c.name.startswith("mlp")],
        head_rank=next(c.ranks[0] for c in choices if c.name == "head_rank"),
    )
    x = images(plan.shape)
    full = factorised(model, plan)
    with gated(full, choices, one_hot(choices, 0)):
        found = full(x)
    torch.testing.assert_close(found, compress(model, low)(x), rtol=0, atol=1e-8)
    with gated(full, choices, one_hot(choices, 2)):
        torch.testing.assert_close(full(x), model(x), rtol=0, atol=1e-8)
    torch.testing.assert_close(full(x), model(x), rtol=0, atol=1e-8)


def test_a_gated_mixture_is_the_explicit_mixture_of_matrices():
    model, plan, choices, _ = setting()
    mlp = next(c for c in choices if c.name == "mlp_rank.1")
    share = torch.tensor([0.2, 0.5, 0.3]).double()
    full = factorised(model, plan)
    x = torch.randn(4, plan.embed_dim).double()
    weight = model.blocks[1].mlp.fc1.weight
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    mixed = sum(p * (u[:, :r] * s[:r]) @ v[:r] for p, r in zip(share, mlp.ranks, strict=True))
    with gated(full, [mlp], [share]):
        found = full.blocks[1].mlp.fc1(x)
    expected = x @ mixed.t() + model.blocks[1].mlp.fc1.bias
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_the_price_of_a_choice_is_the_plans_own():
    _, plan, choices, widths = setting()
    parts = default_components()
    dense = cost(plan, parts)
    gates = GatedRanks(
        factorised(*setting()[:2]), choices, Budget("", dense.macs), (dense.macs, dense.params), 1.5
    )
    assert float(gates.price(one_hot(choices, 2))) == pytest.approx(1.0)
    lowest = widths.at(plan, {c.name: c.ratios[0] for c in choices}, 0.5)
    assert float(gates.price(one_hot(choices, 0))) == pytest.approx(cost(lowest, parts).macs / dense.macs)


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"macs": "50%"}, "macs"),
        ({"flops": "50%"}, "macs"),
        ({"params": "50%"}, "params"),
        ({"macs": "50%", "params": "90%"}, "macs"),
        ({"macs": "90%", "params": "50%"}, "params"),
    ],
)
def test_the_price_is_of_whichever_limit_is_tighter(limits, field):
    model, plan, choices, _ = setting()
    dense = cost(plan, default_components())
    (budget,) = budgets(BudgetConfig(**limits), dense)
    gates = GatedRanks(factorised(model, plan), choices, budget, (dense.macs, dense.params), 1.5)
    for place in (0, 1, 2):
        saved = sum(getattr(c, field)[place] for c in choices)
        full = getattr(dense, field)
        expected = (full - saved) / (full // 2)
        assert float(gates.price(one_hot(choices, place))) == pytest.approx(expected, rel=1e-3)


def test_selection_lowers_the_price_and_leaves_the_teacher_alone():
    model, plan, _, widths = setting()
    teacher = copy.deepcopy(model).float()
    before = copy.deepcopy(teacher.state_dict())
    shape = plan.shape
    pixels = torch.randint(0, 255, (60, shape.channels, *shape.image_size), dtype=torch.uint8)
    labels = torch.arange(60) % shape.classes
    data = TensorImages(pixels, labels, torch.zeros(shape.channels), torch.ones(shape.channels))
    dense = cost(plan).macs
    budget = Budget("", int(0.5 * dense))
    config = CONFIG.model_copy(update={"gate_steps": 30, "lr": 0.3})
    ratios = select_ranks(teacher, plan, widths, budget, default_components(), data, config, seed=0)
    assert set(ratios) == set(widths.searched())
    assert cost(widths.at(plan, ratios, 0.5)).macs < 0.8 * dense
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_search_starts_from_the_chosen_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        budget={"macs": ["70%"]},
        space={"cascade": "keep_all", "widths": RANGES, "distiller": "hard_align"},
        search={"trials": 2, "promote": 1, "ranks": CONFIG.model_dump()},
    )
    run = search(config, out=tmp_path / "run")
    assert all(r.state == "ok" for r in run.rows), [r.error for r in run.rows]
    starts = json.loads((run.path / "ranks.json").read_text())["macs=70%"]
    first = next(r for r in run.rows if r.origin == "search")
    assert set(first.params_searched) == set(starts)
    assert first.saved_ranks > 0.05 and not first.saved_widths

"""Low ranks (COMCAT, arXiv:2305.17235): head-level products of attention, and matrices of MLPs."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from families import FAMILIES, family
from torch.utils.flop_counter import FlopCounterMode

from ucc_search.builtin import default_components
from ucc_search.compression import compress, shape_of
from ucc_search.compression.factorize import factor_product, low_rank_linear
from ucc_search.config import WidthsConfig
from ucc_search.costs import cost, saved_macs
from ucc_search.errors import PlanError
from ucc_search.plan import CompressionPlan
from ucc_search.widths import Widths

FACTORED = [name for name in FAMILIES if name != "norms"]  # whose norms stand between the factors


def images(shape, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, shape.channels, *shape.image_size, generator=generator, dtype=torch.float64)


def full_rank(shape):
    dims = [shape.embed_dims[s] for s in shape.stage_of]
    ranks = [min(b.mlp_hidden, d) for b, d in zip(shape.blocks, dims, strict=True)]
    return CompressionPlan.identity(shape).replace(low_rank_attention=True, mlp_rank=ranks)


def halved(shape):
    dims = [shape.embed_dims[s] for s in shape.stage_of]
    return CompressionPlan.identity(shape).replace(
        low_rank_attention=True,
        qk_dim=[max(1, b.qk_dim // 2) for b in shape.blocks],
        v_dim=[max(1, b.v_dim // 3) for b in shape.blocks],
        mlp_rank=[max(1, d // 3) for d in dims],
    )


def counted(model, shape):
    model = copy.deepcopy(model).to("meta", torch.float32).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, shape.channels, *shape.image_size, device="meta"))
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


@pytest.fixture(params=FACTORED)
def dense(request):
    model = copy.deepcopy(family(request.param))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.mul_(5.0)  # biases of attention are what released code drops
    return model


def shape_here(model):
    return shape_of(model, image_size=(64, 96))


def test_full_rank_is_the_dense_model(dense):
    shape = shape_here(dense)
    x = images(shape)
    torch.testing.assert_close(compress(dense, full_rank(shape))(x), dense(x), rtol=0, atol=1e-8)


def test_costs_of_low_ranks_are_exact(dense):
    shape = shape_here(dense)
    plan = halved(shape)
    small = compress(dense, plan)
    assert counted(small, shape) == (cost(plan).macs, cost(plan).params)
    assert not torch.allclose(small(images(shape)), dense(images(shape)))


def test_half_the_heads_then_half_the_ranks_and_fewer_tokens():
    """Widths are selected first, and what remains is factorised: no more is lost than by ranks of that model."""
    model = family("vit")
    shape = shape_of(model)
    narrow = CompressionPlan.identity(shape).replace(heads=2, embed_dim=20, mlp_hidden=40)
    ranked = narrow.replace(low_rank_attention=True, qk_dim=8, v_dim=8)
    x = images(shape)
    same = compress(model, ranked, heads="remove")(x)
    torch.testing.assert_close(same, compress(model, narrow, heads="remove")(x), rtol=0, atol=1e-8)
    joint = ranked.replace(qk_dim=4, v_dim=5, mlp_rank=9, tokens_out=[9, 6, 4])
    small = compress(model, joint, heads="remove")
    price = cost(joint)
    assert counted(small, shape) == (price.macs - price.scorer_macs, price.params)
    saved = saved_macs(joint, default_components())
    assert saved["ranks"] > 0 and saved["widths"] > 0 and saved["tokens"] > 0
    assert sum(saved.values()) == pytest.approx(cost(CompressionPlan.identity(shape)).macs - price.macs)


def test_products_are_approximated_best():
    left, right = torch.randn(30, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    u, s = factor_product(left, right, 3)
    singular = torch.linalg.svdvals(left @ right.t())
    assert torch.linalg.norm(left @ right.t() - u @ s.t()) == pytest.approx(float(singular[3:].norm()))
    torch.testing.assert_close(u.t() @ u, torch.eye(3, dtype=torch.float64))


def test_head_level_never_loses_more_than_matrix_level_at_equal_parameters():
    """2 D H r of a head-level pair are 4 D R of two matrices of rank R = H r / 2."""
    heads, dim, width = 4, 16, 64
    torch.manual_seed(0)
    q, k = torch.randn(width, heads * dim).double(), torch.randn(width, heads * dim).double()
    for rank in (2, 4, 8, 12):
        whole = heads * rank // 2
        low = [
            (u[:, :whole] * s[:whole]) @ v[:whole]
            for u, s, v in (torch.linalg.svd(w, full_matrices=False) for w in (q, k))
        ]
        by_matrix = by_head = 0.0
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            product = q[:, part] @ k[:, part].t()
            u, s = factor_product(q[:, part], k[:, part], rank)
            by_head += float((product - u @ s.t()).square().sum())
            by_matrix += float((product - low[0][:, part] @ low[1][:, part].t()).square().sum())
        assert by_head < by_matrix


def test_a_thin_pair_is_the_truncated_matrix():
    layer = torch.nn.Linear(10, 6).double()
    u, s, v = torch.linalg.svd(layer.weight)
    x = torch.randn(4, 10).double()
    expected = x @ ((u[:, :2] * s[:2]) @ v[:2]).t() + layer.bias
    torch.testing.assert_close(low_rank_linear(layer, 2)(x), expected)
    with pytest.raises(ValueError, match="rank is 7, expected 1 to 6"):
        low_rank_linear(layer, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_rank": 25}, "mlp_rank is 25, expected 1 to 24"),
        ({"low_rank_attention": True, "heads": 1, "qk_dim": 9}, "qk_dim is 9, expected a rank of 1 to 8"),
    ],
)
def test_ranks_beyond_the_matrix_are_refused(changes, message):
    plan = CompressionPlan.identity(shape_of(family("vit")))
    with pytest.raises(PlanError, match=message):
        plan.replace(**changes)


def test_norms_inside_a_product_are_refused():
    plan = CompressionPlan.identity(shape_of(family("norms")))
    with pytest.raises(PlanError, match="norm"):
        plan.replace(low_rank_attention=True, v_dim=4)


def test_ranks_follow_the_budget_like_widths():
    shape = shape_of(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5))
    config = WidthsConfig.model_validate({k: {"low": 0.25} for k in ("qk_rank", "v_rank", "mlp_rank")})
    widths, dense = Widths(config, shape), CompressionPlan.identity(shape)
    assert widths.at(dense, None, 0.0) == dense
    prices = [cost(widths.at(dense, None, s / 20)).macs for s in range(21)]
    assert prices == sorted(prices, reverse=True) and prices[-1] < 0.45 * prices[0]
    lowest = widths.at(dense, None, 1.0)
    assert lowest.low_rank_attention and {b.qk_dim for b in lowest.blocks} == {16}
    for wider in widths.grown(lowest):
        assert cost(wider).macs > cost(lowest).macs
    assert widths.at(dense, widths.ratios(lowest), 0.5) == lowest


def test_channels_are_selected_or_factorised_not_both():
    with pytest.raises(ValueError, match="either selected"):
        WidthsConfig.model_validate({"attention": 0.5, "qk_rank": {"low": 0.5}})

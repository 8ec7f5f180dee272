"""Low ranks (COMCAT, arXiv:2305.17235): head-level products of attention, and matrices of MLPs."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from families import FAMILIES, family
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ucc_search.builtin import default_components
from ucc_search.compression import ProxyInputs, compress, shape_of
from ucc_search.compression.attention import fused_attention
from ucc_search.compression.factorize import factor_product, low_rank_linear
from ucc_search.compression.whitening import _Sums
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
    return CompressionPlan.identity(shape).replace(
        low_rank_attention=True, mlp_rank=ranks, head_rank=whole_head(shape)
    )


def whole_head(shape):
    return min(shape.embed_dim, shape.classes) if shape.classifiers else None


def halved(shape):
    dims = [shape.embed_dims[s] for s in shape.stage_of]
    return CompressionPlan.identity(shape).replace(
        low_rank_attention=True,
        qk_dim=[max(1, b.qk_dim // 2) for b in shape.blocks],
        v_dim=[max(1, b.v_dim // 3) for b in shape.blocks],
        mlp_rank=[max(1, d // 3) for d in dims],
        head_rank=2 if shape.classifiers else None,
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
    # What the layers read decides which directions come first, and nothing once all of them are there.
    whitened = compress(dense, full_rank(shape), inputs=ProxyInputs([images(shape, 3)]))
    torch.testing.assert_close(whitened(x), dense(x), rtol=0, atol=1e-6)


def test_costs_of_low_ranks_are_exact(dense):
    shape = shape_here(dense)
    plan = halved(shape)
    small = compress(dense, plan)
    assert counted(small, shape) == (cost(plan).macs, cost(plan).params)
    assert not torch.allclose(small(images(shape)), dense(images(shape)))


def test_half_the_heads_then_half_the_ranks_and_fewer_tokens(always_fft):
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


def correlated(rows, width):
    """Inputs far from white: few directions carry most, and the mean is not zero."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * scales
    return x @ mixing + 3.0


def moments_of(x_BTI):
    layer = torch.nn.Identity()
    sums = _Sums()
    sums.add(layer, (x_BTI,))
    return sums.moments()


def test_a_whitened_pair_gives_the_best_outputs_of_its_rank():
    x = correlated(500, 20)
    layer = torch.nn.Linear(20, 12).double()
    inputs = moments_of(x[None])
    error = {
        name: float((low_rank_linear(layer, 4, known)(x) - layer(x)).detach().square().sum())
        for name, known in (("plain", None), ("whitened", inputs))
    }
    # No map of this rank with a bias does better: that of the outputs' own directions is the optimum.
    outputs = layer(x) - layer(x).mean(dim=0)
    best = float(torch.linalg.svdvals(outputs)[4:].square().sum())
    assert best * (1 - 1e-9) <= error["whitened"] <= 1.05 * best < 0.5 * error["plain"]


def test_a_whitened_product_is_the_best_for_what_meets_it():
    torch.manual_seed(0)
    q, k = torch.randn(20, 8).double(), torch.randn(20, 8).double()
    x, y = correlated(400, 20), correlated(300, 20) - 3.0
    seen_x, seen_y = x.t() @ x / len(x), y.t() @ y / len(y)

    def error(u, w):
        return float((x @ (q @ k.t() - u @ w.t()) @ y.t()).square().sum())

    best = float(torch.linalg.svdvals(x @ q @ k.t() @ y.t())[3:].square().sum())
    whitened = error(*factor_product(q, k, 3, seen_x, seen_y))
    assert best * (1 - 1e-9) <= whitened <= 1.05 * best < 0.5 * error(*factor_product(q, k, 3))


def test_keys_are_seen_about_the_mean_of_their_image():
    """What all keys of an image share shifts the logits of a query alike, and softmax drops it."""
    x = correlated(60, 10).unflatten(0, (3, 20))
    shifted = x + torch.randn(3, 1, 10).double() * 5
    torch.testing.assert_close(moments_of(shifted).within_II, moments_of(x).within_II)
    assert not torch.allclose(moments_of(shifted).covariance_II, moments_of(x).covariance_II)


def test_whitening_measures_what_is_left_after_widths():
    model = family("vit")
    plan = CompressionPlan.identity(shape_of(model)).replace(
        embed_dim=16, mlp_hidden=40, low_rank_attention=True, qk_dim=4, v_dim=4, mlp_rank=6
    )
    inputs = ProxyInputs([images(plan.shape, 4)])
    found = compress(model, plan, inputs=inputs)(images(plan.shape))
    assert found.isfinite().all()
    assert not torch.allclose(found, compress(model, plan)(images(plan.shape)))
    # The dense model's moments are kept, and are of another width: they must not be taken for these.
    wide = plan.replace(embed_dim=24, mlp_hidden=plan.shape.blocks[0].mlp_hidden)
    compress(model, wide, inputs=inputs)
    torch.testing.assert_close(compress(model, plan, inputs=inputs)(images(plan.shape)), found)


@pytest.mark.parametrize(("keys", "values"), [(4, 9), (9, 4), (6, 6)])
def test_attention_of_any_widths_stays_on_the_fused_kernel(keys, values):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, d, generator=generator) for d in (keys, keys, values))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refuses what the fused kernel cannot do
        found = fused_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(found, (0.3 * q @ k.mT).softmax(dim=-1) @ v)
    torch.testing.assert_close(
        fused_attention(q, k, v), (q @ k.mT / keys**0.5).softmax(dim=-1) @ v, rtol=1e-4, atol=1e-5
    )


def test_an_mlp_in_slices_is_the_mlp(monkeypatch):
    model = family("vit")
    shape = shape_of(model)
    mlp = compress(model, CompressionPlan.identity(shape).replace(mlp_rank=9)).blocks[0].mlp
    x, calls = torch.randn(5, 10, shape.embed_dim).double(), []
    mlp.fc1.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    whole = mlp(x)
    monkeypatch.setattr("ucc_search.batches.CACHE_BYTES", 1)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), whole, rtol=0, atol=1e-12)
    assert calls == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_rank": 6}, "head_rank is 6, expected 1 to 5"),
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


KINDS = ("qk_rank", "v_rank", "mlp_rank", "head_rank")


def test_the_rank_of_a_classifier_follows_the_budget():
    """At break-even the dense layer stands: two thin ones would cost as much."""
    shape = shape_of(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=64))
    widths = Widths(WidthsConfig.model_validate({"head_rank": {"low": 0.25}}), shape)
    dense = CompressionPlan.identity(shape)
    assert widths.names("head_rank") == ["head_rank"]
    lowest = widths.at(dense, None, 1.0)
    assert lowest.head_rank == 16 and cost(lowest).params < cost(dense).params - 0.2 * 192 * 64
    ranks, plan = [], lowest
    while True:
        found = list(widths.grown(plan))
        if not found:
            break
        ((_, plan),) = found
        ranks.append(plan.head_rank)
    assert ranks == [16 + 8 * (i + 1) for i in range(len(ranks) - 1)] + [None] and len(ranks) > 2
    assert plan == dense
    assert saved_macs(lowest, default_components())["ranks"] == cost(dense).macs - cost(lowest).macs
    assert CompressionPlan.from_json(lowest.to_json()) == lowest and lowest.key != dense.key


def test_ranks_follow_the_budget_like_widths():
    shape = shape_of(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5))
    config = WidthsConfig.model_validate({k: {"low": 0.25} for k in KINDS})
    widths, dense = Widths(config, shape), CompressionPlan.identity(shape)
    assert widths.at(dense, None, 0.0) == dense
    prices = [cost(widths.at(dense, None, s / 20)).macs for s in range(21)]
    assert prices == sorted(prices, reverse=True) and prices[-1] < 0.45 * prices[0]
    lowest = widths.at(dense, None, 1.0)
    assert lowest.low_rank_attention and {b.qk_dim for b in lowest.blocks} == {16}
    for _, wider in widths.grown(lowest):
        assert cost(wider).macs > cost(lowest).macs
    assert widths.at(dense, widths.ratios(lowest), 0.5) == lowest


def test_channels_are_selected_or_factorised_not_both():
    with pytest.raises(ValueError, match="either selected"):
        WidthsConfig.model_validate({"attention": 0.5, "qk_rank": {"low": 0.5}})

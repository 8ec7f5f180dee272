from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from ucc_search.builtin.aggregators import Bipartite, Drop, Fuse, Host
from ucc_search.builtin.cascades import PerBlock
from ucc_search.builtin.scorers import ClassAttention, Joint, Random, Spatial, Spectral
from ucc_search.compression import compress, refusals, set_tokens, shape_of
from ucc_search.compression.blocks import CascadeBlocks, CompressedBlock
from ucc_search.costs import cost
from ucc_search.errors import ModelError, PlanError
from ucc_search.interfaces import Assignment, Components, Scorer
from ucc_search.losses import record
from ucc_search.plan import CompressionPlan

# Real families, small: 16 patches, 4 narrow blocks.
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},  # two class-like tokens, two heads
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "num_classes": 10},  # registers, LayerScale
    "vit_little_patch16_reg4_gap_256": {},  # registers, no class token, average pooling
    "vit_medium_patch16_gap_240": {},  # no prefix tokens at all
    "vit_base_patch16_siglip_224": {"num_classes": 10},  # attention pooling
    "deit3_small_patch16_224": {},  # LayerScale, no position for the class token
    "qk_norm": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "swiglu": {"class_token": True, "no_embed_class": True, "qkv_bias": False},
}
SMALL = {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3}
CUTS = [16, 11, 7, 2]  # 7 to 2 takes several rounds of bipartite merging


@functools.cache
def family(name, device="cpu"):
    """A model of this family with random weights, LayerScale and norms included."""
    options = {**SMALL, **FAMILIES[name]}
    torch.manual_seed(0)
    if name == "swiglu":
        from timm.layers import SwiGLU

        options["mlp_layer"] = SwiGLU
    with torch.device(device):
        if name in ("qk_norm", "swiglu"):
            model = VisionTransformer(patch_size=16, num_classes=10, **options)
        else:
            model = timm.create_model(name, **options)
    if device == "cpu":
        # Fresh norms are ones and fresh LayerScale is nearly zero: neither would show if it were lost.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def images(model, batch=2, **options):
    height, width = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(1) if "device" not in options else None
    return torch.randn(batch, 3, height, width, generator=generator, **options)


def cut_plan(model, *, head_tokens_only=False, tokens=CUTS):
    plan = CompressionPlan.identity(shape_of(model))
    tokens = [*tokens[:-1], tokens[-2]] if head_tokens_only else tokens
    return plan.replace(tokens_out=tokens, head_tokens_only=head_tokens_only)


def parts(scorer=None, aggregator=None, cascade=None):
    return Components(scorer or Joint(), aggregator or Host(), cascade or PerBlock())


@pytest.fixture(params=FAMILIES)
def model(request):
    return family(request.param)


# Invariant 1: the identity


def test_identity_changes_nothing(model):
    plan = CompressionPlan.identity(shape_of(model))
    with torch.no_grad():
        small = compress(model, plan)
        assert torch.equal(small(images(model)), model(images(model)))
    assert list(small.state_dict()) == list(model.state_dict())


def test_the_rebuilt_blocks_compute_what_timm_computes(model):
    # The identity plan keeps timm's own blocks; this runs every block of the seam, cutting nothing.
    sites = parts().sites(cut_plan(model, tokens=[15, 14, 13, 12]))
    small = copy.deepcopy(model)
    shape = shape_of(model)
    dense = CompressionPlan.identity(shape)
    blocks = [
        CompressedBlock(
            block,
            site.block,
            dense.blocks[site.block],
            parts(),
            site,
            prefix=shape.prefix_tokens,
            class_token=shape.class_token,
            grid=shape.grid,
        )
        for block, site in zip(small.blocks, sites, strict=True)
    ]
    small.blocks = CascadeBlocks(blocks, prefix=shape.prefix_tokens, restore=False)
    set_tokens(small, [shape.tokens] * 4)
    with torch.no_grad():
        torch.testing.assert_close(small(images(model)), model(images(model)), rtol=0, atol=1e-5)
    assert set(small.state_dict()) == set(model.state_dict())


def test_sparing_the_unread_tokens_of_the_last_block_is_exact(model):
    shape = shape_of(model)
    plan = CompressionPlan.identity(shape)
    if not shape.head_tokens:
        with pytest.raises(PlanError, match="pools by"):
            plan.replace(head_tokens_only=True)
        return
    spared = plan.replace(head_tokens_only=True)
    with torch.no_grad():
        small = compress(model, spared)
        torch.testing.assert_close(small(images(model)), model(images(model)), rtol=0, atol=1e-5)
    assert cost(spared).macs < cost(plan).macs


REFUSED = {
    "swin_tiny_patch4_window7_224": "windows",
    "eva02_tiny_patch14_224": "rotate positions",
    "beit_base_patch16_224": "relative position bias",
    "resnet18": "ResNet is not timm's VisionTransformer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_with_the_reason(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match=f"{name} cannot be compressed: .*{REFUSED[name]}"):
        shape_of(model, name)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"patch_drop_rate": 0.5}, "patch dropout"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "ResPostBlock"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "ParallelScalingBlock"),
    ],
)
def test_variants_of_the_family_are_refused_with_the_reason(options, reason):
    with torch.device("meta"):
        model = VisionTransformer(**SMALL, **options)
    assert reason in "; ".join(refusals(model))


def test_a_plan_for_another_model_is_refused():
    plan = CompressionPlan.identity(shape_of(family("vit_tiny_patch16_224")))
    with pytest.raises(PlanError, match="another model"):
        compress(family("vit_medium_patch16_gap_240"), plan)


def test_a_scorer_that_needs_a_class_token_is_refused_where_there_is_none():
    model = family("vit_medium_patch16_gap_240")
    with pytest.raises(PlanError, match="no class token; use the scorer"):
        compress(model, cut_plan(model), parts(ClassAttention()))


# Invariant 2: the cost is what torch counts


def fft_flops(values_shape, dims, *args, out_shape=None, **options):
    """FLOPs of an FFT as `fft_macs` counts them, not rounded; torch's counter sees no FFT by itself."""
    count = math.prod(values_shape)
    return sum(5 * count * math.log2(values_shape[dim]) for dim in dims)


def real_inverse_flops(values_shape, dims, *args, out_shape=None, **options):
    """Two real inverse FFTs are the work of a complex one."""
    return fft_flops(out_shape, dims) / 2


def counted_macs(model):
    """MACs of one image, as torch counts them on the meta device."""
    fft = {torch.ops.aten._fft_r2c: fft_flops, torch.ops.aten._fft_c2r: real_inverse_flops}
    # With gradients, as attention pooling breaks the counter without.
    with FlopCounterMode(display=False, custom_mapping=fft) as counter:
        model(images(model, 1, device="meta"))
    return counter.get_total_flops() / 2


SCORERS = [
    Joint(),
    Spatial(),
    Spectral(fft_axis="channel"),
    Spectral(fft_axis="grid2d"),
    Spectral(sign="high"),
    ClassAttention(),
    Random(),
]
AGGREGATORS = [Host(), Drop(), Fuse(), Bipartite()]


def check_cost(model, plan, components):
    small = compress(model, plan, components)
    expected = cost(plan, components)
    # FFTs cost no whole number of MACs: a site rounds each of its at most two terms.
    rounding = len(components.sites(plan)) if isinstance(components.scorer, Joint | Spectral) else 0
    assert abs(counted_macs(small) - expected.macs) <= rounding
    assert sum(p.numel() for p in small.parameters()) == expected.params


@pytest.mark.parametrize("name", FAMILIES)
def test_cost_is_what_torch_counts(name, always_fft):
    model = family(name, "meta")
    check_cost(model, CompressionPlan.identity(shape_of(model)), parts())
    check_cost(model, cut_plan(model), parts())
    check_cost(model, cut_plan(model), parts(aggregator=Bipartite()))
    if shape_of(model).head_tokens:
        check_cost(model, cut_plan(model, head_tokens_only=True), parts())


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_little_patch16_reg4_gap_256"])
def test_every_scorer_costs_what_torch_counts(name, scorer, always_fft):
    model = family(name, "meta")
    if shape_of(model).class_token or not scorer.needs_class_token:
        # Fusing and dropping add nothing of their own.
        check_cost(model, cut_plan(model), parts(scorer, Fuse(), PerBlock(score_every_block=True)))
        check_cost(model, cut_plan(model), parts(scorer, Drop()))


class Learned(Scorer):
    """A linear score per token."""

    def macs(self, site):
        return site.tokens_in * site.dim

    def params(self, site):
        return site.dim + 1

    def build(self, site):
        linear = torch.nn.Linear(site.dim, 1)

        class Score(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = linear

            def forward(self, view):
                return self.linear(view.patches_BND).squeeze(-1).sigmoid()

        return Score()


def test_what_a_scorer_adds_is_part_of_the_model_and_of_its_cost():
    model = family("vit_tiny_patch16_224")
    small = compress(model, cut_plan(model), parts(Learned(), Fuse()))
    expected = cost(cut_plan(model), parts(Learned(), Fuse()))
    assert sum(p.numel() for p in small.parameters()) == expected.params
    assert counted_macs(copy.deepcopy(small).to("meta")) == expected.macs
    assert {k for k in small.state_dict() if "scorer" in k} == {
        f"blocks.{i}.scorer.linear.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")
    }


# Invariant 3: the input is left alone


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=lambda a: type(a).__name__)
def test_the_input_model_is_untouched(model, aggregator):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    with torch.no_grad():
        reference = model(images(model))
        small = compress(model, cut_plan(model), parts(aggregator=aggregator))
        for parameter in small.parameters():
            parameter.add_(1.0)
        assert torch.equal(model(images(model)), reference)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(small.state_dict()) == set(before)
    assert type(small) is type(model)


# What a compressed model computes


def recorded(small, model, blocks=range(4)):
    with torch.no_grad(), record(small, list(blocks), model.num_prefix_tokens) as found:
        logits = small(images(model))
    return logits, found


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=lambda a: type(a).__name__)
def test_blocks_leave_the_tokens_of_the_plan_and_every_prefix_token(model, aggregator):
    plan = cut_plan(model)
    logits, found = recorded(compress(model, plan, parts(aggregator=aggregator)), model)
    assert logits.shape == (2, model.num_classes)
    assert bool(logits.isfinite().all())
    for i, tokens in enumerate(plan.tokens):
        x_BTD = found[i].x_BTD
        assert x_BTD.shape[1] == model.num_prefix_tokens + tokens
        position_BN, compose_BRN = found[i].position_BN, found[i].compose_BRN
        if position_BN is None:
            assert i == 0  # nothing was cut yet
            continue
        assert bool((position_BN.diff(dim=1) > 0).all())  # order on the grid survives
        torch.testing.assert_close(compose_BRN.sum(dim=2), torch.ones(2, tokens))


class Last(Scorer):
    """Prefers late positions: what stays is known beforehand."""

    def score(self, view):
        return view.position_BN.float() + 1.0


def test_dropping_is_running_the_dense_blocks_on_what_stays(model):
    # Slicing equals masking: the dense model with the pruned patches taken out by hand.
    shape = shape_of(model)
    prefix = shape.prefix_tokens
    small = compress(model, cut_plan(model, tokens=[16, 9, 9, 9]), parts(Last(), Drop()))
    with torch.no_grad():
        x = model.patch_embed(images(model))
        x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
        x = model.blocks[0](x)
        block = model.blocks[1]
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = torch.cat([x[:, :prefix], x[:, prefix + 7 :]], dim=1)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        x = model.blocks[3](model.blocks[2](x))
        expected = model.forward_head(model.norm(x))
        torch.testing.assert_close(small(images(model)), expected, rtol=0, atol=1e-5)


class Half(Drop):
    """Merges into the first token in equal parts."""

    merges = True

    def assign(self, view, scores_BN, keep):
        keep_BR, prune_BP, *_ = super().assign(view, scores_BN, keep)
        hosts = torch.zeros_like(prune_BP)
        sizes = view.size_BN
        return Assignment(keep_BR, prune_BP, hosts, sizes.gather(1, prune_BP), sizes.gather(1, keep_BR))


def test_average_pooling_weighs_merged_tokens_by_their_patches():
    model = family("vit_medium_patch16_gap_240")
    small = compress(model, cut_plan(model, tokens=[16, 16, 16, 6]), parts(Last(), Half()))
    with torch.no_grad():
        tokens = small.forward_features(images(model))
    assert tokens.shape[1] == 16
    # Positions 10 to 15 stay; 0 to 9 are part of the first that stays, 10.
    for i in range(10):
        assert torch.equal(tokens[:, i], tokens[:, 10])
    assert not torch.equal(tokens[:, 11], tokens[:, 10])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swiglu"])
def test_sparing_unread_tokens_is_exact_after_cuts_too(name):
    model = family(name)
    tokens = [14, 9, 5, 5]
    with torch.no_grad():
        full = compress(model, cut_plan(model, tokens=tokens))(images(model))
        spared = compress(model, cut_plan(model, tokens=tokens, head_tokens_only=True))(images(model))
    torch.testing.assert_close(spared, full, rtol=0, atol=1e-5)


def test_an_image_is_classified_alike_alone_and_in_a_batch(model):
    small = compress(model, cut_plan(model))
    with torch.no_grad():
        batch = images(model, 4)
        alone = torch.cat([small(image[None]) for image in batch])
        torch.testing.assert_close(small(batch), alone, rtol=0, atol=1e-5)


def test_tokens_can_change_between_passes():
    model = family("vit_tiny_patch16_224")
    small = compress(model, cut_plan(model, tokens=[16, 9, 9, 5]))
    for tokens in ([16, 12, 12, 10], [16, 9, 9, 5]):
        set_tokens(small, tokens)
        _, found = recorded(small, model)
        assert [found[i].x_BTD.shape[1] - 1 for i in range(4)] == tokens


# What people do with a compressed model


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=lambda a: type(a).__name__)
def test_every_parameter_learns(model, aggregator):
    head_tokens_only = bool(shape_of(model).head_tokens)
    plan = cut_plan(model, head_tokens_only=head_tokens_only)
    small = compress(model, plan, parts(aggregator=aggregator)).train().requires_grad_(True)
    out = small(images(model))
    torch.stack(out if isinstance(out, tuple) else [out]).pow(2).sum().backward()
    untouched = [
        n for n, p in small.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())
    ]
    assert not untouched
    assert all(p.grad is None for p in model.parameters())


def test_copies_and_pickles_give_the_same_logits(model):
    small = compress(model, cut_plan(model))
    with torch.no_grad():
        expected = small(images(model))
        for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(copied(images(model)), expected)


def test_bf16_stays_bf16(model):
    small = compress(model, cut_plan(model), parts(aggregator=Bipartite())).to(torch.bfloat16)
    with torch.no_grad():
        assert small(images(model).bfloat16()).dtype == torch.bfloat16
        host = compress(model, cut_plan(model)).to(torch.bfloat16)(images(model).bfloat16())
    assert host.dtype == torch.bfloat16
    assert bool(host.isfinite().all())


@pytest.mark.parametrize("aggregator", [Host(), Bipartite()], ids=lambda a: type(a).__name__)
def test_exported_programs_agree_for_any_batch(aggregator):
    model = family("vit_tiny_patch16_224")
    small = compress(model, cut_plan(model, head_tokens_only=True), parts(aggregator=aggregator)).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(small, (images(model, 2),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for batch in (1, 5):
            x = images(model, batch)
            torch.testing.assert_close(program(x), small(x), rtol=0, atol=1e-5)

"""Structural pruning (UP-ViT, arXiv:2111.15127): widths, heads, depth and embedding, cut by slicing."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import subprocess
import sys

import pytest
import timm
import torch
from families import FAMILIES, PYRAMIDS, dense, family, images, random_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shapes import pvt_shape, random_plan
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from ucc_search.builtin.aggregators import Drop, Fuse, Host
from ucc_search.builtin.cascades import PerBlock
from ucc_search.builtin.scorers import ClassAttention, Random, Spatial
from ucc_search.compression import assemble, compress, shape_of
from ucc_search.compression.masks import masked
from ucc_search.compression.parts import blocks_of, parts_of
from ucc_search.compression.selection import first_units, narrows, select
from ucc_search.config import ModelConfig
from ucc_search.costs import cost
from ucc_search.errors import ModelError, PlanError
from ucc_search.interfaces import INFERENCE_KINDS, ComponentRef, Components
from ucc_search.losses import record
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.saving import arch_of, save_model
from ucc_search.widths import towards

FREE = Components(Random(), Drop(), PerBlock())
VITS = [name for name in FAMILIES if name not in PYRAMIDS]


# Slicing equals masking


def narrowed(name, component):
    """The dense plan with one component narrower."""
    shape = dense(name).shape
    per_block = {
        "channels": {"qk_dim": lambda b: b.qk_dim - 3, "v_dim": lambda b: b.v_dim - 3},
        "heads": {"heads": lambda b: max(1, b.heads - 1)},
        "hidden": {"mlp_hidden": lambda b: b.mlp_hidden // 2 + 1},
    }
    if component == "embedding":
        return dense(name).replace(embed_dims=tuple(d - 3 for d in shape.embed_dims))
    changes = per_block[component].items()
    return dense(name).replace(**{key: [change(b) for b in shape.blocks] for key, change in changes})


def best(score, count):
    """1 for the highest scores, 0 for the others."""
    return torch.zeros_like(score).index_fill_(0, score.topk(count).indices, 1.0)


def masks_of(plan, scores, batch=2):
    """What `select` with heads="remove" deletes, as masks, chosen here a second time."""
    masks = {}
    for kind, i in narrows(plan):
        score = scores[kind, i]
        if kind == "attention":
            per_head = score.view(plan.shape.blocks[i].heads, -1)
            heads = best(per_head.sum(dim=1), plan.blocks[i].heads)
            channels = torch.stack([best(row, plan.blocks[i].qk_dim) for row in per_head])
            mask = (channels * heads[:, None]).flatten()
        else:
            mask = best(score, plan.embed_dims[i] if kind == "embed" else plan.blocks[i].mlp_hidden)
        masks[kind, i] = mask.expand(batch, -1)
    return masks


def check_slicing(name, plan, masks, scores, components=FREE, atol=1e-9):
    """The sliced model computes what the masked one does, and that is not what the dense one does."""
    model, x = family(name), images(name)
    small = compress(model, plan, components, scores=scores, heads="remove")
    with torch.no_grad():
        with masked(model, masks):
            expected = model(x)
        torch.testing.assert_close(small(x), expected, rtol=0, atol=atol)
        assert (expected - model(x)).abs().max() > 1e6 * atol


WIDTHS = [(name, c) for name in FAMILIES for c in ("embedding", "channels", "heads", "hidden")]
WIDTHS.remove(("norms", "channels"))  # queries and keys that are normalised keep their channels


@pytest.mark.parametrize(("name", "component"), WIDTHS)
def test_slicing_a_width_is_masking_it(name, component):
    plan, scores = narrowed(name, component), random_scores(dense(name).shape)
    check_slicing(name, plan, masks_of(plan, scores), scores)


def without_units(plan, units):
    """The plan without these units of depth."""
    attention, mlp = ([True] * plan.shape.depth for _ in range(2))
    for unit in units:
        block, odd = (unit, 0) if plan.shape.stages else divmod(unit, 2)
        attention[block + odd] = mlp[block] = False
    return plan.replace(attention=attention, mlp=mlp)


def depth_mask(shape, units, batch=2):
    steps = shape.unit_groups()[-1].units
    mask = torch.ones(batch, steps, dtype=torch.float64)
    mask[:, list(units)] = 0
    return {("depth", 0): mask}


@pytest.mark.parametrize("name", FAMILIES)
def test_removing_a_step_of_depth_is_masking_it(name):
    plan = dense(name)
    steps = plan.shape.unit_groups()[-1].units
    for units in [*([u] for u in range(min(5, steps))), [steps - 2], [0, steps - 1]]:
        check_slicing(name, without_units(plan, units), depth_mask(plan.shape, units), {})


@pytest.mark.parametrize("name", FAMILIES)
def test_slicing_everything_at_once_is_masking_everything(name):
    shape, scores = dense(name).shape, random_scores(dense(name).shape)
    plan = narrowed(name, "heads")
    wholes = {"mlp_hidden": [b.mlp_hidden - 7 for b in shape.blocks]}
    if name != "norms":
        wholes |= {k: [b.qk_dim - 2 for b in shape.blocks] for k in ("qk_dim", "v_dim")}
    plan = plan.replace(embed_dims=tuple(d - 2 for d in shape.embed_dims), **wholes)
    masks = {**masks_of(plan, scores), **depth_mask(shape, [3])}
    check_slicing(name, without_units(plan, [3]), masks, scores)


@pytest.mark.parametrize("name", ["vit", "deit3", "swiglu", "stem", "pvt_v2_b2"])
def test_queries_and_keys_may_keep_other_channels_than_values(name):
    shape, scores = dense(name).shape, random_scores(dense(name).shape)
    plan = dense(name).replace(
        qk_dim=[b.qk_dim - 5 for b in shape.blocks], v_dim=[b.v_dim - 2 for b in shape.blocks]
    )
    # By hand: rows of zeros in place of the rows that leave.
    by_hand = copy.deepcopy(family(name))
    with torch.no_grad():
        for i, block in enumerate(blocks_of(by_hand)):
            per_head = scores["attention", i].view(shape.blocks[i].heads, -1)
            keep = {
                role: torch.cat([best(row, width) for row in per_head])
                for role, width in (("q", plan.blocks[i].qk_dim), ("v", plan.blocks[i].v_dim))
            }
            keep["k"] = keep["q"]
            for layer, roles in parts_of(block).projections:
                rows = torch.cat([keep[role] for role in roles])
                layer.weight.mul_(rows[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(rows)
        small = compress(family(name), plan, scores=scores)
        expected = by_hand(images(name))
        torch.testing.assert_close(small(images(name)), expected, rtol=0, atol=1e-9)
        assert (expected - family(name)(images(name))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit", "distilled", "registers", "swiglu"])
def test_narrowing_and_cutting_tokens_do_not_disturb_each_other(name):
    # Masking the model whose tokens are cut; this scorer sees no masked channel (but a masked head).
    shape, scores = dense(name).shape, random_scores(dense(name).shape)
    parts = Components(ClassAttention(), Fuse(), PerBlock())
    cut = without_units(dense(name), [2]).replace(tokens_out=[6, 6, 4])
    hidden = [b.mlp_hidden - 9 for b in shape.blocks]
    plan = cut.replace(embed_dim=20, mlp_hidden=hidden, qk_dim=5, v_dim=5)
    all_tokens = compress(family(name), without_units(dense(name), [2]), parts)
    fewer, x = compress(family(name), cut, parts), images(name)
    # The block in the middle is gone from the model, and from its masks.
    place = {("embed", 0): ("embed", 0)} | {
        (kind, i): (kind, p) for kind in ("attention", "mlp") for p, i in enumerate(plan.present)
    }
    masks = {place[key]: mask for key, mask in masks_of(plan, scores).items() if key in place}
    with torch.no_grad():
        with masked(fewer, masks):
            expected = fewer(x)
        small = compress(family(name), plan, parts, scores=scores, heads="remove")
        torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-6)  # scores are float32
        assert (fewer(x) - all_tokens(x)).abs().max() > 1e-3
        assert (fewer(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit", "distilled", "registers"])
@pytest.mark.parametrize("units", [[], [2], [4], [1, 4], [3]])
def test_sparing_unread_tokens_is_exact_whatever_is_left_of_the_last_block(name, units):
    scores = random_scores(dense(name).shape)
    plan = without_units(dense(name), units).replace(embed_dim=20, mlp_hidden=50, heads=2, qk_dim=7, v_dim=4)
    with torch.no_grad():
        full = compress(family(name), plan, scores=scores)(images(name))
        spared = compress(family(name), plan.replace(head_tokens_only=True), scores=scores)(images(name))
    torch.testing.assert_close(spared, full, rtol=0, atol=1e-9)


def test_a_model_of_one_half_block_still_classifies():
    """A pyramid may lose all blocks of its first stages."""
    for name in ("vit", "pvt_v2_b0"):
        depth = dense(name).shape.depth
        attention = [False] * (depth - 1) + [name != "vit"]
        plan = dense(name).replace(attention=attention, mlp=[False] * (depth - 1) + [True])
        small = compress(family(name), plan)
        with torch.no_grad():
            assert bool(small(images(name)).isfinite().all())
        assert sum(p.numel() for p in small.parameters()) == cost(plan).params


@pytest.mark.parametrize("kind", ["embed", "attention", "mlp"])
def test_what_another_norm_reads_is_refused_by_masks(kind):
    from timm.layers import RmsNorm

    model = VisionTransformer(
        img_size=32, depth=1, embed_dim=8, num_heads=2, num_classes=3, norm_layer=RmsNorm
    )
    block = model.blocks[0]
    block.attn.norm, block.mlp.norm = RmsNorm(8), RmsNorm(32)
    mask = torch.ones(1, 32 if kind == "mlp" else 8)
    with (
        pytest.raises(ModelError, match="a RmsNorm reads what is deleted: only LayerNorm can be masked"),
        masked(model, {(kind, 0): mask}),
    ):
        pass
    assert not any(module._forward_hooks for module in model.modules())


# Which units stay


def test_heads_fuse_into_contiguous_groups_of_the_old_channels():
    # DeiT-B's 12 heads of 64 to DeiT-T's 3: a new head takes the best 64 of 256 channels (section 3.3).
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224", img_size=32, depth=1, num_classes=2)
    plan = CompressionPlan.identity(shape_of(model)).replace(heads=3)
    score = torch.rand(768, generator=torch.Generator().manual_seed(0))
    by_hand = torch.cat([g * 256 + score[g * 256 :][:256].topk(64).indices.sort().values for g in range(3)])
    block = select(plan, {("attention", 0): score}).blocks[0]
    assert torch.equal(block.query_key, by_hand)
    assert torch.equal(block.value, by_hand)
    # A head of UP-ViT is not an old one: each draws on several.
    assert all(len({i // 64 for i in head}) > 1 for head in by_hand.view(3, 64).tolist())


@functools.cache
def twelve_heads():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=768, depth=1, num_heads=12, mlp_ratio=0.1, num_classes=2
    ).double()
    torch.nn.init.normal_(model.blocks[0].attn.qkv.bias, std=0.3)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("channels", [64, 32, 80])
def test_fused_heads_take_the_same_rows_and_keep_the_scale_of_the_old_heads(channels):
    model = twelve_heads()
    plan = CompressionPlan.identity(shape_of(model)).replace(heads=3, qk_dim=channels, v_dim=channels)
    score = torch.rand(768, generator=torch.Generator().manual_seed(1))
    keep = torch.cat(
        [g * 256 + score[g * 256 :][:256].topk(channels).indices.sort().values for g in range(3)]
    )
    old = model.blocks[0].attn
    new = compress(model, plan, scores={("attention", 0): score}).blocks[0].attn
    q, k, v = (part[keep] for part in old.qkv.weight.chunk(3))
    new_q, new_k, new_v = new.qkv.weight.chunk(3)
    # Attention of d' channels divides by sqrt(d'), so queries that were made for sqrt(d) are rescaled.
    torch.testing.assert_close(new_q, q * math.sqrt(channels / 64), rtol=1e-12, atol=0)
    assert torch.equal(new_k, k)
    assert torch.equal(new_v, v)
    assert torch.equal(new.proj.weight, old.proj.weight[:, keep])
    assert torch.equal(new.proj.bias, old.proj.bias)
    assert new.scale == pytest.approx(channels**-0.5, rel=1e-12)
    # What the softmax sees is the sum over the kept channels, divided by sqrt(64) as ever.
    x = torch.randn(5, 768, dtype=torch.float64)

    def logits(layer, rows, heads):
        q, k, _ = layer(x).chunk(3, dim=-1)
        q, k = (t[:, rows].view(5, heads, -1).transpose(0, 1) for t in (q, k))
        return q @ k.transpose(1, 2)

    expected = logits(old.qkv, keep, 3) / math.sqrt(64)
    torch.testing.assert_close(logits(new.qkv, slice(None), 3) * new.scale, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_selection_is_the_best_of_every_group(data):
    shape = dense("vit").shape
    heads = data.draw(st.integers(1, 3))
    most = 3 // heads * 8
    qk_dim, v_dim = (data.draw(st.integers(1, most)) for _ in range(2))
    plan = dense("vit").replace(heads=heads, qk_dim=qk_dim, v_dim=v_dim)
    scores = random_scores(shape, seed=data.draw(st.integers(0, 99)))
    for i, block in enumerate(select(plan, scores).blocks):
        score = scores["attention", i]
        for kept, width in ((block.query_key, qk_dim), (block.value, v_dim)):
            for head, units in enumerate(kept.view(heads, width).tolist()):
                group = range(head * 24 // heads, (head + 1) * 24 // heads)
                assert units == sorted(set(units) & set(group))
                left = [score[u] for u in group if u not in units]
                assert not left or min(score[u] for u in units) >= max(left)
        assert block.hidden.tolist() == list(range(96))


def test_of_equal_scores_the_first_units_stay():
    scores = {k: torch.zeros_like(v) for k, v in random_scores(dense("vit").shape).items()}
    selection = select(narrowed("vit", "hidden").replace(embed_dim=20), scores)
    assert selection.embed[0].tolist() == list(range(20))
    assert selection.blocks[0].hidden.tolist() == list(range(49))


# Standard smaller architectures


def deit(size, **options):
    torch.manual_seed(0)
    return timm.create_model(f"deit_{size}_patch16_224", **options).eval().requires_grad_(False)


@functools.cache
def base():
    model = deit("base", img_size=32, depth=2, num_classes=10)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def signature(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def check_same_model(small, target, x):
    """timm's own smaller model takes the pruned weights and computes the same."""
    assert signature(small) == signature(target)
    target.load_state_dict(small.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(small(x), target(x), rtol=0, atol=1e-5)
        assert small(x).std() > 1e-2


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_deit_base_becomes_a_smaller_deit(size):
    target = deit(size, img_size=32, depth=2, num_classes=10)
    plan = towards(shape_of(base()), shape_of(target))
    small = compress(base(), plan)
    check_same_model(small, target, torch.randn(2, 3, 32, 32))
    assert (small.embed_dim, small.num_features) == (target.embed_dim, target.num_features)
    assert small.feature_info == target.feature_info


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_at_full_size_the_shapes_are_timms(size):
    with torch.device("meta"):
        model, target = (timm.create_model(f"deit_{s}_patch16_224") for s in ("base", size))
    shape = shape_of(model)
    small = compress(model, towards(shape, shape_of(target)), scores=random_scores(shape))
    assert signature(small) == signature(target)
    assert shape_of(small, "x") == shape_of(target, "x")


@functools.cache
def pyramid(size):
    torch.manual_seed(0)
    model = timm.create_model(f"pvt_v2_{size}", num_classes=10).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("size", ["b1", "b0"])
def test_a_pyramid_becomes_a_smaller_pyramid(size):
    shape, target = (shape_of(pyramid(s), image_size=(32, 64)) for s in ("b2", size))
    plan = towards(shape, target, depth_order=random.Random(0).sample(range(16), 16))
    small = compress(pyramid("b2"), plan)
    check_same_model(small, copy.deepcopy(pyramid(size)), torch.randn(2, 3, 32, 64))
    assert cost(plan) == cost(CompressionPlan.identity(target))
    assert len(plan.present) == 8
    if size == "b1":
        # Only blocks left: those that stay are the old ones.
        kept = [b for s in small.stages for b in s.blocks]
        old = [b for s in pyramid("b2").stages for b in s.blocks]
        for i, block in zip(plan.present, kept, strict=True):
            assert torch.equal(block.mlp.fc1.weight, old[i].mlp.fc1.weight)


def test_shapes_written_by_hand_are_those_of_the_models():
    with torch.device("meta"):
        model = timm.create_model("pvt_v2_b2")
    assert shape_of(model, "pvt_v2_b2") == pvt_shape("b2")


# The cost is what torch counts


def counted_macs(model, shape):
    """MACs of one image as torch counts them; with gradients, as the tests of `compress` do."""
    x = torch.empty(1, shape.channels, *shape.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x)
    total = counter.get_total_flops()
    assert total % 2 == 0
    return total // 2


@functools.cache
def on_meta(name):
    """A family without weights and in single precision, which timm's counter expects."""
    with torch.device("meta"):
        return FAMILIES[name]().eval()


def heads_by(shape):
    return "remove" if shape.blocks[0].qk_norm_vectors else "fuse"


def check_cost(name, shape, seed, parts):
    plan = random_plan(shape, random.Random(f"{name} {seed}"))
    small = compress(on_meta(name), plan, parts, scores=random_scores(shape), heads=heads_by(shape))
    expected = cost(plan, parts)
    assert counted_macs(small, shape) == expected.macs
    assert sum(p.numel() for p in small.parameters()) == expected.params


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cost_of_any_narrow_plan_is_what_torch_counts(name):
    for seed in range(3 if name == "pvt_v2_b2" else 6):
        # Of these only merging and the score by attention maps cost something of their own.
        check_cost(name, dense(name).shape, seed, [FREE, Components(Spatial(), Host(), PerBlock())][seed % 2])


@pytest.mark.parametrize("size", [(96, 64), (64, 224), (72, 100)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_cost_of_a_pyramid_is_exact_for_odd_images(size):
    # 72 x 100 pixels leave grids that the strides do not divide.
    shape = shape_of(on_meta("pvt_v2_b0"), "pvt_v2_b0", image_size=size)
    assert counted_macs(on_meta("pvt_v2_b0"), shape) == cost(CompressionPlan.identity(shape)).macs
    for seed in range(3):
        check_cost("pvt_v2_b0", shape, f"{size} {seed}", FREE)


def test_a_stage_without_blocks_costs_what_torch_counts():
    shape = dense("pvt_v2_b0").shape
    left = [True, True, False, False, True, True, False, False]
    plan = CompressionPlan.identity(shape).replace(attention=left, mlp=left)
    small = compress(on_meta("pvt_v2_b0"), plan)
    assert counted_macs(small, shape) == cost(plan).macs
    assert sum(p.numel() for p in small.parameters()) == cost(plan).params


# The input is left alone


def traces(model):
    """Everything that pruning writes to: numbers of modules beside their parameters."""
    names = "num_heads head_dim attn_dim scale in_features out_features in_channels out_channels groups"
    names += " normalized_shape embed_dim num_features head_hidden_size feature_info"
    return [
        (type(m), *(copy.deepcopy(getattr(m, n)) for n in names.split() if hasattr(m, n)))
        for m in model.modules()
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_narrowing_leaves_its_input_alone(name):
    model, x = family(name), images(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    written = traces(model)
    plan = random_plan(dense(name).shape, random.Random(3))
    with torch.no_grad():
        logits = model(x)
        small = compress(model, plan, FREE, scores=random_scores(plan.shape), heads=heads_by(plan.shape))
        for parameter in small.parameters():
            parameter.add_(1.0)
        assert torch.equal(model(x), logits)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert traces(model) == written
    assert type(small) is type(model)


# What is refused


def plan_of(name, **changes):
    return lambda: dense(name).replace(**changes)


WRONG_PLANS = {
    "embed_dim is 25, expected 1 to 24": plan_of("vit", embed_dim=25),
    "embed_dim is 0, expected 1 to 24": plan_of("vit", embed_dim=0),
    r"blocks\[0\]\.heads is 4, expected 1 to 3": plan_of("vit", heads=4),
    r"blocks\[1\]\.mlp_hidden is 0, expected 1 to 96": plan_of("vit", mlp_hidden=[96, 0, 96]),
    r"qk_dim is 9, expected 1 to 8 \(3 heads of 8 for 3\)": plan_of("vit", qk_dim=9),
    r"v_dim is 9, expected 1 to 8 \(3 heads of 8 for 2\)": plan_of("vit", heads=2, v_dim=9),
    r"blocks\[0\]\.qk_dim is 5, expected 8: the norm of queries and keys is shared": plan_of(
        "norms", qk_dim=5
    ),
    r"embed_dims has 1 values, expected 4 \(one per stage": plan_of("pvt_v2_b0", embed_dim=8),
    r"embed_dims\[2\] is 99, expected 1 to 40": plan_of("pvt_v2_b0", embed_dims=(8, 16, 99, 64)),
    r"blocks\[0\] lacks one half; a pyramid loses whole blocks only": plan_of("pvt_v2_b0", mlp=False),
    r"blocks\[0\]\.tokens_out is 5, expected 128: .* its tokens cannot be cut": plan_of(
        "pvt_v2_b0", tokens_out=5
    ),
    r"blocks\[1\]\.tokens_out is 4, expected 9: a block without attention has nothing to score": plan_of(
        "vit", attention=[True, False, True], tokens_out=[9, 4, 4]
    ),
    "head_tokens_only needs a head that reads the class token": plan_of("pvt_v2_b0", head_tokens_only=True),
    "a plan has no field 'width'": plan_of("vit", width=3),
}


@pytest.mark.parametrize("message", WRONG_PLANS)
def test_an_impossible_plan_is_refused_in_one_sentence(message):
    with pytest.raises(PlanError, match=message) as caught:
        WRONG_PLANS[message]()
    assert "\n" not in str(caught.value)


def test_the_embedding_that_attention_pooling_reads_is_not_pruned():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_siglip_224", img_size=32, depth=1, num_classes=5)
    plan = CompressionPlan.identity(shape_of(model))
    with pytest.raises(PlanError, match="embed_dim is 760, expected 768: the attention pooling of"):
        plan.replace(embed_dim=760)
    # The widths inside the blocks are.
    narrow = plan.replace(mlp_hidden=100, heads=3)
    small = compress(model, narrow, scores=random_scores(plan.shape))
    assert counted_macs(small, plan.shape) == cost(narrow).macs


@pytest.mark.parametrize(
    ("change", "scores", "message"),
    [
        ("hidden", {}, r"the plan narrows mlp\[0\], for which there are no importance scores"),
        ("embedding", {}, r"the plan narrows embed\[0\], for which there are no"),
        ("heads", {("mlp", 0): torch.ones(96)}, r"the plan narrows attention\[0\], for which there are no"),
        ("hidden", {("mlp", 0): torch.ones(97)}, r"mlp\[0\] has scores of shape \(97,\), expected \(96,\)"),
        ("channels", {("attention", 0): torch.ones(3, 8)}, r"shape \(3, 8\), expected \(24,\)"),
    ],
)
def test_scores_that_do_not_fit_the_plan_are_refused(change, scores, message):
    with pytest.raises(PlanError, match=message):
        compress(family("vit"), narrowed("vit", change), scores=scores)


def test_whole_heads_cannot_become_wider():
    plan = dense("vit").replace(heads=1, qk_dim=20, v_dim=20)
    scores = random_scores(plan.shape)
    with pytest.raises(PlanError, match=r"blocks\[0\] has 1 heads of 20 channels, but only 8 to choose from"):
        compress(family("vit"), plan, scores=scores, heads="remove")
    assert compress(family("vit"), plan, scores=scores).blocks[0].attn.head_dim == 20


def test_heads_that_share_a_norm_are_not_fused():
    # A new head would put channels of other places under the shared norm's weights.
    plan, scores = dense("norms").replace(heads=2), random_scores(dense("norms").shape)
    with pytest.raises(PlanError, match=r"blocks\[0\].*norm of queries and keys.*fewer_heads: remove"):
        compress(family("norms"), plan, scores=scores)


# Plans as text


def test_plans_of_the_format_before_pyramids_are_read():
    plan = dense("vit").replace(tokens_out=[9, 5, 5], head_tokens_only=True)
    data = json.loads(plan.to_json())
    assert data["format"] == 2
    del data["shape"]["stages"]
    for block in data["shape"]["blocks"]:
        for later in ("kv_reduction", "kv_tokens", "mlp_kernel"):
            del block[later]
    old = {**data, "format": 1, "embed_dim": data.pop("embed_dims")[0]}
    old.pop("embed_dims")
    assert CompressionPlan.from_dict(old) == plan
    with pytest.raises(PlanError, match="plan format is 3, expected 2"):
        CompressionPlan.from_dict({**old, "format": 3})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_survives_as_text(name):
    plan = random_plan(dense(name).shape, random.Random(1))
    again = CompressionPlan.from_json(plan.to_json())
    assert (again, again.key) == (plan, plan.key)


# Saved models


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_to_load_weights_into_has_the_shapes_of_any_plan(name):
    plan = random_plan(dense(name).shape, random.Random(5))
    pruned = compress(family(name), plan, FREE, scores=random_scores(plan.shape), heads=heads_by(plan.shape))
    empty = assemble(family(name), plan, FREE, first_units(plan))
    empty.load_state_dict(pruned.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(empty(images(name)), pruned(images(name)))


SAVED = {
    "vit": (
        ModelConfig(
            name="vit_tiny_patch16_224", args={"img_size": 64, "depth": 4, "embed_dim": 24, "num_heads": 3}
        ),
        {
            "attention": [True, False, True, False],
            "mlp": [True, False, False, True],
            "tokens_out": [12, 12, 5, 5],
            "head_tokens_only": True,
            "embed_dim": 17,
            "heads": [3, 3, 2, 1],
            "qk_dim": [8, 8, 5, 20],
            "v_dim": [6, 8, 8, 3],
        },
    ),
    "pyramid": (
        ModelConfig(name="pvt_v2_b0", args={"embed_dims": [8, 16, 40, 64]}),
        {
            "attention": [True, False] * 4,
            "mlp": [True, False] * 4,
            "embed_dims": (5, 11, 24, 64),
            "qk_dim": 6,
            "v_dim": [8, 5] * 4,
            "mlp_hidden": 30,
        },
    ),
}
REFS = {
    "scorer": ComponentRef("joint"),
    "aggregator": ComponentRef("host"),
    "cascade": ComponentRef("per_block"),
}
FRESH = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from ucc_search.saving import load_model
for folder in map(Path, sys.argv[1:]):
    images = load_file(folder / "images.safetensors")["images"]
    with torch.no_grad():
        save_file({"logits": load_model(folder)(images)}, folder / "logits.safetensors")
"""


def test_pruned_models_give_the_same_logits_in_a_fresh_process(tmp_path):
    plugins = Plugins.load((), environment=False)
    expected = {}
    for name, (config, changes) in SAVED.items():
        torch.manual_seed(0)
        model = build_model(config, classes=5, channels=3)
        for parameter in model.requires_grad_(False).parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        shape = shape_of(model, config.name, image_size=(64, 64))
        plan = CompressionPlan.identity(shape).replace(**changes)
        small = compress(model, plan, plugins.components(**REFS)).eval()
        identities = {kind: plugins.identity(kind, REFS[kind].name) for kind in INFERENCE_KINDS}
        save_model(small, tmp_path / name, plan, arch_of(config, REFS, identities, (), {}))
        x = torch.randn(2, 3, 64, 64)
        save_file({"images": x}, tmp_path / name / "images.safetensors")
        with torch.no_grad():
            expected[name] = small(x)
    folders = [str(tmp_path / name) for name in SAVED]
    subprocess.run(
        [sys.executable, "-c", FRESH, *folders],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    for name, logits in expected.items():
        found = load_file(tmp_path / name / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-6)
        assert logits.std() > 1e-3


# What a distiller sees of blocks that are gone


def recorded(model, name, present=None):
    depth, prefix = dense(name).shape.depth, dense(name).shape.prefix_tokens
    with torch.no_grad(), record(model, range(depth), prefix, present) as found:
        model(images(name))
    return [found[i].x_BTD for i in range(depth)]


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("units", [[2], [4], [2, 4], [1], [3]])
def test_features_of_a_removed_block_are_those_before_it(name, units):
    # In the dense model a masked block hands on what it got: by the same indices, the same features.
    plan = without_units(dense(name), units)
    with masked(family(name), depth_mask(plan.shape, units)):
        expected = recorded(family(name), name)
    found = recorded(compress(family(name), plan), name, plan.present)
    for block, (here, there) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-9, msg=f"block {block}")


def test_the_first_block_that_is_left_stands_for_those_gone_before_it():
    plan = without_units(dense("vit"), [0])
    found = recorded(compress(family("vit"), plan), "vit", plan.present)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_features_after_removed_blocks_keep_track_of_the_tokens():
    plan = without_units(dense("vit"), [2]).replace(tokens_out=[5, 5, 3])
    small = compress(family("vit"), plan, Components(ClassAttention(), Fuse(), PerBlock()))
    with torch.no_grad(), record(small, range(3), 1, plan.present) as found:
        small(images("vit"))
    assert [found[i].x_BTD.shape[1] - 1 for i in range(3)] == [5, 5, 3]
    assert [found[i].position_BN.shape[1] for i in range(3)] == [5, 5, 3]
    assert torch.equal(found[0].compose_BRN, found[1].compose_BRN)

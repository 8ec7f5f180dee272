"""EViT keeps what the class token attends to, and fuses the others by their attentiveness."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import ucc_search
from ucc_search.interfaces import ComponentRef, ScheduleRequest, Site, TokenView

MODULE = Path(__file__).resolve().parent.parent / "ucc_plugin_evit.py"
PLUGINS = ucc_search.Plugins.load([str(MODULE)], entry_points=False, environment=False)


def build(kind, **params):
    return PLUGINS.build(kind, ComponentRef("evit", params))


def view(count=6, prefix=2):
    generator = torch.Generator().manual_seed(1)
    total = prefix + count
    x, q, k, v = (torch.randn(2, *s, generator=generator) for s in [(total, 8), *[(2, total, 4)] * 3])
    position, size = torch.arange(count).expand(2, count), torch.ones(2, count)
    return TokenView(x, q, k, v, None, 0.5, prefix, True, position, size, (1, count))


def test_the_score_is_the_class_row_of_the_whole_attention_map():
    seen = view()
    whole = (seen.q_BHTK @ seen.k_BHTK.transpose(-2, -1) * seen.scale).softmax(dim=-1)
    scores = build("scorer").score(seen)
    torch.testing.assert_close(scores, whole.mean(dim=1)[:, 0, 2:])


def test_one_token_is_the_attentive_mean_of_all_that_are_not_kept():
    scores = torch.tensor([[0.3, 0.05, 0.1, 0.25, 0.2, 0.0]]).expand(2, 6)
    keep, prune, host, weight, own = build("aggregator").assign(view(), scores, 3)
    assert keep[0].tolist() == [0, 3, 4]  # 0 and 3 are attentive, 4 stands for the rest
    assert prune[0].tolist() == [1, 2, 5]
    assert keep[0][host[0]].tolist() == [4, 4, 4]
    torch.testing.assert_close(weight[0], torch.tensor([0.05, 0.1, 1e-6]))
    torch.testing.assert_close(own[0], torch.tensor([0.3, 0.25, 0.2]))


def test_without_fusion_the_others_are_dropped():
    aggregator = build("aggregator", fuse=False)
    found = aggregator.assign(view(), torch.arange(6.0).expand(2, 6), 2)
    assert found.keep_BR[0].tolist() == [4, 5]
    assert found.host_BP is None
    assert not aggregator.merges


def test_a_model_keeps_the_attentive_tokens_untouched():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    plan = ucc_search.CompressionPlan.identity(ucc_search.shape_of(model)).replace(tokens_out=[5, 5])
    parts = PLUGINS.components(*[ComponentRef("evit")] * 3)
    small = ucc_search.compress(model, plan, parts).eval()
    seen = {}
    small.blocks[0].norm1.register_forward_hook(lambda module, inputs, output: seen.update(before=inputs[0]))
    small.blocks[0].ls1.register_forward_hook(lambda module, inputs, output: seen.update(added=output))
    small.blocks[0].norm2.register_forward_hook(lambda module, inputs, output: seen.update(after=inputs[0]))
    with torch.no_grad():
        small(torch.randn(1, 3, 8, 8))
        attention = model.blocks[0].attn
        qkv = attention.qkv(model.blocks[0].norm1(seen["before"])).view(1, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        row = (qkv[0][:, :, :1] * attention.scale @ qkv[1].transpose(-2, -1)).softmax(-1).mean((1, 2))[0, 1:]
    x, order = (seen["before"] + seen["added"])[0, 1:], row.argsort(descending=True)
    fused = (row[order[4:], None] * x[order[4:]]).sum(0) / row[order[4:]].sum()
    expected = x.index_copy(0, order[4:5], fused[None])[order[:5].sort().values]
    torch.testing.assert_close(seen["after"][0, 1:], expected)


@pytest.mark.parametrize(("depth", "cuts"), [(12, [3, 6, 9]), (6, [1, 3, 4]), (24, [6, 12, 18])])
def test_three_stages_scale_with_the_depth(depth, cuts):
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=8, depth=depth, num_heads=2, num_classes=3)
    family = build("cascade").profile(ScheduleRequest(ucc_search.shape_of(model)))
    counts = [16.0, *family(0.3)]
    ratios = [b / a for a, b in itertools.pairwise(counts)]
    assert ratios == pytest.approx([0.7 if i in cuts else 1.0 for i in range(depth)])
    assert family(0.0) == [16.0] * depth
    assert family(1.0)[-1] == 1.0


def test_models_without_a_class_token_are_refused():
    site = Site(1, 12, 6, 0, False, 16, 2, 8, 8, 4, (3, 4))
    with pytest.raises(ucc_search.UserError, match="class token"):
        build("scorer").build(site)


def test_stages_outside_the_model_are_refused():
    with pytest.raises(ucc_search.UserError, match="from 0 to below 1"):
        build("cascade", stages=[0.5, 1.0])

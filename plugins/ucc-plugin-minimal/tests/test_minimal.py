"""The plugin loads by its public names alone and keeps what it says."""

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

import ucc_search
from ucc_search.interfaces import ComponentRef
from ucc_search.testing import assert_conforms

MODULE = Path(__file__).resolve().parent.parent / "ucc_plugin_minimal.py"


def test_it_keeps_the_contract_of_a_scorer():
    plugins = ucc_search.Plugins.load([str(MODULE)], entry_points=False, environment=False)
    assert_conforms(plugins.build("scorer", ComponentRef("l2_norm")))


def test_it_loads_is_costed_and_keeps_the_largest_tokens():
    plugins = ucc_search.Plugins.load([str(MODULE)], entry_points=False)
    parts = plugins.components(ComponentRef("l2_norm"), ComponentRef("drop"), ComponentRef("per_block"))
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    plan = ucc_search.CompressionPlan.identity(ucc_search.shape_of(model)).replace(tokens_out=[8, 8])
    seen = {}
    small = ucc_search.compress(model, plan, parts).eval()
    small.blocks[0].ls1.register_forward_hook(lambda module, inputs, output: seen.update(added=output))
    small.blocks[0].norm1.register_forward_hook(lambda module, inputs, output: seen.update(before=inputs[0]))
    small.blocks[0].norm2.register_forward_hook(lambda module, inputs, output: seen.update(after=inputs[0]))
    with torch.no_grad():
        assert small(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    norms = (seen["before"] + seen["added"])[:, 1:].norm(dim=-1)
    kept = seen["after"][:, 1:].norm(dim=-1)
    torch.testing.assert_close(kept.sort().values, norms.topk(8).values.sort().values)
    # Norms are not counted as MACs, here as everywhere.
    assert ucc_search.cost(plan, parts).scorer_macs == 0

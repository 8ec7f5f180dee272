"""ToMe merges what its formula says, and merging equal tokens under proportional attention loses nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import ucc_search
from ucc_search.interfaces import ComponentRef, ScheduleRequest, Site, TokenView

MODULE = Path(__file__).resolve().parent.parent / "ucc_plugin_tome.py"
PLUGINS = ucc_search.Plugins.load([str(MODULE)], entry_points=False, environment=False)


def model(**options):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=3, **options
    ).eval()


def parts(**params):
    return PLUGINS.components(ComponentRef("random"), ComponentRef("tome", params), ComponentRef("tome"))


def tokens(trend, strength, depth=12):
    shape = ucc_search.shape_of(
        VisionTransformer(img_size=32, patch_size=2, embed_dim=8, depth=depth, num_heads=2, num_classes=3)
    )
    cascade = PLUGINS.build("cascade", ComponentRef("tome", {"trend": trend}))
    return [shape.tokens, *cascade.profile(ScheduleRequest(shape))(strength)]


@pytest.mark.parametrize("feature", ["keys", "tokens"])
def test_one_round_is_the_papers_matching_written_out(feature):
    count, removed = 9, 3
    generator = torch.Generator().manual_seed(1)
    x, q, k, v = (torch.randn(1, *s, generator=generator) for s in [(10, 8), *[(2, 10, 4)] * 3])
    sizes = torch.rand(1, count, generator=generator) + 1
    view = TokenView(x, q, k, v, None, 0.5, 1, True, torch.arange(count)[None], sizes, (3, 3))
    found = PLUGINS.build("aggregator", ComponentRef("tome", {"feature": feature})).assign(
        view, None, count - removed
    )
    values = (k.mean(1) if feature == "keys" else x)[0, 1:]
    pairs = []
    for i in range(0, count, 2):
        cosine = {j: float(torch.cosine_similarity(values[i], values[j], dim=0)) for j in range(1, count, 2)}
        j = max(cosine, key=cosine.get)
        pairs.append((cosine[j], i, j))
    expected = {i: j for _, i, j in sorted(pairs, reverse=True)[:removed]}
    hosts = found.keep_BR[0][found.host_BP[0]].tolist()
    assert dict(zip(found.prune_BP[0].tolist(), hosts, strict=True)) == expected
    torch.testing.assert_close(found.weight_BP, sizes.gather(1, found.prune_BP))
    torch.testing.assert_close(found.self_BR, sizes.gather(1, found.keep_BR))


@pytest.mark.parametrize("proportional", [True, False])
def test_proportional_attention_makes_merging_of_equal_tokens_exact(proportional):
    dense = model(pos_embed="none")
    plan = ucc_search.CompressionPlan.identity(ucc_search.shape_of(dense)).replace(tokens_out=[8, 8, 8])
    columns = torch.randn(2, 3, 8, 2, 1, 2, generator=torch.Generator().manual_seed(2))
    images = columns.expand(2, 3, 8, 2, 2, 2).reshape(2, 3, 8, 8)  # patches 0 and 1 are equal, 2 and 3, ...
    small = ucc_search.compress(dense, plan, parts(proportional=proportional)).eval()
    with torch.no_grad():
        error = float((small(images) - dense(images)).abs().max())
    assert (error < 1e-5) == proportional


def test_r_is_constant_or_follows_the_trend():
    constant, falling, rising = (tokens(trend, 0.05) for trend in (0.0, -1.0, 1.0))
    r = 0.05 * 255
    for i in range(12):
        assert constant[i] - constant[i + 1] == pytest.approx(r)
        assert falling[i] - falling[i + 1] == pytest.approx(2 * r * (1 - i / 11))
        assert rising[i] - rising[i + 1] == pytest.approx(2 * r * i / 11)


@pytest.mark.parametrize("trend", [-1.0, -0.3, 0.0, 1.0])
def test_schedules_fall_with_depth_and_strength_to_one_token(trend):
    weaker = tokens(trend, 0.0)
    assert weaker == [256.0] * 13
    for strength in (0.01, 0.1, 0.5, 1.0):
        counts = tokens(trend, strength)
        assert all(a >= b >= 1 for a, b in itertools.pairwise(counts))
        assert all(a <= b for a, b in zip(counts, weaker, strict=True))
        weaker = counts
    assert weaker[-1] == 1


@pytest.mark.parametrize("feature", ["keys", "tokens"])
def test_its_cost_is_that_of_its_similarities(feature):
    site = Site(1, 12, 4, 1, True, 16, 2, 8, 8, 4, (3, 4))
    width = 8 if feature == "keys" else 16
    # Two rounds: 6 x 6 pairs, then 3 x 3 of the six that are left.
    assert PLUGINS.build("aggregator", ComponentRef("tome", {"feature": feature})).macs(site) == 45 * width


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [("aggregator", {"feature": "values"}, "keys or tokens"), ("cascade", {"trend": 2}, "-1 to 1")],
)
def test_what_it_cannot_do_is_refused(kind, params, message):
    with pytest.raises(ucc_search.UserError, match=message):
        PLUGINS.build(kind, ComponentRef("tome", params))

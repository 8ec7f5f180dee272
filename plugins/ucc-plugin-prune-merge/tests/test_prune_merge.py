"""TPS squeezes by its formula; the method after DiffRate drops, merges and keeps what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import ucc_search
from ucc_search.interfaces import ComponentRef, Site, TokenView

MODULE = Path(__file__).resolve().parent.parent / "ucc_plugin_prune_merge.py"
PLUGINS = ucc_search.Plugins.load([str(MODULE)], entry_points=False, environment=False)


def build(name, **params):
    return PLUGINS.build("aggregator", ComponentRef(name, params))


def example(count=10, keep=4):
    """A view with one prefix token, and scores that fall from the last token to the first."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 1 + count, 8, generator=generator)
    q = torch.randn(1, 2, 1 + count, 4, generator=generator)
    sizes = torch.rand(1, count, generator=generator) + 1
    view = TokenView(x, q, q, q, None, 0.5, 1, True, torch.arange(count)[None], sizes, (1, count))
    return view, torch.linspace(0.1, 1.0, count)[None], keep


def merged_tokens(view, found):
    """What the framework makes of an assignment, written out."""
    keep, prune, host, weight, own = (t[0] for t in found)
    total, value = own.clone(), own[:, None] * view.patches_BND[0, keep]
    for p, r, w in zip(prune.tolist(), host.tolist(), weight, strict=True):
        total[r] += w
        value[r] += w * view.patches_BND[0, p]
    return value / total[:, None]


def nearest(patches, token, kept):
    cosine = {r: float(torch.cosine_similarity(patches[token], patches[r], dim=0)) for r in kept}
    host = max(cosine, key=cosine.get)
    return host, cosine[host]


def test_tps_is_its_formula_written_out():
    view, scores, keep = example()
    patches = view.patches_BND[0]
    kept = list(range(6, 10))
    expected = []
    squeezed = {p: nearest(patches, p, kept) for p in range(6)}
    for r in kept:
        weights = {p: math.exp(c) for p, (host, c) in squeezed.items() if host == r}
        value = math.e * patches[r] + sum(w * patches[p] for p, w in weights.items())
        expected.append(value / (math.e + sum(weights.values())))
    found = build("tps").assign(view, scores, keep)
    assert found.keep_BR[0].tolist() == kept
    torch.testing.assert_close(merged_tokens(view, found), torch.stack(expected))


@pytest.mark.parametrize(("dropped", "merged"), [(0.0, [0, 1, 2, 3, 4, 5]), (0.5, [3, 4, 5]), (1.0, [])])
def test_diffrate_drops_the_least_important_and_merges_the_next(dropped, merged):
    view, scores, keep = example()
    patches, sizes = view.patches_BND[0], view.size_BN[0]
    kept = list(range(6, 10))
    expected = []
    for r in kept:
        joined = [r, *(p for p in merged if nearest(patches, p, kept)[0] == r)]
        expected.append(sum(sizes[i] * patches[i] for i in joined) / sum(sizes[i] for i in joined))
    aggregator = build("diffrate", dropped=dropped)
    found = aggregator.assign(view, scores, keep)
    torch.testing.assert_close(merged_tokens(view, found), torch.stack(expected))
    assert sorted(found.prune_BP[0].tolist()) == list(range(6))
    assert int((found.weight_BP > 0).sum()) == len(merged)
    assert aggregator.macs(Site(1, 10, 4, 1, True, 8, 2, 4, 4, 4, (1, 10))) == len(merged) * 4 * 8


@pytest.mark.parametrize("name", ["tps", "diffrate"])
def test_one_token_may_take_in_all_others(name):
    view, scores, _ = example()
    found = build(name).assign(view, scores, 1)
    assert found.keep_BR.tolist() == [[9]]
    assert merged_tokens(view, found).shape == (1, 8)


def test_a_share_outside_zero_to_one_is_refused():
    with pytest.raises(ucc_search.UserError, match=r"dropped is 1\.5, expected 0 to 1"):
        build("diffrate", dropped=1.5)

"""One block cut at a time: the plans are what they say, and the measurement is that of the search."""

from __future__ import annotations

import pytest
from shapes import deit_shape
from tiny import tiny_config

from ucc_search.errors import ConfigError
from ucc_search.plan import CompressionPlan
from ucc_search.plugins import Plugins
from ucc_search.sensitivity import probe_blocks, probe_json, single_cuts


def test_each_plan_differs_in_one_cut():
    base = CompressionPlan.identity(deit_shape("small")).replace(head_tokens_only=True)
    plans = {(kind, block): plan for kind, block, plan in single_cuts(base, 0.5)}
    assert set(plans) == {
        *(("tokens", b) for b in range(11)),
        *((half, b) for half in ("attention", "mlp") for b in range(12)),
    }
    for (kind, block), plan in plans.items():
        if kind == "tokens":
            assert plan.tokens == (196,) * block + (98,) * (12 - block)
        changed = [i for i, (a, b) in enumerate(zip(base.blocks, plan.blocks, strict=True)) if a != b]
        assert changed == (list(range(block, 12)) if kind == "tokens" else [block])
        assert plan.blocks[block].attention is (kind != "attention")
        assert plan.blocks[block].mlp is (kind != "mlp")


def test_probes_are_measured_as_the_search_measures(tmp_path, monkeypatch):
    monkeypatch.setenv("UCC_SEARCH_CACHE", str(tmp_path))
    config, plugins = tiny_config(), Plugins.load([], entry_points=False, environment=False)
    found = probe_blocks(config, plugins, keep=0.25)
    # Pooled by the class token: the last block's tokens are not read.
    assert [(p.kind, p.block) for p in found[:3]] == [("tokens", b) for b in range(3)]
    assert len(found) == 3 + 4 + 4
    assert {p.tokens for p in found[:3]} == {4}
    tokens = [p for p in found if p.kind == "tokens"]
    assert [p.saved for p in tokens] == sorted((p.saved for p in tokens), reverse=True), (
        "earlier cuts save more"
    )
    assert all(p.kl > 0 and 0 <= p.accuracy <= 1 for p in found)
    assert [p["price"] for p in probe_json(tokens)] == [p.kl / (100 * p.saved) for p in tokens]


@pytest.mark.parametrize("keep", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_share_is_a_share(keep):
    with pytest.raises(ConfigError, match="expected above 0 and below 1"):
        probe_blocks(tiny_config(), Plugins.load([], entry_points=False, environment=False), keep=keep)

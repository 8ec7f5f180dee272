"""The importance is the page rank of the attention graph; dropping follows similarity, then importance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ucc_search
from ucc_search.interfaces import ComponentRef, Site, TokenView

MODULE = Path(__file__).resolve().parent.parent / "ucc_plugin_zero_tprune.py"
PLUGINS = ucc_search.Plugins.load([str(MODULE)], entry_points=False, environment=False)


def build(kind, **params):
    return PLUGINS.build(kind, ComponentRef("zero_tprune", params))


def view(count=9, prefix=1, heads=1, sharpness=1.0):
    generator = torch.Generator().manual_seed(5)
    total = prefix + count
    x, q, k = (torch.randn(2, *s, generator=generator) for s in [(total, 8), *[(heads, total, 4)] * 2])
    attn = (sharpness * q @ k.transpose(-2, -1)).softmax(dim=-1)
    position, size = torch.arange(count).expand(2, count), torch.ones(2, count)
    return TokenView(x, q, k, k, attn, 1.0, prefix, True, position, size, (1, count))


def test_iterated_long_enough_it_is_the_stationary_distribution():
    seen = view()
    values, vectors = torch.linalg.eig(seen.attn_BHTT[0, 0].double().T)
    stationary = vectors[:, values.real.argmax()].real
    scores = build("scorer", iterations=100).score(seen)
    torch.testing.assert_close(
        scores[0].double(), (10 * stationary / stationary.sum())[1:], atol=1e-4, rtol=0
    )


def test_one_iteration_is_the_mean_attention_received():
    seen = view()
    received = seen.attn_BHTT[:, 0].sum(dim=1)[:, 1:]
    torch.testing.assert_close(build("scorer", iterations=1).score(seen), received)


def test_flat_heads_are_left_out_and_the_others_join_by_root_mean_square():
    seen = view(heads=3, sharpness=torch.tensor([2.0, 0.0, 1.0]).view(3, 1, 1))
    scores = build("scorer", iterations=1).score(seen)
    received = seen.attn_BHTT.sum(dim=2)[..., 1:]  # the second head looks everywhere alike
    expected = ((received[:, 0] ** 2 + received[:, 2] ** 2) / 2).sqrt()
    torch.testing.assert_close(scores, expected)
    everything_flat = build("scorer", iterations=1, min_variance=1e6).score(seen)
    torch.testing.assert_close(everything_flat, (received**2).mean(dim=1).sqrt())


@pytest.mark.parametrize(("similar", "keep"), [(0.0, 4), (0.5, 5), (0.5, 1), (1.0, 5), (1.0, 3)])
def test_the_most_similar_go_first_then_the_least_important(similar, keep):
    seen = view()
    count = 9
    scores = torch.rand(2, count, generator=torch.Generator().manual_seed(6))
    found = build("aggregator", similar=similar).assign(seen, scores, keep)
    for image in range(2):
        keys = seen.k_BHTK[image, :, 1:].mean(dim=0)
        order = sorted(range(count), key=lambda i: -float(scores[image, i]))
        closeness = {
            guest: max(float(torch.cosine_similarity(keys[guest], keys[o], dim=0)) for o in order[::2])
            for guest in order[1::2]
        }
        alike = min(int(similar * (count - keep) + 0.5), count // 2)
        gone = sorted(closeness, key=closeness.get, reverse=True)[:alike]
        left = [i for i in order if i not in gone]
        assert found.keep_BR[image].tolist() == sorted(left[:keep])
        assert sorted([*found.keep_BR[image].tolist(), *found.prune_BP[image].tolist()]) == list(range(count))


def test_costs_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    seen = view(heads=2)
    scorer, aggregator = build("scorer", iterations=3), build("aggregator")
    site = Site(1, 9, 4, 1, True, 8, 2, 4, 4, 4, (1, 9))
    with FlopCounterMode(display=False) as counter:
        aggregator.assign(seen, scorer.score(seen), 4)
    images = 2
    assert counter.get_total_flops() == 2 * images * (scorer.macs(site) + aggregator.macs(site))


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("scorer", {"iterations": 0}, "expected 1 or more"),
        ("scorer", {"min_variance": 2, "max_variance": 1}, "min < max"),
        ("aggregator", {"similar": -0.1}, "expected 0 to 1"),
    ],
)
def test_what_it_cannot_do_is_refused(kind, params, message):
    with pytest.raises(ucc_search.UserError, match=message):
        build(kind, **params)

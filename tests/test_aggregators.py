from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from views import DIM, QK_DIM, check_assignment, site, token_view

from ucc_search.builtin.aggregators import Bipartite, Drop, Fuse, Host, rounds
from ucc_search.compression.tokens import initial_state, reduce_tokens
from ucc_search.interfaces import Aggregator, Assignment

AGGREGATORS: list[Aggregator] = [Drop(), Host(), Host(weighting="similarity"), Fuse(), Bipartite()]


def patches(count: int = 12) -> torch.Tensor:
    return torch.randn(3, count, DIM, generator=torch.Generator().manual_seed(2))


def scores(count: int = 12) -> torch.Tensor:
    return torch.rand(3, count, generator=torch.Generator().manual_seed(3))


def shares(found: Assignment) -> torch.Tensor:
    """What every token, kept first, contributes to its host."""
    keep_BR, _, host_BP, weight_BP, self_BR = found
    assert host_BP is not None
    total_BR = self_BR.scatter_add(1, host_BP, weight_BP)
    hosts = torch.cat([torch.arange(keep_BR.shape[1]).expand_as(keep_BR), host_BP], dim=1)
    return torch.cat([self_BR, weight_BP], dim=1) / total_BR.gather(1, hosts)


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(("count", "keep"), [(12, 6), (12, 11), (13, 7), (12, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_assignments_are_whole(aggregator, count, keep, prefix):
    view = token_view(patches(count), prefix=prefix)
    found = aggregator.assign(view, scores(count), keep)
    if isinstance(aggregator, Bipartite):
        keep = rounds(count, keep)[1]
    check_assignment(found, tokens=count, keep=keep)
    if found.host_BP is not None:
        sums_BR = torch.zeros(3, keep).scatter_add(
            1, torch.cat([torch.arange(keep).expand(3, keep), found.host_BP], dim=1), shares(found)
        )
        torch.testing.assert_close(sums_BR, torch.ones(3, keep))


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=lambda a: type(a).__name__)
def test_equal_tokens_and_scores_are_no_trouble(aggregator):
    for values in (torch.zeros(3, 8, DIM), torch.ones(3, 8, DIM)):
        found = aggregator.assign(token_view(values), torch.zeros(3, 8), 4)
        check_assignment(found, tokens=8, keep=4)
        assert all(bool(torch.isfinite(t).all()) for t in found if t is not None)


def test_the_highest_scores_stay():
    scores_BN = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    view = token_view(patches(4)[:1])
    for aggregator in (Drop(), Host(), Fuse()):
        assert aggregator.assign(view, scores_BN, 2).keep_BR.tolist() == [[1, 3]]


def test_host_is_the_formula_written_out():
    tokens, scores_BN = patches(), scores()
    found = Host().assign(token_view(tokens), scores_BN, 5)
    for b in range(3):
        kept = found.keep_BR[b]
        for p, index in enumerate(found.prune_BP[b].tolist()):
            cosines = torch.cosine_similarity(tokens[b, index][None], tokens[b, kept], dim=1)
            host = int(cosines.argmax())
            omega = min(1.0, float(scores_BN[b, index] / scores_BN[b, kept[host]]))
            assert int(found.host_BP[b, p]) == host
            assert float(found.weight_BP[b, p]) == pytest.approx(omega * math.exp(cosines[host]), rel=1e-5)
    assert bool((found.self_BR == math.e).all())


def test_similarity_weighting_ignores_scores_once_chosen():
    view = token_view(patches())
    first = Host(weighting="similarity").assign(view, scores(), 5)
    second = Host(weighting="similarity").assign(view, scores() ** 3, 5)
    torch.testing.assert_close(first.weight_BP, second.weight_BP)
    with_scores = Host().assign(view, scores(), 5)
    assert bool((with_scores.weight_BP <= first.weight_BP).all())


def test_host_passes_gradients_to_tokens_not_to_scores():
    tokens, scores_BN = patches().requires_grad_(), scores().requires_grad_()
    Host().assign(token_view(tokens), scores_BN, 5).weight_BP.sum().backward()
    assert scores_BN.grad is None
    assert float(tokens.grad.abs().sum()) > 0


def test_negative_scores_still_make_an_average():
    # A plugin's scorer may be any finite number.
    for aggregator in (Host(), Fuse()):
        check_assignment(aggregator.assign(token_view(patches()), scores() - 2, 5), tokens=12, keep=5)


def test_fuse_leaves_all_but_the_lowest_kept_token_alone():
    scores_BN = torch.tensor([[0.1, 0.9, 0.2, 0.7, 0.4]])
    found = Fuse().assign(token_view(patches(5)[:1]), scores_BN, 3)
    assert found.keep_BR.tolist() == [[1, 3, 4]]
    assert found.host_BP.tolist() == [[2, 2]]
    torch.testing.assert_close(found.weight_BP, torch.tensor([[0.1, 0.2]]))
    torch.testing.assert_close(found.self_BR[:, 2], torch.tensor([0.4]))


def test_bipartite_merges_the_most_alike():
    view = token_view(patches(6)[:1])
    keys = torch.eye(6)[None, None].repeat(1, 2, 1, 1)
    keys[:, :, 4] = keys[:, :, 1]  # tokens 4 and 1 have one key, all others differ
    view = view._replace(k_BHTK=torch.cat([torch.ones(1, 2, 1, 6), keys], dim=2))
    view = view._replace(size_BN=torch.tensor([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0]]))
    found = Bipartite().assign(view, None, 5)
    assert found.prune_BP.tolist() == [[4]]
    assert found.keep_BR.tolist() == [[0, 1, 2, 3, 5]]
    assert found.host_BP.tolist() == [[1]]
    assert found.weight_BP.tolist() == [[3.0]]
    assert found.self_BR.tolist() == [[1.0, 2.0, 1.0, 1.0, 1.0]]


def test_bipartite_hosts_are_the_best_partners():
    view = token_view(patches(13))
    key_BNK = torch.nn.functional.normalize(view.k_BHTK[:, :, 1:].mean(dim=1), dim=-1)
    found = Bipartite().assign(view, None, 8)
    for b in range(3):
        for p, index in enumerate(found.prune_BP[b].tolist()):
            best = 1 + 2 * int((key_BNK[b, 1::2] @ key_BNK[b, index]).argmax())
            assert index % 2 == 0
            assert int(found.keep_BR[b, found.host_BP[b, p]]) == best


def test_rounds_halve_at_most():
    assert rounds(196, 150) == [196, 150]
    assert rounds(196, 40) == [196, 98, 49, 40]
    assert rounds(3, 1) == [3, 2, 1]
    assert rounds(5, 5) == [5]


def test_costs_are_what_torch_counts():
    view = token_view(patches()[:1])
    for aggregator, keep in ((Drop(), 5), (Host(), 5), (Fuse(), 5), (Bipartite(), 7)):
        with FlopCounterMode(display=False) as counter:
            aggregator.assign(view, scores()[:1], keep)
        assert counter.get_total_flops() == 2 * aggregator.macs(site(12, keep)), type(aggregator).__name__
    assert Host().macs(site(12, 5)) == 7 * 5 * DIM
    assert Bipartite().macs(site(13, 3)) == (7 * 6 + 4 * 3 + 2 * 2) * QK_DIM


@pytest.mark.parametrize("aggregator", [Drop(), Host(), Fuse(), Bipartite()])
def test_aggregators_export_with_a_batch_of_any_size(aggregator):
    class Model(nn.Module):
        def forward(self, x_BTD, k, size, scores_BN):
            found = aggregator.assign(
                token_view(patches())._replace(x_BTD=x_BTD, k_BHTK=k, size_BN=size), scores_BN, 7
            )
            return [t for t in found if t is not None]

    view = token_view(patches())
    inputs = (view.x_BTD, view.k_BHTK, view.size_BN, scores())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), inputs, dynamic_shapes=[{0: batch}] * 4)
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


def test_a_token_of_weight_zero_leaves_no_trace_in_its_host():
    x_BND = patches(4)
    one = torch.ones(3, 1, dtype=torch.int64)
    found = Assignment(
        torch.cat([0 * one, one], 1),
        torch.cat([2 * one, 3 * one], 1),
        torch.cat([0 * one, one], 1),
        torch.tensor([[0.0, 1.0]]).expand(3, 2),
        torch.ones(3, 2),
    )
    x_BRD, state = reduce_tokens(
        x_BND, initial_state(x_BND, owners=False, trace=False), found, absorb_scores=True
    )
    torch.testing.assert_close(x_BRD, torch.stack([x_BND[:, 0], (x_BND[:, 1] + x_BND[:, 3]) / 2], dim=1))
    torch.testing.assert_close(state.size_BN, torch.tensor([[1.0, 2.0]]).expand(3, 2))


def test_bad_weighting_is_named():
    with pytest.raises(ValueError, match="score or similarity"):
        Host(weighting="mean")

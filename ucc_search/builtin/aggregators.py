"""Aggregators: which tokens stay, and what becomes of the others.

Importing this module imports no torch. Shape suffixes are those of `ucc_search.interfaces`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from ucc_search.interfaces import Aggregator, Assignment, Site, TokenView

if TYPE_CHECKING:
    from torch import Tensor


class Drop(Aggregator):
    """Keep the tokens with the highest scores and forget the others."""

    merges: ClassVar[bool] = False

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        assert scores_BN is not None
        return Assignment(*split_by_score(scores_BN, keep))


class Host(Aggregator):
    """UCC's aggregation: every pruned token flows into the kept token most similar to it, its host.

    x_r <- (e x_r + sum_p w_p e^{c_pr} x_p) / (e + sum_p w_p e^{c_pr}), over the pruned p whose host
    is r; c is the cosine of the tokens, e the weight of the host's similarity to itself.

    Args:
        weighting: `score` sets w_p = S_p / S_r (at most 1, "according to their weights");
            `similarity` sets w_p = 1, which is TPS.

    Reference: reconstructed for UCC from TPS (CVPR 2023), squeezing by similarity.
    """

    def __init__(self, weighting: str = "score") -> None:
        if weighting not in ("score", "similarity"):
            raise ValueError(f"weighting is {weighting!r}, expected score or similarity")
        self.weighting = weighting

    def macs(self, site: Site) -> int:
        return (site.tokens_in - site.tokens_out) * site.tokens_out * site.dim

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        assert scores_BN is not None
        keep_BR, prune_BP = split_by_score(scores_BN, keep)
        unit_BND = _unit(view.patches_BND)
        kept_BRD, pruned_BPD = _rows(unit_BND, keep_BR), _rows(unit_BND, prune_BP)
        cosine_BP, host_BP = (pruned_BPD @ kept_BRD.transpose(1, 2)).max(dim=-1)
        weight_BP = cosine_BP.exp()
        if self.weighting == "score":
            host_score_BP = scores_BN.gather(1, keep_BR).gather(1, host_BP)
            share_BP = scores_BN.gather(1, prune_BP) / host_score_BP.clamp_min(1e-12)
            weight_BP = weight_BP * share_BP.clamp(0.0, 1.0).to(weight_BP.dtype)
        self_BR = weight_BP.new_full(keep_BR.shape, math.e)
        return Assignment(keep_BR, prune_BP, host_BP, weight_BP, self_BR)


class Fuse(Aggregator):
    """EViT's fused token: one token carries all the pruned ones, weighted by their scores.

    Of the `keep` tokens, keep - 1 stay as they are; the last takes in everything pruned, so that
    the count is the plan's.

    Reference: Liang et al. 2022, EViT, arXiv:2202.07800, section 3.2 (inattentive token fusion).
    """

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        assert scores_BN is not None
        keep_BR, prune_BP = split_by_score(scores_BN, keep)
        positive_BN = scores_BN.clamp_min(1e-6)
        lowest_B1 = positive_BN.gather(1, keep_BR).argmin(dim=1, keepdim=True)
        host_BP = lowest_B1.expand_as(prune_BP)
        return Assignment(
            keep_BR, prune_BP, host_BP, positive_BN.gather(1, prune_BP), positive_BN.gather(1, keep_BR)
        )


class Bipartite(Aggregator):
    """Merge the most similar pairs between every second token and the others; needs no scores.

    Tokens alternate between two sets; each token of the first finds the most similar key (cosine,
    mean over heads) in the second, and the tokens with the most similar partners are merged into
    them, averaged by size. One round removes at most half; deeper cuts take several rounds.

    Reference: Bolya et al. 2023, Token Merging, ICLR, sections 3.1 and 3.2; written from the paper.
    """

    needs_scores: ClassVar[bool] = False
    proportional_attention: ClassVar[bool] = True

    def macs(self, site: Site) -> int:
        count, total = site.tokens_in, 0
        while count > site.tokens_out:
            total += ((count + 1) // 2) * (count // 2) * site.qk_dim
            count = after_round(count, site.tokens_out)
        return total

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        import torch

        keys_BNK = view.k_BHTK.mean(dim=1)[:, view.prefix :]
        count = keys_BNK.shape[1]
        removed = count - after_round(count, keep)
        unit_BNK = _unit(keys_BNK)
        # The larger set comes second to none: with an odd count the first set has one token more.
        first_BA, second_BC = unit_BNK[:, ::2], unit_BNK[:, 1::2]
        best_BA, partner_BA = (first_BA @ second_BC.transpose(1, 2)).max(dim=-1)
        order_BA = best_BA.argsort(dim=1, descending=True)
        merged_BP, stay = order_BA[:, :removed], order_BA[:, removed:]
        partner_BP = partner_BA.gather(1, merged_BP)
        second = torch.arange(1, count, 2, device=keys_BNK.device).expand(keys_BNK.shape[0], -1)
        keep_BR = torch.cat([2 * stay, second], dim=1).sort(dim=1).values
        # Where in the sorted kept tokens does token 2 * partner + 1 stand?
        host_BP = torch.searchsorted(keep_BR.contiguous(), (2 * partner_BP + 1).contiguous())
        prune_BP = 2 * merged_BP
        sizes = view.size_BN
        return Assignment(keep_BR, prune_BP, host_BP, sizes.gather(1, prune_BP), sizes.gather(1, keep_BR))


def after_round(count: int, keep: int) -> int:
    """Tokens left after one round of bipartite merging from `count` towards `keep`."""
    return max(keep, count - count // 2)


def split_by_score(scores_BN: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(keep_BR, prune_BP): the highest scores, each part in ascending order of position."""
    order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
    keep_BR, prune_BP = order_BN[:, :keep], order_BN[:, keep:]
    return keep_BR.sort(dim=1).values, prune_BP.sort(dim=1).values


def _unit(values_BND: Tensor) -> Tensor:
    return values_BND / values_BND.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def _rows(values_BND: Tensor, index_BR: Tensor) -> Tensor:
    return values_BND.gather(1, index_BR[..., None].expand(-1, -1, values_BND.shape[-1]))

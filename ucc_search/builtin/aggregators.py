"""Aggregators: which tokens stay, and what becomes of the others.

torch is imported only inside the one method that needs it: listing plugins and costing plans import
this file, and must start without it. Shape suffixes are those of `ucc_search.interfaces`. Every
assignment lists kept and pruned tokens in ascending order; ties go to the earlier token.
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
        """The `keep` highest scores; no hosts."""
        assert scores_BN is not None
        return Assignment(*split_by_score(scores_BN, keep))


class Host(Aggregator):
    """UCC's aggregation: every pruned token flows into the kept token most similar to it, its host.

    x_r <- (e x_r + sum_p w_p e^{c_pr} x_p) / (e + sum_p w_p e^{c_pr}), over the pruned p whose host
    is r; c_pr is the cosine of the tokens, e = e^1 the weight of the host's similarity to itself.
    Prefix tokens cannot be hosts. Gradients flow through the tokens and their similarity, not
    through the scores.

    Args:
        weighting: `score` sets w_p = S_p / S_r, from 0 to 1 ("according to their weights");
            `similarity` sets w_p = 1, which is TPS.

    Reference: reconstructed for UCC (Neurocomputing 2024) from the squeezing step of TPS (Wei et al.
    2023, CVPR); w_p is our reading of UCC's abstract.
    """

    def __init__(self, weighting: str = "score") -> None:
        if weighting not in ("score", "similarity"):
            raise ValueError(f"weighting is {weighting!r}, expected score or similarity")
        self.weighting = weighting

    def macs(self, site: Site) -> int:
        """The cosine of every pruned token to every kept one."""
        return (site.tokens_in - site.tokens_out) * site.tokens_out * site.dim

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        """The `keep` highest scores, and hosts for all others."""
        from ucc_search.batches import gather_rows

        assert scores_BN is not None
        keep_BR, prune_BP = split_by_score(scores_BN, keep)
        kept_BRD, pruned_BPD = (gather_rows(view.x_BTD, i, view.prefix) for i in (keep_BR, prune_BP))
        norm_BR, norm_BP = (x.norm(dim=-1).clamp_min(1e-6) for x in (kept_BRD, pruned_BPD))
        # The norms divide the few products, not the many tokens; a token's own norm does not move its maximum.
        product_BPR = pruned_BPD @ kept_BRD.transpose(1, 2) / norm_BR[:, None]
        highest_BP, host_BP = product_BPR.max(dim=-1)
        weight_BP = (highest_BP / norm_BP).exp()
        if self.weighting == "score":
            score_BN = scores_BN.detach()
            host_score_BP = score_BN.gather(1, keep_BR).gather(1, host_BP)
            share_BP = score_BN.gather(1, prune_BP) / host_score_BP.clamp_min(1e-12)
            weight_BP = weight_BP * share_BP.clamp(0.0, 1.0).to(weight_BP.dtype)
        self_BR = weight_BP.new_full(keep_BR.shape, math.e)
        return Assignment(keep_BR, prune_BP, host_BP, weight_BP, self_BR)


class Fuse(Aggregator):
    """EViT's fused token: one token carries all the pruned ones, weighted by their scores.

    Of the `keep` tokens, keep - 1 stay as they are; the lowest-scoring one takes in everything
    pruned and stands in its own place, so that the count is the plan's. EViT adds the weighted
    tokens up; here their weights are normalised to sum to 1, which keeps the fused token at the
    scale of the others.

    Reference: Liang et al. 2022, EViT, arXiv:2202.07800, section 3.2 (inattentive token fusion).
    """

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        """The `keep` highest scores, the lowest of them host of all others."""
        assert scores_BN is not None
        keep_BR, prune_BP = split_by_score(scores_BN, keep)
        lowest_B1 = scores_BN.gather(1, keep_BR).argmin(dim=1, keepdim=True)
        positive_BN = scores_BN.clamp_min(1e-6)  # all weights zero would have no average
        return Assignment(
            keep_BR,
            prune_BP,
            lowest_B1.expand_as(prune_BP),
            positive_BN.gather(1, prune_BP),
            positive_BN.gather(1, keep_BR),
        )


class Bipartite(Aggregator):
    """Merge the most similar pairs between every second token and the others; needs no scores.

    Tokens alternate between two sets; each token of the first finds the most similar key (cosine,
    mean over heads) in the second, and the tokens with the most similar partners are merged into
    them, averaged by the number of patches they stand for. One round removes at most half of the
    tokens; the framework asks again for a deeper cut, with the keys of the tokens that are left.

    Reference: Bolya et al. 2023, Token Merging, ICLR, sections 3.1 and 3.2; written from the paper.
    """

    needs_scores: ClassVar[bool] = False
    proportional_attention: ClassVar[bool] = True

    def macs(self, site: Site) -> int:
        """The similarities of every round."""
        counts = rounds(site.tokens_in, site.tokens_out)[:-1]
        return sum((count - count // 2) * (count // 2) * site.qk_dim for count in counts)

    def assign(self, view: TokenView, scores_BN: Tensor | None, keep: int) -> Assignment:
        """One round: `keep` tokens stay, or half if that is more."""
        import torch

        key_BNK = _unit(view.k_BHTK[:, :, view.prefix :].mean(dim=1))
        count = key_BNK.shape[1]
        removed = count - after_round(count, keep)
        similar_BAC = key_BNK[:, ::2] @ key_BNK[:, 1::2].transpose(1, 2)
        best_BA, partner_BA = similar_BAC.max(dim=-1)
        order_BA = best_BA.argsort(dim=1, descending=True, stable=True)
        merged_BP, stay_BA = order_BA[:, :removed].sort(dim=1).values, order_BA[:, removed:]
        partner_BP = partner_BA.gather(1, merged_BP)
        second_BC = torch.arange(1, count, 2, device=key_BNK.device).expand(key_BNK.shape[0], -1)
        keep_BR = torch.cat([2 * stay_BA, second_BC], dim=1).sort(dim=1).values
        # Kept before token 2c + 1 are c tokens of the second set, and those of the first up to c.
        # (Counted by comparison: exporters know no searchsorted.)
        host_BP = partner_BP + (stay_BA[:, None, :] <= partner_BP[:, :, None]).sum(dim=-1)
        prune_BP = 2 * merged_BP
        sizes_BN = view.size_BN
        return Assignment(
            keep_BR, prune_BP, host_BP, sizes_BN.gather(1, prune_BP), sizes_BN.gather(1, keep_BR)
        )


def after_round(count: int, keep: int) -> int:
    """Tokens left after one round of bipartite merging from `count` towards `keep`."""
    return max(keep, count - count // 2)


def rounds(count: int, keep: int) -> list[int]:
    """Token counts before, between and after the rounds of bipartite merging that lead to `keep`."""
    counts = [count]
    while counts[-1] > keep:
        counts.append(after_round(counts[-1], keep))
    return counts


def split_by_score(scores_BN: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(keep_BR, prune_BP): the `keep` highest scores and the others, each in ascending order."""
    # Only where scores tie does the order of all matter: the highest are found without it.
    lowest_B1 = scores_BN.topk(keep, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    higher_BN, level_BN = scores_BN > lowest_B1, scores_BN == lowest_B1
    room_B1 = keep - higher_BN.sum(dim=1, keepdim=True)
    kept_BN = higher_BN | (level_BN & (level_BN.cumsum(dim=1) <= room_B1))
    both_BN = kept_BN.byte().argsort(dim=1, descending=True, stable=True)
    return both_BN[:, :keep], both_BN[:, keep:]


def _unit(values_BND: Tensor) -> Tensor:
    unit_BND: Tensor = values_BND / values_BND.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return unit_BND

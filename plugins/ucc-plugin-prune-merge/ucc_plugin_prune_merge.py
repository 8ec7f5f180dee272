"""Pruning and merging together: TPS, and a method after DiffRate.

References: Wei et al. 2023, Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision
Transformers, CVPR, arXiv:2304.10716. Chen et al. 2023, DiffRate: Differentiable Compression Rate for Efficient
Vision Transformers, ICCV, arXiv:2305.17997.
"""

from __future__ import annotations

import math
from typing import ClassVar

from ucc_search import Aggregator, hookimpl
from ucc_search.interfaces import Assignment


class TPS(Aggregator):
    """Every pruned token is squeezed into the kept token most similar to it, its host.

    x_r <- (e x_r + sum_p e^c_pr x_p) / (e + sum_p e^c_pr) over the pruned p whose host is r; c_pr is the cosine
    of the tokens, and e the weight of the host's similarity to itself (section 3.2).
    """

    absorb_scores = False

    def macs(self, site):
        """The cosine of every pruned token to every kept one."""
        return (site.tokens_in - site.tokens_out) * site.tokens_out * site.dim

    def assign(self, view, scores_BN, keep):
        order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
        keep_BR, prune_BP = order_BN[:, :keep].sort(dim=1).values, order_BN[:, keep:].sort(dim=1).values
        cosine_BP, host_BP = hosts(view.patches_BND, keep_BR, prune_BP)
        weight_BP = cosine_BP.exp()
        return Assignment(keep_BR, prune_BP, host_BP, weight_BP, weight_BP.new_full(keep_BR.shape, math.e))


class DiffRate(Aggregator):
    """The least important tokens are dropped, the next ones merged into the kept token most similar to them.

    A merged token is averaged with its host by the number of patches both stand for.

    Args:
        dropped: share of the tokens that leave which are dropped, from 0 (all are merged) to 1 (all dropped).
            DiffRate learns it per block by gradient descent; here one share is searched.
    """

    ranges: ClassVar = {"dropped": {"low": 0.0, "high": 1.0}}
    absorb_scores = False
    proportional_attention = True

    def __init__(self, dropped=0.5):
        if not 0.0 <= dropped <= 1.0:
            raise ValueError(f"dropped is {dropped}, expected 0 to 1")
        self.dropped = dropped

    def merged(self, count, keep):
        """How many of the tokens that leave are merged."""
        return count - keep - math.floor(self.dropped * (count - keep) + 0.5)

    def macs(self, site):
        """The cosine of every merged token to every kept one."""
        return self.merged(site.tokens_in, site.tokens_out) * site.tokens_out * site.dim

    def assign(self, view, scores_BN, keep):
        import torch

        order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
        end = keep + self.merged(order_BN.shape[1], keep)
        keep_BR = order_BN[:, :keep].sort(dim=1).values
        merge_BM, drop_BX = order_BN[:, keep:end], order_BN[:, end:]
        _, host_BM = hosts(view.patches_BND, keep_BR, merge_BM)
        sizes_BN = view.size_BN
        return Assignment(
            keep_BR,
            order_BN[:, keep:],
            torch.cat([host_BM, torch.zeros_like(drop_BX)], dim=1),
            torch.cat([sizes_BN.gather(1, merge_BM), sizes_BN.new_zeros(drop_BX.shape)], dim=1),  # 0: dropped
            sizes_BN.gather(1, keep_BR),
        )


def hosts(patches_BND, keep_BR, gone_BP):
    """(cosine_BP, host_BP): the kept token most similar to each one that goes, as an index into R."""
    unit_BND = patches_BND / patches_BND.norm(dim=-1, keepdim=True).clamp_min(1e-6)

    def rows(index):
        return unit_BND.gather(1, index[..., None].expand(-1, -1, unit_BND.shape[-1]))

    return (rows(gone_BP) @ rows(keep_BR).transpose(1, 2)).max(dim=-1)


@hookimpl
def ucc_aggregators():
    return {"tps": TPS, "diffrate": DiffRate}

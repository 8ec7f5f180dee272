"""After Zero-TPrune: importance by page rank on the attention graph, then similarity; nothing is trained for it.

Reference: Wang, Dedhia and Jha 2024, Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention
Graph in Pre-Trained Transformers, CVPR, arXiv:2305.17328.
"""

from __future__ import annotations

import math
from typing import ClassVar

from ucc_search import Aggregator, Scorer, hookimpl
from ucc_search.interfaces import Assignment


class PageRank(Scorer):
    """Weighted page rank: a token is important if important tokens attend to it (section 3.2).

    In every head s <- s A, from the uniform distribution, with the block's attention A as the weights of the
    graph. Heads join by the root of the mean square, which keeps what matters in one head alone; heads whose
    variance of T s (T tokens, mean 1) lies outside the bounds are left out, unless that were all of them.

    The whole attention map is needed, so attention in these blocks is not fused.

    Args:
        iterations: rounds of page rank; 1 or more. The paper takes up to 50 in shallow blocks and 1 in deep ones.
        min_variance: heads below are flat, and say nothing.
        max_variance: heads above look at single tokens; null for no upper bound.
    """

    needs_attention = True
    ranges: ClassVar = {"iterations": {"low": 1, "high": 30, "step": 1}}

    def __init__(self, iterations=5, min_variance=0.01, max_variance=None):
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}, expected 1 or more")
        if not 0.0 <= min_variance < (math.inf if max_variance is None else max_variance):
            raise ValueError(f"variances are {min_variance} to {max_variance}, expected 0 <= min < max")
        self.iterations, self.low, self.high = iterations, min_variance, max_variance

    def macs(self, site):
        """One product of a row with the attention map, per head and iteration."""
        return self.iterations * site.heads * (site.tokens_in + site.prefix_tokens) ** 2

    def score(self, view):
        attn_BHTT = view.attn_BHTT.detach().float()
        tokens = attn_BHTT.shape[-1]
        rank_BH1T = attn_BHTT.new_ones(*attn_BHTT.shape[:2], 1, tokens)  # mean 1
        for _ in range(self.iterations):
            rank_BH1T = rank_BH1T @ attn_BHTT
        rank_BHT = rank_BH1T.squeeze(2)
        heads_BH1 = self._heads(rank_BHT.var(dim=-1, correction=0, keepdim=True)).to(rank_BHT.dtype)
        square_BT = (heads_BH1 * rank_BHT**2).sum(dim=1) / heads_BH1.sum(dim=1)
        return square_BT.sqrt()[:, view.prefix :]

    def _heads(self, variance_BH1):
        inside_BH1 = variance_BH1 >= self.low
        if self.high is not None:
            inside_BH1 = inside_BH1 & (variance_BH1 <= self.high)
        return inside_BH1 | ~inside_BH1.any(dim=1, keepdim=True)


class SimilarThenUnimportant(Aggregator):
    """First the tokens that an important one stands for are dropped, then the least important ones.

    Ordered by importance, every second token looks for its most similar key (cosine, mean over heads) among the
    tokens between; those with the closest match go (sections 3.3 and 3.4).

    Args:
        similar: share of the dropped tokens that go by similarity; at most half of all tokens do.
    """

    merges = False
    ranges: ClassVar = {"similar": {"low": 0.0, "high": 1.0}}

    def __init__(self, similar=0.3):
        if not 0.0 <= similar <= 1.0:
            raise ValueError(f"similar is {similar}, expected 0 to 1")
        self.similar = similar

    def by_similarity(self, count, keep):
        """How many tokens go by similarity."""
        return min(math.floor(self.similar * (count - keep) + 0.5), count // 2)

    def macs(self, site):
        """The similarities between both halves."""
        count = site.tokens_in
        if not self.by_similarity(count, site.tokens_out):
            return 0
        return (count // 2) * (count - count // 2) * site.qk_dim

    def assign(self, view, scores_BN, keep):
        order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
        count = order_BN.shape[1]
        alike = self.by_similarity(count, keep)
        if alike:
            guests_BA, others_BC = order_BN[:, 1::2], order_BN[:, ::2]
            closest_BA = (self._keys(view, guests_BA) @ self._keys(view, others_BC).transpose(1, 2)).amax(
                dim=-1
            )
            by_closeness_BA = closest_BA.argsort(dim=1, descending=True, stable=True)
            going_BX = guests_BA.gather(1, by_closeness_BA[:, :alike])
            rank_BN = order_BN.argsort(dim=1, stable=True)  # 0: the most important
            order_BN = rank_BN.scatter(1, going_BX, count).argsort(dim=1, stable=True)
        return Assignment(order_BN[:, :keep].sort(dim=1).values, order_BN[:, keep:].sort(dim=1).values)

    def _keys(self, view, index_BA):
        key_BNK = view.k_BHTK[:, :, view.prefix :].mean(dim=1)
        unit_BNK = key_BNK / key_BNK.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        return unit_BNK.gather(1, index_BA[..., None].expand(-1, -1, unit_BNK.shape[-1]))


@hookimpl
def ucc_scorers():
    return {"zero_tprune": PageRank}


@hookimpl
def ucc_aggregators():
    return {"zero_tprune": SimilarThenUnimportant}

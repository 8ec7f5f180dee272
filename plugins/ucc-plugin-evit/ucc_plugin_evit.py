"""EViT: keep the tokens the class token attends to, fuse the others into one, at three stages.

Reference: Liang et al. 2022, Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations, ICLR, arXiv:2202.07800.
"""

from __future__ import annotations

from ucc_search import Aggregator, Cascade, Scorer, UserError, hookimpl
from ucc_search.interfaces import Assignment

STAGES = (3 / 12, 6 / 12, 9 / 12)
"""Depths at which tokens leave: the 4th, 7th and 10th of twelve blocks."""


class Attentiveness(Scorer):
    """The class token's attention to each token, averaged over heads (section 3.2).

    Its row alone is formed a second time, so the block's own attention stays fused.
    """

    needs_class_token = True

    def macs(self, site):
        """One query per head against all keys."""
        return site.heads * (site.tokens_in + site.prefix_tokens) * site.qk_dim

    def build(self, site):
        if not site.class_token:
            raise UserError("the scorer evit reads the class token's attention, and this model has none")
        return self.score

    def score(self, view):
        query_BH1K = view.q_BHTK[:, :, :1] * view.scale
        row_BH1T = (query_BH1K @ view.k_BHTK.transpose(-2, -1)).softmax(dim=-1)
        return row_BH1T.mean(dim=(1, 2))[:, view.prefix :]


class Reorganize(Aggregator):
    """Attentive tokens stay, the inattentive ones become one token, weighted by their attentiveness.

    Of the `keep` tokens, keep - 1 are attentive; the last is the fused one, in the place of its most attentive
    part.

    Args:
        fuse: false drops the inattentive tokens, and keeps one attentive token more (the paper's ablation).
    """

    absorb_scores = False

    def __init__(self, fuse=True):
        self.merges = fuse

    def assign(self, view, scores_BN, keep):
        order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
        keep_BR = order_BN[:, :keep].sort(dim=1).values
        prune_BP = order_BN[:, keep:].sort(dim=1).values
        if not self.merges:
            return Assignment(keep_BR, prune_BP)
        fused_B1 = (keep_BR == order_BN[:, keep - 1 : keep]).int().argmax(dim=1, keepdim=True)
        weights_BN = scores_BN.clamp_min(1e-6)
        return Assignment(
            keep_BR,
            prune_BP,
            fused_B1.expand_as(prune_BP),
            weights_BN.gather(1, prune_BP),
            weights_BN.gather(1, keep_BR),
        )


class Stages(Cascade):
    """The same keep ratio at three stages, a quarter, half and three quarters down the model.

    A token is judged by the attention of the block it is in, not by what it earned before.

    Args:
        stages: depths as shares of all blocks, each from 0 to below 1.
    """

    def __init__(self, stages=STAGES):
        super().__init__(gamma=0.0)
        if not stages or not all(0.0 <= s < 1.0 for s in stages):
            raise ValueError(
                f"stages is {list(stages)}, expected shares of the depth, each from 0 to below 1"
            )
        self.stages = tuple(stages)

    def profile(self, request):
        depth, low = request.shape.depth, request.min_keep
        cuts = {int(share * depth + 1e-9) for share in self.stages}

        def family(strength):
            tokens, after = float(request.shape.tokens), []
            for block in range(depth):
                if block in cuts:
                    tokens = max(1.0, tokens * (1 - strength * (1 - low)))
                after.append(tokens)
            return after

        return family


@hookimpl
def ucc_scorers():
    return {"evit": Attentiveness}


@hookimpl
def ucc_aggregators():
    return {"evit": Reorganize}


@hookimpl
def ucc_cascades():
    return {"evit": Stages}

"""Token Merging: in every block the most similar tokens are merged, as many as a schedule of r says.

Reference: Bolya et al. 2023, Token Merging: Your ViT but faster, ICLR, arXiv:2210.09461.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

from ucc_search import Cascade, hookimpl
from ucc_search.builtin.aggregators import Bipartite


class ToMe(Bipartite):
    """Bipartite soft matching: every second token finds its most similar partner among the others.

    The built-in `bipartite` is this method as the paper ended it; here are the two choices it compares.

    Args:
        feature: what is compared, `keys` (mean over heads) or `tokens` (section 4.1, table 1a).
        proportional: add the log of each token's size to the attention logits (section 3.2).
    """

    def __init__(self, feature="keys", proportional=True):
        if feature not in ("keys", "tokens"):
            raise ValueError(f"feature is {feature!r}, expected keys or tokens")
        self.feature = feature
        self.proportional_attention = proportional

    def macs(self, site):
        """The similarities of every round; whole tokens are wider than keys."""
        width = site.qk_dim if self.feature == "keys" else site.dim
        return super().macs(dataclasses.replace(site, qk_dim=width))

    def assign(self, view, scores_BN, keep):
        """One round; the framework asks again for a deeper cut than half."""
        if self.feature == "tokens":
            view = view._replace(k_BHTK=view.x_BTD[:, None])
        return super().assign(view, scores_BN, keep)


class RSchedule(Cascade):
    """r_l tokens leave in block l: the same number in every block, or a linear trend over the depth.

    r_l = r (1 + trend (2 l / (L - 1) - 1)) for the blocks l = 0 to L - 1. No block keeps a smaller share than
    the space's lowest keep ratio of what reaches it, and one token always stays.

    Args:
        trend: 0 is the paper's constant schedule, -1 its decreasing one (2 r to 0), 1 the increasing one.
    """

    ranges: ClassVar = {"trend": {"low": -1.0, "high": 1.0}}

    def __init__(self, trend=0.0):
        super().__init__(gamma=0.0)
        if not -1.0 <= trend <= 1.0:
            raise ValueError(f"trend is {trend}, expected -1 to 1")
        self.trend = trend

    def profile(self, request):
        """The family over r, from 0 to all tokens but one."""
        tokens, depth, low = request.shape.tokens, request.shape.depth, request.min_keep
        slopes = [1 + self.trend * (2 * i / max(1, depth - 1) - 1) for i in range(depth)]

        def family(strength):
            r = strength * (tokens - 1)
            kept = itertools.accumulate(
                slopes, lambda n, slope: max(n - r * slope, low * n, 1.0), initial=float(tokens)
            )
            return list(kept)[1:]

        return family


@hookimpl
def ucc_aggregators():
    return {"tome": ToMe}


@hookimpl
def ucc_cascades():
    return {"tome": RSchedule}

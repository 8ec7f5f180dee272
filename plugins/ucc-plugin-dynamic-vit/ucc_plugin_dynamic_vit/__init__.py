"""DynamicViT: a small network predicts which tokens are kept, and learns it together with the model.

Reference: Rao et al. 2021, DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS,
arXiv:2106.02034.
"""

from __future__ import annotations

from typing import ClassVar

from ucc_search import Scorer, hookimpl


class Predictor(Scorer):
    """Learned probability of a token to be kept, from the token itself and the mean over all tokens.

    Every site has a predictor of its own. In training its two logits get Gumbel noise, so that other tokens are
    tried; the highest samples are kept, and the loss reaches them straight through. Zero-shot trials say nothing
    about it: it starts at random.

    Args:
        ratio_weight: of the loss that pulls the mean sample to the share of tokens that is kept; 2 in the paper.
        temperature: of the Gumbel softmax, above 0.
    """

    learned = True
    ranges: ClassVar = {
        "ratio_weight": {"low": 0.5, "high": 8.0, "log": True},
        "temperature": {"low": 0.3, "high": 3.0, "log": True},
    }

    def __init__(self, ratio_weight=2.0, temperature=1.0):
        if ratio_weight < 0.0:
            raise ValueError(f"ratio_weight is {ratio_weight}, expected 0 or more")
        if temperature <= 0.0:
            raise ValueError(f"temperature is {temperature}, expected above 0")
        self.ratio_weight, self.temperature = ratio_weight, temperature

    def macs(self, site):
        """The four matrices, once per token."""
        return site.tokens_in * sum(rows * columns for rows, columns in widths(site.dim))

    def params(self, site):
        """The four matrices with their biases, and the norm before them."""
        return 2 * site.dim + sum((rows + 1) * columns for rows, columns in widths(site.dim))

    def build(self, site):
        from .predictor import KeepProbability

        return KeepProbability(widths(site.dim), self.temperature)

    def losses(self, scores):
        """The ratio loss (section 3.3), the mean over images and sites."""
        misses = [(s.scores_BN.mean(dim=1) - s.keep / s.scores_BN.shape[1]).square().mean() for s in scores]
        return {"ratio": self.ratio_weight * sum(misses) / len(misses)} if misses else {}


def widths(dim):
    """Inputs and outputs of the predictor's layers: local and global features, then three that decide."""
    half, quarter = max(1, dim // 2), max(1, dim // 4)
    return [(dim, dim), (dim, half), (half, quarter), (quarter, 2)]


@hookimpl
def ucc_scorers():
    return {"dynamic_vit": Predictor}

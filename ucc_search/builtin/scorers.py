"""Token scorers: UCC's joint score and its two halves, and the baselines beside it.

torch is imported only inside the methods that need it: listing plugins and costing plans import this
file, and must start without it. Shape suffixes are those of `ucc_search.interfaces`.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

from ucc_search.errors import ModelError
from ucc_search.interfaces import Scorer, Site, TokenView

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

FftAxis = Literal["token", "channel", "grid2d"]
Sign = Literal["low", "high"]
_AXES = ("token", "channel", "grid2d")
_SIGNS = ("low", "high")
_KAPPA = 0.15
_TINY = 1e-12  # keeps constant and all-zero inputs from dividing by zero


class Spatial(Scorer):
    """How much the class token attends to a token, directly and through what it attends to.

    With the softmax attention A_h and the class token at index 0:
    c_j = mean_h(a_h A_h[0, j]) where a_h = mean_i A_h[i, 0], how far all tokens listen to the class
    token; g_j = mean_h(b_h mean_i A_h[i, j]) where b_h = A_h[0, 0]; scores_BN = c_j + g_j, without
    unit, non-negative. Means over i run over all tokens, prefix tokens included.

    Without a class token the score is mean_h mean_i A_h[i, j], the attention a token receives.

    The block hands over what is needed of its attention map; no MACs are added, but that block forms its
    map, a few images at a time.

    Reference: reconstructed for UCC (Neurocomputing 2024, doi 10.1016/j.neucom.2024.128747), whose
    formula is not public, from the attention score of VTC-LFC (NeurIPS 2022).
    """

    needs_attention_means: ClassVar[bool] = True

    def score(self, view: TokenView) -> Tensor:
        """scores_BN, non-negative."""
        received_BHT, class_row_BHT = view.received_BHT, view.class_row_BHT
        assert received_BHT is not None and class_row_BHT is not None
        if not view.class_token:
            return received_BHT.mean(dim=1)[:, view.prefix :]
        to_class_BH1, class_itself_BH1 = received_BHT[:, :, :1], class_row_BHT[:, :, :1]
        score_BT = (to_class_BH1 * class_row_BHT + class_itself_BH1 * received_BHT).mean(dim=1)
        return score_BT[:, view.prefix :]


class Spectral(Scorer):
    """Energy of a token in the low frequencies of the token sequence (or in what the mean leaves).

    With sign `low`: Z_low = IFFT(G * FFT Z) along `fft_axis`, where
    G_k = 1 - exp(-(k - m)^2 / (2 s^2)), m = (n - 1) / 2, s = n kappa / 2, k = 0..n-1 (about 1 at both
    ends, which are the low frequencies, and 0 at Nyquist). Then
    s_j = sum_c |Z_low[j, c]| / mean_j' sum_c |Z[j', c]|, without unit, non-negative.

    With sign `high`: s_j = ||z_j - mean z|| / mean_j' ||z_j'||, what is left beside the DC part.

    Patch tokens only, in float32, detached: no gradient flows through the score.

    Args:
        fft_axis: `token` along the sequence of remaining tokens, `channel` over the channels of
            each token, `grid2d` over the image grid with zeros where tokens are gone (the filter is
            then the product of one along each side).
        sign: `low` keeps tokens rich in low frequencies, `high` those far from the mean.
        kappa: width of the notch at Nyquist as a fraction of the spectrum, above 0 and up to 1.

    Reference: reconstructed for UCC; `token` with `low` is the low-frequency energy of VTC-LFC
    (NeurIPS 2022) at cutoff 0.85, `high` the DC/HF split of Anti-Oversmoothing (ICLR 2022).
    """

    ranges: ClassVar = {"kappa": {"low": 0.05, "high": 0.5}}

    def __init__(self, fft_axis: FftAxis = "token", sign: Sign = "low", kappa: float = _KAPPA) -> None:
        if fft_axis not in _AXES:
            raise ValueError(f"fft_axis is {fft_axis!r}, expected one of {', '.join(_AXES)}")
        if sign not in _SIGNS:
            raise ValueError(f"sign is {sign!r}, expected one of {', '.join(_SIGNS)}")
        if not 0.0 < kappa <= 1.0:
            raise ValueError(f"kappa is {kappa}, expected 0 < kappa <= 1")
        if sign == "high" and (fft_axis != "token" or kappa != _KAPPA):
            warnings.warn("fft_axis and kappa have no effect with sign: high", stacklevel=2)
        self.fft_axis, self.sign, self.kappa = fft_axis, sign, kappa

    def macs(self, site: Site) -> int:
        """A forward and an inverse complex FFT, see `fft_macs`.

        The forward one is real in fact, a quarter less of the whole; a filter that reaches few neighbours (as the
        default does), short axes, single images and traced models multiply by the filter's matrix instead, which
        is more MACs in less time.
        """
        if self.sign == "high":
            return 0
        if self.fft_axis == "token":
            return fft_macs(site.tokens_in, 2 * site.dim)
        if self.fft_axis == "channel":
            return fft_macs(site.dim, 2 * site.tokens_in)
        rows, columns = site.grid
        return fft_macs(columns, 2 * site.dim * rows) + fft_macs(rows, 2 * site.dim * columns)

    def build(self, site: Site) -> Callable[[TokenView], Tensor] | nn.Module:
        """A module that keeps its filters, without an entry in checkpoints."""
        if self.sign == "high":
            return self.score
        from ucc_search.builtin.low_pass import LowPassEnergy

        lengths = {"token": (site.tokens_in,), "channel": (site.dim,), "grid2d": site.grid}
        return LowPassEnergy(self.fft_axis, self.kappa, lengths[self.fft_axis])

    def score(self, view: TokenView) -> Tensor:
        """scores_BN, non-negative; 0 for all-zero tokens."""
        from ucc_search.builtin.low_pass import LowPassEnergy

        if self.sign == "low":
            energy_BN: Tensor = LowPassEnergy(self.fft_axis, self.kappa)(view)
            return energy_BN
        z_BND = view.patches_BND.detach().float()
        rest_BN = (z_BND - z_BND.mean(dim=1, keepdim=True)).norm(dim=-1)
        return _relative(rest_BN, z_BND.norm(dim=-1))


class Joint(Scorer):
    """UCC's joint score: spatial and spectral characteristics of a token together.

    scores_BN without unit, non-negative.

    Args:
        mix: null multiplies the two scores, as VTC-LFC does; a number from 0 to 1 adds them instead,
            mix * spatial + (1 - mix) * spectral, each min-max normalised per image.
        fft_axis: of the spectral score, see `Spectral`.
        sign: of the spectral score.
        kappa: of the spectral score.

    Reference: UCC (Neurocomputing 2024, doi 10.1016/j.neucom.2024.128747) names a joint score of
    spatial and spectral characteristics; its form here is reconstructed from VTC-LFC (NeurIPS 2022).
    """

    needs_attention_means: ClassVar[bool] = True
    ranges: ClassVar = {"mix": {"low": 0.0, "high": 1.0}, "kappa": {"low": 0.05, "high": 0.5}}

    def __init__(
        self,
        mix: float | None = None,
        fft_axis: FftAxis = "token",
        sign: Sign = "low",
        kappa: float = _KAPPA,
    ) -> None:
        if mix is not None and not 0.0 <= mix <= 1.0:
            raise ValueError(f"mix is {mix}, expected 0 to 1, or null for the product")
        self.mix = mix
        self.spatial, self.spectral = Spatial(), Spectral(fft_axis, sign, kappa)

    def macs(self, site: Site) -> int:
        """Those of the spectral score; the spatial one adds none."""
        return self.spatial.macs(site) + self.spectral.macs(site)

    def build(self, site: Site) -> nn.Module:
        """A module that keeps the spectral score's filters, without an entry in checkpoints."""
        from ucc_search.builtin.low_pass import Combined

        return Combined(self.combine, self.spatial.build(site), self.spectral.build(site))

    def score(self, view: TokenView) -> Tensor:
        """scores_BN, non-negative."""
        return self.combine(self.spatial.score(view), self.spectral.score(view))

    def combine(self, spatial_BN: Tensor, spectral_BN: Tensor) -> Tensor:
        """scores_BN from both."""
        if self.mix is None:
            return spatial_BN * spectral_BN
        return self.mix * _min_max(spatial_BN) + (1 - self.mix) * _min_max(spectral_BN)


class ClassAttention(Scorer):
    """How much the class token attends to each token, averaged over heads.

    scores_BN are probabilities: non-negative, at most 1 in sum. Only the class token's row is
    formed, so attention stays fused.

    Reference: Liang et al. 2022, EViT, arXiv:2202.07800, section 3.2 (attentive tokens).
    """

    needs_class_token: ClassVar[bool] = True

    def macs(self, site: Site) -> int:
        """One query per head against all keys."""
        return site.heads * (site.tokens_in + site.prefix_tokens) * site.qk_dim

    def build(self, site: Site) -> Callable[[TokenView], Tensor]:
        """What computes the scores.

        Raises:
            ModelError: the model has no class token.
        """
        if not site.class_token:
            raise ModelError(
                "the scorer class_attention reads the class token's attention, and this model has no class "
                "token; use the scorer joint, spatial, spectral or random"
            )
        return self.score

    def score(self, view: TokenView) -> Tensor:
        """scores_BN, in [0, 1]."""
        query_BH1K = view.q_BHTK[:, :, :1] * view.scale
        row_BH1T = (query_BH1K @ view.k_BHTK.transpose(-2, -1)).softmax(dim=-1)
        return row_BH1T.mean(dim=(1, 2))[:, view.prefix :]


class Random(Scorer):
    """A random order of the positions, one per block, the same for every image: the floor to beat.

    It is fixed by the seed, the block and the original position alone, so that runs repeat exactly
    and exported models need no random numbers. scores_BN are in (0, 1].

    Args:
        seed: 0 or more; different seeds give different orders.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        self.seed = seed

    def build(self, site: Site) -> nn.Module:
        """A module without parameters, and without an entry in checkpoints."""
        from ucc_search.builtin.random_scores import RandomScores

        rows, columns = site.grid
        return RandomScores(rows * columns, self.seed * site.depth + site.block)


def fft_macs(length: int, transforms: int = 1) -> int:
    """MACs of `transforms` complex FFTs: 2.5 n log2 n each, half the textbook 5 n log2 n real FLOPs.

    A convention: libraries differ, and FLOP counters in torch see no FFT at all.
    """
    return round(2.5 * length * math.log2(length) * transforms)


def _relative(value_BN: Tensor, whole_BN: Tensor) -> Tensor:
    """As a fraction of the image's mean of `whole_BN`."""
    relative_BN: Tensor = value_BN / whole_BN.mean(dim=1, keepdim=True).clamp_min(_TINY)
    return relative_BN


def _min_max(score_BN: Tensor) -> Tensor:
    low_B1, high_B1 = score_BN.amin(dim=1, keepdim=True), score_BN.amax(dim=1, keepdim=True)
    scaled_BN: Tensor = (score_BN - low_B1) / (high_B1 - low_B1).clamp_min(_TINY)
    return scaled_BN

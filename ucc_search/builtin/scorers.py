"""Token scorers: UCC's joint score and its two halves, and the baselines beside it.

torch is imported inside the methods that need it, so that listing plugins and costing plans start
without it. Shape suffixes are those of `ucc_search.interfaces`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ucc_search.interfaces import Scorer, Site, TokenView

if TYPE_CHECKING:
    from torch import Tensor, nn

FftAxis = Literal["token", "channel", "grid2d"]
_AXES = ("token", "channel", "grid2d")
_SIGNS = ("low", "high")


class Spatial(Scorer):
    """How much the class token looks at a token, and how much the tokens that it looks at do.

    c_j = mean_h(a_h A_h[0, j]) with a_h = mean_i A_h[i, 0], and g_j = mean_h(b_h mean_i A_h[i, j])
    with b_h = A_h[0, 0]; the score is c_j + g_j. Means over i run over all tokens, prefix included.
    Models without a class token score by mean_h mean_i A_h[i, j], the attention a token receives.

    The block's own attention map is reused, so no MACs are added; that block's attention is not fused.

    Reference: reconstructed for UCC (Neurocomputing 2024) from VTC-LFC (NeurIPS 2022), attention score.
    """

    needs_attention: ClassVar[bool] = True

    def score(self, view: TokenView) -> Tensor:
        assert view.attn_BHTT is not None
        received_BHT = view.attn_BHTT.mean(dim=2)
        if not view.class_token:
            return received_BHT.mean(dim=1)[:, view.prefix :]
        class_row_BHT = view.attn_BHTT[:, :, 0]
        looks_BH1 = received_BHT[:, :, :1]
        itself_BH1 = class_row_BHT[:, :, :1]
        score_BT = (looks_BH1 * class_row_BHT + itself_BH1 * received_BHT).mean(dim=1)
        return score_BT[:, view.prefix :]


class Spectral(Scorer):
    """Energy of a token in the low frequencies of the token sequence (or in the high ones).

    With sign `low`: Z_low = IFFT(G * FFT Z) along `fft_axis`, G_k = 1 - exp(-(k - m)^2 / (2 s^2)),
    m = (n - 1) / 2, s = n kappa / 2, k = 0..n-1 (1 at both ends, the low frequencies; 0 at Nyquist);
    s_j = sum_c |Z_low[j, c]| / mean_j' sum_c |Z[j', c]|. In float32, detached.
    With sign `high`: s_j = ||z_j - mean z|| / mean_j' ||z_j'||, what the mean (the DC part) leaves.

    Args:
        fft_axis: `token` along the sequence of remaining tokens, `channel` over the channels of
            each token, `grid2d` over the image grid with zeros where tokens are gone.
        sign: `low` keeps tokens rich in low frequencies, `high` the others.
        kappa: width of the notch at Nyquist, as a share of the spectrum.

    Reference: reconstructed for UCC; `token`/`low` is the low-frequency energy of VTC-LFC with cutoff
    0.85 (kappa = 0.15), `high` the split of AntiOversmoothing (ICLR 2022).
    """

    ranges: ClassVar = {"kappa": {"low": 0.05, "high": 0.5}}

    def __init__(self, fft_axis: FftAxis = "token", sign: str = "low", kappa: float = 0.15) -> None:
        if fft_axis not in _AXES:
            raise ValueError(f"fft_axis is {fft_axis!r}, expected one of {', '.join(_AXES)}")
        if sign not in _SIGNS:
            raise ValueError(f"sign is {sign!r}, expected one of {', '.join(_SIGNS)}")
        if not 0.0 < kappa <= 1.0:
            raise ValueError(f"kappa is {kappa}, expected 0 < kappa <= 1")
        self.fft_axis, self.sign, self.kappa = fft_axis, sign, kappa

    def macs(self, site: Site) -> int:
        if self.sign == "high":
            return 0
        if self.fft_axis == "token":
            return 2 * site.dim * fft_macs(site.tokens_in)
        if self.fft_axis == "channel":
            return 2 * site.tokens_in * fft_macs(site.dim)
        rows, columns = site.grid
        return 2 * site.dim * (rows * fft_macs(columns) + columns * fft_macs(rows))

    def score(self, view: TokenView) -> Tensor:
        z_BND = view.patches_BND.detach().float()
        if self.sign == "high":
            rest_BN = (z_BND - z_BND.mean(dim=1, keepdim=True)).norm(dim=-1)
            return rest_BN / z_BND.norm(dim=-1).mean(dim=1, keepdim=True).clamp_min(1e-12)
        energy_BN = self._low_pass(z_BND, view).sum(dim=-1)
        total_BN = z_BND.abs().sum(dim=-1)
        return energy_BN / total_BN.mean(dim=1, keepdim=True).clamp_min(1e-12)

    def _low_pass(self, z_BND: Tensor, view: TokenView) -> Tensor:
        """|Z_low|, shape BND."""
        if self.fft_axis == "token":
            return _filter(z_BND, (1,), self.kappa).abs()
        if self.fft_axis == "channel":
            return _filter(z_BND, (2,), self.kappa).abs()
        rows, columns = view.grid
        batch, _, dim = z_BND.shape
        index_BND = view.position_BN[..., None].expand_as(z_BND)
        grid = z_BND.new_zeros(batch, rows * columns, dim).scatter(1, index_BND, z_BND)
        low = _filter(grid.unflatten(1, (rows, columns)), (1, 2), self.kappa).abs()
        return low.flatten(1, 2).gather(1, index_BND)


class Joint(Scorer):
    """UCC's joint score: spatial and spectral characteristics of a token together.

    Args:
        mix: None multiplies the two scores (VTC-LFC); a number from 0 to 1 weighs them instead,
            mix * spatial + (1 - mix) * spectral, each min-max normalised per image.
        fft_axis, sign, kappa: of the spectral score.

    Reference: UCC (Neurocomputing 2024) names the joint score; its form here is reconstructed.
    """

    needs_attention: ClassVar[bool] = True
    ranges: ClassVar = {"mix": {"low": 0.0, "high": 1.0}, "kappa": {"low": 0.05, "high": 0.5}}

    def __init__(
        self,
        mix: float | None = None,
        fft_axis: FftAxis = "token",
        sign: str = "low",
        kappa: float = 0.15,
    ) -> None:
        if mix is not None and not 0.0 <= mix <= 1.0:
            raise ValueError(f"mix is {mix}, expected 0 to 1, or null for the product")
        self.mix = mix
        self._spatial, self._spectral = Spatial(), Spectral(fft_axis, sign, kappa)

    def macs(self, site: Site) -> int:
        return self._spatial.macs(site) + self._spectral.macs(site)

    def score(self, view: TokenView) -> Tensor:
        spatial_BN, spectral_BN = self._spatial.score(view), self._spectral.score(view)
        if self.mix is None:
            return spatial_BN * spectral_BN
        return self.mix * _min_max(spatial_BN) + (1 - self.mix) * _min_max(spectral_BN)


class ClassAttention(Scorer):
    """How much the class token attends to each token, averaged over heads.

    Only the class token's row is formed, so attention stays fused.

    Reference: Liang et al. 2022, EViT, arXiv:2202.07800, section 3.2.
    """

    needs_class_token: ClassVar[bool] = True

    def macs(self, site: Site) -> int:
        return site.heads * (site.tokens_in + site.prefix_tokens) * site.qk_dim

    def score(self, view: TokenView) -> Tensor:
        class_query_BH1K = view.q_BHTK[:, :, :1] * view.scale
        row_BH1T = (class_query_BH1K @ view.k_BHTK.transpose(-2, -1)).softmax(dim=-1)
        return row_BH1T.mean(dim=(1, 2))[:, view.prefix :]


class Random(Scorer):
    """A fixed random score for every position and block, the same for every image: the floor to beat.

    Args:
        seed: different seeds give different scores.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def build(self, site: Site) -> nn.Module:
        return _random_scores(self.seed, site)


def _random_scores(seed: int, site: Site) -> nn.Module:
    import torch

    class RandomScores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(1_000_003 * seed + site.block)
            scores = torch.rand(site.grid[0] * site.grid[1], generator=generator)
            # Moves with the model, yet stays out of its checkpoint.
            self.register_buffer("scores_O", scores, persistent=False)

        def forward(self, view: TokenView) -> Any:
            return self.scores_O[view.position_BN]

    return RandomScores()


def fft_macs(length: int) -> int:
    """MACs of one complex FFT: half of the textbook 5 n log2 n real operations."""
    return round(2.5 * length * math.log2(length)) if length > 1 else 0


def _filter(values: Tensor, dims: tuple[int, ...], kappa: float) -> Tensor:
    """Low-pass along `dims`; complex."""
    import torch

    spectrum = torch.fft.fftn(values, dim=dims)
    for dim in dims:
        shape = [1] * values.ndim
        shape[dim] = -1
        spectrum = spectrum * _low_pass_gain(values.shape[dim], kappa, values).view(shape)
    return torch.fft.ifftn(spectrum, dim=dims)


def _low_pass_gain(length: int, kappa: float, like: Tensor) -> Tensor:
    import torch

    k = torch.arange(length, device=like.device, dtype=like.dtype)
    middle, width = (length - 1) / 2, length * kappa / 2
    return 1 - torch.exp(-((k - middle) ** 2) / (2 * width**2))


def _min_max(score_BN: Tensor) -> Tensor:
    low, high = score_BN.amin(dim=1, keepdim=True), score_BN.amax(dim=1, keepdim=True)
    return (score_BN - low) / (high - low).clamp_min(1e-12)

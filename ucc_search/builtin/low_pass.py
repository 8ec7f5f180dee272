"""The spectral scorer's modules; on their own because they need torch when they are imported."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ucc_search.batches import image_slices
from ucc_search.interfaces import TokenView

_SHORT, _FEW = 96, 2
"""Up to this length, and with fewer images, a matrix product beat the FFT on two cores; no result depends on it."""
_TINY = 1e-12  # keeps all-zero tokens from dividing by zero


class LowPass(nn.Module):
    """A filter of real values along one axis or a grid; its output is complex, given as its two parts.

    The gain splits into G_k = E_k + O_k with E_k = E_{-k} and O_k = -O_{-k} (indices modulo the lengths):
    E gives the real part and O the imaginary part of the output, each by one real inverse FFT. Short axes
    and few images multiply by the same filter as a matrix, which is faster there; so does a trace
    (torch.compile, export), as ONNX knows no complex numbers.

    Args:
        gain: float64, one per frequency of each axis: [n] or [rows, columns].
    """

    even: Tensor
    odd: Tensor
    matrix_MN: Tensor

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.lengths = tuple(gain.shape)
        axes = tuple(range(gain.ndim))
        mirrored = gain.flip(axes).roll((1,) * gain.ndim, axes)
        half = gain.shape[-1] // 2 + 1
        # Not persistent: they move with the model, yet stay out of its checkpoint.
        self.register_buffer("even", ((gain + mirrored) / 2)[..., :half, None].float(), persistent=False)
        self.register_buffer("odd", ((gain - mirrored) / 2)[..., :half, None].float(), persistent=False)
        self.register_buffer("matrix_MN", _matrix(gain), persistent=False)

    def forward(self, values_BNX: Tensor) -> tuple[Tensor, Tensor]:
        """(real_BNX, imaginary_BNX); values float32, N the product of the lengths."""
        images, places, _ = values_BNX.shape
        if torch.compiler.is_compiling() or places <= _SHORT or images < _FEW:
            real_BNX, imaginary_BNX = (self.matrix_MN @ values_BNX).chunk(2, dim=1)
            return real_BNX, imaginary_BNX
        axes = tuple(range(1, 1 + len(self.lengths)))
        spectrum = torch.fft.rfftn(values_BNX.unflatten(1, self.lengths), dim=axes)
        # An odd real gain leaves an imaginary signal: i times what the gain times -i leaves.
        turned = torch.complex(torch.zeros_like(self.odd), -self.odd)
        parts = (
            torch.fft.irfftn(spectrum * gain, s=self.lengths, dim=axes).flatten(1, len(axes))
            for gain in (self.even, turned)
        )
        return next(parts), next(parts)


def _matrix(gain: Tensor) -> Tensor:
    """[2 N, N] float32: the real and the imaginary part of the filter, circulant along every axis."""
    kernel = torch.fft.ifftn(gain)
    places = torch.cartesian_prod(*(torch.arange(n, device=gain.device) for n in gain.shape)).view(
        -1, gain.ndim
    )
    apart = (places[:, None] - places).remainder(torch.tensor(gain.shape, device=gain.device))
    whole_NN = kernel[apart.unbind(-1)]
    return torch.cat([whole_NN.real, whole_NN.imag]).float()


class LowPassEnergy(nn.Module):
    """Scores tokens by their energy in low frequencies, see `ucc_search.builtin.scorers.Spectral`.

    Args:
        axis: `token`, `channel` or `grid2d`.
        lengths: of the axes for which a filter is kept; for others (token counts that anneal in
            training) it is made anew in each call.
    """

    def __init__(self, axis: str, kappa: float, lengths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.axis, self.kappa = axis, kappa
        self.kept = LowPass(self._gain(lengths)) if lengths else None

    def forward(self, view: TokenView) -> Tensor:
        """scores_BN, non-negative; 0 for all-zero tokens."""
        patches_BND = view.patches_BND.detach()
        with torch.no_grad():
            low_pass = self._filter(patches_BND, view.grid)
            slices = image_slices(patches_BND, 4 * patches_BND.shape[1] * patches_BND.shape[2])
            parts = [self._energy(low_pass, patches_BND[s].float(), view.position_BN[s]) for s in slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _energy(self, low_pass: LowPass, z_BND: Tensor, position_BN: Tensor) -> Tensor:
        if self.axis == "grid2d":  # with zeros where tokens are gone
            index_BND = position_BN[..., None].expand_as(z_BND)
            cells = low_pass.lengths[0] * low_pass.lengths[1]
            grid_BOD = z_BND.new_zeros(z_BND.shape[0], cells, z_BND.shape[2]).scatter(1, index_BND, z_BND)
            energy_BN = _size(*low_pass(grid_BOD)).sum(dim=-1).gather(1, position_BN)
        elif self.axis == "channel":
            energy_BN = _size(*low_pass(z_BND.transpose(1, 2))).sum(dim=1)
        else:
            energy_BN = _size(*low_pass(z_BND)).sum(dim=-1)
        whole_B1 = z_BND.abs().sum(dim=-1).mean(dim=1, keepdim=True)
        return energy_BN / whole_B1.clamp_min(_TINY)

    def _filter(self, z_BND: Tensor, grid: tuple[int, int]) -> LowPass:
        lengths = {"token": (z_BND.shape[1],), "channel": (z_BND.shape[2],), "grid2d": grid}[self.axis]
        kept = self.kept
        # Casting the model to half precision would have spoilt it.
        if kept is not None and kept.lengths == lengths and kept.even.dtype == torch.float32:
            return kept
        return LowPass(self._gain(lengths).to(z_BND.device))

    def _gain(self, lengths: tuple[int, ...]) -> Tensor:
        """The product of one gain along each axis, float64."""
        gains = [low_pass_gain(n, self.kappa) for n in lengths]
        return gains[0] if len(gains) == 1 else gains[0][:, None] * gains[1]


def low_pass_gain(length: int, kappa: float) -> Tensor:
    """G_k of `ucc_search.builtin.scorers.Spectral`, k = 0..length-1, float64."""
    k_K = torch.arange(length, dtype=torch.float64)
    middle, width = (length - 1) / 2, length * kappa / 2
    return 1 - torch.exp(-((k_K - middle) ** 2) / (2 * width**2))


def _size(real: Tensor, imaginary: Tensor) -> Tensor:
    """Absolute values of complex numbers."""
    return real.square().addcmul_(imaginary, imaginary).sqrt_()


class Combined(nn.Module):
    """Two scorers' scores made one, for scorers whose parts may be modules.

    Args:
        combine: a method, so that the module can be pickled.
    """

    def __init__(
        self,
        combine: Callable[[Tensor, Tensor], Tensor],
        first: Callable[[TokenView], Tensor],
        second: Callable[[TokenView], Tensor],
    ) -> None:
        super().__init__()
        self.combine, self.first, self.second = combine, first, second

    def forward(self, view: TokenView) -> Tensor:
        """scores_BN."""
        combined: Tensor = self.combine(self.first(view), self.second(view))
        return combined

"""The spectral scorer's modules; on their own because they need torch when they are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ucc_search.batches import image_slices
from ucc_search.interfaces import TokenView

_TINY = 1e-12  # keeps all-zero tokens from dividing by zero
_TAIL = 1e-6
"""Taps of the filter that together are less than this are left out: what float32 rounds away anyway."""
_WINDOW = 18  # places at a time, when neighbours alone matter; no result depends on it
_SHORT, _FEW = 96, 2
"""Up to this length, and with fewer images, a matrix product beat the FFT on two cores; no result depends on it."""


class LowPass(nn.Module):
    """A filter of real values along one axis or a grid; its output is complex, given by its absolute values.

    What is filtered out is a narrow band, so the filter reaches a few neighbours only: it is a product of a
    small matrix with windows of the sequence. Where it reaches everywhere (grids, wide bands), it is one
    matrix or the FFT, whichever is faster; a trace (torch.compile, export) takes the matrix, as ONNX knows no
    complex numbers.

    In the FFT the gain splits into G_k = E_k + O_k with E_k = E_{-k} and O_k = -O_{-k} (indices modulo the
    lengths): E gives the real part and O the imaginary part of the output, each by one real inverse FFT.

    Args:
        gain: float64, one per frequency of each axis: [n] or [rows, columns].
    """

    even: Tensor
    odd: Tensor
    real_MN: Tensor
    imaginary_MN: Tensor

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.lengths, self.places = tuple(gain.shape), gain.numel()
        kernel = torch.fft.ifftn(gain)
        self.reach, self.step = _reach(kernel)
        """Neighbours on either side that matter (0: all do), and places to filter at a time."""
        matrix_MN = _windowed(kernel, self.step, self.reach) if self.reach else _circulant(kernel)
        # Not persistent: they move with the model, yet stay out of its checkpoint.
        self.register_buffer("real_MN", matrix_MN.real.float(), persistent=False)
        self.register_buffer("imaginary_MN", matrix_MN.imag.float(), persistent=False)
        if not self.reach:
            axes = tuple(range(gain.ndim))
            mirrored = gain.flip(axes).roll((1,) * gain.ndim, axes)
            half = gain.shape[-1] // 2 + 1
            self.register_buffer("even", ((gain + mirrored) / 2)[..., :half, None].float(), persistent=False)
            self.register_buffer("odd", ((gain - mirrored) / 2)[..., :half, None].float(), persistent=False)

    def forward(self, values_BNX: Tensor) -> Iterator[Tensor]:
        """size_BnX of successive places; values float32, N the product of the lengths.

        Read each before the next: they may share memory.
        """
        images, places, width = values_BNX.shape
        if self.reach:
            tracing = torch.compiler.is_compiling()
            for first in range(0, places, self.step):
                count = min(self.step, places - first)
                if first == 0 or count < self.step:
                    both_MN = self._both(count).expand(images, -1, -1)
                    buffer = None if tracing else values_BNX.new_empty(images, 2 * count, width)
                window_BNX = _window(values_BNX, first - self.reach, first + count + self.reach)
                yield _size(*torch.bmm(both_MN, window_BNX, out=buffer).split(count, dim=1))
        elif torch.compiler.is_compiling() or places <= _SHORT or images < _FEW:
            yield _size(self.real_MN @ values_BNX, self.imaginary_MN @ values_BNX)
        else:
            yield _size(*self._by_fft(values_BNX))

    def _both(self, count: int) -> Tensor:
        """[2 count, count + 2 reach]: the real and the imaginary filter for `count` places at a time."""
        width = count + 2 * self.reach
        return torch.cat([self.real_MN[:count, :width], self.imaginary_MN[:count, :width]])

    def _by_fft(self, values_BNX: Tensor) -> Iterator[Tensor]:
        """real_BNX, imaginary_BNX."""
        axes = tuple(range(1, 1 + len(self.lengths)))
        spectrum = torch.fft.rfftn(values_BNX.unflatten(1, self.lengths), dim=axes)
        # An odd real gain leaves an imaginary signal: i times what the gain times -i leaves.
        turned = torch.complex(torch.zeros_like(self.odd), -self.odd)
        for gain in (self.even, turned):
            yield torch.fft.irfftn(spectrum * gain, s=self.lengths, dim=axes).flatten(1, len(axes))


def _reach(kernel: Tensor) -> tuple[int, int]:
    """(neighbours on either side beyond which the taps sum to less than `_TAIL`, places at a time); (0, all)
    where windows of that size would not be smaller than the whole."""
    places = kernel.numel()
    if kernel.ndim == 1:
        away = torch.arange(places)
        taps = kernel.abs()[torch.minimum(away, places - away).argsort(stable=True)]  # nearest first
        reach = int((taps.flip(0).cumsum(0) >= _TAIL).sum()) // 2
        step = -(-places // -(-places // _WINDOW))
        if reach > 0 and step + 2 * reach < places:
            return reach, step
    return 0, places


def _windowed(kernel: Tensor, step: int, reach: int) -> Tensor:
    """[step, step + 2 reach]: `step` outputs from the places around them."""
    apart = torch.arange(step)[:, None] + reach - torch.arange(step + 2 * reach)
    return torch.where(apart.abs() <= reach, kernel[apart.remainder(kernel.numel())], 0)


def _circulant(kernel: Tensor) -> Tensor:
    """[N, N] complex: circulant along every axis."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in kernel.shape)).view(-1, kernel.ndim)
    apart = (places[:, None] - places).remainder(torch.tensor(kernel.shape))
    return kernel[apart.unbind(-1)]


def _window(values_BNX: Tensor, low: int, high: int) -> Tensor:
    """Places `low` to `high`, going round the ends."""
    places = values_BNX.shape[1]
    if low < 0 or high > places:
        return torch.cat([values_BNX[:, low % places :], values_BNX[:, : high % places]], dim=1)
    return values_BNX[:, low:high]


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
            # What is formed at a time: absolute values, in place of the real parts.
            bytes_each = 4 * low_pass.step * patches_BND.shape[1] * patches_BND.shape[2] // low_pass.places
            slices = image_slices(patches_BND, bytes_each)
            parts = [self._energy(low_pass, patches_BND[s].float(), view.position_BN[s]) for s in slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _energy(self, low_pass: LowPass, z_BND: Tensor, position_BN: Tensor) -> Tensor:
        if self.axis == "grid2d":  # with zeros where tokens are gone
            index_BND = position_BN[..., None].expand_as(z_BND)
            grid_BOD = z_BND.new_zeros(z_BND.shape[0], low_pass.places, z_BND.shape[2])
            sizes = low_pass(grid_BOD.scatter(1, index_BND, z_BND))
            energy_BN = torch.cat([s.sum(dim=-1) for s in sizes], dim=1).gather(1, position_BN)
        elif self.axis == "channel":
            energy_BN = torch.stack([s.sum(dim=1) for s in low_pass(z_BND.transpose(1, 2))]).sum(dim=0)
        else:
            energy_BN = torch.cat([s.sum(dim=-1) for s in low_pass(z_BND)], dim=1)
        whole_B1 = _sum_of_sizes(z_BND)[:, None] / z_BND.shape[1]
        return energy_BN / whole_B1.clamp_min(_TINY)

    def _filter(self, z_BND: Tensor, grid: tuple[int, int]) -> LowPass:
        lengths = {"token": (z_BND.shape[1],), "channel": (z_BND.shape[2],), "grid2d": grid}[self.axis]
        kept = self.kept
        # Casting the model to half precision would have spoilt it.
        if kept is not None and kept.lengths == lengths and kept.real_MN.dtype == torch.float32:
            return kept
        return LowPass(self._gain(lengths)).to(z_BND.device)

    def _gain(self, lengths: tuple[int, ...]) -> Tensor:
        """The product of one gain along each axis, float64."""
        gains = [low_pass_gain(n, self.kappa) for n in lengths]
        return gains[0] if len(gains) == 1 else gains[0][:, None] * gains[1]


def low_pass_gain(length: int, kappa: float) -> Tensor:
    """G_k of `ucc_search.builtin.scorers.Spectral`, k = 0..length-1, float64."""
    k_K = torch.arange(length, dtype=torch.float64)
    middle, width = (length - 1) / 2, length * kappa / 2
    return 1 - torch.exp(-((k_K - middle) ** 2) / (2 * width**2))


def _sum_of_sizes(values_BNX: Tensor) -> Tensor:
    """Sum of the absolute values of each image, a few places at a time, in memory that is used again."""
    if torch.compiler.is_compiling():
        return values_BNX.abs().sum(dim=(1, 2))
    batch, places, width = values_BNX.shape
    memory = values_BNX.new_empty(batch, min(places, _WINDOW), width)
    total_B = values_BNX.new_zeros(batch)
    for part_BnX in values_BNX.split(_WINDOW, dim=1):
        total_B += torch.abs(part_BnX, out=memory[:, : part_BnX.shape[1]]).sum(dim=(1, 2))
    return total_B


def _size(real: Tensor, imaginary: Tensor) -> Tensor:
    """Absolute values of complex numbers, in place of their real parts."""
    return real.square_().addcmul_(imaginary, imaginary).sqrt_()


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

"""Importance criteria: what is lost with a channel, a hidden unit, or a half-step of depth.

torch is imported inside the methods that need it, so that listing plugins starts without it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from ucc_search.interfaces import Importance, Probe, UnitGroup

if TYPE_CHECKING:
    from torch import Tensor


class KL(Importance):
    """UP-ViT's criterion: sum over proxy images of KL(p || p without the unit), of the whole model.

    Every unit is deleted alone from the unpruned model; no labels are used, the temperature is 1.
    The blocks before the first that a deletion touches are not computed again.

    Reference: Yu and Wu 2021, A Unified Pruning Framework for Vision Transformers, arXiv:2111.15127,
    section 3.2.
    """

    def score(self, probe: Probe, group: UnitGroup) -> Tensor:
        import torch

        total = torch.zeros(group.units, dtype=torch.float64)
        for units_K, whole_BC, deleted_KBC in probe.deletions(group):
            divergence_KB = _kl(whole_BC.double(), deleted_KBC.double())
            total.index_add_(0, units_K.cpu(), divergence_KB.sum(dim=1).cpu())
        return total


class Fisher(Importance):
    """The second-order approximation of `kl`: half the Fisher information of a mask on the unit.

    1/2 sum over images of E_y~p [(d log p(y | x) / d m)^2] at m = 1: all units of a kind are scored
    by the same backward passes, one for every sampled y. Depth, of which there are few units and
    which is far from infinitesimal, is scored by exact deletion.

    Args:
        samples: classes drawn for each image; if there are no more classes than that, the
            expectation is exact.
        seed: of the draws.

    Reference: the expansion is textbook (Martens 2020, JMLR 21:146); its use for this criterion is ours.
    """

    ranges: ClassVar = {"samples": {"low": 1, "high": 16, "step": 1}}

    def __init__(self, samples: int = 10, seed: int = 0) -> None:
        if samples < 1:
            raise ValueError(f"samples is {samples}, expected 1 or more")
        self.samples, self.seed = samples, seed

    def build(self, probe: Probe) -> Callable[[UnitGroup], Tensor]:
        found: dict[str, dict[int, Tensor]] = {}

        def score(group: UnitGroup) -> Tensor:
            if group.kind == "depth":
                return KL().score(probe, group)
            if group.kind not in found:
                found[group.kind] = self._scores(probe, group.kind)
            return found[group.kind][group.index]

        return score

    def _scores(self, probe: Probe, kind: str) -> dict[int, Tensor]:
        import torch

        groups = [g for g in probe.shape.unit_groups() if g.kind == kind]
        totals = {g.index: torch.zeros(g.units, dtype=torch.float64) for g in groups}
        generator = torch.Generator().manual_seed(self.seed)
        for images, whole_BC in probe.batches():
            masks = {(kind, g.index): images.new_ones(len(images), g.units).requires_grad_() for g in groups}
            with torch.enable_grad(), probe.masked(masks):
                log_p_BC = probe.model(images).float().log_softmax(dim=-1)
                for chosen_B, weight_B in self._draws(whole_BC.softmax(dim=-1), generator):
                    picked_B = log_p_BC.gather(1, chosen_B[:, None])[:, 0]
                    # A model reads images apart, so row b of each gradient is that of image b.
                    slopes = torch.autograd.grad(picked_B.sum(), list(masks.values()), retain_graph=True)
                    for (_, index), slope_BU in zip(masks, slopes, strict=True):
                        squared_U = (weight_B[:, None] * slope_BU.double().square()).sum(dim=0)
                        totals[index] += 0.5 * squared_U.cpu()
        return totals

    def _draws(self, p_BC: Tensor, generator: object) -> list[tuple[Tensor, Tensor]]:
        """Classes and their weights in the expectation, a pair for every backward pass."""
        import torch

        batch, classes = p_BC.shape
        if classes <= self.samples:
            return [(torch.full_like(p_BC[:, 0], c, dtype=torch.int64), p_BC[:, c]) for c in range(classes)]
        drawn_BS = torch.multinomial(p_BC.cpu(), self.samples, replacement=True, generator=generator)
        share = p_BC.new_full((batch,), 1 / self.samples)
        return [(drawn_BS[:, s].to(p_BC.device), share) for s in range(self.samples)]


class Magnitude(Importance):
    """L2 norm of all weights that leave with the unit."""

    needs_images: ClassVar[bool] = False

    def score(self, probe: Probe, group: UnitGroup) -> Tensor:
        import torch

        squares = [w.double().square().sum(dim=1) for w in probe.weights(group)]
        return torch.stack(squares).sum(dim=0).sqrt()


class Random(Importance):
    """Scores by chance, the same for one seed: what any criterion has to beat.

    Args:
        seed: of the draw.
    """

    needs_images: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, probe: Probe, group: UnitGroup) -> Tensor:
        import torch

        place = zlib.crc32(f"{self.seed} {group.kind} {group.index}".encode())
        return torch.rand(group.units, generator=torch.Generator().manual_seed(place), dtype=torch.float64)


def _kl(whole_BC: Tensor, deleted_KBC: Tensor) -> Tensor:
    """KL(softmax(whole) || softmax(deleted)) in nats, [K, B]; zero at equality, exactly."""
    p, q = whole_BC.log_softmax(dim=-1), deleted_KBC.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)

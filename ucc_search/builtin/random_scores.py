"""The random scorer's module; on its own because it needs torch when it is imported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ucc_search.interfaces import TokenView


class RandomScores(nn.Module):
    """A random order of the original grid positions, looked up for the tokens that are left.

    Args:
        positions: patch tokens of the dense model.
        seed: fixes the order.
    """

    order: Tensor

    def __init__(self, positions: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(seed)
        order_O = torch.randperm(positions, generator=generator, device="cpu")
        # Not persistent: it moves with the model, yet stays out of its checkpoint. Integers: casting
        # the model to half precision would make scores equal that are not.
        self.register_buffer("order", order_O, persistent=False)

    def forward(self, view: TokenView) -> Tensor:
        """scores_BN, in (0, 1]."""
        order_BN = self.order[view.position_BN]
        return (order_BN + 1).float() / len(self.order)

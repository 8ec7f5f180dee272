"""What schedules share: three stages, and how a ratio grows with the one number that a budget fixes. No torch."""

from __future__ import annotations

import math


def three_stages(depth: int) -> tuple[int, int, int]:
    """Blocks a third of the depth apart, from its first twelfth on: 1, 5 and 9 of 12; 0, 2 and 4 of 6."""
    return depth // 12, 5 * depth // 12, 9 * depth // 12


def power(ratio: float, strength: float, bound: float) -> float:
    """ratio^t, t = strength / (1 - strength), not below `bound`, which it reaches at strength 1."""
    if strength >= 1.0:
        return bound
    t = strength / (1 - strength)
    if ratio == 1.0:
        # No power of 1 cuts, so beyond the proposal (t = 1) it counts as slightly less. Not before:
        # a proposal made of whole tokens must come back exactly.
        return max(math.pow(1 - 1e-6, max(0.0, t - 1)), bound)
    return max(math.pow(ratio, t), bound)

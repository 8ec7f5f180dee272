"""Cascade schedulers: how many tokens are left after each block, as families ordered by strength."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from ucc_search.interfaces import Cascade, ScheduleRequest

Profile = Callable[[float], Sequence[float]]
_ALMOST_ONE = 1 - 1e-6


class PerBlock(Cascade):
    """One keep ratio per block, proposed by the search.

    The proposals r_l are a direction; the family raises them to a common power t = s / (1 - s), so
    the relative pressure on the blocks stays as proposed while the budget sets the amount. No block
    falls below `min_keep`.
    """

    searched: ClassVar[bool] = True

    def profile(self, request: ScheduleRequest) -> Profile:
        ratios = request.keep_ratios or [0.5] * request.shape.depth
        return _powers(request, [min(r, _ALMOST_ONE) if r >= 1.0 else r for r in ratios])


class Constant(Cascade):
    """The same number of tokens leaves in every block.

    Reference: Bolya et al. 2023, Token Merging, ICLR, section 3.1 (constant r).
    """

    def profile(self, request: ScheduleRequest) -> Profile:
        tokens, depth = request.shape.tokens, request.shape.depth

        def family(strength: float) -> list[float]:
            return [tokens - strength * (tokens - 1) * (i + 1) / depth for i in range(depth)]

        return family


class Geometric(Cascade):
    """One keep ratio for every block from `first_block` on.

    Reference: closed-form schedules that meet UCC's published FLOPs (reconstructed).
    """

    def __init__(self, first_block: int = 1, gamma: float = 1.0, score_every_block: bool = False) -> None:
        super().__init__(gamma, score_every_block)
        if first_block < 0:
            raise ValueError(f"first_block is {first_block}, expected 0 or more")
        self.first_block = first_block

    def profile(self, request: ScheduleRequest) -> Profile:
        cuts = range(self.first_block, request.shape.depth)
        return _common_ratio(request, cuts)


class Staged(Cascade):
    """The same keep ratio at a few blocks, none elsewhere.

    Args:
        blocks: where to cut; the default is a quarter, half and three quarters of the depth (blocks
            3, 6 and 9 of 12, as DynamicViT and EViT cut).
    """

    def __init__(
        self, blocks: Sequence[int] | None = None, gamma: float = 1.0, score_every_block: bool = False
    ) -> None:
        super().__init__(gamma, score_every_block)
        if blocks is not None and (not blocks or min(blocks) < 0):
            raise ValueError(f"blocks is {list(blocks)}, expected indices of blocks")
        self.blocks = tuple(blocks) if blocks is not None else None

    def profile(self, request: ScheduleRequest) -> Profile:
        depth = request.shape.depth
        cuts = self.blocks or sorted({depth // 4, depth // 2, 3 * depth // 4})
        outside = [b for b in cuts if b >= depth]
        if outside:
            raise ValueError(f"blocks names {outside[0]}, the model has {depth} blocks (0 to {depth - 1})")
        return _common_ratio(request, cuts)


class Calibrated(Cascade):
    """Bottom-up pruning against an accuracy allowance on calibration images.

    From the first block on, each block removes as many tokens (from itself and all later blocks) as
    cost at most `allowance / depth` of accuracy; the step grows while the loss is small. This is
    done for a few allowances; the family runs through their schedules, log-linear in between, from
    the dense model to one token, so that any budget can be met.

    Args:
        allowances: total accuracy that may be lost, before any training (0 to 1).

    Reference: reconstructed for UCC from VTC-LFC (NeurIPS 2022), bottom-up cascade pruning.
    """

    needs_model: ClassVar[bool] = True

    def __init__(
        self,
        allowances: Sequence[float] = (0.02, 0.06, 0.15, 0.35),
        gamma: float = 1.0,
        score_every_block: bool = False,
    ) -> None:
        super().__init__(gamma, score_every_block)
        if not allowances or any(not 0.0 < a < 1.0 for a in allowances):
            raise ValueError(f"allowances is {list(allowances)}, expected numbers between 0 and 1")
        self.allowances = tuple(sorted(allowances))

    def profile(self, request: ScheduleRequest) -> Profile:
        if request.evaluate is None:
            raise ValueError("calibrated needs the model and calibration images, which this command does not load")
        shape = request.shape
        evaluate = _cached(request.evaluate)
        knots: list[Sequence[float]] = [[float(shape.tokens)] * shape.depth]
        for allowance in self.allowances:
            tokens = bottom_up(evaluate, shape.tokens, shape.depth, allowance / shape.depth)
            # Noise in the accuracy may let a larger allowance prune less somewhere: keep the order.
            knots.append([min(a, b) for a, b in zip(tokens, knots[-1], strict=True)])
        knots.append([1.0] * shape.depth)
        return _through(knots)


def bottom_up(
    evaluate: Callable[[Sequence[int]], float], tokens: int, depth: int, allowance: float
) -> list[int]:
    """Tokens after each block, each block losing at most `allowance` of accuracy (0 to 1)."""
    counts = [tokens] * depth
    for block in range(depth):
        reference = evaluate(counts)
        here, accepted, step = counts[block], 0, 1
        while step > accepted and here - accepted > 1:
            count = max(here - step, 1)
            drop = reference - evaluate(counts[:block] + [count] * (depth - block))
            if drop <= allowance:
                accepted = here - count
                growth = (2 - drop / allowance) * step
                step = max(accepted + 1, min(math.ceil(growth), math.ceil(step + here / 3)))
            else:
                # Shrink towards the last accepted step; stop once nothing lies between.
                step = max(int((2 - drop / allowance) * step), (accepted + step) // 2)
        counts = counts[:block] + [here - accepted] * (depth - block)
    return counts


def _cached(evaluate: Callable[[Sequence[int]], float]) -> Callable[[Sequence[int]], float]:
    known: dict[tuple[int, ...], float] = {}

    def ask(tokens: Sequence[int]) -> float:
        key = tuple(tokens)
        if key not in known:
            known[key] = evaluate(key)
        return known[key]

    return ask


def _through(knots: Sequence[Sequence[float]]) -> Profile:
    """The family that visits these schedules at equal steps of strength, log-linear between them."""

    def family(strength: float) -> list[float]:
        place = strength * (len(knots) - 1)
        left = min(int(place), len(knots) - 2)
        share = place - left
        pairs = zip(knots[left], knots[left + 1], strict=True)
        return [math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in pairs]

    return family


def _common_ratio(request: ScheduleRequest, cuts: Sequence[int]) -> Profile:
    return _powers(request, [0.5 if i in cuts else None for i in range(request.shape.depth)])


def _powers(request: ScheduleRequest, ratios: Sequence[float | None]) -> Profile:
    """Tokens under the ratios raised to a common power; None never cuts."""
    tokens, low = request.shape.tokens, request.min_keep

    def factor(ratio: float | None, strength: float) -> float:
        if ratio is None:
            return 1.0
        bound = min(low, ratio) if low > 0 else 1.0 / tokens
        if strength >= 1.0:
            return bound
        return max(ratio ** (strength / (1 - strength)), bound)

    def family(strength: float) -> list[float]:
        kept = itertools.accumulate((factor(r, strength) for r in ratios), lambda a, b: a * b)
        return [max(tokens * share, 1.0) for share in kept]

    return family

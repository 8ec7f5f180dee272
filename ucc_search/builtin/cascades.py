"""Cascade schedulers: how many tokens are left after each block, as families ordered by strength.

No torch. Strength 0 prunes nothing, strength 1 the most; values are real-valued patch tokens, at
least 1, that the framework rounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from ucc_search.errors import PlanError
from ucc_search.interfaces import Cascade, ScheduleRequest
from ucc_search.strength import power, three_stages

Profile = Callable[[float], Sequence[float]]
Evaluate = Callable[[Sequence[int]], float]


class PerBlock(Cascade):
    """One keep ratio per block, proposed by the search.

    The proposals r_l are a direction: the family raises them to a common power t = s / (1 - s), so
    the relative pressure on the blocks stays as proposed while the budget sets the amount; s = 0.5
    is the proposal itself. No block keeps less than `min_keep`, or than r_l where that is lower. A
    block with r_l = 1 starts to cut only beyond the proposal, as the others reach their bounds: any
    budget that some schedule meets can be met.

    Without proposals all ratios are equal.
    """

    searched: ClassVar[bool] = True

    def profile(self, request: ScheduleRequest) -> Profile:
        """The family through the proposed ratios.

        Raises:
            PlanError: not one ratio per block, or a ratio outside (0, 1].
        """
        shape = request.shape
        ratios = list(request.keep_ratios or [0.5] * shape.depth)
        if len(ratios) != shape.depth:
            raise PlanError(f"keep_ratios has {len(ratios)} values, expected {shape.depth} (one per block)")
        for i, ratio in enumerate(ratios):
            if not 0.0 < ratio <= 1.0:
                raise PlanError(f"keep_ratios[{i}] is {ratio}, expected 0 < ratio <= 1")
        bounds = [min(request.min_keep, r) for r in ratios]

        def family(strength: float) -> list[float]:
            return _chain(shape.tokens, [power(r, strength, b) for r, b in zip(ratios, bounds, strict=True)])

        return family


class KeepAll(Cascade):
    """Cuts no tokens at any strength: the budget is met by widths and depth alone."""

    def __init__(self) -> None:
        super().__init__()

    def profile(self, request: ScheduleRequest) -> Profile:
        tokens = [float(n) for n in request.shape.block_tokens]
        return lambda strength: tokens


class Constant(Cascade):
    """The same number of tokens leaves in every block, until one is left.

    No block keeps a smaller share than `min_keep` of what reaches it.

    Reference: Bolya et al. 2023, Token Merging, ICLR, section 3.1 (constant r).
    """

    def profile(self, request: ScheduleRequest) -> Profile:
        """n_l = max(n_{l-1} - s (N - 1), min_keep n_{l-1}, 1)."""
        tokens, depth, low = request.shape.tokens, request.shape.depth, request.min_keep

        def family(strength: float) -> list[float]:
            removed = strength * (tokens - 1)
            kept = itertools.accumulate(
                range(depth), lambda n, _: max(n - removed, low * n, 1.0), initial=float(tokens)
            )
            return list(kept)[1:]

        return family


class Geometric(Cascade):
    """One keep ratio for every block from `first_block` on: 1 - s (1 - min_keep).

    Args:
        first_block: index of the first block that cuts; 0 or more.
        gamma: see `Cascade`.
        score_every_block: see `Cascade`.

    Reference: reconstructed for UCC (Neurocomputing 2024), whose schedules are not public: ratios
    0.951 and 0.8275 from block 1 on meet its published FLOPs on ViT-B and DeiT-B.
    """

    def __init__(self, first_block: int = 1, gamma: float = 1.0, score_every_block: bool = False) -> None:
        super().__init__(gamma, score_every_block)
        if first_block < 0:
            raise ValueError(f"first_block is {first_block}, expected 0 or more")
        self.first_block = first_block

    def profile(self, request: ScheduleRequest) -> Profile:
        """The family over the common ratio.

        Raises:
            PlanError: `first_block` is beyond the model's last block.
        """
        _check_block(self.first_block, request, "first_block")
        return _common_ratio(request, range(self.first_block, request.shape.depth))


class Staged(Cascade):
    """The same keep ratio, 1 - s (1 - min_keep), at a few blocks; none elsewhere.

    Args:
        blocks: indices of the blocks that cut; the default is three, a third of the depth apart, from its
            first twelfth on (1, 5 and 9 of 12; 0, 2 and 4 of 6). DynamicViT, EViT and TPS cut at 3, 6 and 9
            of 12. Where we measured both at equal MACs (`results/stages.json`), the default was mostly
            nearer to the uncompressed model; earlier still was better after a convolutional stem and worse
            after plain patches.
        gamma: see `Cascade`.
        score_every_block: see `Cascade`.
    """

    def __init__(
        self, blocks: Sequence[int] | None = None, gamma: float = 1.0, score_every_block: bool = False
    ) -> None:
        super().__init__(gamma, score_every_block)
        if blocks is not None and (not blocks or min(blocks) < 0):
            raise ValueError(f"blocks is {list(blocks)}, expected indices of blocks, 0 or more")
        self.blocks = None if blocks is None else tuple(blocks)

    def profile(self, request: ScheduleRequest) -> Profile:
        """The family over the common ratio.

        Raises:
            PlanError: a block beyond the model's last one.
        """
        depth = request.shape.depth
        cuts = self.blocks or three_stages(depth)
        _check_block(max(cuts), request, "blocks")
        return _common_ratio(request, cuts)


class Calibrated(Cascade):
    """Bottom-up pruning against an accuracy allowance on calibration images.

    From the first block on, each block cuts as many tokens (for itself and all later blocks) as cost
    at most allowance / depth of accuracy; see `bottom_up`. This is done for a few allowances. The
    family runs from the dense model through their schedules, in order of the allowance, to the
    smallest one (`min_keep` in every block, or one token), log-linear between them, so that any
    budget can be met. Each schedule is lowered to the one before it where noise in the accuracy let
    the larger allowance cut less: tokens never grow with the strength.

    At most 1 + 9 * depth evaluations per allowance (433 for the default four and 12 blocks; about
    half of that in practice), and none twice.

    Args:
        allowances: total accuracies that may be lost before any training, as fractions of 1.
        gamma: see `Cascade`.
        score_every_block: see `Cascade`.

    Reference: reconstructed for UCC (Neurocomputing 2024) from the bottom-up cascade pruning of
    VTC-LFC (NeurIPS 2022). VTC-LFC bisects on one allowance of 0.095, 56 % of it for tokens; a budget
    is not known here, hence several allowances.
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
            raise ValueError(f"allowances is {list(allowances)}, expected fractions between 0 and 1")
        self.allowances = tuple(sorted(allowances))

    def profile(self, request: ScheduleRequest) -> Profile:
        """The family through the calibrated schedules.

        Raises:
            PlanError: the request has no model to evaluate.
        """
        if request.evaluate is None:
            raise PlanError(
                "the cascade calibrated needs the model and calibration images, which are not loaded here; "
                "use per_block, geometric, staged or constant"
            )
        shape, evaluate = request.shape, _remember(request.evaluate)
        knots = [[float(shape.tokens)] * shape.depth]
        for allowance in self.allowances:
            tokens = bottom_up(evaluate, shape.tokens, shape.depth, allowance, request.min_keep)
            knots.append(_lower(tokens, knots[-1]))
        knots.append(_lower(_chain(shape.tokens, [request.min_keep] * shape.depth), knots[-1]))
        return _through(knots)


def bottom_up(
    evaluate: Evaluate, tokens: int, depth: int, allowance: float, min_keep: float = 0.0
) -> list[int]:
    """Patch tokens after each block, where every block may lose allowance / depth of accuracy.

    The first block keeps 97 % at least (VTC-LFC: 190 of 196), since all others build on it.

    Args:
        evaluate: accuracy (0 to 1) of a schedule.
        allowance: of all blocks together, above 0.
    """
    counts = [tokens] * depth
    for block in range(depth):
        keep = max(min_keep, 190 / 196) if block == 0 else min_keep
        here = counts[block]
        floor = max(1, math.ceil(keep * here - 1e-9))
        left = _cut_block(evaluate, counts, block, floor, allowance / depth)
        counts = counts[:block] + [left] * (depth - block)
    return counts


def _cut_block(
    evaluate: Evaluate, counts: Sequence[int], block: int, floor: int, delta: float, tries: int = 8
) -> int:
    """Tokens to leave from `block` on: the step grows while the loss is below `delta`, then shrinks once."""
    here, before = counts[block], counts[:block]
    if floor >= here:
        return here
    reference = evaluate(counts)
    step, accepted = 1, 0
    for _ in range(tries):
        left = max(here - step, floor)
        slack = 2 - (reference - evaluate([*before, *[left] * (len(counts) - block)])) / delta
        if slack < 1:  # lost more than delta
            return max(here - max(int(slack * step), accepted), floor)
        if left == floor:
            return floor
        accepted = step
        # At least one more: a loss of exactly delta would repeat this step for ever.
        step = max(step + 1, min(math.ceil(slack * step), math.ceil(step + here / 3)))
    return here - accepted


def _remember(evaluate: Evaluate) -> Evaluate:
    known: dict[tuple[int, ...], float] = {}

    def ask(tokens: Sequence[int]) -> float:
        key = tuple(tokens)
        if key not in known:
            known[key] = evaluate(key)
        return known[key]

    return ask


def _lower(tokens: Sequence[float], bound: Sequence[float]) -> list[float]:
    return [min(a, b) for a, b in zip(tokens, bound, strict=True)]


def _through(knots: Sequence[Sequence[float]]) -> Profile:
    """The family that visits these schedules at equal steps of strength, log-linear between them."""

    def family(strength: float) -> list[float]:
        place = strength * (len(knots) - 1)
        left = min(int(place), len(knots) - 2)
        share = place - left
        # a^(1 - share) b^share gives the knots without rounding, unlike exp of logs.
        return [a ** (1 - share) * b**share for a, b in zip(knots[left], knots[left + 1], strict=True)]

    return family


def _common_ratio(request: ScheduleRequest, cuts: Sequence[int]) -> Profile:
    shape, low = request.shape, request.min_keep

    def family(strength: float) -> list[float]:
        ratio = 1 - strength * (1 - low)
        return _chain(shape.tokens, [ratio if i in cuts else 1.0 for i in range(shape.depth)])

    return family


def _chain(tokens: int, factors: Sequence[float]) -> list[float]:
    """Tokens after each block, at least 1."""
    left = itertools.accumulate(factors, lambda count, factor: count * factor, initial=float(tokens))
    return [max(1.0, count) for count in itertools.islice(left, 1, None)]


def _check_block(block: int, request: ScheduleRequest, key: str) -> None:
    depth = request.shape.depth
    if block >= depth:
        raise PlanError(f"{key} names block {block}, {request.shape.name} has blocks 0 to {depth - 1}")

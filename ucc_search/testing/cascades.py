"""The contract of cascades, line by line."""

from __future__ import annotations

import itertools
import math

import torch

from ucc_search.interfaces import Cascade, ScheduleRequest
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.models import tiny_model, tiny_plan

_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def _schedules(cascade: Cascade, min_keep: float = 0.0) -> tuple[list[list[float]], int]:
    shape = tiny_plan(tiny_model()).shape
    request = ScheduleRequest(
        shape,
        keep_ratios=(0.8, 0.5, 0.7) if cascade.searched else None,
        min_keep=min_keep,
        evaluate=(lambda tokens: sum(tokens) / (shape.tokens * shape.depth)) if cascade.needs_model else None,
    )
    family = cascade.profile(request)
    return [list(map(float, family(s))) for s in _STRENGTHS], shape.tokens


def schedules_are_counts(cascade: Cascade) -> None:
    schedules, tokens = _schedules(cascade)
    for strength, schedule in zip(_STRENGTHS, schedules, strict=True):
        if len(schedule) != 3:
            raise Broken(
                f"gave {len(schedule)} numbers for a model of 3 blocks",
                "return the patch tokens after each block",
                method="profile",
            )
        if not all(math.isfinite(n) and 0 < n <= tokens + 1e-6 for n in schedule):
            raise Broken(
                f"gave {schedule} at strength {strength} for {tokens} patch tokens",
                f"every number lies above 0 and up to {tokens}",
                method="profile",
            )


def schedules_fall(cascade: Cascade) -> None:
    schedules, _ = _schedules(cascade)
    for strength, schedule in zip(_STRENGTHS, schedules, strict=True):
        if any(b > a + 1e-6 for a, b in itertools.pairwise(schedule)):
            raise Broken(
                f"tokens come back: {schedule} at strength {strength}",
                "non-increasing over the blocks",
                method="profile",
            )
    for (s, weak), (t, strong) in itertools.pairwise(zip(_STRENGTHS, schedules, strict=True)):
        if any(b > a + 1e-6 for a, b in zip(weak, strong, strict=True)):
            raise Broken(
                f"strength {t} keeps more than {s}: {strong} and {weak}",
                "every number is non-increasing in the strength: the projection onto the budget bisects it",
                method="profile",
            )


def strength_zero_keeps_all(cascade: Cascade) -> None:
    schedules, tokens = _schedules(cascade)
    if not all(math.isclose(n, tokens) for n in schedules[0]):
        raise Broken(
            f"strength 0 gives {schedules[0]} of {tokens} tokens",
            "at strength 0 nothing is pruned",
            method="profile",
        )


def schedules_repeat(cascade: Cascade) -> None:
    if _schedules(cascade)[0] != _schedules(cascade)[0]:
        raise Broken("gave another schedule for the same request", "no random numbers", method="profile")


def accumulates(cascade: Cascade) -> None:
    for scores in (torch.rand(2, 5), torch.zeros(2, 5), torch.randn(2, 5)):
        total = cascade.accumulate(cascade.accumulate(None, scores), scores)
        if tuple(total.shape) != (2, 5) or not bool(total.isfinite().all()):
            raise Broken(
                f"accumulated scores have shape {tuple(total.shape)}, finite: {bool(total.isfinite().all())}",
                "one finite number per token, for all-zero and negative scores too",
                method="accumulate",
            )


CASCADE_CHECKS = (
    Check("shape", "a number of patch tokens after each block, above 0", schedules_are_counts),
    Check("monotone", "numbers fall over the blocks and with the strength", schedules_fall),
    Check("strength", "strength 0 prunes nothing", strength_zero_keeps_all),
    Check("determinism", "equal requests give equal schedules", schedules_repeat),
    Check("scores", "accumulated scores are finite, one per token", accumulates),
)

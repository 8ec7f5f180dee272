"""The contract of importance criteria, line by line."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ucc_search.errors import PluginError
from ucc_search.importance import unit_scores
from ucc_search.interfaces import Importance
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.models import tiny_images, tiny_model, tiny_plan


def _importance(criterion: Importance) -> Mapping[tuple[str, int], Tensor]:
    model = tiny_model()
    images = [tiny_images(6), tiny_images(2)] if criterion.needs_images else []
    return unit_scores(model, tiny_plan(model).shape, criterion, images)


def units_are_scored(criterion: Importance) -> None:
    try:
        _importance(criterion)
    except PluginError as error:
        raise Broken(
            str(error), "return scores_U, finite, one per unit of the group", method="score"
        ) from None


def unit_scores_repeat(criterion: Importance) -> None:
    first, second = _importance(criterion), _importance(criterion)
    if any(not torch.equal(first[k], second[k]) for k in first):
        raise Broken(
            "gave other scores for the same model and images",
            "draw random numbers from a generator of a fixed seed",
            method="score",
        )


def the_model_is_left_alone(criterion: Importance) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    unit_scores(model, tiny_plan(model).shape, criterion, [tiny_images(4)] if criterion.needs_images else [])
    if any(not torch.equal(before[k], v) for k, v in model.state_dict().items()) or model.training:
        raise Broken("changed the model", "use probe.masked, and put everything back", method="score")


IMPORTANCE_CHECKS = (
    Check("shape", "finite scores, one for each unit", units_are_scored),
    Check("determinism", "equal models and images give equal scores", unit_scores_repeat),
    Check("model", "the model is left as it was", the_model_is_left_alone),
)

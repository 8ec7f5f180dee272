"""The contract of metrics, line by line."""

from __future__ import annotations

import itertools
import math

from ucc_search.interfaces import Components, Metric
from ucc_search.plan import CompressionPlan
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.models import tiny_model, tiny_plan


def _metric_plans() -> list[CompressionPlan]:
    whole = tiny_plan(tiny_model(), (16, 16, 16))
    return [
        whole,
        whole.replace(tokens_out=[10, 10, 10]),
        whole.replace(tokens_out=[10, 6, 6]),
        whole.replace(tokens_out=[10, 6, 6], mlp_hidden=32),
        whole.replace(tokens_out=[10, 6, 6], mlp_hidden=32, heads=1),
    ]


def prices_are_numbers(metric: Metric) -> None:
    parts = _components()
    for plan in _metric_plans():
        value = metric.value(plan, parts)
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise Broken(f"gave {value!r}", "return a finite number, 0 or more", method="value")
        if metric.value(plan, parts) != value:
            raise Broken(
                "gave another price for the same plan", "no measuring, no random numbers", method="value"
            )


def prices_fall_with_the_plan(metric: Metric) -> None:
    values = [metric.value(plan, _components()) for plan in _metric_plans()]
    for larger, smaller in itertools.pairwise(values):
        if smaller > larger + 1e-9 * abs(larger):
            raise Broken(
                f"a plan with fewer tokens or narrower layers costs more: {smaller} after {larger}",
                "the price must not fall when an integer of the plan grows; budgets are met by bisection",
                method="value",
            )


def _components() -> Components:
    from ucc_search.builtin import default_components

    return default_components()


METRIC_CHECKS = (
    Check("number", "a finite price, 0 or more, the same when asked again", prices_are_numbers),
    Check("monotone", "fewer tokens and narrower layers never cost more", prices_fall_with_the_plan),
)

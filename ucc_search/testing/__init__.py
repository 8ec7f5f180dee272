"""The conformance suite: does a component keep the contract of `ucc_search.interfaces`?

On the command line `ucc-search plugins validate`; in the tests of a plugin a line or two:

    from ucc_search.testing import assert_conforms

    def test_it_conforms():
        assert_conforms(MyScorer())

All checks run on the CPU within seconds, on a Vision Transformer of three blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ucc_search.errors import PluginError
from ucc_search.interfaces import Component
from ucc_search.plugins import BASES
from ucc_search.testing.core import Broken, Check, Result, run_checks

__all__ = ["Broken", "Check", "Result", "assert_conforms", "checks_for", "conformance", "run_checks", "suite"]


def suite(kind: str) -> tuple[Check, ...]:
    """The lines of the contract of a kind (`scorer`, `aggregator`, ...)."""
    from ucc_search.testing import (
        aggregators,
        cascades,
        datasets,
        distillers,
        families,
        importances,
        metrics,
        observers,
        samplers,
        scorers,
    )

    suites = {
        "scorer": scorers.SCORER_CHECKS,
        "aggregator": aggregators.AGGREGATOR_CHECKS,
        "cascade": cascades.CASCADE_CHECKS,
        "distiller": distillers.DISTILLER_CHECKS,
        "importance": importances.IMPORTANCE_CHECKS,
        "sampler": samplers.SAMPLER_CHECKS,
        "metric": metrics.METRIC_CHECKS,
        "observer": observers.OBSERVER_CHECKS,
        "dataset": datasets.DATASET_CHECKS,
        "family": families.FAMILY_CHECKS,
    }
    return (Check("ranges", "declared ranges are of its own parameters, and ranges", _ranges), *suites[kind])


def checks_for(component: Component) -> tuple[Check, ...]:
    """The lines of the contract that a component must keep, by its base class.

    Raises:
        PluginError: it derives from none of `ucc_search.interfaces`.
    """
    for kind, base in BASES.items():
        if isinstance(component, base):
            return suite(kind)
    names = ", ".join(base.__name__ for base in BASES.values())
    raise PluginError(f"{type(component).__name__} derives from none of {names}")


def conformance(component: Component) -> list[Result]:
    """The result of every check."""
    return run_checks(component, checks_for(component))


def assert_conforms(component: Component) -> None:
    """For the tests of a plugin.

    Raises:
        AssertionError: with all lines of the contract that do not hold, where, and what to do.
    """
    broken = [str(r) for r in conformance(component) if not r.passed]
    if broken:
        raise AssertionError(f"{type(component).__name__} breaks its contract\n" + "\n".join(broken))


def _ranges(component: Component) -> None:
    from pydantic import ValidationError

    from ucc_search.config import Range
    from ucc_search.plugin_checks import parameters_of

    factory: Callable[..., Any] = type(component)
    known = parameters_of(factory)
    for name, value in component.ranges.items():
        if known is not None and name not in known:
            raise Broken(f"ranges has {name!r}, which __init__ does not take", "name parameters of __init__")
        try:
            Range.model_validate(value)
        except ValidationError as error:
            raise Broken(
                f"the range of {name} is {value!r} ({error.errors()[0]['msg']})",
                "write it as a space file would: {'low': 0.1, 'high': 1.0}, with log or step, or {'choices': [...]}",
            ) from None

"""Budget-constrained compression search for Vision Transformers: tokens, widths and ranks in one plan.

Names are imported when they are first used, so that `import ucc_search` needs neither torch, ray nor
deepspeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ucc_search.compression import compress, shape_of
    from ucc_search.config import load_config
    from ucc_search.costs import Cost, cost
    from ucc_search.detection import Backbone, detector
    from ucc_search.errors import UserError
    from ucc_search.hookspecs import hookimpl
    from ucc_search.importance import unit_scores
    from ucc_search.interfaces import (
        Aggregator,
        Cascade,
        Components,
        Dataset,
        Distiller,
        Family,
        Importance,
        Metric,
        Observer,
        Sampler,
        Scorer,
    )
    from ucc_search.plan import CompressionPlan, ModelShape
    from ucc_search.plugins import Plugins
    from ucc_search.runner import search
    from ucc_search.runs import Run, load_run
    from ucc_search.saving import load_model
    from ucc_search.widths import towards

_HOMES = {
    "Aggregator": "interfaces",
    "Backbone": "detection",
    "Cascade": "interfaces",
    "Components": "interfaces",
    "CompressionPlan": "plan",
    "Cost": "costs",
    "Dataset": "interfaces",
    "Distiller": "interfaces",
    "Family": "interfaces",
    "Importance": "interfaces",
    "Metric": "interfaces",
    "ModelShape": "plan",
    "Observer": "interfaces",
    "Plugins": "plugins",
    "Run": "runs",
    "Sampler": "interfaces",
    "Scorer": "interfaces",
    "UserError": "errors",
    "compress": "compression",
    "cost": "costs",
    "detector": "detection",
    "hookimpl": "hookspecs",
    "load_config": "config",
    "load_model": "saving",
    "load_run": "runs",
    "search": "runner",
    "shape_of": "compression",
    "towards": "widths",
    "unit_scores": "importance",
}

__all__ = [
    "Aggregator",
    "Backbone",
    "Cascade",
    "Components",
    "CompressionPlan",
    "Cost",
    "Dataset",
    "Distiller",
    "Family",
    "Importance",
    "Metric",
    "ModelShape",
    "Observer",
    "Plugins",
    "Run",
    "Sampler",
    "Scorer",
    "UserError",
    "compress",
    "cost",
    "detector",
    "hookimpl",
    "load_config",
    "load_model",
    "load_run",
    "search",
    "shape_of",
    "towards",
    "unit_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ucc_search' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ucc_search.{_HOMES[name]}"), name)

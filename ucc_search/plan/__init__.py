"""What a model is (`ModelShape`) and what it becomes (`CompressionPlan`). Integers only; no torch."""

from __future__ import annotations

from ucc_search.plan.compression_plan import WHOLE_FIELDS, BlockPlan, CompressionPlan
from ucc_search.plan.model_shape import AffineCost, BlockShape, ModelShape, StageShape, UnitGroup

__all__ = [
    "WHOLE_FIELDS",
    "AffineCost",
    "BlockPlan",
    "BlockShape",
    "CompressionPlan",
    "ModelShape",
    "StageShape",
    "UnitGroup",
]

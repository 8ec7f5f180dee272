"""A latency table by a formula: what parts of these sizes would take on a machine that does nothing else."""

from __future__ import annotations

import itertools

from ucc_search.config import RunConfig
from ucc_search.interfaces import Components
from ucc_search.latency import Conditions, Grid, Latency, LatencyTable
from ucc_search.latency.layout import layout
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins

CONDITIONS = Conditions(4, 1, "fp32", "cpu", "a machine by hand", "0")


def microseconds(name: str, point: tuple[int, ...]) -> float:
    """Of one part; rising in everything, and never a product alone: every part has a constant."""
    if name.startswith("low mlp"):
        tokens, dim, hidden, rank = point
        return 4 + tokens * 2 * rank * (dim + hidden) / 1e3
    if name.startswith("mlp"):
        tokens, dim, hidden = point
        return 3 + tokens * 2 * dim * hidden / 1e3
    if name.startswith("cut"):
        tokens, _, dim, heads = point
        return 20 + tokens * (dim + heads) / 1e3
    if name.startswith("score"):
        tokens, dim, heads = point
        return 10 + tokens * (dim + heads) / 1e3
    if "attention" in name:
        tokens, dim, heads, qk, v = point
        v = v or qk
        return 5 + tokens * heads * (dim * (2 * qk + 2 * v) + tokens * (qk + v)) / 1e3
    return 2 + sum(point) / 1e3


def table_by_hand(config: RunConfig, shape: ModelShape, plugins: Plugins) -> LatencyTable:
    grids = {}
    for part, axes in layout(config, shape, plugins).parts.items():
        points = itertools.product(*(a or (0,) for a in axes))
        grids[part] = Grid(axes, tuple(microseconds(str(part), p) / 1e3 for p in points))
    table = LatencyTable(shape, CONDITIONS, 1.0, 1.0, 0.0, grids)
    dense = Latency(table).value(CompressionPlan.identity(shape), Components(None, _Plain(), None))
    return LatencyTable(shape, CONDITIONS, dense, 1.0, 0.0, grids)


class _Plain:
    """An aggregator, as far as a plan without cuts asks for one."""

    needs_scores = merges = proportional_attention = False

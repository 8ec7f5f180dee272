"""Trial rows and run folders, made by hand."""

from __future__ import annotations

from typing import Any

from ucc_search.config import RunConfig, parse_config
from ucc_search.plan import CompressionPlan
from ucc_search.runs import Run
from ucc_search.store import TrialRow

DENSE_MACS = 10_000_000


def config(**changes: Any) -> RunConfig:
    """A small run; keyword arguments replace whole sections."""
    data: dict[str, Any] = {
        "name": "example",
        "model": {"name": "small_vit"},
        "data": {"name": "digits"},
        "budget": {"macs": ["75%", "50%"]},
    }
    return parse_config({**data, **changes})


def row(id: int, **changes: Any) -> TrialRow:
    """A trained, feasible trial of the search; every id is another architecture."""
    macs = changes.get("macs", 5_000_000)
    values: dict[str, Any] = {
        "state": "ok",
        "method": "search",
        "origin": "search",
        "rung": "train",
        "fidelity": 100,
        "seed": 0,
        "target": "macs=50%",
        "macs": macs,
        "params": 90_000,
        "macs_ratio": macs / DENSE_MACS,
        "limit_macs": 5_000_000,
        "feasible": True,
        "tokens": [49, 49, 25, 16, 16, 16],
        "plan_key": f"plan{id}",
        "kl": 0.1,
        "accuracy": 0.9,
        "test_accuracy": 0.89,
        "scorer": "joint",
        "aggregator": "host",
        "cascade": "per_block",
        "distiller": "two_level",
    }
    return TrialRow(id=id, **{**values, **changes})


def zero_shot(id: int, **changes: Any) -> TrialRow:
    return row(id, **{"rung": "zero-shot", "fidelity": 0, "test_accuracy": None, **changes})


def saved_plan(run: Run, row: TrialRow) -> CompressionPlan:
    """What a trial of a run on disk was."""
    text = (run.path / "trials" / str(row.id) / "plan.json").read_text(encoding="utf-8")
    return CompressionPlan.from_json(text)

"""How long a run will take, judged by what this machine measured before. No torch."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from ucc_search.config import RunConfig
from ucc_search.shapes import cache_folder
from ucc_search.space import KINDS
from ucc_search.store import TrialRow


def _file() -> Path:
    return cache_folder() / "speed.json"


def speeds() -> dict[str, float]:
    """Seconds per GMAC for each rung, from earlier runs on this machine; empty before the first."""
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
        return {k: float(v) for k, v in known.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def remember(rows: Sequence[TrialRow], config: RunConfig) -> None:
    """Keep the median speed of these trials for later estimates."""
    known = speeds()
    for rung in ("zero-shot", "train"):
        measured = [
            row.seconds / (row.macs * _images(row.rung, row.fidelity, config) / 1e9)
            for row in rows
            if row.rung == rung and row.state == "ok" and row.origin != "dense"
        ]
        if measured:
            known[rung] = statistics.median(measured)
    if known:
        _file().parent.mkdir(parents=True, exist_ok=True)
        _file().write_text(json.dumps(known), encoding="utf-8")


def jobs(config: RunConfig) -> dict[str, int]:
    """How many trials of each rung a run will make, as long as none is repeated."""
    search, targets = config.search, _targets(config)
    fixed = len(config.baselines) * targets
    if search.fidelity == "train":
        return {"train": search.trials + fixed * len(search.seeds)}
    sets = math.prod(len(getattr(config.space, kind)) for kind in KINDS)
    trained = 0
    if search.promote:
        promoted = min(search.trials, targets * sets * search.promote)
        trained = (promoted + fixed) * len(search.seeds)
    return {"zero-shot": search.trials + fixed, "train": trained}


def seconds(config: RunConfig, dense_macs: int, steps: int) -> float | None:
    """Expected seconds of a run, None where this machine has not measured enough.

    Args:
        steps: optimiser steps of one training.
    """
    known, total = speeds(), 0.0
    for rung, count in jobs(config).items():
        if not count:
            continue
        if rung not in known:
            return None
        # On average a candidate costs about half of the dense model.
        total += count * known[rung] * 0.5 * dense_macs * _images(rung, steps, config) / 1e9
    return total / (config.search.concurrency or os.cpu_count() or 1)


def _images(rung: str, steps: int, config: RunConfig) -> int:
    return config.data.calibration if rung == "zero-shot" else steps * config.train.batch_size


def _targets(config: RunConfig) -> int:
    return len(config.budget.macs or config.budget.flops or (0,))

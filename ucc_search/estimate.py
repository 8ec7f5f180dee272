"""How long a run will take, judged by what this machine measured before. No torch."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from ucc_search.config import RunConfig, RungConfig
from ucc_search.shapes import cache_folder
from ucc_search.space import KINDS
from ucc_search.store import TrialRow


def _file() -> Path:
    return cache_folder() / "speed.json"


def speeds() -> dict[str, float]:
    """Seconds per GMAC by `_key`, from earlier runs on this machine; empty before the first."""
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
        return {k: float(v) for k, v in known.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _key(rung: str, config: RunConfig) -> str:
    """Small models take longer for a MAC, so each model and data set has a speed of its own."""
    return json.dumps([rung, config.model.name, dict(config.model.args), config.data.name], default=str)


def remember(rows: Sequence[TrialRow], config: RunConfig) -> None:
    """Keep the median speed of these trials for later estimates."""
    known = speeds()
    for rung in ("zero-shot", "train"):
        measured = [
            row.seconds / (row.macs * _images(row.rung, row.fidelity, config) / 1e9)
            for row in rows
            if row.rung == rung and row.state == "ok" and row.origin != "dense" and row.same_as is None
        ]
        if measured:
            known[_key(rung, config)] = statistics.median(measured)
    if known:
        _file().parent.mkdir(parents=True, exist_ok=True)
        _file().write_text(json.dumps(known), encoding="utf-8")


def jobs(config: RunConfig) -> dict[str, int]:
    """How many trials of each rung a run will make, as long as none is repeated and none fails."""
    return {_label(rung): count for rung, count in _counts(config)}


def seconds(config: RunConfig, dense_macs: int, train_images: int) -> float | None:
    """Expected seconds of a run, None where this machine has not measured enough.

    Args:
        train_images: of the training split.
    """
    known, total, behind = speeds(), 0.0, 0
    for rung, count in _counts(config):
        if not count:
            continue
        speed = known.get(_key(rung.rung, config))
        if speed is None:
            return None
        steps = rung.stop(config.train, train_images)
        images = count * _images(rung.rung, steps, config)
        if behind:  # one seed of each trial goes on where the rung below stopped
            images -= count // len(rung.seeds) * _images(rung.rung, behind, config)
        behind = steps
        # On average a candidate costs about half of the dense model.
        total += speed * 0.5 * dense_macs * images / 1e9
    return total / (config.search.concurrency or os.cpu_count() or 1)


def _counts(config: RunConfig) -> list[tuple[RungConfig, int]]:
    """Trials of every rung, the lowest first."""
    search, targets = config.search, _targets(config)
    fixed = len(config.baselines) * targets
    groups = targets * math.prod(len(getattr(config.space, kind)) for kind in KINDS)
    found, climbed = [], search.trials
    for rung in search.rungs:
        if isinstance(rung.keep, int):
            climbed = min(climbed, groups * rung.keep)
        elif rung.keep is not None:
            climbed = min(climbed, groups * math.ceil(rung.keep * climbed / groups))
        seeds = len(rung.seeds) if rung.keep is not None else 1
        baselines = fixed * (len(rung.seeds) if rung.rung == "train" else 1)
        found.append((rung, climbed * seeds + (baselines if rung.rung == "zero-shot" or rung.whole else 0)))
    return found


def _label(rung: RungConfig) -> str:
    if rung.steps is None and rung.epochs is None:
        return rung.rung
    return f"train to {f'step {rung.steps}' if rung.steps else f'epoch {rung.epochs:g}'}"


def _images(rung: str, steps: int, config: RunConfig) -> int:
    return config.data.calibration if rung == "zero-shot" else steps * config.train.batch_size


def _targets(config: RunConfig) -> int:
    return max(1, len(config.budget.targets()[1]))

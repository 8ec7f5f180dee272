"""The latency table that a run needs: from a file, from the cache, or measured. No torch before one is measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ucc_search.config import LatencyConfig, RunConfig
from ucc_search.errors import BudgetError
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.latency.layout import Layout, layout
from ucc_search.latency.table import TABLE_FORMAT, Conditions, Grid, LatencyTable
from ucc_search.plan import ModelShape
from ucc_search.plugins import Plugins
from ucc_search.shapes import cache_folder
from ucc_search.store import replace_text

Log = Callable[[str], None]


def table_for(
    config: RunConfig, shape: ModelShape, plugins: Plugins, *, log: Log | None = None, again: bool = False
) -> LatencyTable | None:
    """The table that the space file's `latency` asks for; None if it asks for none.

    Args:
        log: measure the table if it is not kept yet, and say so; None measures nothing.
        again: do not look for one that is kept.

    Returns:
        None also where the table would have to be measured first, and `log` is None.

    Raises:
        BudgetError: the file of `latency.table` cannot be used for this model and space.
    """
    settings = config.timing
    if settings is None:
        return None
    wanted = layout(config, shape, plugins)
    if settings.table is not None:
        return _from_file(Path(settings.table), wanted, shape)
    path = cache_folder() / "latency" / f"{_key(config, settings, wanted, shape, plugins)}.json"
    with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged: it is measured again
        if not again:
            return _read(path, wanted, shape)
    return None if log is None else _measured(config, settings, wanted, shape, plugins, path, log)


def _from_file(path: Path, wanted: Layout, shape: ModelShape) -> LatencyTable:
    try:
        return _read(path, wanted, shape)
    except OSError as error:
        raise BudgetError(
            f"latency.table: {path} cannot be read ({error.strerror}); write it with ucc-search latency SPACE --out FILE"
        ) from None
    except ValueError as error:
        raise BudgetError(
            f"latency.table: {path}: {error}; write it again with ucc-search latency SPACE --out FILE"
        ) from None


def _read(path: Path, wanted: Layout, shape: ModelShape) -> LatencyTable:
    """ValueError where it is no whole table for this model and space."""
    table = LatencyTable.from_json(path.read_text(encoding="utf-8"))
    if table.shape != shape:
        raise ValueError(f"it is of another model than this {shape.name}, or of other images")
    for part, axes in wanted.parts.items():
        if part not in table.grids or not _reaches(table.grids[part], axes):
            raise ValueError(f"it does not reach as far as this space file ({part})")
    return table


def _reaches(grid: Grid, axes: tuple[tuple[int, ...], ...]) -> bool:
    return len(grid.axes) == len(axes) and all(
        not levels or (bool(own) and own[0] <= levels[0] and own[-1] >= levels[-1])
        for own, levels in zip(grid.axes, axes, strict=True)
    )


def _measured(
    config: RunConfig,
    settings: LatencyConfig,
    wanted: Layout,
    shape: ModelShape,
    plugins: Plugins,
    path: Path,
    log: Log,
) -> LatencyTable:
    import torch

    from ucc_search.latency.measure import measure_table

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BudgetError(
            "latency.device is cuda, but torch sees no GPU here; set it to cpu, or give latency.table"
        )
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    conditions = Conditions(
        settings.batch, settings.threads, settings.precision, device, name, torch.__version__
    )
    count = sum(math.prod(len(a) for a in axes if a) for axes in wanted.parts.values())
    log(f"latency: timing {count} parts of {shape.name}, {conditions}")
    started = time.monotonic()
    table = measure_table(config.model, shape, wanted, conditions, plugins, log=log)
    took = f"latency: {table.dense_ms:.3g} ms uncompressed, measured in {time.monotonic() - started:.0f} s"
    if table.noisy:
        log(took)
        log(
            f"latency: the machine is busy: times of this table differ by up to {100 * table.noise:.0f} % between "
            "rounds; it serves now and is not kept; measure again when it is quiet with "
            "`ucc-search latency SPACE --again`"
        )
        return table
    log(f"{took}; kept for the next run")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, table.to_json())
    return table


def _key(
    config: RunConfig, settings: LatencyConfig, wanted: Layout, shape: ModelShape, plugins: Plugins
) -> str:
    """Of all that decides about the times, as far as it is known without torch."""
    components = {
        f"{kind} {c.refs[kind].name}": plugins.identity(kind, c.refs[kind].name)
        for c in wanted.combinations
        for kind in INFERENCE_KINDS
    }
    facts = {
        "format": TABLE_FORMAT,
        "settings": settings.model_dump(exclude={"table", "measure"}),
        "machine": [cpu_name(), os.cpu_count(), os.environ.get("CUDA_VISIBLE_DEVICES")],
        "versions": [version("torch"), version("timm"), version("ucc-search")],
        "model": [
            config.model.name,
            dict(config.model.args),
            config.model.bound and config.model.bound.sha256,
        ],
        "shape": shape.to_dict(),
        "wanted": wanted.to_dict(),
        "components": components,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def cpu_name() -> str:
    """The processor as the system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

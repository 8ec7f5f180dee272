"""Importance scores of a whole run, measured in this process before the trials that need them. No torch here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ucc_search.binding import bind
from ucc_search.config import RunConfig, dump_config
from ucc_search.errors import ConfigError
from ucc_search.interfaces import ComponentRef
from ucc_search.plan import ModelShape
from ucc_search.plugins import Plugins
from ucc_search.progress import progress_bar
from ucc_search.schedule import scored_kinds
from ucc_search.shapes import model_shape

if TYPE_CHECKING:
    from ucc_search.workbench import Workbench

Log = Callable[[str], None]


def this_bench(config: RunConfig, plugins: Plugins, log: Log = lambda text: None) -> Workbench:
    """This process's bench: data and teacher, for what must be measured before a plan can be made."""
    from ucc_search.workbench import warm_bench

    return warm_bench(dump_config(config), plugins.bundle(), log)


def score_units(config: RunConfig, plugins: Plugins, *, log: Log = lambda text: None) -> dict[str, Any]:
    """Importance by every criterion of the space file, for whatever it allows to be pruned.

    Returns:
        units, min, median and max of every group (`mlp 3`), by the criterion's name and parameters.

    Raises:
        ConfigError: the space file prunes no widths and no depth.
    """
    config = bind(config, plugins)
    criteria = measure_importance(config, plugins, model_shape(config), log)
    if not criteria:
        raise ConfigError("the space file prunes tokens alone; give space.widths ranges to score units for")
    return {
        key: {
            f"{kind} {index}": {
                "units": len(values),
                **{k: float(getattr(values, k)()) for k in ("min", "median", "max")},
            }
            for (kind, index), values in scores.items()
        }
        for key, scores in criteria.items()
    }


def scores_text(found: Mapping[str, Any]) -> str:
    """`score_units` for people."""
    lines = []
    for key, groups in found.items():
        lines.append(f"{key}: {'group':<14} {'units':>6} {'min':>12} {'median':>12} {'max':>12}")
        for name, g in groups.items():
            numbers = " ".join(f"{g[k]:>12.4g}" for k in ("min", "median", "max"))
            lines.append(f"{'':{len(key)}}  {name:<14} {g['units']:>6} {numbers}")
    return "\n".join(lines)


def measure_importance(
    config: RunConfig, plugins: Plugins, shape: ModelShape, log: Log
) -> dict[str, Mapping[tuple[str, int], Any]]:
    """Once, before the trials that all need it; workers read it from the cache."""
    measured = {}
    for key in scored_kinds(config, shape):
        ref, started = ComponentRef.from_dict(json.loads(key)), time.monotonic()
        log(f"importance by {ref.name}: measuring, or reading what is kept")
        with progress_bar(f"importance {ref.name}") as progress:
            measured[key] = this_bench(config, plugins).scores(ref, progress)
        log(f"importance by {ref.name}: {time.monotonic() - started:.1f} s")
    return measured

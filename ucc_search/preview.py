"""What the commands that change nothing show: plan and models inspect. Text and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ucc_search import estimate
from ucc_search.binding import bind, bind_model
from ucc_search.budget import LATENCY, Limit, label
from ucc_search.config import LatencyConfig, RunConfig
from ucc_search.costs import cost
from ucc_search.errors import BudgetError, ConfigError
from ucc_search.interfaces import INFERENCE_KINDS
from ucc_search.ladder import levels
from ucc_search.latency.kept import table_for
from ucc_search.observers import Observers
from ucc_search.plan import ModelShape
from ucc_search.plugins import Plugins
from ucc_search.schedule import NO_TABLE, Scheduler, candidate_of, check_budgets
from ucc_search.shapes import model_shape, train_images
from ucc_search.space import SearchSpace
from ucc_search.store import replace_text
from ucc_search.units import format_macs, format_params


def preview(config: RunConfig, plugins: Plugins) -> dict[str, Any]:
    """What a search would do.

    Returns:
        model, dense (macs, params), reachable (macs from..to, per method), budgets (label,
        max_macs, reachable), latency (measured, conditions, dense_ms, min_ms; or null), not_judged
        (labels of limits on a latency without a table), dimensions, trials (by rung), steps, seconds (or null).

    Raises:
        UserError: what `search` would refuse as well: an unreachable budget, unknown components.
    """
    config = bind(config, plugins)
    shape = model_shape(config)
    table = table_for(config, shape, plugins)
    unmeasured = config.budget.latency_ms is not None and table is None
    judged = config.without_latency() if unmeasured else config
    scheduler = Scheduler(judged, shape, plugins, latency=table)
    space = SearchSpace.of(config.space, shape, plugins)
    check_budgets(judged, scheduler, space, plugins)
    Observers.named(config.observers, plugins)
    images = train_images(config)
    levels(config, images)  # refuses a ladder that does not rise
    dense = scheduler.dense_cost
    return {
        "name": config.name,
        "model": shape.name,
        "tokens": shape.tokens,
        "depth": shape.depth,
        "dense": {"macs": dense.macs, "flops": dense.flops, "params": dense.params},
        "reachable": _reachable(config, scheduler, space, plugins),
        "budgets": [
            {
                "label": b.label,
                "max_macs": b.max_macs,
                "max_params": b.max_params,
                "limits": {x.name: _most(x) for x in b.limits},
            }
            for b in scheduler.budgets
            if b.label
        ],
        "latency": _latency(config, scheduler, space, plugins),
        "not_judged": [label(LATENCY, v) for v in config.budget.latency_ms or ()] if unmeasured else [],
        "dimensions": [d.name for d in space.dimensions],
        "trials": estimate.jobs(config),
        "steps": config.train.total_steps(images),
        "seconds": estimate.seconds(config, dense.macs, images),
        "out": f"results/{config.name}",
    }


def latency_found(
    config: RunConfig, plugins: Plugins, *, out: Path | None, again: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the latency table of a space file, or read the one that is kept.

    Args:
        out: where to write it.

    Returns:
        measured (true), conditions, dense_ms, and min_ms of everything pruned (or null).

    Raises:
        BudgetError: the file of `latency.table` does not fit, or `out` cannot be written.
    """
    config = bind(config, plugins)
    timed = config.model_copy(update={"latency": config.timing or LatencyConfig()})
    shape = model_shape(config)
    table = table_for(timed, shape, plugins, log=log, again=again)
    assert table is not None  # it was asked for, and may be measured
    if out is not None:
        try:
            replace_text(out, table.to_json())
        except OSError as error:
            raise BudgetError(
                f"--out {out}: cannot be written ({error.strerror}); choose another file"
            ) from None
    space = SearchSpace.of(config.space, shape, plugins)
    scheduler = Scheduler(config.without_latency(), shape, plugins, latency=table)
    return _latency(timed, scheduler, space, plugins) or {}


def latency_text(found: dict[str, Any]) -> str:
    """`latency_found`, or what `preview` has of it, for people."""
    if not found["measured"]:
        return NO_TABLE
    least = "" if found["min_ms"] is None else f", {found['min_ms']:.3g} ms with everything pruned"
    return f"{found['dense_ms']:.3g} ms uncompressed{least}: {found['conditions']}"


def _most(limit: Limit) -> str:
    """A limit for people; milliseconds need no name."""
    most = f"{limit.most:.4g} {limit.metric.unit}"
    return most if limit.name == LATENCY else f"{most} of {limit.name}"


def _latency(
    config: RunConfig, scheduler: Scheduler, space: SearchSpace, plugins: Plugins
) -> dict[str, Any] | None:
    """What the table says; None where no latencies are asked for."""
    if config.timing is None:
        return None
    if scheduler.latency is None:
        return {"measured": False}
    table = scheduler.latency.table
    found = {
        "measured": True,
        "conditions": str(table.conditions),
        "dense_ms": table.dense_ms,
        "min_ms": None,
    }
    if (
        config.search.trials
        and not plugins.build("cascade", space.corners()[0].components["cascade"]).needs_model
    ):
        candidate = space.corners()[0]
        parts = plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))
        found["min_ms"] = scheduler.latency.value(scheduler.smallest(candidate), parts)
    return found


def _reachable(
    config: RunConfig, scheduler: Scheduler, space: SearchSpace, plugins: Plugins
) -> dict[str, dict[str, int]]:
    """Cheapest and dearest plan of the search and of every baseline, in MACs."""
    searched = {"search": space.corners()[0]} if config.search.trials else {}
    methods = searched | {b.name: candidate_of(b) for b in config.baselines}
    found = {}
    for name, candidate in methods.items():
        parts = plugins.components(*(candidate.components[k] for k in INFERENCE_KINDS))
        if parts.cascade.needs_model:
            continue
        least, most = (cost(f(candidate), parts) for f in (scheduler.smallest, scheduler.largest))
        found[name] = {"min_macs": least.macs, "max_macs": most.macs, "min_params": least.params}
    return found


def preview_text(found: dict[str, Any]) -> str:
    """`preview` for people."""
    dense = found["dense"]["macs"]
    lines = [
        f"{found['name']}: {found['model']}, {found['tokens']} patch tokens, {found['depth']} blocks",
        f"uncompressed  {format_macs(dense)} for one image ({2 * dense / 1e9:.3g} GFLOPs), "
        f"{format_params(found['dense']['params'])}",
    ]
    for name, ends in found["reachable"].items():
        low, high = (100 * ends[k] / dense for k in ("min_macs", "max_macs"))
        lines.append(f"reachable     {low:.1f}% to {high:.1f}% of the MACs by {name}")
    if found["latency"] is not None:
        lines.append(f"latency       {latency_text(found['latency'])}")
    for budget in found["budgets"]:
        limits = [format_macs(budget["max_macs"])] if budget["max_macs"] else []
        limits += [format_params(budget["max_params"])] if budget["max_params"] else []
        limits += budget["limits"].values()
        most = found["reachable"].get("search", {}).get("max_macs")
        above = (
            " (more than any plan of the search costs)" if most and (budget["max_macs"] or 0) > most else ""
        )
        lines.append(f"budget        {budget['label']}: at most {' and '.join(limits)}{above}")
    lines += [
        f"budget        {name}: not judged yet, no table (ucc-search latency SPACE)"
        for name in found["not_judged"]
    ]
    lines.append(f"searched      {len(found['dimensions'])} parameters: {_short(found['dimensions'])}")
    trials = ", ".join(f"{count} {rung}" for rung, count in found["trials"].items())
    lines.append(f"trials        {trials} ({found['steps']} steps a training)")
    time = found["seconds"]
    known = "unknown until this machine has finished a run" if time is None else f"about {_duration(time)}"
    lines.append(f"time          {known}")
    lines.append(f"writes to     {found['out']}")
    return "\n".join(lines)


def _short(names: Sequence[str]) -> str:
    """Names that differ by a number alone are one range."""
    groups: dict[str, list[str]] = {}
    for name in names:
        stem, _, number = name.rpartition(".")
        groups.setdefault(stem if number.isdigit() else name, []).append(name)
    return ", ".join(g[0] if len(g) == 1 else f"{g[0]} to {g[-1]}" for g in groups.values()) or "none"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def inspect_model(name: str, args: Sequence[str], plugins: Plugins) -> dict[str, Any]:
    """`models inspect`: whether and where a timm model can be compressed.

    Raises:
        ModelError: timm knows no such model.
    """
    import torch

    from ucc_search.compression import capabilities
    from ucc_search.config import ModelConfig
    from ucc_search.models import build_model

    arguments = {}
    for text in args:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--arg {text!r}: expected key=value, for example img_size=112")
        arguments[key] = yaml.safe_load(value)
    with torch.device("meta"):
        config = bind_model(ModelConfig(name=name, args=arguments), plugins)
        model = build_model(config, classes=1000, channels=3)
    found = capabilities(model, name)
    if found["supported"]:
        from ucc_search.plan import CompressionPlan

        price = cost(CompressionPlan.identity(ModelShape.from_dict(found["shape"])))
        found["cost"] = {"macs": price.macs, "params": price.params}
    return found


def inspect_text(found: dict[str, Any]) -> str:
    """`inspect_model` for people."""
    if not found["supported"]:
        reasons = "".join(f"\n  - {r}" for r in found["reasons"])
        return f"{found['model']} ({found['class']}) cannot be compressed by this version:{reasons}"
    tokens, shape, widths = found["tokens"], found["shape"], found["widths"]
    scorers = "all scorers" if tokens["class_token_scorers"] else "scorers that need no class token"
    spare = "yes, exactly" if tokens["head_tokens_only"] else "no, the head reads every token"
    leave = (
        f"{tokens['patch_tokens']} patch tokens can be pruned or merged in each of {len(shape['blocks'])} blocks; "
        f"{tokens['prefix_tokens']} prefix tokens always stay"
    )
    cut = [
        "heads and hidden units of each block",
        *(["channels per head"] if widths["attention_channels"] else []),
        *(["the embedding"] if widths["embed"] else []),
        "half-blocks" if widths["half_blocks"] else "blocks",
    ]
    ranked = [
        *(["query-key products"] if widths["attention_channels"] else []),
        *(["value-output products"] if widths["value_products"] else []),
        "the MLP's matrices",
    ]
    lines = [
        f"{found['model']} ({found['class']}): {format_macs(found['cost']['macs'])}, "
        f"{format_params(found['cost']['params'])} at {shape['image_size'][0]} x {shape['image_size'][1]}",
    ]
    if tokens["can_leave"]:
        lines += [
            f"  tokens        {leave}",
            f"  scoring       {scorers}",
            f"  last block    can be spared for unread tokens: {spare}",
        ]
    else:
        lines.append("  tokens        stay: its keys come from convolutions on the whole grid")
    lines += [
        f"  pooling       {tokens['pool']}",
        f"  widths        can be pruned: {', '.join(cut)}",
        f"  ranks         can be lowered: {', '.join(ranked)}",
    ]
    if not widths["attention_channels"]:
        lines.append(
            "                (channels per head cannot: all heads share the norm of queries and keys)"
        )
    if not widths["embed"]:
        lines.append("                (the embedding cannot: the attention pooling reads it)")
    return "\n".join(lines)

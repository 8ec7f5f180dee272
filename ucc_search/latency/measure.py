"""Time the parts of a model, and finished models beside the uncompressed one. Needs torch."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ucc_search.builtin import default_components
from ucc_search.config import ModelConfig
from ucc_search.interfaces import Components
from ucc_search.latency.layout import Layout
from ucc_search.latency.modules import DTYPES, HALF, WHOLE, Call, Key, Parts, half_depth
from ucc_search.latency.table import NOISY, Axes, Conditions, Grid, Latency, LatencyTable, Part
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins
from ucc_search.timing import Timings, interleave

_SAW_TOOTH = 0.5
"""Attention on a CPU takes up to this share longer where its vectors of 16 tokens are badly filled."""
_CORRECTION = 2.0
"""Scoring and merging are small differences of larger times, good to a factor of about two; one whole model that asks
for more says that one of the times is wrong, and must not rule the many of its parts."""


def measure_table(
    config: ModelConfig,
    shape: ModelShape,
    wanted: Layout,
    conditions: Conditions,
    plugins: Plugins,
    *,
    rounds: int = 11,
    seconds: float = 40.0,
    log: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Time every part at every one of its levels, in interleaved rounds with the whole model.

    Whatever else the machine does only ever adds time, so the fastest round counts. What three rounds do
    not agree on is timed for half as long again.

    Args:
        shape: of the configured model.
        rounds: at most; each times everything once.
        seconds: start no further round after this long.
        log: told of a correction that was cut short.
    """
    parts = Parts(config, shape, conditions, wanted, plugins)
    with _threads(conditions.threads), torch.inference_mode():
        calls = dict(parts.calls())
        named = {repr(key): call for key, call in calls.items()}
        # Models are settled by few numbers, and are as warm in use as they are after some calls.
        least = {repr(key): 0.004 if key[0] in wanted.parts else 0.03 for key in calls}
        time_all = functools.partial(interleave, warmup=1, sync=parts.sync)
        timings = time_all(named, rounds=rounds, min_seconds=least, max_seconds=seconds)
        taken = {name: list(values) for name, values in timings.seconds.items()}
        if rounds > 1:
            _again_where_noisy(time_all, named, least, taken, seconds / 2)
    ms = {key: 1e3 * min(taken[repr(key)]) for key in calls}
    longest = max(ms[key] for key in calls if key[0] not in wanted.parts and key[1] == ())
    # No part takes longer than the slowest model it may be in.
    ms = {key: min(value, longest) for key, value in ms.items()}
    grids = {name: _grid(name, axes, ms) for name, axes in wanted.parts.items()}
    noise = max(_disagreement(taken[repr(WHOLE)]), _ninth_decile(map(_disagreement, taken.values())))
    table = LatencyTable(shape, conditions, ms[WHOLE], 1.0, 0.0, grids, noise)
    table = _right_for_whole_models(table, ms[HALF])
    for c in wanted.combinations:
        table = _right_for_cuts(
            table, parts.cutting_everywhere(), parts.components(c), c.key, ms[c.key, ()], log
        )
    return table


def _again_where_noisy(
    time_all: Callable[..., Timings],
    calls: Mapping[str, Call],
    least: Mapping[str, float],
    taken: dict[str, list[float]],
    seconds: float,
) -> None:
    """Further rounds of what rounds disagree on, added to `taken`, until they agree or `seconds` are over."""
    end = time.monotonic() + seconds
    while True:
        noisy = {name: call for name, call in calls.items() if _disagreement(taken[name]) > NOISY / 2}
        if not noisy or time.monotonic() > end:
            return
        more = time_all(noisy, rounds=3, min_seconds=least, max_seconds=end - time.monotonic())
        for name, values in more.seconds.items():
            taken[name] += values


def _disagreement(seconds: Sequence[float]) -> float:
    """By which share the fastest three rounds differ (of two, both); infinite for a single one."""
    fastest = sorted(seconds)[:3]
    return fastest[-1] / fastest[0] - 1 if len(fastest) > 1 else math.inf


def _ninth_decile(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[(9 * len(ordered)) // 10]


def _right_for_whole_models(table: LatencyTable, half_ms: float) -> LatencyTable:
    """Scaled and shifted so that the uncompressed model and the one with half of its blocks take what they took.

    What is shifted is what a call takes whatever the model: never negative, and at most a fifth of the whole.
    """
    whole, half = (
        Latency(table).value(plan, default_components())
        for plan in (CompressionPlan.identity(table.shape), half_depth(table.shape))
    )
    constant = 0.0
    if whole > half:
        constant = min(
            max(0.0, half_ms - half * (table.dense_ms - half_ms) / (whole - half)), table.dense_ms / 5
        )
    return replace(table, factor=(table.dense_ms - constant) / whole, constant_ms=constant)


def _right_for_cuts(
    table: LatencyTable,
    plan: CompressionPlan,
    components: Components,
    key: str,
    ms: float,
    log: Callable[[str], None],
) -> LatencyTable:
    """The times of scoring and merging scaled so that a whole model that cuts tokens everywhere takes `ms`."""
    cuts = {part: g for part, g in table.grids.items() if part.cuts and part.combination == key}
    free = {name: replace(g, ms=(0.0,) * len(g.ms)) for name, g in cuts.items()}
    predicted = Latency(table).value(plan, components)
    rest = Latency(replace(table, grids={**table.grids, **free})).value(plan, components)
    if predicted <= rest:
        return table
    asked = (ms - rest) / (predicted - rest)
    factor = min(max(asked, 1 / _CORRECTION), _CORRECTION)
    if factor != asked:
        log(
            f"latency: cutting by {key} takes {asked:.2g} times what its parts do in a whole model; "
            f"corrected by {factor:.2g} alone, so such plans may be priced wrongly"
        )
    scaled = {name: replace(g, ms=tuple(factor * v for v in g.ms)) for name, g in cuts.items()}
    return replace(table, grids={**table.grids, **scaled})


def _grid(part: Part, axes: Axes, ms: Mapping[Key, float]) -> Grid:
    points = itertools.product(*(a or (0,) for a in axes))
    if not part.cuts:
        saw_tooth = _SAW_TOOTH if part.what.endswith("attention") else 0.0
        return Grid.rising(axes, [ms[part, p] for p in points], saw_tooth=saw_tooth)
    base = part._replace(what="base")
    # What scoring and merging add to the attention half of the same widths.
    added = [max(0.0, ms[part, p] - ms[base, (p[0], *p[-2:])]) for p in points]
    # A difference of two times is as often too small as too large.
    return Grid.rising(axes, added, saw_tooth=math.inf, but=1 if part.what == "cut" else None)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finished_ms(
    model: nn.Module, dense: nn.Module, shape: ModelShape, how: Mapping[str, Any]
) -> float | None:
    """Milliseconds of a finished model's batch: its share of the dense model's time, times what that is by the table.

    Both are timed in the same rounds, so what else the machine does weighs on both.

    Args:
        how: `Latency.to_measure`.

    Returns:
        None on a machine without the device that the table is of.
    """
    if how["conditions"]["device"] == "cuda" and not torch.cuda.is_available():
        return None
    timings = time_beside(model, dense, shape, Conditions(**how["conditions"]))
    return float(how["dense_ms"]) / timings.speedup("model", "dense").median


def time_beside(
    model: nn.Module,
    dense: nn.Module,
    shape: ModelShape,
    conditions: Conditions,
    *,
    rounds: int = 25,
    seconds: float = 10.0,
) -> Timings:
    """A finished model and the uncompressed one in interleaved rounds; `model` and `dense`.

    Args:
        rounds: at most.
        seconds: start no further round after this long.
    """
    device, dtype = torch.device(conditions.device), DTYPES[conditions.precision]
    size = (conditions.batch, shape.channels, *shape.image_size)
    images = torch.randn(size, device=device, dtype=dtype)
    placed = {"model": _converted(model, device, dtype), "dense": _converted(dense, device, dtype)}
    with _threads(conditions.threads), torch.inference_mode():
        return interleave(
            {name: functools.partial(run, images) for name, run in placed.items()},
            rounds=rounds,
            warmup=1,
            min_seconds=0.02,
            max_seconds=seconds,
            sync=torch.cuda.synchronize if device.type == "cuda" else None,
        )


def _converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy where it would be changed."""
    weight = next(model.parameters())
    same = (weight.device.type, weight.dtype) == (device.type, dtype)
    return (model if same else copy.deepcopy(model).to(device, dtype)).eval()

"""How numbers, components and token counts are written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ucc_search.analysis import Point
from ucc_search.store import TrialRow
from ucc_search.tables.grid import MISSING

JSON_FORMAT = 1
UNITS = "MACs are for one image; what papers on Vision Transformers print as GFLOPs are GMACs."


def compact_tokens(tokens: Sequence[int]) -> str:
    """Runs of equal numbers drawn together: `49x2 25 16x3`."""
    runs = ((n, len(list(group))) for n, group in itertools.groupby(tokens))
    return " ".join(str(n) if times == 1 else f"{n}x{times}" for n, times in runs)


def milliseconds(value: Point | TrialRow) -> str:
    """Milliseconds as measured (with a ! where that is over the limit), and by the table."""
    measured, predicted = value.latency_ms, value.latency_ms_predicted
    by_table = MISSING if predicted is None else f"{predicted:.3g}"
    over = "!" if (value.latency_over or 0.0) > 0 else ""
    return f"{MISSING if measured is None else f'{measured:.3g}'}{over} ({by_table})"


def gmacs_limit(macs: int) -> str:
    """Of these MACs, for `pick --max-gmacs`."""
    return rounded_up(macs / 1e9)


def rounded_up(value: float) -> str:
    """Three significant digits of a limit: the point itself must fit."""
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def accuracy_of(point: Point) -> str:
    return f"{mean_and_std(point.accuracy, point.accuracy_std)} ({point.seeds})"


def mean_and_std(mean: float | None, std: float | None) -> str:
    return hundredths(mean) + (f" ± {100 * std:.2f}" if std is not None else "")


def hundredths(rate: float | None) -> str:
    return MISSING if rate is None else f"{100 * rate:.2f}"


def percent_of(rate: float | None) -> str:
    return f"{hundredths(rate)}%"


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def component_names(item: Point | TrialRow) -> str:
    names = (item.scorer, item.aggregator, item.cascade, item.distiller, item.importance)
    return "/".join(filter(None, names))


def plain_values(value: Any) -> Any:
    """Tuples as lists, a point as a mapping: as JSON would give it back."""
    if isinstance(value, Point):
        return {k: plain_values(v) for k, v in asdict(value).items()}
    if isinstance(value, Mapping):
        return {k: plain_values(v) for k, v in value.items()}
    return [plain_values(v) for v in value] if isinstance(value, list | tuple) else value

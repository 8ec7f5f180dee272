"""A small canvas for charts as inline SVG: axes, marks and text; colours come from the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDE, NARROW = 826, 310
"""Widths in pixels that each chart is drawn at: the page shows the one that fits."""


@dataclass
class Canvas:
    """Collects elements of one SVG."""

    width: float
    height: float
    label: str  # what a screen reader says of the whole chart
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, cls: str = "", text: str | None = None, **attributes: object) -> None:
        """One element; attribute names take `_` for `-`."""
        self.parts.append(element(tag, cls, text, **attributes))

    def text(self, x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> None:
        self.add("text", cls, text, x=x, y=y, text_anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        self.add("line", cls, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Iterable[tuple[float, float]], cls: str) -> None:
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.add("path", cls, d=d)

    def svg(self, *, group: bool = False) -> str:
        """The whole element. A `group` holds parts that can be focused, anything else is one picture."""
        role = "group" if group else "img"
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" height="{self.height:g}" '
            f'role="{role}" aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'
        )


def element(tag: str, cls: str = "", text: str | None = None, **attributes: object) -> str:
    """An SVG element as text."""
    shown = {"class": cls or None, **{k.replace("_", "-"): v for k, v in attributes.items()}}
    inside = "".join(f' {k}="{_value(v)}"' for k, v in shown.items() if v is not None)
    return f"<{tag}{inside}/>" if text is None else f"<{tag}{inside}>{escape(text)}</{tag}>"


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))


@dataclass(frozen=True)
class Scale:
    """Linear, from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


@dataclass(frozen=True)
class LogScale(Scale):
    """Logarithmic, from data above zero to pixels."""

    def __call__(self, value: float) -> float:
        span = math.log(self.high / self.low)
        return self.start + math.log(value / self.low) / span * (self.end - self.start)


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values and a little more."""
    low, high = min(values), max(values)
    more = (high - low) * share or abs(high) * share or 1.0
    return low - more, high + more


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within the range."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within the range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [v for n in powers for m in (1, 2, 5) if low <= (v := m * 10.0**n) <= high]


def decimals(values: Sequence[float]) -> int:
    """Digits after the point that tell neighbouring ticks apart."""
    if len(values) < 2:
        return 2
    step = min(b - a for a, b in itertools.pairwise(values))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return places + (abs(round(step, places) - step) > step * 1e-6)


def axes(
    canvas: Canvas, x: Scale, y: Scale, *, x_name: str, y_name: str, x_count: int = 6, y_count: int = 5
) -> None:
    """Grid lines, tick labels and axis names; the y axis' name stands above it, where it can be read."""
    x_ticks = ticks(x.low, x.high, x_count)
    logarithmic = isinstance(y, LogScale)
    y_ticks = log_ticks(y.low, y.high) if logarithmic else ticks(y.low, y.high, y_count)
    for value in y_ticks:
        canvas.line(x.start, y(value), x.end, y(value), "grid")
        text = f"{value:g}" if logarithmic else f"{value:.{decimals(y_ticks)}f}"
        canvas.text(x.start - 6, y(value) + 4, text, "tick", "end")
    canvas.line(x.start, y.start, x.end, y.start, "axis")
    for value in x_ticks:
        canvas.line(x(value), y.start, x(value), y.start + 4, "axis")
        canvas.text(x(value), y.start + 18, f"{value:.{decimals(x_ticks)}f}", "tick", "middle")
    canvas.text(x.end, y.start + 36, x_name, "name", "end")
    canvas.text(4, y.end - 12, y_name, "name")


def left_of(labels: Iterable[str], longest: int) -> int:
    """Room for labels at the left, in pixels; longer ones are cut to `longest` characters."""
    return 18 + 7 * min(longest, max(map(len, labels), default=0))


def responsive(draw: Callable[[int], str]) -> str:
    """A chart drawn twice, for wide and for narrow screens; the style sheet hides one of them."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'

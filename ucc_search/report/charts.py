"""The report's charts: what each shows is decided here, how it is drawn in `svg`. Pure functions to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ucc_search.analysis import Point
from ucc_search.influence import Importance, Sensitivity
from ucc_search.report.svg import Canvas, LogScale, Scale, axes, decimals, element, left_of, padded, ticks
from ucc_search.spread import Standing


def unit_of(points: Sequence[Point]) -> tuple[str, float]:
    """One unit of MACs for a whole chart."""
    return ("GMACs", 1e9) if max(p.macs for p in points) >= 10**9 else ("MMACs", 1e6)


def shown_quality(point: Point) -> tuple[float, float | None]:
    """What the y axis shows, with its deviation: accuracy in percent, or KL in nats (lower is better)."""
    if point.rung == "train":
        assert point.accuracy is not None
        return 100 * point.accuracy, None if point.accuracy_std is None else 100 * point.accuracy_std
    assert point.kl is not None
    return point.kl, point.kl_std


def front_chart(
    points: Sequence[Point],
    front: Sequence[Point],
    knee: Point | None,
    dense: Point | None,
    width: int,
) -> str:
    """All measured models of a rung; the front drawn through its points, the knee ringed."""
    trained = front[0].rung == "train"
    unit, scale = unit_of([*points, dense] if dense else points)
    spread = [shown_quality(p) for p in [*points, *([dense] if dense else [])]]
    edges = [v + s * (d or 0) for v, d in spread for s in (-1, 1)]
    height = round(width * (0.56 if width > 500 else 1.0))
    macs = [p.macs / scale for p in points] + ([dense.macs / scale] if dense else [])
    x = Scale(*padded(macs, 0.05), 48, width - 14)
    low, high = padded(edges, 0.07)
    y = Scale(low, high, height - 46, 30)
    name = "selection accuracy, %" if trained else "KL to the teacher, nats (less is better)"
    canvas = Canvas(
        width, height, "Models by MACs and quality. Use the arrow keys to go from one to the next."
    )
    axes(canvas, x, y, x_name=f"{unit} for one image", y_name=name, x_count=7 if width > 500 else 4)
    if dense:
        level = y(shown_quality(dense)[0])
        canvas.line(x.start, level, x.end, level, "dense-line")
        canvas.text(x(dense.macs / scale), level - 9, "uncompressed", "note", "end")
    canvas.path([(x(p.macs / scale), y(shown_quality(p)[0])) for p in front], "front-line")
    on_front = {p.id for p in front}
    at = {p.id: (x(p.macs / scale), y(shown_quality(p)[0])) for p in points}
    at |= _apart(at, fixed=on_front, low=x.start + 6, high=x.end - 6)
    for point in sorted(points, key=lambda p: (p.id in on_front, p.macs)):
        ring = knee is not None and point.id == knee.id
        canvas.parts.append(_mark(point, at[point.id][0], y, point.id in on_front, ring))
    if dense:
        canvas.parts.append(_mark(dense, x(dense.macs / scale), y, False, False))
    if knee is not None:
        left, top = at[knee.id]
        canvas.text(left - 13, top - 8, "knee", "note knee-text", "end")
    return canvas.svg(group=True)


def _apart(
    at: Mapping[int, tuple[float, float]], *, fixed: set[int], low: float, high: float
) -> dict[int, tuple[float, float]]:
    """Points that would cover one another, moved apart sideways, so that each can be pointed at."""
    taken = [at[i] for i in at if i in fixed]
    moved = {}
    for i in sorted((i for i in at if i not in fixed), key=lambda i: (at[i][1], i)):
        x, y = at[i]
        tries = [x + side * 13 * n for n in range(4) for side in ((1, -1) if n else (1,))]
        free = (
            t for t in tries if low <= t <= high and all(abs(t - a) > 12 or abs(y - b) > 12 for a, b in taken)
        )
        moved[i] = (next(free, x), y)
        taken.append(moved[i])
    return moved


def point_label(point: Point) -> str:
    """One line about a model: what a tooltip and a screen reader say."""
    quality, deviation = shown_quality(point)
    value = f"{quality:.2f} %" if point.rung == "train" else f"KL {quality:.4f} nats"
    spread = f" ± {deviation:.2f}" if deviation is not None else ""
    return f"trial {point.id}, {point.method}, {100 * point.macs_ratio:.1f} % of the MACs, {value}{spread}"


def _mark(point: Point, x: float, y: Scale, on_front: bool, ring: bool) -> str:
    quality, deviation = shown_quality(point)
    parts = []
    if deviation:
        ends = y(quality - deviation), y(quality + deviation)
        parts.append(element("line", "whisker", x1=x, x2=x, y1=ends[0], y2=ends[1]))
        parts += [element("line", "whisker", x1=x - 3, x2=x + 3, y1=e, y2=e) for e in ends]
    if ring:
        parts.append(element("circle", "ring", cx=x, cy=y(quality), r=10))
    if point.origin == "search":
        parts.append(element("circle", "dot", cx=x, cy=y(quality), r=5.5))
    elif point.origin == "dense":
        parts.append(element("path", "dot", d=_diamond(x, y(quality), 6)))
    else:
        parts.append(element("rect", "dot", x=x - 4.5, y=y(quality) - 4.5, width=9, height=9, rx=1.5))
    # A finger or an unsteady hand needs more than the mark itself.
    parts.append(element("circle", "hit", cx=x, cy=y(quality), r=12))
    label = point_label(point)
    classes = f"pt {point.origin}{' on-front' if on_front else ''}"
    inside = "".join(parts) + element("title", "", label)
    return (
        f'<g class="{classes}" data-id="{point.id}" data-macs="{point.macs}" tabindex="-1" role="img" '
        f'aria-label="{escape(label)}">{inside}</g>'
    )


def _diamond(x: float, y: float, r: float) -> str:
    return f"M{x:.1f} {y - r:.1f}L{x + r:.1f} {y:.1f}L{x:.1f} {y + r:.1f}L{x - r:.1f} {y:.1f}Z"


def standings_chart(standing: Sequence[Standing], target: str, width: int) -> str:
    """Each method's mean beside the best of the budget, with the interval of its distance from it."""
    here = [s for s in standing if s.target == target]
    best = here[0].accuracy
    longest, row = (28 if width > 500 else 15), 24
    left = left_of((s.method for s in here), longest)
    height = 40 + row * len(here)
    values = [100 * s.accuracy for s in here]
    margins = [100 * (s.margin or 0) for s in here]
    edges = [v + m * sign for v, m in zip(values, margins, strict=True) for sign in (-1, 1)]
    x = Scale(*padded(edges), left, width - 12)
    canvas = Canvas(width, height, f"Methods at {target}: mean selection accuracy with intervals")
    for value in _whole(x, 5 if width > 500 else 3):
        canvas.line(x(value[0]), 8, x(value[0]), height - 28, "grid")
        canvas.text(x(value[0]), height - 12, value[1], "tick", "middle")
    canvas.line(x(100 * best), 8, x(100 * best), height - 28, "best-line")
    for i, one in enumerate(here):
        y = 20 + row * i
        level = one.verdict in ("best", "not told apart")
        canvas.text(
            left - 10,
            y + 4,
            _cut(one.method, longest),
            "label" + (" strong" * level),
            "end",
        )
        if one.margin is not None:
            ends = [x(100 * (one.accuracy + sign * one.margin)) for sign in (-1, 1)]
            canvas.line(ends[0], y, ends[1], y, "interval level" if level else "interval")
        cls = "dot level" if level else "dot"
        shape = {"cx": x(100 * one.accuracy), "cy": float(y), "r": 5}
        canvas.add("circle", cls + (" searched" if one.method == "search" else ""), None, **shape)
    return canvas.svg()


def _whole(scale: Scale, count: int) -> list[tuple[float, str]]:
    values = ticks(scale.low, scale.high, count)
    return [(v, f"{v:.{decimals(values)}f}") for v in values]


def _cut(text: str, length: int) -> str:
    """The middle goes: names of one family differ at their ends."""
    if len(text) <= length:
        return text
    front = (length - 1) // 2
    return f"{text[:front]}…{text[front + 1 - length :]}"


def shares_chart(
    shares: Mapping[str, Sequence[float | None]], counts: Mapping[str, Sequence[str]], width: int
) -> str:
    """A row of bars per kind (tokens, attention, MLP), a bar per block: what is left of it.

    Args:
        shares: 0 to 1 by kind; None where that half of the block is gone.
        counts: what stands above each bar.
    """
    left, row = (86 if width > 500 else 74), 62
    depth = max(len(v) for v in shares.values())
    step = (width - left - 8) / depth
    canvas = Canvas(width, row * len(shares) + 20, "; ".join(_sentence(k, counts[k]) for k in shares))
    for i, (kind, values) in enumerate(shares.items()):
        base = row * i + 52
        canvas.text(0, base - 4, kind, "label")
        canvas.line(left, base, width - 8, base, "axis")
        for block, share in enumerate(values):
            x, w = left + step * block + 2, step - 4
            canvas.add("rect", "full", x=x, y=base - 34.0, width=w, height=34.0)
            if share:
                canvas.add(
                    "rect",
                    f"share {kind.split()[0].lower()}",
                    x=x,
                    y=base - 34 * share,
                    width=w,
                    height=34 * share,
                )
            if step > 21 or block % 2 == 0:
                text = counts[kind][block] if share is not None else "gone"
                canvas.text(x + w / 2, base - 38, text, "tick", "middle")
    for block in range(depth):
        if step > 21 or block % 2 == 0:
            canvas.text(left + step * (block + 0.5), row * len(shares) + 10, str(block), "tick", "middle")
    canvas.text(0, row * len(shares) + 10, "block", "tick")
    return canvas.svg()


def _sentence(kind: str, counts: Sequence[str]) -> str:
    return f"{kind} by block: {', '.join(counts)}"


def importance_chart(found: Sequence[Importance], target: str, width: int, most: int = 10) -> str:
    """Bars by parameter, the largest first."""
    here = [f for f in found if f.target == target][:most]
    longest, row = (28 if width > 500 else 15), 22
    left = left_of((f.parameter for f in here), longest)
    height = row * len(here) + 8
    x = Scale(0, max(f.importance for f in here), left, width - 54)
    canvas = Canvas(width, height, f"Importance of searched parameters at {target}")
    for i, one in enumerate(here):
        y = 6 + row * i
        canvas.text(left - 10, y + 13, _cut(one.parameter, longest), "label", "end")
        canvas.add(
            "rect", "bar", x=float(left), y=float(y + 2), width=x(one.importance) - left, height=15.0, rx=2
        )
        canvas.text(x(one.importance) + 6, y + 14, f"{100 * one.importance:.0f} %", "tick")
    return canvas.svg()


def sensitivity_chart(found: Sequence[Sensitivity], target: str, width: int) -> str:
    """Per block and kind: the mean ratio of the best quarter of the trials beside that of the rest."""
    here = [s for s in found if s.target == target]
    kinds = list(dict.fromkeys(s.kind for s in here))
    left, row, gap = left_of((f"{s.kind} {s.block}" for s in here), 20), 22, 10
    height = row * len(here) + gap * len(kinds) + 32
    x = Scale(0.0, 1.0, left, width - 60)
    canvas = Canvas(
        width, height, f"Ratios kept in each block at {target}, best quarter of the trials and others"
    )
    for value, text in _whole(x, 5 if width > 500 else 2):
        canvas.line(x(value), 8, x(value), height - 20, "grid")
        canvas.text(x(value), height - 4, text, "tick", "middle")
    y = 6
    for kind in kinds:
        for one in (s for s in here if s.kind == kind):
            y += row
            canvas.text(left - 10, y, f"{kind} {one.block}", "label", "end")
            canvas.line(x(one.rest), y - 4, x(one.best), y - 4, "link")
            canvas.add("circle", "rest", cx=x(one.rest), cy=y - 4.0, r=4)
            canvas.add("circle", "best-dot", cx=x(one.best), cy=y - 4.0, r=5)
            if one.correlation is not None:
                canvas.text(width - 6, y, f"{one.correlation:+.2f}", "tick", "end")
        y += gap
    return canvas.svg()


def progress_chart(
    series: Mapping[str, Sequence[tuple[int, float]]], y_name: str, x_name: str, width: int
) -> str:
    """Steps over the number of trials; each series is labelled at its end."""
    height = 240 if width > 500 else 220
    right = 92 if len(series) > 1 else 14
    values = [v for points in series.values() for _, v in points]
    x = Scale(0, max(n for points in series.values() for n, _ in points), 58, width - right)
    logarithmic = min(values) > 0 and max(values) > 5 * min(values)
    y = (
        LogScale(min(values) / 1.15, max(values) * 1.15, height - 46, 30)
        if logarithmic
        else Scale(*padded(values, 0.05), height - 46, 30)
    )
    canvas = Canvas(width, height, f"{y_name} over {x_name}")
    axes(canvas, x, y, x_name=x_name, y_name=y_name, x_count=6 if width > 500 else 3, y_count=4)
    taken: list[float] = []
    for i, (name, points) in enumerate(series.items()):
        steps: list[tuple[float, float]] = []
        for n, value in points:
            if steps:
                steps.append((x(n), steps[-1][1]))
            steps.append((x(n), y(value)))
        canvas.path(steps, f"series s{i % 4}")
        if len(series) > 1:
            at = steps[-1][1] + 4
            while any(abs(at - other) < 13 for other in taken):
                at -= 13
            taken.append(at)
            canvas.text(x.end + 6, at, _cut(name, 13), f"label s{i % 4}-text")
    return canvas.svg()

"""Latency of a plan by a table: measured times of the parts a model is made of, and what lies between. No torch.

A model's parts are its stem, the attention half and the MLP half of every kind of block, the places
where tokens are scored and merged, and its head. Each part was timed on a grid of tokens and widths
(`layout`, `measure`); a plan's latency is the sum of its parts, in between by
multilinear interpolation, scaled and shifted so that it is right for whole models.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from ucc_search.errors import BudgetError
from ucc_search.interfaces import ComponentRef, Components, Metric
from ucc_search.plan import BlockShape, CompressionPlan, ModelShape

TABLE_FORMAT = 2
NOISY = 0.25
"""A table whose rounds disagree by more is not kept. Alone on a machine they do by 5 to 15 %, beside two other
programs on two cores by 100 % and more."""
Axes = tuple[tuple[int, ...], ...]


class Part(NamedTuple):
    """What a time is of."""

    what: str  # stem, attention, mlp, cut, score, head, restore or carry, with words before that say of which sort
    number: int | None = None  # of the kind of block, or of the stem's stage
    combination: str = ""  # of scorer and aggregator, where tokens are cut

    @property
    def cuts(self) -> bool:
        """Whether it is timed as a difference, to the attention half without scores or cuts."""
        return self.what in ("cut", "score")

    def __str__(self) -> str:
        """As tables in files name it; `of` is the inverse."""
        return " ".join(str(x) for x in self if x not in (None, ""))

    @classmethod
    def of(cls, text: str) -> Part:
        found = re.fullmatch(r"(\D+?)(?: (\d+)(?: (.+))?)?", text)
        if found is None:
            raise ValueError(f"it has a part {text!r}, which no model has")
        return cls(found[1], None if found[2] is None else int(found[2]), found[3] or "")


@dataclass(frozen=True, slots=True)
class Grid:
    """One part's times: milliseconds at every combination of levels, the last axis fastest.

    An axis of one level cannot be asked for another value; an empty axis does not matter.
    """

    axes: Axes
    ms: tuple[float, ...]

    @classmethod
    def rising(
        cls, axes: Axes, ms: Sequence[float], *, saw_tooth: float = 0.0, but: int | None = None
    ) -> Grid:
        """A grid below `ms` that falls along no axis: its running minimum from the far end.

        A time that a larger size undercuts is taken for one that something else prolonged, so the
        smaller one is believed. Only falls that the hardware is known for are met half-way, between
        the running maximum and that minimum.

        Args:
            saw_tooth: up to which share of the smaller time a fall is the hardware's own; infinite
                where times err both ways, as differences do.
            but: an axis along which it may fall.

        Raises:
            ValueError: not one time per combination of levels.
        """
        sizes = [len(a) for a in axes if a]
        if math.prod(sizes) != len(ms):
            raise ValueError(f"{len(ms)} times for a grid of {math.prod(sizes)}")
        strides, stride = [], len(ms)
        for number, size in [(n, len(a)) for n, a in enumerate(axes) if a]:
            stride //= size
            if number != but:
                strides.append((stride, size))
        down = list(ms)
        for stride, size in strides:
            for i in reversed(range(len(ms))):
                if i // stride % size < size - 1:
                    down[i] = min(down[i], down[i + stride])
        up = list(ms)
        if math.isfinite(saw_tooth):
            up = [min(a, (1 + saw_tooth) * b) for a, b in zip(ms, down, strict=True)]
        for stride, size in strides:
            for i in range(len(ms)):
                if i // stride % size:
                    up[i] = max(up[i], up[i - stride])
        return cls(axes, tuple((a + b) / 2 for a, b in zip(up, down, strict=True)))

    def __call__(self, *point: int) -> float:
        """Milliseconds at this point; beyond the last level of an axis as at that level.

        Raises:
            BudgetError: an axis has one level alone, and this is another.
        """
        corners = [(0, 1.0)]
        for value, levels in zip(point, self.axes, strict=True):
            if not levels:
                continue
            place, size = self._place(value, levels), len(levels)
            low = min(int(place), size - 1)
            share = place - low
            near = [(i * size + low, w * (1.0 - share)) for i, w in corners]
            corners = near + [(i * size + low + 1, w * share) for i, w in corners] if share else near
        return sum(self.ms[i] * w for i, w in corners)

    @staticmethod
    def _place(value: int, levels: tuple[int, ...]) -> float:
        """Where a value lies among the levels, from 0 to the last one's number."""
        if len(levels) == 1 and value != levels[0]:
            raise BudgetError(
                f"the latency table knows a width of {levels[0]} alone where {value} is asked for; "
                "measure it for this space file with `ucc-search latency`"
            )
        i = bisect.bisect_right(levels, value) - 1
        if i < 0:
            return 0.0
        if i == len(levels) - 1:
            return float(i)
        return i + (value - levels[i]) / (levels[i + 1] - levels[i])


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a latency is measured under."""

    batch: int
    threads: int
    precision: str  # fp32, bf16 or fp16
    device: str  # cpu or cuda
    hardware: str  # name of the CPU or GPU
    torch: str  # version

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        return f"a batch of {self.batch} in {self.precision} on {self.hardware}{threads}"


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Times of one model's parts under one set of conditions."""

    shape: ModelShape
    conditions: Conditions
    dense_ms: float  # of the whole uncompressed model, for a batch
    factor: float  # from the sum of parts to a whole model, after which `constant_ms` is added
    constant_ms: float
    grids: Mapping[Part, Grid]
    noise: float = 0.0
    """By which share rounds of its measurement disagreed: of the whole model, and of nine in ten parts at most."""

    @property
    def noisy(self) -> bool:
        """Whether another measurement may well say something else."""
        return self.noise > NOISY

    def to_json(self) -> str:
        grids = {
            str(part): {"axes": g.axes, "ms": [float(f"{v:.6g}") for v in g.ms]}
            for part, g in self.grids.items()
        }
        return json.dumps(
            {
                "format": TABLE_FORMAT,
                "shape": self.shape.to_dict(),
                "conditions": asdict(self.conditions),
                "dense_ms": self.dense_ms,
                "factor": self.factor,
                "constant_ms": self.constant_ms,
                "noise": self.noise,
                "grids": grids,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """The inverse of `to_json`.

        Raises:
            ValueError: not such a table, of another version, or damaged.
        """
        try:
            data = json.loads(text)
            if data["format"] != TABLE_FORMAT:
                raise ValueError(f"its format is {data['format']!r}, expected {TABLE_FORMAT}")
            grids = {
                Part.of(name): Grid(tuple(map(tuple, g["axes"])), tuple(map(float, g["ms"])))
                for name, g in data["grids"].items()
            }
            table = cls(
                ModelShape.from_dict(data["shape"]),
                Conditions(**data["conditions"]),
                float(data["dense_ms"]),
                float(data["factor"]),
                float(data["constant_ms"]),
                grids,
                float(data["noise"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no latency table ({type(error).__name__}: {error})") from None
        for part, grid in grids.items():
            if math.prod(len(a) for a in grid.axes if a) != len(grid.ms):
                raise ValueError(f"its part {str(part)!r} is not whole")
        return table


def block_kinds(shape: ModelShape) -> tuple[int, ...]:
    """For each block the number of its kind: blocks of one kind and stage take equally long."""
    known: dict[tuple[BlockShape, int], int] = {}
    return tuple(known.setdefault(k, len(known)) for k in zip(shape.blocks, shape.stage_of, strict=True))


def components_key(scorer: ComponentRef, aggregator: ComponentRef, *, needs_scores: bool) -> str:
    """Equal for components that are taken to be equally fast: numbers among their parameters do not count."""

    def plain(ref: ComponentRef) -> str:
        words = {k: v for k, v in ref.params.items() if isinstance(v, str | bool)}
        return ComponentRef(ref.name, words).key

    return f"{plain(scorer)} {plain(aggregator)}" if needs_scores else plain(aggregator)


class Latency(Metric):
    """Milliseconds of a batch, by a table; remembers every block it has priced."""

    unit: ClassVar[str] = "ms"

    def __init__(self, table: LatencyTable) -> None:
        self.table = table
        self._kinds = block_kinds(table.shape)
        self._known: dict[Any, float] = {}

    def value(self, plan: CompressionPlan, components: Components) -> float:
        """Milliseconds of what `compress(model, plan, components)` builds.

        Non-decreasing in tokens and widths as long as tokens are cut in the same blocks.

        Raises:
            BudgetError: the table was measured for another model, space or components.
        """
        known, shape, tokens_in = self._known, plan.shape, plan.tokens_in
        scored = components.scored_blocks(plan)
        combination = self._combination(components) if scored else ""
        first, head_block = scored[0] if scored else shape.depth, plan.head_block
        biased = components.aggregator.proportional_attention
        total = self._ends(plan, components, bool(scored))
        sites = set(scored)
        for i, (block, stage) in enumerate(zip(plan.blocks, shape.stage_of, strict=True)):
            key = (
                *(self._kinds[i], block, tokens_in[i], plan.embed_dims[stage], i == head_block),
                *(biased and i > first, combination if i in sites else None),
            )
            ms = known.get(key)
            if ms is None:
                ms = known[key] = self._block(plan, i, biased and i > first, key[-1])
            total += ms
        return total * self.table.factor + self.table.constant_ms

    def to_measure(self) -> dict[str, Any]:
        """What a worker needs to time a finished model as the table was: `conditions` and `dense_ms`."""
        return {"conditions": asdict(self.table.conditions), "dense_ms": self.table.dense_ms}

    def _block(self, plan: CompressionPlan, index: int, biased: bool, combination: str | None) -> float:
        shape, block, kind = plan.shape, plan.blocks[index], self._kinds[index]
        dim, only_head = plan.embed_dims[shape.stage_of[index]], index == plan.head_block
        n_in = plan.tokens_in[index]
        ms = 0.0
        if block.attention:
            what = f"{'head ' if only_head else 'biased ' if biased else ''}attention"
            what = what if block.qk_dim == block.v_dim else f"uneven {what}"
            ms += self._part(
                Part(what, kind), shape.prefix_tokens + n_in, dim, block.heads, block.qk_dim, block.v_dim
            )
        if combination is not None and block.tokens_out < n_in:
            share = round(1000 * block.tokens_out / n_in)
            ms += self._part(Part("cut", kind, combination), n_in, share, dim, block.heads)
        elif combination is not None:
            ms += self._part(Part("score", kind, combination), n_in, dim, block.heads)
        if block.mlp:
            tokens = shape.head_tokens if only_head else shape.prefix_tokens + block.tokens_out
            if block.mlp_rank is None:
                ms += self._part(Part("mlp", kind), tokens, dim, block.mlp_hidden)
            else:
                ms += self._part(Part("low mlp", kind), tokens, dim, block.mlp_hidden, block.mlp_rank)
        return ms

    def _ends(self, plan: CompressionPlan, components: Components, scored: bool) -> float:
        """Stem, head, and what keeping account of the tokens costs."""
        shape, last = plan.shape, plan.blocks[-1].tokens_out
        restored = scored and components.aggregator.merges and shape.pool in ("avg", "avgmax")
        carries = scored or plan.head_block is not None
        key = (plan.embed_dims, plan.head_rank, last, restored, carries, plan.head_block is None)
        if key not in self._known:
            dims = (shape.channels, *plan.embed_dims)
            ms = sum(self._part(Part("stem", s), *pair) for s, pair in enumerate(itertools.pairwise(dims)))
            tokens = shape.tokens if restored and not shape.stages else last
            tokens = shape.head_tokens if plan.head_block is not None else shape.prefix_tokens + tokens
            rank = () if plan.head_rank is None else (plan.head_rank,)
            ms += self._part(Part("low head" if rank else "head"), tokens, plan.embed_dim, *rank)
            ms += self._part(Part("restore"), plan.embed_dim) if restored else 0.0
            ms += self._part(Part("carry"), plan.embed_dim) if carries else 0.0
            self._known[key] = ms
        return self._known[key]

    def _part(self, part: Part, *point: int) -> float:
        grid = self.table.grids.get(part)
        if grid is None:
            raise BudgetError(
                f"the latency table has no part {str(part)!r}: it was measured for another model or space file; "
                "measure it for this one with `ucc-search latency`"
            )
        return grid(*point)

    def _combination(self, components: Components) -> str:
        if components.refs is None:
            raise BudgetError("latency is priced for components that were made by name (Plugins.components)")
        return components_key(*components.refs, needs_scores=components.aggregator.needs_scores)

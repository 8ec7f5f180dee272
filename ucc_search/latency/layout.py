"""Which parts of a model a latency table needs, and at which tokens and widths: as far as a space reaches. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucc_search.config import RunConfig, WidthRange
from ucc_search.interfaces import INFERENCE_KINDS, Cascade, ComponentRef, ScheduleRequest
from ucc_search.latency.table import Axes, Part, block_kinds, components_key
from ucc_search.plan import ModelShape
from ucc_search.plugins import Plugins
from ucc_search.widths import KINDS, Widths

_TOKENS = (0.0, 0.06, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
"""Shares of a block's tokens: closer together below, where fixed costs give way to work, than above, where times are
nearly straight lines."""
_ARRIVING = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the tokens that arrive at a cut: fewer, since a cut is a small part of a block and each costs a row of
`_KEPT`."""
_KEPT = (100, 300, 600, 850, 1000)
"""Per mille of the arriving tokens; the last stands for all but one, since merging one token already takes a sort."""
_VECTOR = 16
_LEVELS = {0: 1, 1: 5, 2: 4}
"""Levels of each width, by how many of a part's widths move; three where more do."""


@dataclass(frozen=True, slots=True)
class Combination:
    """A scorer and an aggregator that may meet in a plan, with the parameters they are timed with."""

    refs: Mapping[str, ComponentRef]
    key: str
    everywhere: bool  # tokens are also scored where none leave
    biased: bool  # attention is proportional to the sizes of tokens after the first cut
    merges: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a model's table with their axes (see `table.Latency`)."""

    parts: Mapping[Part, Axes]
    combinations: tuple[Combination, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": {str(part): axes for part, axes in self.parts.items()},
            "combinations": [c.key for c in self.combinations],
        }


def layout(config: RunConfig, shape: ModelShape, plugins: Plugins) -> Layout:
    """What plans of this space file, its baselines included, are made of."""
    combinations: dict[str, Combination] = {}
    for section in () if shape.stages else (config.space, *config.baselines):
        for found in _combinations(section, config.space.keep_ratio.low, shape, plugins):
            known = combinations.setdefault(found.key, found)
            if found.everywhere and not known.everywhere:
                combinations[found.key] = found
    levels = _Levels(shape, _lowest(config, shape), list(combinations.values()))
    return Layout(levels.parts(), tuple(combinations.values()))


class _Levels:
    """Tokens and widths to measure at."""

    def __init__(
        self, shape: ModelShape, lowest: Mapping[str, tuple[float, int]], combinations: Sequence[Combination]
    ) -> None:
        self.shape, self._lowest, self._combinations = shape, lowest, combinations

    def parts(self) -> dict[Part, Axes]:
        shape, parts = self.shape, dict[Part, Axes]()
        embed = [self._widths(d, "embed", count=3) for d in shape.embed_dims]
        for stage, (before, dims) in enumerate(itertools.pairwise([(shape.channels,), *embed])):
            parts[Part("stem", stage)] = (before, dims)
        kinds = block_kinds(shape)
        for kind in range(max(kinds) + 1):
            index = kinds.index(kind)
            dims = embed[shape.stage_of[index]]
            parts |= self._attention(kind, index, dims) | self._mlp(kind, index, dims)
        return parts | self._ends(embed[-1])

    def _attention(self, kind: int, index: int, dims: tuple[int, ...]) -> dict[Part, Axes]:
        block = self.shape.blocks[index]
        ranked = self._moves("qk_rank") or self._moves("v_rank")
        count = self._count("embed", "heads", "attention", "qk_rank", "v_rank")
        heads = self._widths(block.heads, "heads", count=count)
        query, value = (
            self._widths(block.qk_dim, "attention", k, count=count) for k in ("qk_rank", "v_rank")
        )
        even = min(query, value, key=lambda levels: levels[0])
        start = (self._tokens(index), dims, heads)
        names = ["attention", *(["head attention"] if self.shape.head_tokens else [])]
        names += ["biased attention"] if any(c.biased for c in self._combinations) else []
        # Queries, keys and values are equally wide where they are selected, and on another path where they are not.
        parts: dict[Part, Axes] = {Part(name, kind): (*start, even, ()) for name in names}
        if ranked:
            parts |= {Part(f"uneven {name}", kind): (*start, query, value) for name in names}
        arriving = tuple(n for n in self._counts(index, _ARRIVING) if n > 1)
        ends = [tuple(sorted({a[0], a[-1]})) for a in (dims, heads)]
        for c in self._combinations:
            parts[Part("cut", kind, c.key)] = (arriving, _KEPT, *ends)
            if c.everywhere:
                parts[Part("score", kind, c.key)] = (arriving, *ends)
        return parts

    def _mlp(self, kind: int, index: int, dims: tuple[int, ...]) -> dict[Part, Axes]:
        full = self.shape.blocks[index].mlp_hidden
        hidden = self._widths(full, "mlp", count=self._count("embed", "mlp", "mlp_rank"))
        tokens = self._with_head(self._tokens(index))
        parts: dict[Part, Axes] = {Part("mlp", kind): (tokens, dims, hidden)}
        if self._moves("mlp_rank"):
            parts[Part("low mlp", kind)] = (tokens, dims, hidden, self._ranks("mlp_rank", dims, hidden))
        return parts

    def _ends(self, dims: tuple[int, ...]) -> dict[Part, Axes]:
        shape = self.shape
        tokens = self._with_head(self._tokens(shape.depth - 1))
        parts: dict[Part, Axes] = {Part("head"): (tokens, dims), Part("carry"): (dims,)}
        if self._moves("head_rank") and shape.classifiers:
            parts[Part("low head")] = (tokens, dims, self._ranks("head_rank", dims, (shape.classes,)))
        if any(c.merges for c in self._combinations) and shape.pool in ("avg", "avgmax"):
            parts[Part("restore")] = (dims,)
        return parts

    def _moves(self, kind: str) -> bool:
        return self._lowest[kind][0] < 1.0

    def _count(self, *kinds: str) -> int:
        return _LEVELS.get(sum(map(self._moves, kinds)), 3)

    def _widths(self, full: int, *kinds: str, count: int) -> tuple[int, ...]:
        """From the least that any of these kinds of width reaches to all, evenly."""
        share, step = min(self._lowest[k] for k in kinds)
        least = min(full, max(step, step * math.floor(share * full / step + 0.5))) if share < 1.0 else full
        return _evenly(least, full, count, step)

    def _ranks(self, kind: str, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
        """Up to the rank at which two thin matrices cost what the dense one does."""
        share, step = self._lowest[kind]
        low, high = (a[i] * b[i] // (a[i] + b[i]) for i in (0, -1) for a, b in [(first, second)])
        least = max(step, step * math.floor(share * low / step + 0.5))
        return _evenly(min(least, high), high, 4, step)

    def _tokens(self, index: int) -> tuple[int, ...]:
        """All tokens that may arrive at a block."""
        counts = (
            self._counts(index, _TOKENS) if self._combinations else self.shape.block_tokens[index : index + 1]
        )
        return tuple(self.shape.prefix_tokens + n for n in counts)

    def _counts(self, index: int, shares: Sequence[float]) -> tuple[int, ...]:
        """Patch tokens at these shares of all.

        Attention takes up to half as long again where vectors of 16 are filled badly, so the times of whole vectors
        say little about their neighbours. Half a vector more is in the middle of what lies around.
        """
        whole, prefix = self.shape.block_tokens[index], self.shape.prefix_tokens
        exact = (prefix + s * whole for s in shares)
        typical = (n if n < _VECTOR else _VECTOR * round(n / _VECTOR - 0.5) + _VECTOR // 2 for n in exact)
        return tuple(sorted({*(min(whole, max(1, round(n - prefix))) for n in typical), whole}))

    def _with_head(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({*tokens, *([self.shape.head_tokens] if self.shape.head_tokens else [])}))


def _evenly(low: int, high: int, count: int, step: int) -> tuple[int, ...]:
    """At most `count` numbers, two at least where the ends differ; between the ends multiples of `step`."""
    steps = max(1, count - 1)
    between = (step * round((low + (high - low) * i / steps) / step) for i in range(1, steps))
    return tuple(sorted({low, high, *(n for n in between if low < n < high)}))


def _lowest(config: RunConfig, shape: ModelShape) -> dict[str, tuple[float, int]]:
    """By kind of width the smallest ratio in the space and its baselines, and the step of widths there."""
    sections = [config.space.widths, *(b.widths for b in config.baselines)]
    found = {}
    for kind in KINDS:
        values = [(getattr(w, kind), Widths(w, shape).step(kind)) for w in sections]
        found[kind] = min((v.low if isinstance(v, WidthRange) else v, step) for v, step in values)
    return found


def _combinations(section: Any, low: float, shape: ModelShape, plugins: Plugins) -> Iterator[Combination]:
    """Every scorer with every aggregator, where a cascade cuts tokens at all."""
    refs = {
        kind: [r for ref in getattr(section, kind) for r in _variants(plugins.with_ranges(kind, ref))]
        for kind in INFERENCE_KINDS
    }
    for chosen in itertools.product(*(refs[kind] for kind in INFERENCE_KINDS)):
        parts = plugins.components(*chosen)
        if not _cuts(parts.cascade, low, shape):
            continue
        named, aggregator = dict(zip(INFERENCE_KINDS, chosen, strict=True)), parts.aggregator
        key = components_key(named["scorer"], named["aggregator"], needs_scores=aggregator.needs_scores)
        yield Combination(
            named, key, parts.scores_uncut, aggregator.proportional_attention, aggregator.merges
        )


def _cuts(cascade: Cascade, low: float, shape: ModelShape) -> bool:
    if cascade.needs_model:
        return True
    strongest = cascade.profile(ScheduleRequest(shape, [low] * shape.depth, low if cascade.searched else 0.0))
    return min(strongest(1.0)) < shape.tokens


def _variants(ref: ComponentRef) -> Iterator[ComponentRef]:
    """With every choice of a searched parameter, and the start of every range."""
    values = [
        (v["choices"] if v.get("choices") else [v["low"]]) if isinstance(v, Mapping) else [v]
        for v in ref.params.values()
    ]
    for chosen in itertools.product(*values):
        yield ComponentRef(ref.name, dict(zip(ref.params, chosen, strict=True)))

"""Widths, depth and ranks as ratios: from what a space file allows to integers of a plan. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucc_search.config import WidthRange, WidthsConfig
from ucc_search.errors import PlanError
from ucc_search.plan import BlockPlan, BlockShape, CompressionPlan, ModelShape
from ucc_search.strength import power

RANKS = ("qk_rank", "v_rank", "mlp_rank", "head_rank")
KINDS = ("embed", "heads", "attention", "mlp", "depth", *RANKS)
_MULTIPLES = {
    **{"embed": 8, "heads": 1, "attention": 4, "mlp": 8, "depth": 1},
    **{"qk_rank": 4, "v_rank": 4, "mlp_rank": 8, "head_rank": 8},
}

Ratios = Mapping[str, float]
"""Kept fraction by name: `embed.0`, `heads.3`, `mlp.11`, `depth`."""


@dataclass(frozen=True)
class Widths:
    """What may become narrower in one model.

    Args:
        depth_order: depth units (`UnitGroup`), the least important first; asked only where depth may
            fall. None stands for whole blocks from the deepest on, before anything was measured.
    """

    config: WidthsConfig
    shape: ModelShape
    depth_order: Callable[[], Sequence[int]] | None = None

    def __bool__(self) -> bool:
        return any(self._setting(kind) != 1.0 for kind in KINDS)

    def _setting(self, kind: str) -> float | WidthRange:
        setting: float | WidthRange = getattr(self.config, kind)
        return setting

    def names(self, kind: str) -> list[str]:
        """The coordinates of one kind: per stage, per block, or one."""
        if kind in ("depth", "head_rank"):
            return [kind]
        count = len(self.shape.embed_dims) if kind == "embed" else self.shape.depth
        return [f"{kind}.{i}" for i in range(count)]

    def searched(self) -> dict[str, WidthRange]:
        """Every coordinate with a range, which the budget and the search may move."""
        ranges = ((k, self._setting(k)) for k in KINDS)
        return {name: r for kind, r in ranges if isinstance(r, WidthRange) for name in self.names(kind)}

    def kinds_scored(self) -> set[str]:
        """Kinds of unit groups (`UnitGroup`) whose importance decides something."""
        kinds = {k for k in KINDS if self._setting(k) != 1.0 and k not in RANKS}
        return {"attention" if k == "heads" else k for k in kinds}

    def at(self, base: CompressionPlan, ratios: Ratios | None, strength: float) -> CompressionPlan:
        """The plan with the widths of this strength; see `family`."""
        return self.family(base, ratios)(strength)

    def family(self, base: CompressionPlan, ratios: Ratios | None) -> Callable[[float], CompressionPlan]:
        """Plans by strength: coordinate c keeps r_c^t, t = strength / (1 - strength), of its units.

        No coordinate falls below its bound. It is the family that `per_block` has for tokens, so that
        both answer to one strength.

        Args:
            base: whose other integers stay.
            ratios: proposed by the search; None goes straight to the bounds.
        """
        moving = self.searched()
        fixed = {n: float(getattr(self.config, k)) for k in KINDS for n in self.names(k) if n not in moving}
        proposed = {n: ratios[n] if ratios else r.low for n, r in moving.items()}
        scales = [(n, proposed[n], min(r.low, proposed[n]), *self._scale(n)) for n, r in moving.items()]
        made: dict[tuple[float, ...], CompressionPlan] = {}

        def at(strength: float) -> CompressionPlan:
            kept, integers = dict(fixed), []
            for name, ratio, bound, full, step in scales:
                kept[name] = part = power(ratio, strength, bound)
                steps = math.floor(part * full / step + 0.5) if full else part
                integers.append(-1 if part == 1.0 else steps)  # all units may be no multiple of the step
            key = tuple(integers)  # most strengths round to widths that were met before
            if key not in made:
                made[key] = self._plan(base, kept)
            return made[key]

        return at

    def _scale(self, name: str) -> tuple[int, int]:
        """(All units of a coordinate, step of its widths); 0 units where they depend on other widths."""
        kind, index = split_name(name)
        if kind == "depth":
            return self.shape.depth, 1
        if kind == "embed":
            return self.shape.embed_dims[index], self._multiple(kind)
        full = getattr(self.shape.blocks[index], _FIELD[kind]) if kind in _FIELD else 0
        return full, self._multiple(kind)

    def with_ratio(self, plan: CompressionPlan, name: str, ratio: float) -> CompressionPlan:
        """The plan with one coordinate at this ratio, all others as they are."""
        kept = {n: self._ratio(plan, n) for kind in KINDS for n in self.names(kind)}
        return self._plan(plan, {**kept, name: ratio})

    def ratios(self, plan: CompressionPlan) -> dict[str, float]:
        """The kept fraction of every searched coordinate."""
        return {name: self._ratio(plan, name) for name in self.searched()}

    def _ratio(self, plan: CompressionPlan, name: str) -> float:
        if name == "depth":
            return self._blocks_left(plan) / self.shape.depth
        if name == "head_rank":
            return 1.0 if plan.head_rank is None else plan.head_rank / self._dense_head_rank(plan)
        kind, index = split_name(name)
        if kind == "embed":
            return plan.embed_dims[index] / self.shape.embed_dims[index]
        block = plan.blocks[index]
        if kind == "mlp_rank":
            return 1.0 if block.mlp_rank is None else block.mlp_rank / self._dense_rank(plan, index)
        key = _FIELD[kind]
        return float(getattr(block, key) / getattr(self.shape.blocks[index], key))

    def _dense_rank(self, plan: CompressionPlan, index: int) -> int:
        """The rank at which two thin matrices of this block's MLP cost what the dense one does."""
        dim, hidden = plan.embed_dims[self.shape.stage_of[index]], plan.blocks[index].mlp_hidden
        return max(1, dim * hidden // (dim + hidden))

    def _dense_head_rank(self, plan: CompressionPlan) -> int:
        """As `_dense_rank`, of the classifier."""
        dim, classes = plan.embed_dim, self.shape.classes
        return max(1, dim * classes // max(1, dim + classes))

    def _blocks_left(self, plan: CompressionPlan) -> int:
        return math.ceil(sum(b.attention + b.mlp for b in plan.blocks) / 2)

    def grown(
        self, plan: CompressionPlan, but: Collection[str] = ()
    ) -> Iterator[tuple[str, CompressionPlan]]:
        """The plan with one step more of one coordinate, for each; those that keep least come first."""
        ratios = self.ratios(plan)
        for name in sorted(ratios, key=lambda n: ratios[n]):
            if ratios[name] < 1.0 and name not in but:
                yield name, self._one_step_more(plan, name)

    def _one_step_more(self, plan: CompressionPlan, name: str) -> CompressionPlan:
        if name == "depth":
            return self._with_depth(plan, self._blocks_left(plan) + 1)
        kind, index = split_name(name)
        step = self._multiple(kind)
        if kind == "head_rank":
            assert plan.head_rank is not None  # its ratio is below one
            rank = (plan.head_rank // step + 1) * step
            return plan.replace(head_rank=rank if rank < self._dense_head_rank(plan) else None)
        if kind == "embed":
            dims = list(plan.embed_dims)
            dims[index] = min(self.shape.embed_dims[index], (dims[index] // step + 1) * step)
            return plan.replace(embed_dims=tuple(dims))
        block, full = plan.blocks[index], self.shape.blocks[index]
        if kind == "mlp_rank":
            assert block.mlp_rank is not None  # its ratio is below one
            rank = (block.mlp_rank // step + 1) * step
            dense = rank >= self._dense_rank(plan, index)
            return _with_block(plan, index, {"mlp_rank": None if dense else rank})
        most = getattr(full, _FIELD[kind])
        wider = min(most, (getattr(block, _FIELD[kind]) // step + 1) * step)
        return self._marked(_with_block(plan, index, _fields(kind, wider)))

    def _marked(self, plan: CompressionPlan) -> CompressionPlan:
        """Attention is factorised where ranks may fall and some have; a full rank is the dense layer."""
        if self._setting("qk_rank") == 1.0 and self._setting("v_rank") == 1.0:
            return plan
        pairs = zip(plan.blocks, self.shape.blocks, strict=True)
        lower = any((b.qk_dim, b.v_dim) != (f.qk_dim, f.v_dim) for b, f in pairs)
        return plan.replace(low_rank_attention=lower)

    def step(self, kind: str) -> int:
        """What widths of this kind are multiples of; a fixed ratio is taken as it is: it names a standard architecture."""
        return self._multiple(kind) if isinstance(self._setting(kind), WidthRange) else 1

    def _multiple(self, kind: str) -> int:
        setting = self._setting(kind)
        wanted = setting.multiple if isinstance(setting, WidthRange) else None
        return wanted or _MULTIPLES[kind]

    def _plan(self, base: CompressionPlan, kept: Ratios) -> CompressionPlan:
        def units(name: str, full: int) -> int:
            kind = split_name(name)[0]
            exact, step = kept[name] * full, self.step(kind)
            return full if kept[name] == 1.0 else min(full, max(step, step * math.floor(exact / step + 0.5)))

        dims = tuple(units(f"embed.{i}", d) for i, d in enumerate(self.shape.embed_dims))
        changes: dict[str, list[int]] = {"heads": [], "qk_dim": [], "v_dim": [], "mlp_hidden": []}
        for i, full in enumerate(self.shape.blocks):
            changes["heads"].append(units(f"heads.{i}", full.heads))
            for key, rank in (("qk_dim", "qk_rank"), ("v_dim", "v_rank")):
                channels = units(f"attention.{i}", full.qk_dim)
                changes[key].append(min(channels, units(f"{rank}.{i}", full.qk_dim)))
            changes["mlp_hidden"].append(units(f"mlp.{i}", full.mlp_hidden))
        plan = self._marked(base.replace(embed_dims=dims, **changes))
        if self._setting("mlp_rank") != 1.0:
            dense = [self._dense_rank(plan, i) for i in range(self.shape.depth)]
            ranks = [units(f"mlp_rank.{i}", full) for i, full in enumerate(dense)]
            plan = plan.replace(mlp_rank=[r if r < d else None for r, d in zip(ranks, dense, strict=True)])
        if self._setting("head_rank") != 1.0:
            most = self._dense_head_rank(plan)
            rank = units("head_rank", most)
            plan = plan.replace(head_rank=rank if rank < most else None)
        return self._with_depth(plan, max(1, math.floor(kept["depth"] * self.shape.depth + 0.5)))

    def _with_depth(self, plan: CompressionPlan, blocks: int) -> CompressionPlan:
        if blocks >= self.shape.depth:
            halves = [True] * self.shape.depth, [True] * self.shape.depth
        else:
            order = self.depth_order() if self.depth_order is not None else _deepest_first(self.shape)
            halves = halves_left(self.shape, order, self.shape.depth - blocks)
        flags = tuple(zip(*halves, strict=True))
        if flags == tuple((b.attention, b.mlp) for b in plan.blocks):
            return plan
        # Tokens are set afterwards, by what is left; until then all are kept.
        tokens = list(self.shape.block_tokens)
        return plan.replace(tokens_out=tokens, attention=halves[0], mlp=halves[1])


_FIELD = {
    **{"heads": "heads", "attention": "qk_dim", "mlp": "mlp_hidden"},
    **{"qk_rank": "qk_dim", "v_rank": "v_dim"},
}


def _fields(kind: str, value: int) -> dict[str, int]:
    return {"qk_dim": value, "v_dim": value} if kind == "attention" else {_FIELD[kind]: value}


def split_name(name: str) -> tuple[str, int]:
    """The kind of a coordinate and its place; 0 where there is one alone."""
    kind, _, index = name.partition(".")
    return kind, int(index or 0)


def _with_block(plan: CompressionPlan, index: int, values: Mapping[str, int]) -> CompressionPlan:
    changes: dict[str, list[Any]] = {key: [getattr(b, key) for b in plan.blocks] for key in values}
    for key, value in values.items():
        changes[key][index] = value
    return plan.replace(**changes)


def _deepest_first(shape: ModelShape) -> list[int]:
    blocks = range(shape.depth - 1, -1, -1)
    return [i if shape.stages else 2 * i for i in blocks]


def halves_left(shape: ModelShape, order: Sequence[int], count: int) -> tuple[list[bool], list[bool]]:
    """Which attentions and which MLPs stay when `count` depth units leave, none of them overlapping.

    A pyramid keeps the first block of every stage.

    Args:
        order: units, the first leaves first.

    Reference: UP-ViT, arXiv:2111.15127, section 3.3.
    """
    attention, mlp = [True] * shape.depth, [True] * shape.depth
    firsts = {shape.stage_of.index(s) for s in range(len(shape.stages))}
    for unit in order:
        if not count:
            break
        block = unit if shape.stages else unit // 2
        later = block + (0 if shape.stages or unit % 2 == 0 else 1)
        if block in firsts or not (attention[later] and mlp[block]):
            continue
        attention[later] = mlp[block] = False
        count -= 1
    return attention, mlp


def towards(
    shape: ModelShape, target: ModelShape, depth_order: Sequence[int] | None = None
) -> CompressionPlan:
    """The plan that turns a model into a standard smaller one: DeiT-B into the shape of DeiT-T.

    Args:
        shape: of the larger model.
        target: of the smaller one; as many stages, no more blocks in any, nothing wider.
        depth_order: depth units, least important first; needed where blocks must leave.

    Raises:
        PlanError: the target is not contained in the model.
    """
    mismatch = _mismatch(shape, target)
    if mismatch:
        raise PlanError(f"{shape.name} cannot become {target.name}: {mismatch}")
    order = list(depth_order) if depth_order is not None else _deepest_first(shape)
    attention, mlp = [True] * shape.depth, [True] * shape.depth
    for stage in range(len(shape.embed_dims)):
        own = [i for i, s in enumerate(shape.stage_of) if s == stage]
        surplus = len(own) - target.stage_of.count(stage)
        inside = [u for u in order if (u if shape.stages else u // 2) in own and (shape.stages or u % 2 == 0)]
        left = halves_left(shape, inside, surplus)
        attention = [a and b for a, b in zip(attention, left[0], strict=True)]
        mlp = [a and b for a, b in zip(mlp, left[1], strict=True)]
    if sum(attention) != target.depth:
        raise PlanError(f"depth_order names too few of the blocks that must leave {shape.name}")
    blocks: list[BlockPlan] = []
    wanted = iter(target.blocks)
    for tokens, full, kept in zip(shape.block_tokens, shape.blocks, attention, strict=True):
        model = next(wanted) if kept else full
        blocks.append(_like(model, tokens, kept))
    return CompressionPlan(shape, target.embed_dims, tuple(blocks))


def _like(model: BlockShape, tokens: int, kept: bool) -> BlockPlan:
    return BlockPlan(tokens, model.heads, model.qk_dim, model.v_dim, model.mlp_hidden, None, kept, kept)


def _mismatch(shape: ModelShape, target: ModelShape) -> str | None:
    if len(shape.embed_dims) != len(target.embed_dims) or bool(shape.stages) != bool(target.stages):
        return "it has another number of stages"
    if (shape.block_tokens[0], shape.image_size) != (target.block_tokens[0], target.image_size):
        return "it sees other images or patches"
    if (shape.classes, shape.channels) != (target.classes, target.channels):
        return "it has other classes or channels"
    if (shape.prefix_tokens, shape.pool) != (target.prefix_tokens, target.pool):
        return "it has other tokens beside the patches, or pools them otherwise"
    for stage in range(len(shape.embed_dims)):
        if target.stage_of.count(stage) > shape.stage_of.count(stage):
            return f"it has more blocks in stage {stage}"
    return None

"""The parts of a model as real modules, each a call to time. Needs torch.

The model is compressed to each width on the meta device, where that costs nothing, and what is timed of
it gets random weights, on which speed does not depend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ucc_search.batches import gather_rows
from ucc_search.budget import whole_tokens, with_tokens
from ucc_search.builtin import default_components
from ucc_search.compression import assemble, shape_of
from ucc_search.compression.blocks import CompressedBlock
from ucc_search.compression.selection import first_units
from ucc_search.compression.tokens import initial_state
from ucc_search.config import ModelConfig
from ucc_search.interfaces import INFERENCE_KINDS, Components, Site
from ucc_search.latency.layout import Combination, Layout
from ucc_search.latency.table import Conditions, Part, block_kinds
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan, ModelShape
from ucc_search.plugins import Plugins

Call = Callable[[], Any]
Point = tuple[int, ...]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Key = tuple[Part | str, Point]
"""A part at one point of its grid; a whole model by its name, at none."""
WHOLE: Key = ("whole", ())
HALF: Key = ("half", ())


class Parts:
    """Builds what is timed; modules of one width are shared by all token counts."""

    def __init__(
        self, config: ModelConfig, shape: ModelShape, conditions: Conditions, wanted: Layout, plugins: Plugins
    ) -> None:
        self._config = config.model_copy(update={"pretrained": False})
        self.shape, self._wanted, self._plugins = shape, wanted, plugins
        self._batch, self._dtype = conditions.batch, DTYPES[conditions.precision]
        self._device = torch.device(conditions.device)
        self.sync = torch.cuda.synchronize if self._device.type == "cuda" else None
        with torch.device("meta"):
            self._model = build_model(self._config, classes=shape.classes, channels=shape.channels)
        self._firsts = _one_block_per_kind(self._model, shape)
        self._short = shape_of(self._model, shape.name, image_size=shape.image_size)
        self._inputs: dict[Point, Tensor] = {}
        self._modules: dict[Any, Any] = {}

    def calls(self) -> Iterator[tuple[Key, Call]]:
        """What to time, by part and point."""
        for part, axes in self._wanted.parts.items():
            for point in itertools.product(*(a or (0,) for a in axes)):
                yield from self._part(part, point)
        whole = build_model(self._config, classes=self.shape.classes, channels=self.shape.channels)
        whole, images = self._placed(whole, fresh=False), self._images()
        yield WHOLE, self._on(whole, images)
        half = half_depth(self.shape)
        yield HALF, self._on(assemble(whole, half, default_components(), first_units(half)), images)
        for c in self._wanted.combinations:
            plan, parts = self.cutting_everywhere(), self.components(c)
            cutting = assemble(whole, plan, parts, first_units(plan))
            yield (c.key, ()), self._on(self._placed(cutting, fresh=False), images)

    def cutting_everywhere(self) -> CompressionPlan:
        """A plan that cuts tokens in every block, to a quarter in all."""
        shape = self.shape
        tokens = [shape.tokens * 0.25 ** ((i + 1) / shape.depth) for i in range(shape.depth)]
        base = CompressionPlan.identity(shape).replace(
            head_tokens_only=shape.head_tokens > 0 and shape.depth > 1
        )
        return with_tokens(base, whole_tokens(tokens, shape.tokens))

    def components(self, c: Combination) -> Components:
        return self._plugins.components(*(c.refs[k] for k in INFERENCE_KINDS))

    def _part(self, part: Part, point: Point) -> Iterator[tuple[Key, Call]]:
        what, kind = part.what, part.number or 0
        if what == "stem":
            yield (part, point), self._stem(kind, *point)
        elif part.cuts:
            combination = next(c for c in self._wanted.combinations if c.key == part.combination)
            kept = point[1] if what == "cut" else None
            bare = (point[0], *point[-2:])
            yield (part, point), self._site(kind, combination, *bare, kept)
            if kept in (None, 1000):
                yield (part._replace(what="base"), bare), self._base(kind, combination, *bare)
        elif what in ("head", "low head", "restore", "carry"):
            yield (part, point), self._end(what, *point)
        elif what in ("mlp", "low mlp"):
            yield (part, point), self._mlp(kind, *point)
        else:
            how, uneven = what.removeprefix("uneven ").partition(" ")[0], what.startswith("uneven ")
            yield (part, point), self._attention(kind, how, point, uneven=uneven)

    # Inputs and modules

    def _images(self) -> Tensor:
        shape = (self._batch, self.shape.channels, *self.shape.image_size)
        return torch.randn(shape, device=self._device, dtype=self._dtype)

    def _tokens(self, *sizes: int) -> Tensor:
        if sizes not in self._inputs:
            self._inputs[sizes] = torch.randn(self._batch, *sizes, device=self._device, dtype=self._dtype)
        return self._inputs[sizes]

    def _placed(self, module: nn.Module, *, fresh: bool = True) -> nn.Module:
        """On the device, with random weights where it comes from the meta device."""
        if fresh:
            module.to_empty(device=self._device)
            for weight in (*module.parameters(), *module.buffers()):
                if weight.is_floating_point():
                    nn.init.normal_(weight, std=0.02)
                    weight.abs_()
        return module.to(self._device, self._dtype).eval()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._modules:
            self._modules[key] = make()
        return self._modules[key]

    @staticmethod
    def _on(module: Callable[..., Any], *inputs: Any) -> Call:
        return lambda: module(*inputs)

    def _narrow(self, *, components: Components | None = None, **changes: Any) -> nn.Module:
        """The model of one block per kind, compressed on the meta device."""
        plan = CompressionPlan.identity(self._short).replace(**changes)
        return assemble(self._model, plan, components or default_components(), first_units(plan))

    def _block(
        self, kind: int, dim: int, *, components: Components | None = None, head: bool = False, **changes: Any
    ) -> nn.Module:
        """One block with these widths of its own."""
        short, stage = self._short, self._short.stage_of[kind]
        dims = tuple(dim if s == stage else d for s, d in enumerate(short.embed_dims))
        identity = CompressionPlan.identity(short)
        columns: dict[str, Any] = {k: [getattr(b, k) for b in identity.blocks] for k in changes}
        for key, value in changes.items():
            columns[key][kind] = value
        if not short.stages:  # the others are not needed
            for half in ("attention", "mlp"):
                columns.setdefault(half, [True] * short.depth)
                columns[half] = [kept and i == kind for i, kept in enumerate(columns[half])]
        block = identity.blocks[kind]
        widths = {k: changes.get(k, getattr(block, k)) for k in ("qk_dim", "v_dim")}
        ranked = widths["qk_dim"] != widths["v_dim"]
        small = self._narrow(
            components=components,
            embed_dims=dims,
            head_tokens_only=head,
            low_rank_attention=ranked,
            **columns,
        )
        blocks = small.stages[stage].blocks if short.stages else small.blocks
        return self._placed(blocks[0])

    def _attention(self, kind: int, what: str, point: Point, *, uneven: bool = False) -> Call:
        tokens, dim, heads, qk, v = point
        v = v or qk
        if uneven and v == qk:  # nearly the same sizes, on the path of uneven ones
            qk, v = (qk, v - 1) if v > 1 else (qk + 1, v)
        widths = {"heads": heads, "qk_dim": qk, "v_dim": v}
        x = self._tokens(tokens, dim)
        key = (what, kind, dim, *widths.values())
        if self.shape.stages:
            block = self._once(key, lambda: self._block(kind, dim, **widths))
            grid = self.shape.stages[self._short.stage_of[kind]].grid
            return lambda: x + block.drop_path1(block.attn(block.norm1(x), grid))
        if what == "attention" and qk == v:  # such blocks stay timm's own
            block = self._once(key, lambda: self._block(kind, dim, **widths))
            return lambda: x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        parts = self._biased() if what == "biased" else None

        def make() -> nn.Module:
            block = self._block(kind, dim, components=parts, head=what == "head", mlp=False, **widths)
            block.carries = what == "biased"
            return block

        block = self._once(key, make)
        return self._on(block, x, self._state(x)) if what == "biased" else self._on(block, x)

    def _mlp(self, kind: int, tokens: int, dim: int, hidden: int, rank: int = 0) -> Call:
        x = self._tokens(tokens, dim)
        widths = {"mlp_hidden": hidden, "mlp_rank": min(rank, dim, hidden) or None}
        key = ("mlp", kind, dim, hidden, rank)
        if self.shape.stages:
            block = self._once(key, lambda: self._block(kind, dim, **widths))
            grid = self.shape.stages[self._short.stage_of[kind]].grid
            return lambda: x + block.drop_path2(block.mlp(block.norm2(x), grid))
        block = self._once(key, lambda: self._block(kind, dim, **widths))
        return lambda: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def _site(self, kind: int, c: Combination, arriving: int, dim: int, heads: int, kept: int | None) -> Call:
        """The attention half of a block that cuts to `kept` per mille; None scores alone."""
        shape, parts = self.shape, self.components(c)
        full = self._short.blocks[kind]
        index = block_kinds(shape).index(kind)
        out = arriving if kept is None else min(arriving - 1, max(1, round(kept * arriving / 1000)))
        site = Site(
            index, arriving, out, shape.prefix_tokens, shape.class_token,
            dim, heads, full.qk_dim, full.v_dim, shape.depth, shape.grid,
        )  # fmt: skip
        inner = self._once(("site", kind, dim, heads), lambda: self._block(kind, dim, mlp=False, heads=heads))
        plan = replace(CompressionPlan.identity(self._short).blocks[kind], heads=heads, mlp=False)
        block = CompressedBlock(
            inner, index, plan, parts, site,
            prefix=shape.prefix_tokens, class_token=shape.class_token, grid=shape.grid,
        ).to(self._device, self._dtype).eval()  # fmt: skip
        x = self._tokens(shape.prefix_tokens + arriving, dim)
        return self._on(block, x, self._state(x, owners=c.merges and shape.pool in ("avg", "avgmax")))

    def _base(self, kind: int, c: Combination, arriving: int, dim: int, heads: int) -> Call:
        """The attention half that `_site` does more than."""
        full = self._short.blocks[kind]
        tokens = self.shape.prefix_tokens + arriving
        how = "biased" if c.biased else "attention"
        return self._attention(kind, how, (tokens, dim, heads, full.qk_dim, 0))

    def _stem(self, stage: int, before: int, dim: int) -> Call:
        shape = self.shape
        if not shape.stages:
            small = self._once(("stem", dim), lambda: self._stem_alone(dim))
            return self._on(small.forward_features, self._images())
        dims = list(shape.embed_dims)
        dims[stage] = dim
        if stage:
            dims[stage - 1] = before
        small = self._narrow(embed_dims=tuple(dims))
        part = small.stages[stage]
        part.blocks = nn.ModuleList()
        if not stage:
            first = self._placed(nn.Sequential(small.patch_embed, part))
            return self._on(first, self._images())
        grid = shape.stages[stage - 1].grid
        return self._on(self._placed(part), self._tokens(before, *grid))

    def _stem_alone(self, dim: int) -> nn.Module:
        small = self._narrow(embed_dim=dim)
        small.blocks, small.norm = nn.Identity(), nn.Identity()
        return self._placed(small)

    def _end(self, name: str, *point: int) -> Call:
        shape = self.shape
        if name in ("restore", "carry"):
            x = self._tokens(shape.prefix_tokens + shape.tokens, point[0])
            if name == "carry":
                return lambda: initial_state(x[:, shape.prefix_tokens :], owners=False, trace=False)
            all_tokens = self._state(x).position_BN

            def restore() -> Tensor:
                patches = gather_rows(x, all_tokens, shape.prefix_tokens)
                return torch.cat([x[:, : shape.prefix_tokens], patches], dim=1)

            return restore
        tokens, dim, *rank = point
        model = self._once((name, dim, *rank), lambda: self._head_alone(dim, *rank))
        if shape.stages:
            return self._on(model.forward_head, self._tokens(dim, *shape.stages[-1].grid))
        x = self._tokens(tokens, dim)
        return lambda: model.forward_head(model.norm(x))

    def _head_alone(self, dim: int, rank: int | None = None) -> nn.Module:
        limit = min(dim, self.shape.classes)
        dims = (*self._short.embed_dims[:-1], dim)
        small = self._narrow(embed_dims=dims, head_rank=None if rank is None else min(rank, limit))
        if self.shape.stages:
            small.stages = nn.Sequential()
        else:
            small.blocks = nn.Identity()
        return self._placed(small)

    def _state(self, x: Tensor, owners: bool = False) -> Any:
        return initial_state(x[:, self.shape.prefix_tokens :], owners=owners, trace=False)

    def _biased(self) -> Components:
        return self.components(next(c for c in self._wanted.combinations if c.biased))


def half_depth(shape: ModelShape) -> CompressionPlan:
    """Every other block, and the first of every stage."""
    firsts = {shape.stage_of.index(s) for s in shape.stage_of}
    kept = [i % 2 == 0 or i in firsts for i in range(shape.depth)]
    return CompressionPlan.identity(shape).replace(attention=kept, mlp=kept)


def _one_block_per_kind(model: nn.Module, shape: ModelShape) -> list[int]:
    """Leave the first block of every kind, in place; returns their indices."""
    kinds = block_kinds(shape)
    firsts = [kinds.index(k) for k in range(max(kinds) + 1)]
    if not shape.stages:
        model.blocks = nn.Sequential(*(model.blocks[i] for i in firsts))
        del model.feature_info[len(firsts) :]
        return firsts
    start = 0
    for stage in model.stages:
        stop = start + len(stage.blocks)
        stage.blocks = nn.ModuleList(stage.blocks[i - start] for i in firsts if start <= i < stop)
        start = stop
    return firsts

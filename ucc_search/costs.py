"""Multiply-accumulates (MACs) and parameters of a plan, for one image, in closed form; no torch.

One MAC is two FLOPs; what papers on Vision Transformers print as "GFLOPs" are GMACs. Counted are
convolutions, matrix products, the two products of attention, and what scorers and aggregators
declare. Norms, softmax, GELU, sorting and gathering are not counted, as everywhere in the field.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ucc_search.plan import WHOLE_FIELDS, BlockPlan, BlockShape, CompressionPlan

if TYPE_CHECKING:
    from ucc_search.interfaces import Components, Site


@dataclass(frozen=True, slots=True)
class Cost:
    """Exact cost of one plan for one image, by part; all integers."""

    stem_macs: int
    attention_macs: int
    mlp_macs: int
    scorer_macs: int
    aggregator_macs: int
    head_macs: int
    params: int

    @property
    def macs(self) -> int:
        return (
            self.stem_macs
            + self.attention_macs
            + self.mlp_macs
            + self.scorer_macs
            + self.aggregator_macs
            + self.head_macs
        )

    @property
    def flops(self) -> int:
        return 2 * self.macs


def cost(plan: CompressionPlan, components: Components | None = None) -> Cost:
    """What the model that `compress(model, plan, components)` builds will cost.

    Args:
        plan: the integers.
        components: scorer, aggregator and cascade; the default is UCC's.
    """
    from ucc_search.builtin import default_components

    parts = components or default_components()
    stem, head, params = ends_cost(plan)
    attention = mlp = scorer = aggregator = 0
    for index in range(plan.shape.depth):
        attended, mixed, held = block_cost(plan, index)
        attention, mlp, params = attention + attended, mlp + mixed, params + held
    for site in parts.sites(plan):
        scored, merged, held = site_cost(site, parts)
        scorer, aggregator, params = scorer + scored, aggregator + merged, params + held
    return Cost(stem, attention, mlp, scorer, aggregator, head, params)


def ends_cost(plan: CompressionPlan) -> tuple[int, int, int]:
    """(MACs of the stem, MACs of pooling and head, parameters of both)."""
    stem_macs, stem_params = stem_cost(plan)
    head_macs, head_params = head_cost(plan)
    head_macs += plan.shape.pool_macs_per_token * plan.tokens[-1]
    return stem_macs, head_macs, stem_params + head_params


def block_cost(plan: CompressionPlan, index: int) -> tuple[int, int, int]:
    """(MACs of attention, MACs of the MLP, parameters) of one block."""
    shape, block, full = plan.shape, plan.blocks[index], plan.shape.blocks[index]
    dim = plan.embed_dims[shape.stage_of[index]]
    n_in = shape.prefix_tokens + plan.tokens_in[index]
    only_head = index == plan.head_block
    queries = shape.head_tokens if only_head else n_in
    n_out = shape.head_tokens if only_head else shape.prefix_tokens + block.tokens_out
    return (
        attention_macs(block, full, dim, tokens=n_in, queries=queries),
        mlp_macs(block, full, dim, tokens=n_out),
        block_params(block, full, dim),
    )


def site_cost(site: Site, parts: Components) -> tuple[int, int, int]:
    """(MACs of the scorer, MACs of the aggregator, parameters) of one place where tokens are scored."""
    scores, cuts = parts.aggregator.needs_scores, site.tokens_out < site.tokens_in
    return (
        parts.scorer.macs(site) if scores else 0,
        parts.aggregator.macs(site) if cuts else 0,
        parts.scorer.params(site) if scores else 0,
    )


class Price(NamedTuple):
    """What a budget looks at first; integers for one image."""

    macs: int
    params: int


class Pricer:
    """Prices plans of one model as `cost` does, and remembers every block it has priced.

    A projection asks for the price of hundreds of plans that differ in a block or two.
    """

    def __init__(self, components: Components) -> None:
        self._parts = components
        self._known: dict[Any, Price] = {}

    def __call__(self, plan: CompressionPlan) -> Price:
        """Equal to `cost(plan, components)`."""
        known, shape = self._known, plan.shape
        ends = (plan.blocks[-1].tokens_out, *(getattr(plan, name) for name in WHOLE_FIELDS))
        if ends not in known:
            stem, head, held = ends_cost(plan)
            known[ends] = Price(stem + head, held)
        macs, params = known[ends]
        head_block, tokens_in, last = plan.head_block, plan.tokens_in, plan.embed_dim
        for i, (block, n_in, stage) in enumerate(zip(plan.blocks, tokens_in, shape.stage_of, strict=True)):
            key = (i, block, n_in, plan.embed_dims[stage], last, i == head_block)
            price = known.get(key)
            if price is None:
                price = known[key] = self._block(plan, i)
            macs += price[0]
            params += price[1]
        if self._parts.scores_uncut:
            for i in self._parts.scored_blocks(plan):
                if plan.blocks[i].tokens_out == tokens_in[i]:
                    scored, merged, held = site_cost(self._parts.site(plan, i), self._parts)
                    macs, params = macs + scored + merged, params + held
        return Price(macs, params)

    def _block(self, plan: CompressionPlan, index: int) -> Price:
        """One block, with what cutting its tokens costs."""
        attention, mlp, held = block_cost(plan, index)
        price = Price(attention + mlp, held)
        if plan.blocks[index].tokens_out == plan.tokens_in[index] or index == plan.head_block:
            return price
        scored, merged, held = site_cost(self._parts.site(plan, index), self._parts)
        return Price(price.macs + scored + merged, price.params + held)


def stem_cost(plan: CompressionPlan) -> tuple[int, int]:
    """(MACs, parameters) of the patch embedding; in a pyramid of all of them, with the stages' norms."""
    shape = plan.shape
    macs, params = shape.stem.at(plan.embed_dim)
    before = shape.channels
    for stage, dim in zip(shape.stages, plan.embed_dims, strict=False):
        macs += stage.tokens * stage.patch * before * dim
        params += stage.patch * before * dim + 5 * dim  # bias, the embedding's norm, the stage's norm
        before = dim
    return macs, params


def head_cost(plan: CompressionPlan) -> tuple[int, int]:
    """(MACs, parameters) of final norms, pooling and classifiers; with `head_rank` these are thin pairs."""
    macs, params = plan.shape.head.at(plan.embed_dim)
    if plan.head_rank is None:
        return macs, params
    dim, classes = plan.embed_dim, plan.shape.classes
    more = plan.shape.classifiers * (plan.head_rank * (dim + classes) - dim * classes)
    return macs + more, params + more


def attention_macs(block: BlockPlan, full: BlockShape, dim: int, *, tokens: int, queries: int) -> int:
    """MACs of one attention layer; `tokens` arrive, prefix tokens included."""
    if not block.attention:
        return 0
    keys, reduce = tokens, 0
    if full.kv_reduction > 1:
        keys = full.kv_tokens
        reduce = keys * full.kv_reduction**2 * dim * dim
    query = queries * dim * block.heads * block.qk_dim
    key_value = keys * dim * block.heads * (block.qk_dim + block.v_dim)
    attend = queries * keys * block.heads * (block.qk_dim + block.v_dim)
    project = queries * block.heads * block.v_dim * dim
    return reduce + query + key_value + attend + project


def mlp_macs(block: BlockPlan, full: BlockShape, dim: int, *, tokens: int) -> int:
    """MACs of one MLP; with `mlp_rank` every matrix is a product of two thin ones."""
    if not block.mlp:
        return 0
    matrix = dim * block.mlp_hidden if block.mlp_rank is None else block.mlp_rank * (dim + block.mlp_hidden)
    return tokens * (full.mlp_matrices * matrix + full.mlp_kernel * block.mlp_hidden)


def block_params(block: BlockPlan, full: BlockShape, dim: int) -> int:
    """Parameters of one block; the norm and LayerScale of an absent half-block go with it."""
    params = 0
    half_vectors = full.channel_vectors // 2
    if block.attention:
        qkv = block.heads * (2 * block.qk_dim + block.v_dim)
        out = block.heads * block.v_dim
        params += half_vectors * dim
        params += qkv * dim + (qkv if full.qkv_bias else 0)
        params += full.qk_norm_vectors * block.qk_dim + full.attn_norm_vectors * out
        params += out * dim + (dim if full.proj_bias else 0)
        if full.kv_reduction > 1:
            params += full.kv_reduction**2 * dim * dim + 3 * dim  # with bias and norm
    if block.mlp:
        hidden, rank = block.mlp_hidden, block.mlp_rank
        params += half_vectors * dim
        params += full.mlp_matrices * (dim * hidden if rank is None else rank * (dim + hidden))
        params += ((full.mlp_matrices - 1) * hidden + dim) if full.mlp_bias else 0
        params += full.mlp_norm_vectors * hidden
        params += (full.mlp_kernel + 1) * hidden if full.mlp_kernel else 0
    return params


_METHODS = {
    "tokens": ("tokens_out",),
    "widths": ("embed_dims", "heads", "qk_dim", "v_dim", "mlp_hidden"),
    "depth": ("attention", "mlp"),
    "ranks": ("mlp_rank", "head_rank"),
    "unread": ("head_tokens_only",),
}
"""The fields of a plan by the method that changes them."""
_RANKS = ("qk_dim", "v_dim")  # where attention is factorised


def saved_macs(plan: CompressionPlan, components: Components) -> dict[str, float]:
    """How many of the saved MACs each method took: its Shapley value over the order of application.

    Cutting tokens saves less of a narrow model than of a wide one, so no single order is fair; the
    mean over all orders is, and its parts sum to what is saved.

    Returns:
        MACs by method: tokens, widths, depth, ranks, and unread (the last block's work on tokens
        that nothing reads). What scoring and merging cost is charged to the tokens.
    """
    dense = CompressionPlan.identity(plan.shape)
    methods = dict(_METHODS)
    if plan.low_rank_attention:
        methods["widths"] = tuple(f for f in methods["widths"] if f not in _RANKS)
        methods["ranks"] = (*methods["ranks"], *_RANKS)
    used = [m for m, fields in methods.items() if _taken(dense, plan, fields) != dense]
    price: dict[frozenset[str], int] = {}
    for size in range(len(used) + 1):
        for group in map(frozenset, itertools.combinations(used, size)):
            fields = [f for m in group for f in methods[m]]
            price[group] = cost(_taken(dense, plan, fields), components).macs
    saved = dict.fromkeys(_METHODS, 0.0)
    for order in itertools.permutations(used):
        for place, method in enumerate(order):
            before, after = frozenset(order[:place]), frozenset(order[: place + 1])
            saved[method] += (price[before] - price[after]) / math.factorial(len(used))
    return saved


def _taken(dense: CompressionPlan, plan: CompressionPlan, fields: Sequence[str]) -> CompressionPlan:
    """The dense plan with these fields of another."""
    whole = {f: getattr(plan, f) for f in fields if f in WHOLE_FIELDS}
    blocks = {f: [getattr(b, f) for b in plan.blocks] for f in fields if f not in whole}
    return dense.replace(**whole, **blocks)

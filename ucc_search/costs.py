"""Multiply-accumulates (MACs) and parameters of a plan, for one image, in closed form; no torch.

One MAC is two FLOPs; what papers on Vision Transformers print as "GFLOPs" are GMACs. Counted are
convolutions, matrix products, the two products of attention, and what scorers and aggregators
declare. Norms, softmax, GELU, sorting and gathering are not counted, as everywhere in the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucc_search.plan import BlockPlan, BlockShape, CompressionPlan

if TYPE_CHECKING:
    from ucc_search.interfaces import Components


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
    shape, dim = plan.shape, plan.embed_dim
    stem_macs, stem_params = shape.stem.at(dim)
    head_macs, head_params = shape.head.at(dim)
    head_macs += shape.pool_macs_per_token * plan.tokens[-1]
    attention = mlp = params = scorer = aggregator = 0
    last = shape.depth - 1
    for i, (block, full) in enumerate(zip(plan.blocks, shape.blocks, strict=True)):
        n_in = shape.prefix_tokens + plan.tokens_in[i]
        only_head = plan.head_tokens_only and i == last
        queries = shape.head_tokens if only_head else n_in
        n_out = shape.head_tokens if only_head else shape.prefix_tokens + block.tokens_out
        attention += attention_macs(block, dim, tokens=n_in, queries=queries)
        mlp += mlp_macs(block, full, dim, tokens=n_out)
        params += block_params(block, full, dim)
    for site in parts.sites(plan):
        scorer += parts.scorer.macs(site) if parts.aggregator.needs_scores else 0
        params += parts.scorer.params(site) if parts.aggregator.needs_scores else 0
        aggregator += parts.aggregator.macs(site) if site.tokens_out < site.tokens_in else 0
    return Cost(stem_macs, attention, mlp, scorer, aggregator, head_macs, stem_params + head_params + params)


def attention_macs(block: BlockPlan, dim: int, *, tokens: int, queries: int) -> int:
    """MACs of one attention layer; `tokens` are keys and values, prefix tokens included."""
    if not block.attention:
        return 0
    query = queries * dim * block.heads * block.qk_dim
    key_value = tokens * dim * block.heads * (block.qk_dim + block.v_dim)
    attend = queries * tokens * block.heads * (block.qk_dim + block.v_dim)
    project = queries * block.heads * block.v_dim * dim
    return query + key_value + attend + project


def mlp_macs(block: BlockPlan, full: BlockShape, dim: int, *, tokens: int) -> int:
    """MACs of one MLP; with `mlp_rank` every matrix is a product of two thin ones."""
    if not block.mlp:
        return 0
    matrix = dim * block.mlp_hidden if block.mlp_rank is None else block.mlp_rank * (dim + block.mlp_hidden)
    return tokens * full.mlp_matrices * matrix


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
    if block.mlp:
        hidden, rank = block.mlp_hidden, block.mlp_rank
        params += half_vectors * dim
        params += full.mlp_matrices * (dim * hidden if rank is None else rank * (dim + hidden))
        params += ((full.mlp_matrices - 1) * hidden + dim) if full.mlp_bias else 0
        params += full.mlp_norm_vectors * hidden
    return params

"""Which embedding channels, attention channels and hidden units a narrower plan keeps.

A unit belongs to a group: `embed` (a channel of one stage, kept or deleted in every layer of it),
`attention` (channel j of one block, row-major by head: the same row of Q, K and V and column of the
projection), `mlp` (a hidden unit of one block) or `depth` (half-steps, see `ucc_search.widths`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ucc_search.errors import PlanError
from ucc_search.plan import BlockPlan, BlockShape, CompressionPlan

HeadsBy = Literal["fuse", "remove"]
Scores = Mapping[tuple[str, int], Tensor]
"""Importance of every unit by group kind and index (of the stage or block); higher is kept."""


class BlockSelection(NamedTuple):
    """Indices that one block keeps, ascending within a head."""

    query_key: Tensor  # int64, flat channels of Q and K, head after head
    value: Tensor  # int64, flat channels of V and columns of the projection
    hidden: Tensor  # int64


class Selection(NamedTuple):
    """Indices that a model keeps."""

    embed: tuple[Tensor, ...]  # ascending, per stage
    blocks: tuple[BlockSelection, ...]


def select(plan: CompressionPlan, scores: Scores, *, heads: HeadsBy = "fuse") -> Selection:
    """The most important units of every group, as many as the plan keeps.

    Args:
        scores: for every group that the plan narrows; others may be absent.
        heads: how fewer heads are made. `fuse`: the channels of all heads are cut into as many
            contiguous groups as there are new heads, and the best of a group form its head (UP-ViT,
            arXiv:2111.15127, section 3.3). `remove`: the heads with the highest sums stay.

    Raises:
        PlanError: a group that the plan narrows has no scores, or not one per unit; or heads that share
            a norm of queries and keys would be fused.
    """
    plan = unfactorized(plan)
    shape = plan.shape
    embed = tuple(
        _top(_scores(scores, "embed", i, full, kept), kept)
        for i, (kept, full) in enumerate(zip(plan.embed_dims, shape.embed_dims, strict=True))
    )
    blocks = []
    for i, (block, full) in enumerate(zip(plan.blocks, shape.blocks, strict=True)):
        hidden = _scores(scores, "mlp", i, full.mlp_hidden, block.mlp_hidden)
        query_key, value = _channels(block, full, scores, i, heads)
        blocks.append(BlockSelection(query_key, value, _top(hidden, block.mlp_hidden)))
    return Selection(embed, tuple(blocks))


def unfactorized(plan: CompressionPlan) -> CompressionPlan:
    """The plan before its ranks are brought down: what is selected, all of which is factorised then."""
    if not plan.low_rank_attention:
        return plan
    full = plan.shape.blocks
    return plan.replace(qk_dim=[b.qk_dim for b in full], v_dim=[b.v_dim for b in full])


def narrows(plan: CompressionPlan) -> list[tuple[str, int]]:
    """The groups, by kind and index, of which the plan keeps a part."""
    plan = unfactorized(plan)
    shape = plan.shape
    found = [
        ("embed", i)
        for i, (kept, full) in enumerate(zip(plan.embed_dims, shape.embed_dims, strict=True))
        if kept != full
    ]
    for i, (block, full) in enumerate(zip(plan.blocks, shape.blocks, strict=True)):
        if _attention(block) != _attention(full):
            found.append(("attention", i))
        if block.mlp_hidden != full.mlp_hidden:
            found.append(("mlp", i))
    return found


def _attention(block: BlockPlan | BlockShape) -> tuple[int, int, int]:
    return block.heads, block.qk_dim, block.v_dim


def first_units(plan: CompressionPlan) -> Selection:
    """Some selection of the plan's sizes, for a model whose weights are loaded afterwards."""
    ones: dict[tuple[str, int], Tensor] = {
        ("embed", i): torch.zeros(dim) for i, dim in enumerate(plan.shape.embed_dims)
    }
    for i, full in enumerate(plan.shape.blocks):
        ones["mlp", i] = torch.zeros(full.mlp_hidden)
        ones["attention", i] = torch.zeros(full.heads * full.qk_dim)
    shared = any(full.qk_norm_vectors for full in plan.shape.blocks)
    return select(plan, ones, heads="remove" if shared else "fuse")


def _channels(
    block: BlockPlan, full: BlockShape, scores: Scores, index: int, heads: HeadsBy
) -> tuple[Tensor, Tensor]:
    same = _attention(block) == _attention(full)
    width = full.heads * full.qk_dim
    score = _scores(scores, "attention", index, width, 0 if not same else width)
    if heads == "remove" or block.heads == full.heads:
        per_head = score.view(full.heads, full.qk_dim)
        kept = _top(per_head.sum(dim=1), block.heads)
        groups = [torch.arange(full.qk_dim) + h * full.qk_dim for h in kept.tolist()]
    elif full.qk_norm_vectors:
        raise PlanError(
            f"blocks[{index}] cannot fuse {full.heads} heads into {block.heads}: the norm of queries and keys is "
            "shared by all heads, so a head must stay whole; set fewer_heads: remove"
        )
    else:
        bounds = [g * width // block.heads for g in range(block.heads + 1)]
        groups = [torch.arange(a, b) for a, b in itertools.pairwise(bounds)]
    if max(block.qk_dim, block.v_dim) > min(len(g) for g in groups):
        raise PlanError(
            f"blocks[{index}] has {block.heads} heads of {max(block.qk_dim, block.v_dim)} channels, but only "
            f"{min(len(g) for g in groups)} to choose from for each"
        )
    query_key, value = (
        torch.cat([g[_top(score[g], dim)] for g in groups]) for dim in (block.qk_dim, block.v_dim)
    )
    return query_key, value


def _scores(scores: Scores, kind: str, index: int, units: int, kept: int) -> Tensor:
    found = scores.get((kind, index))
    if found is None:
        if kept < units:
            raise PlanError(f"the plan narrows {kind}[{index}], for which there are no importance scores")
        return torch.zeros(units)
    if tuple(found.shape) != (units,):
        raise PlanError(f"{kind}[{index}] has scores of shape {tuple(found.shape)}, expected ({units},)")
    return found.detach().cpu().double()


def _top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest, ascending; of equals the first."""
    return score.argsort(descending=True, stable=True)[:count].sort().values

"""Cut a model to a plan's widths and depth, in place: the kept units, everywhere they appear (UP-ViT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ucc_search.compression.attention import PyramidAttention
from ucc_search.compression.parts import (
    Parts,
    blocks_of,
    classifiers,
    is_pyramid,
    last_convolution,
    parts_of,
    stage_norms,
)
from ucc_search.compression.selection import BlockSelection, Selection
from ucc_search.compression.slicing import keep_conv, keep_linear, keep_token, keep_vectors
from ucc_search.plan import BlockPlan, BlockShape, CompressionPlan

_TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")


def narrow(model: nn.Module, plan: CompressionPlan, selection: Selection) -> None:
    """Cut every layer of a dense model to the selection; parameter names stay.

    Half-blocks that the plan leaves out are not removed here.
    """
    shape = plan.shape
    for block, part, wanted, full, stage in zip(
        blocks_of(model), plan.blocks, selection.blocks, shape.blocks, shape.stage_of, strict=True
    ):
        _narrow_block(parts_of(block), part, full, selection.embed[stage], wanted)
    for norms, channels in zip(stage_norms(model), selection.embed, strict=True):
        for norm in norms:
            keep_vectors(norm, channels)
    _narrow_stems(model, selection.embed)
    for head in classifiers(model):
        keep_linear(head, columns=selection.embed[-1])
    model.num_features = model.head_hidden_size = plan.embed_dim
    if not is_pyramid(model):
        model.embed_dim = plan.embed_dim
    for number, info in enumerate(model.feature_info):
        info["num_chs"] = plan.embed_dims[number if is_pyramid(model) else 0]


def _narrow_stems(model: nn.Module, embed: tuple[Tensor, ...]) -> None:
    keep_conv(last_convolution(model.patch_embed), outputs=embed[0])
    if is_pyramid(model):
        for stage, before, after in zip(model.stages[1:], embed, embed[1:], strict=False):
            keep_conv(stage.downsample.proj, inputs=before, outputs=after)
        return
    for name in _TOKENS:
        keep_token(model, name, embed[0])


def _narrow_block(
    parts: Parts, plan: BlockPlan, full: BlockShape, embed: Tensor, wanted: BlockSelection
) -> None:
    for norm in parts.embed_norms:
        keep_vectors(norm, embed)
    width = full.heads * full.qk_dim
    for layer, roles in parts.projections:
        rows = [wanted.value if r == "v" else wanted.query_key for r in roles]
        keep_linear(layer, rows=torch.cat([i * width + r for i, r in enumerate(rows)]), columns=embed)
        if roles.startswith("q"):
            _fold_scale(layer, len(wanted.query_key), plan.qk_dim / full.qk_dim)
    keep_linear(parts.attention_out, rows=embed, columns=wanted.value)
    keep_vectors(parts.attention_norm, wanted.value)
    if parts.reduction is not None:
        keep_conv(parts.reduction, inputs=embed, outputs=embed)
    for layer in parts.hidden_in:
        keep_linear(layer, rows=wanted.hidden, columns=embed)
    keep_vectors(parts.hidden_norm, wanted.hidden)
    if parts.depthwise is not None:
        keep_conv(parts.depthwise, outputs=wanted.hidden)
    keep_linear(parts.hidden_out, rows=embed, columns=wanted.hidden)
    attention = parts.attention
    attention.num_heads, attention.head_dim = plan.heads, plan.qk_dim
    attention.attn_dim = plan.heads * plan.v_dim
    attention.scale = attention.scale * math.sqrt(full.qk_dim / plan.qk_dim)


def _fold_scale(projection: nn.Linear, queries: int, ratio: float) -> None:
    """Attention of d' channels divides by sqrt(d'); the queries make up for it, so that logits keep 1/sqrt(d).

    With it, the narrow model is what timm's own layer of that width computes.
    """
    with torch.no_grad():
        for part in (projection.weight, projection.bias):
            if part is not None:
                part[:queries] *= math.sqrt(ratio)


def rebuild_stages(model: nn.Module, plan: CompressionPlan) -> None:
    """Drop the blocks that a pyramid's plan leaves out, and give the others attention of free widths."""
    first = 0
    for stage in model.stages:
        kept = []
        for i, block in enumerate(stage.blocks, start=first):
            part, full = plan.blocks[i], plan.shape.blocks[i]
            if not part.present:
                continue
            same = (part.heads, part.qk_dim, part.v_dim) == (full.heads, full.qk_dim, full.v_dim)
            if not same or plan.embed_dims != plan.shape.embed_dims:
                block.attn = PyramidAttention(block.attn, part.heads, part.qk_dim, part.v_dim)
            kept.append(block)
        first += len(stage.blocks)
        stage.blocks = nn.ModuleList(kept)

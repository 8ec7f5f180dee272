"""The layers of a dense model by what pruning does with them: the same for every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from timm.layers import Mlp
from timm.models.pvt_v2 import Block as PyramidBlock
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn


class Parts(NamedTuple):
    """One block. Channels of the embedding enter and leave it, those of attention and MLP are its own."""

    attention: nn.Module
    mlp: nn.Module
    embed_norms: tuple[nn.Module, ...]  # norms and LayerScales over the embedding
    projections: tuple[tuple[nn.Linear, str], ...]  # with what its rows hold, in order: "qkv", "q" or "kv"
    attention_out: nn.Linear
    hidden_in: tuple[nn.Linear, ...]  # one, or two of a gated MLP
    hidden_out: nn.Linear
    attention_norm: nn.Module | None = None  # over what the projection reads
    hidden_norm: nn.Module | None = None
    reduction: nn.Conv2d | None = None  # shrinks the grid of keys and values
    depthwise: nn.Conv2d | None = None  # over hidden units


def parts_of(block: nn.Module) -> Parts:
    """The layers of a timm `Block` of a Vision Transformer or of a PVTv2."""
    attn, mlp = block.attn, block.mlp
    if isinstance(block, PyramidBlock):
        reduced = (attn.norm,) if attn.sr is not None else ()
        return Parts(
            attn,
            mlp,
            (block.norm1, block.norm2, *reduced),
            ((attn.q, "q"), (attn.kv, "kv")),
            attn.proj,
            (mlp.fc1,),
            mlp.fc2,
            reduction=attn.sr,
            depthwise=mlp.dwconv,
        )
    return Parts(
        attn,
        mlp,
        (block.norm1, block.norm2, block.ls1, block.ls2),
        ((attn.qkv, "qkv"),),
        attn.proj,
        (mlp.fc1,) if isinstance(mlp, Mlp) else (mlp.fc1_g, mlp.fc1_x),
        mlp.fc2,
        attention_norm=attn.norm,
        hidden_norm=mlp.norm,
    )


def is_pyramid(model: nn.Module) -> bool:
    return isinstance(model, PyramidVisionTransformerV2)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All blocks, shallow ones first."""
    return [b for s in model.stages for b in s.blocks] if is_pyramid(model) else list(model.blocks)


def first_norms(model: nn.Module) -> list[list[nn.Module]]:
    """Per stage, the norms that stand before its blocks and write its embedding."""
    if is_pyramid(model):
        return [[e.norm] for e in (model.patch_embed, *(s.downsample for s in model.stages[1:]))]
    embed_norm = getattr(model.patch_embed, "norm", None)
    return [[m for m in (embed_norm, model.norm_pre) if m is not None]]


def stage_norms(model: nn.Module) -> list[list[nn.Module]]:
    """Per stage, the norms over its embedding that belong to no block."""
    last = [[s.norm] for s in model.stages] if is_pyramid(model) else [[model.norm, model.fc_norm]]
    return [before + after for before, after in zip(first_norms(model), last, strict=True)]


def classifiers(model: nn.Module) -> list[nn.Linear]:
    """The classifier, or both of a distilled DeiT; none where the head was removed."""
    return [h for h in (model.head, getattr(model, "head_dist", None)) if isinstance(h, nn.Linear)]


def last_convolution(stem: nn.Module) -> nn.Conv2d:
    """The convolution of a patch embedding that makes the embedding channels."""
    return [m for m in stem.modules() if isinstance(m, nn.Conv2d)][-1]


def run_from(model: nn.Module, index: int, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Logits from the input of block `index`, without the blocks before it.

    Args:
        x: as the block receives it, [B, T, D].
        grids: of every stage (used by pyramids).
    """
    if not is_pyramid(model):
        for block in model.blocks[index:]:
            x = block(x)
        return model.forward_head(model.norm(x))
    first = 0
    for number, stage in enumerate(model.stages):
        end = first + len(stage.blocks)
        if index < end:
            rows, columns = grids[number]
            if index < first:  # x comes from the stage before
                x = stage.downsample(x).flatten(1, 2)
            for block in stage.blocks[max(0, index - first) :]:
                x = block(x, (rows, columns))
            x = stage.norm(x).transpose(1, 2).unflatten(2, (rows, columns))
        first = end
    return model.forward_head(x)

"""Read the shape of a PVTv2: four resolutions, keys and values on a reduced grid, convolutions in the MLP."""

from __future__ import annotations

from timm.models.pvt_v2 import Attention, Block, MlpWithDepthwiseConv, PyramidVisionTransformerV2
from torch import nn

from ucc_search.plan import AffineCost, BlockShape, ModelShape, StageShape


def pyramid_refusals(model: PyramidVisionTransformerV2) -> list[str]:
    """Why this PVTv2 cannot be compressed here; empty if it can."""
    reasons = []
    for block in (b for s in model.stages for b in s.blocks):
        if type(block) is not Block or type(block.mlp) is not MlpWithDepthwiseConv:
            reasons.append(f"its block {type(block).__name__} is not timm's")
        elif type(block.attn) is not Attention:
            reasons.append("it is compressed already; compress the dense model with another plan")
        elif block.attn.pool is not None:
            reasons.append("its linear attention pools keys to 7 x 7, which is not supported")
        if reasons:
            break
    return reasons


def pyramid_shape(
    model: PyramidVisionTransformerV2, name: str, image_size: tuple[int, int] | None
) -> ModelShape:
    """The integers of a PVTv2 at one image size."""
    rows, columns = image_size or _default_size(model)
    embeds = [model.patch_embed, *(s.downsample for s in model.stages[1:])]
    stages, blocks, grid = [], [], (rows, columns)
    for stage, embed in zip(model.stages, embeds, strict=True):
        conv = embed.proj
        grid = (_strided(grid[0], conv, 0), _strided(grid[1], conv, 1))
        patch = conv.kernel_size[0] * conv.kernel_size[1]
        stages.append(StageShape(grid, conv.out_channels, len(stage.blocks), patch))
        blocks += [_block_shape(b, grid) for b in stage.blocks]
    outputs, bias = 0, 0
    if isinstance(model.head, nn.Linear):
        outputs, bias = model.head.out_features, model.head.out_features
    return ModelShape(
        name=name,
        image_size=(rows, columns),
        channels=model.patch_embed.proj.in_channels,
        classes=model.num_classes,
        grid=stages[0].grid,
        prefix_tokens=0,
        class_token=False,
        embed_dim=stages[-1].embed_dim,
        pool=model.global_pool,
        head_tokens=0,
        blocks=tuple(blocks),
        stem=AffineCost(),
        head=AffineCost(macs_per_channel=outputs, params=bias, params_per_channel=outputs),
        stages=tuple(stages),
    )


def _block_shape(block: Block, grid: tuple[int, int]) -> BlockShape:
    attention = block.attn
    stride = attention.sr.stride[0] if attention.sr is not None else 1
    kernel = block.mlp.dwconv.kernel_size
    return BlockShape(
        heads=attention.num_heads,
        qk_dim=attention.head_dim,
        v_dim=attention.head_dim,
        mlp_hidden=block.mlp.fc1.out_features,
        qkv_bias=attention.q.bias is not None,
        kv_reduction=stride,
        kv_tokens=(grid[0] // stride) * (grid[1] // stride) if stride > 1 else 0,
        mlp_kernel=kernel[0] * kernel[1],
    )


def _strided(size: int, conv: nn.Conv2d, axis: int) -> int:
    padding = conv.padding[axis]
    assert isinstance(padding, int)
    return (size + 2 * padding - conv.kernel_size[axis]) // conv.stride[axis] + 1


def _default_size(model: PyramidVisionTransformerV2) -> tuple[int, int]:
    _, rows, columns = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return rows, columns

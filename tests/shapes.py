"""Shapes of the DeiT and PVTv2 families, written by hand: tests of plans and costs need no model."""

from __future__ import annotations

import random

from ucc_search.plan import AffineCost, BlockShape, CompressionPlan, ModelShape, StageShape

_WIDTH = {"tiny": 192, "small": 384, "base": 768}


def deit_shape(size: str) -> ModelShape:
    """DeiT (or ViT) of this size: patches of 16, images of 224, 12 blocks, 1000 classes."""
    dim = _WIDTH[size]
    block = BlockShape(heads=dim // 64, qk_dim=64, v_dim=64, mlp_hidden=4 * dim)
    pixels = 3 * 16 * 16
    return ModelShape(
        name=f"deit_{size}_patch16_224",
        image_size=(224, 224),
        channels=3,
        classes=1000,
        grid=(14, 14),
        prefix_tokens=1,
        class_token=True,
        embed_dim=dim,
        pool="token",
        head_tokens=1,
        blocks=(block,) * 12,
        # Patch convolution; its weight and bias, the class token, and a position for each of 197 tokens.
        stem=AffineCost(macs_per_channel=196 * pixels, params_per_channel=pixels + 1 + 1 + 197),
        # Final norm (2 vectors) and classifier.
        head=AffineCost(macs_per_channel=1000, params=1000, params_per_channel=2 + 1000),
    )


_PYRAMID = {  # blocks and embedding of every stage
    "b0": ((2, 2, 2, 2), (32, 64, 160, 256)),
    "b1": ((2, 2, 2, 2), (64, 128, 320, 512)),
    "b2": ((3, 4, 6, 3), (64, 128, 320, 512)),
}


def pvt_shape(size: str) -> ModelShape:
    """PVTv2 of this size: four resolutions, images of 224, 1000 classes."""
    depths, dims = _PYRAMID[size]
    blocks: list[BlockShape] = []
    heads, ratios, strides = (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1)
    for depth, dim, head, ratio, stride in zip(depths, dims, heads, ratios, strides, strict=True):
        # The strides leave 7 x 7 keys in every stage.
        blocks += depth * [
            BlockShape(
                heads=head,
                qk_dim=dim // head,
                v_dim=dim // head,
                mlp_hidden=ratio * dim,
                kv_reduction=stride,
                kv_tokens=49 if stride > 1 else 0,
                mlp_kernel=9,
            )
        ]
    grids = [(side, side) for side in (56, 28, 14, 7)]
    return ModelShape(
        name=f"pvt_v2_{size}",
        image_size=(224, 224),
        channels=3,
        classes=1000,
        grid=grids[0],
        prefix_tokens=0,
        class_token=False,
        embed_dim=dims[-1],
        pool="avg",
        head_tokens=0,
        blocks=tuple(blocks),
        stem=AffineCost(),
        head=AffineCost(macs_per_channel=1000, params=1000, params_per_channel=1000),
        stages=tuple(map(StageShape, grids, dims, depths, (49, 9, 9, 9))),
    )


def small_shape(*, tokens: tuple[int, int] = (4, 4), depth: int = 4) -> ModelShape:
    """A few narrow blocks."""
    block = BlockShape(heads=2, qk_dim=4, v_dim=4, mlp_hidden=16)
    return ModelShape(
        name="small",
        image_size=(8, 8),
        channels=1,
        classes=10,
        grid=tokens,
        prefix_tokens=1,
        class_token=True,
        embed_dim=8,
        pool="token",
        head_tokens=1,
        blocks=(block,) * depth,
        stem=AffineCost(),
        head=AffineCost(),
    )


def random_plan(shape: ModelShape, rng: random.Random) -> CompressionPlan:
    """Any plan that a model of this shape can have: widths, heads, depth and tokens."""
    tokens: list[int] = []
    blocks: list[dict[str, int]] = []
    left = shape.tokens
    cuts = not shape.stages and rng.random() < 0.7
    for full in shape.blocks:
        heads = rng.randint(1, full.heads)
        most = full.heads // heads * full.qk_dim
        attention, mlp = (rng.random() < 0.8 for _ in range(2))
        blocks.append(
            {
                "heads": heads,
                "qk_dim": full.qk_dim if full.qk_norm_vectors else rng.randint(1, most),
                "v_dim": rng.randint(1, full.v_dim if full.qk_norm_vectors else most),
                "mlp_hidden": rng.randint(1, full.mlp_hidden),
                "attention": attention,
                "mlp": attention if shape.stages else mlp,
            }
        )
        left = rng.randint(1, left) if cuts and attention and rng.random() < 0.7 else left
        tokens.append(left)
    return CompressionPlan.identity(shape).replace(
        embed_dims=tuple(rng.randint(1, d) for d in shape.embed_dims),
        head_tokens_only=bool(shape.head_tokens) and rng.random() < 0.5,
        tokens_out=list(shape.block_tokens) if shape.stages else tokens,
        **{key: [b[key] for b in blocks] for key in blocks[0]},
    )

"""Read a timm model's shape, and say what can be compressed in it and what not, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, Mlp, PatchDropout, SwiGLU
from timm.layers.attention import Attention
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from ucc_search.compression.parts import classifiers, last_convolution
from ucc_search.compression.pyramid import pyramid_refusals, pyramid_shape
from ucc_search.errors import ModelError
from ucc_search.plan import AffineCost, BlockShape, ModelShape

_POOLS = ("token", "avg", "avgmax", "max", "map", "")


def shape_of(
    model: nn.Module, name: str | None = None, *, image_size: tuple[int, int] | None = None
) -> ModelShape:
    """The integers that plans and costs need, read from a timm `VisionTransformer` or PVTv2.

    Args:
        image_size: rows and columns of the images, for a model that takes any size; the default is
            the one timm gives it.

    Raises:
        ModelError: listing every reason why this model cannot be compressed.
    """
    label = name or _name(model)
    reasons = refusals(model)
    if reasons:
        raise ModelError(f"{label} cannot be compressed: {'; '.join(reasons)}")
    if isinstance(model, PyramidVisionTransformerV2):
        return pyramid_shape(model, label, image_size)
    assert isinstance(model, VisionTransformer)
    distilled = hasattr(model, "dist_token")
    grid = tuple(model.patch_embed.grid_size)
    shape = ModelShape(
        name=label,
        image_size=tuple(model.patch_embed.img_size),
        channels=_input_channels(model),
        classes=model.num_classes,
        grid=(grid[0], grid[1]),
        prefix_tokens=model.num_prefix_tokens,
        class_token=model.has_class_token,
        embed_dim=model.embed_dim,
        pool=model.global_pool,
        head_tokens=(2 if distilled else 1) if model.global_pool == "token" else 0,
        blocks=tuple(_block_shape(b) for b in model.blocks),
        stem=_stem_cost(model),
        head=_head_cost(model),
        pool_macs_per_token=_pool_macs_per_token(model),
    )
    return shape


def refusals(model: nn.Module) -> list[str]:
    """Why this model cannot be compressed here; empty if it can."""
    if isinstance(model, PyramidVisionTransformerV2):
        return pyramid_refusals(model)
    if not isinstance(model, VisionTransformer):
        kind = type(model).__name__
        return [
            _OTHER_FAMILIES.get(kind, f"{kind} is not timm's VisionTransformer, whose blocks are known here")
        ]
    reasons = []
    if model.dynamic_img_size:
        reasons.append("its token count follows the image size; build it with dynamic_img_size=False")
    if model.global_pool not in _POOLS:
        reasons.append(f"pooling {model.global_pool!r} reads every token again")
    if isinstance(model.patch_drop, PatchDropout):
        reasons.append("patch dropout changes the token count in training; build it with patch_drop_rate=0")
    pool = model.attn_pool
    if isinstance(pool, AttentionPoolLatent) and pool.pos_embed is not None:
        reasons.append("its attention pooling has one position embedding per token")
    for i, block in enumerate(model.blocks):
        reason = _block_refusal(block)
        if reason:
            reasons.append(f"blocks[{i}]: {reason}")
            break
    return reasons


_SWIN = (
    "Swin attends in windows, so tokens cannot leave, and ties its heads to a position table per window, "
    "so widths are not cut either"
)
_OTHER_FAMILIES = {
    "Eva": "Eva models (EVA-02, DINOv3) rotate positions into attention, which is not supported",
    "Beit": "BEiT adds a relative position bias between all pairs of tokens, so tokens cannot leave",
    "Cait": "CaiT mixes its attention heads and adds the class token late",
    "Xcit": "XCiT attends over channels and needs the full token grid",
    "SwinTransformer": _SWIN,
    "SwinTransformerV2": _SWIN,
    "MultiScaleVit": "MViT pools its tokens by convolutions on the full grid",
}


def _block_refusal(block: nn.Module) -> str | None:
    # Exact types: a subclass may compute something else.
    if type(block).__name__ == "CompressedBlock":
        return "it is compressed already; compress the dense model with another plan"
    if type(block) is not Block:
        return f"{type(block).__name__} is not timm's pre-norm Block"
    if type(block.attn) is not Attention:
        return f"attention is {type(block.attn).__name__}, not timm's Attention"
    if block.attn.gate is not None:
        return "gated attention"
    if type(block.mlp) not in (Mlp, SwiGLU):
        return f"MLP is {type(block.mlp).__name__}, known are Mlp and SwiGLU"
    return None


def capabilities(model: nn.Module, name: str) -> dict[str, Any]:
    """What `ucc-search models inspect` prints: for each method, whether it applies, and why not."""
    reasons = refusals(model)
    report: dict[str, Any] = {
        "model": name,
        "class": type(model).__name__,
        "supported": not reasons,
        "reasons": reasons,
    }
    if reasons:
        return report
    shape = shape_of(model, name)
    report["shape"] = shape.to_dict()
    report["widths"] = {
        "embed": shape.pool != "map",
        "attention_channels": not shape.blocks[0].qk_norm_vectors,
        "value_products": not shape.blocks[0].attn_norm_vectors,
        "heads": True,
        "mlp": True,
        "half_blocks": not shape.stages,
    }
    report["tokens"] = {
        "can_leave": not shape.stages,
        "patch_tokens": shape.tokens,
        "prefix_tokens": shape.prefix_tokens,
        "pool": shape.pool or "none",
        "head_tokens_only": bool(shape.head_tokens),
        "class_token_scorers": shape.class_token,
    }
    return report


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    return str(
        getattr(config, "architecture", "") or (config or {}).get("architecture") or type(model).__name__
    )


def _input_channels(model: VisionTransformer) -> int:
    return next(m.in_channels for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d))


def _vectors(*modules: nn.Module | None, width: int) -> int:
    """How many vectors of this width the parameters of these modules are."""
    total = sum(p.numel() for m in modules if m is not None for p in m.parameters())
    assert total % width == 0, (total, width)
    return total // width


def _block_shape(block: nn.Module) -> BlockShape:
    attention, mlp = block.attn, block.mlp
    first = mlp.fc1 if isinstance(mlp, Mlp) else mlp.fc1_g
    dim, hidden = first.in_features, first.out_features
    return BlockShape(
        heads=attention.num_heads,
        qk_dim=attention.head_dim,
        v_dim=attention.head_dim,
        mlp_hidden=hidden,
        mlp_matrices=2 if isinstance(mlp, Mlp) else 3,
        qkv_bias=attention.qkv.bias is not None,
        proj_bias=attention.proj.bias is not None,
        mlp_bias=first.bias is not None,
        channel_vectors=_vectors(block.norm1, block.norm2, block.ls1, block.ls2, width=dim),
        qk_norm_vectors=_vectors(attention.q_norm, attention.k_norm, width=attention.head_dim),
        attn_norm_vectors=_vectors(attention.norm, width=attention.attn_dim),
        mlp_norm_vectors=_vectors(mlp.norm, width=hidden),
    )


def _stem_cost(model: VisionTransformer) -> AffineCost:
    """Patch embedding, special tokens and position embeddings; the last convolution is per channel."""
    from torch.utils.flop_counter import FlopCounterMode

    embed = copy.deepcopy(model.patch_embed).to("meta", torch.float32).eval()
    image = torch.empty(1, _input_channels(model), *model.patch_embed.img_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        embed(image)
    total_macs = counter.get_total_flops() // 2
    last = last_convolution(model.patch_embed)
    dim = model.embed_dim
    assert last.out_channels == dim and last.groups == 1
    per_channel_macs = model.patch_embed.num_patches * last.weight.numel() // dim
    conv_params = last.weight.numel() // dim + (last.bias is not None)
    conv_params += _vectors(getattr(model.patch_embed, "norm", None), width=dim)
    tokens = [model.cls_token, model.reg_token, getattr(model, "dist_token", None), model.pos_embed]
    special = sum(t.numel() // dim for t in tokens if t is not None)
    special += _vectors(model.norm_pre, width=dim)
    fixed = sum(p.numel() for p in model.patch_embed.parameters()) - conv_params * dim
    return AffineCost(
        macs=total_macs - per_channel_macs * dim,
        macs_per_channel=per_channel_macs,
        params=fixed,
        params_per_channel=conv_params + special,
    )


def _head_cost(model: VisionTransformer) -> AffineCost:
    """Final norms, attention pooling and classifiers, for the part that does not grow with tokens."""
    dim = model.embed_dim
    heads = classifiers(model)
    outputs = sum(h.out_features for h in heads)
    bias = sum(h.bias.numel() for h in heads if h.bias is not None)
    pool_macs = pool_params = 0
    pool = model.attn_pool
    if isinstance(pool, AttentionPoolLatent):
        pool_params = sum(p.numel() for p in pool.parameters())
        linears = [m for m in (pool.q, pool.proj) if isinstance(m, nn.Linear)]
        linears += [
            m for m in (pool.mlp.modules() if pool.mlp is not None else ()) if isinstance(m, nn.Linear)
        ]
        pool_macs = pool.latent_len * sum(m.weight.numel() for m in linears)
    return AffineCost(
        macs=pool_macs,
        macs_per_channel=outputs,
        params=bias + pool_params,
        params_per_channel=outputs + _vectors(model.norm, model.fc_norm, width=dim),
    )


def _pool_macs_per_token(model: VisionTransformer) -> int:
    pool = model.attn_pool
    if not isinstance(pool, AttentionPoolLatent):
        return 0
    return pool.kv.weight.numel() + pool.latent_len * 2 * pool.num_heads * pool.head_dim

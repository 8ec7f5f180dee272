"""A compressed model as timm itself builds it, where its plan is one that timm's constructor can express."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ucc_search.errors import ModelError, PlanError
from ucc_search.plan import CompressionPlan


def timm_model(
    model: nn.Module, plan: CompressionPlan, named: Mapping[str, Any]
) -> tuple[nn.Module, str, dict[str, Any]]:
    """(timm's model with the same logits, its name, the arguments of `timm.create_model`).

    Args:
        model: the compressed model.
        named: `name` and `args` of the uncompressed one.

    Raises:
        PlanError: timm cannot express the plan, with the reason.
        ModelError: the weights do not fit after all.
    """
    if named["name"] not in timm.list_models():
        raise PlanError(
            f"format timm: {named['name']} is no model of timm; use safetensors, onnx or torch-export"
        )
    reason = _refusal(model, plan)
    if reason:
        raise PlanError(
            f"format timm: {reason}, which timm cannot express; use safetensors, onnx or torch-export"
        )
    present, block = len(plan.present), plan.blocks[plan.present[0]]
    shape = plan.shape
    args = {
        **named["args"],
        "num_classes": shape.classes,
        "in_chans": shape.channels,
        "embed_dim": plan.embed_dim,
        "depth": present,
        "num_heads": block.heads,
        "mlp_ratio": block.mlp_hidden / plan.embed_dim,
    }
    twin = timm.create_model(named["name"], pretrained=False, **args).eval()
    weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    _fold_scales(model, twin, weights)
    try:
        twin.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"format timm: the weights do not load ({' '.join(str(error).split())[:200]})"
        ) from None
    return twin, named["name"], args


def _refusal(model: nn.Module, plan: CompressionPlan) -> str | None:
    """Why timm's constructor has no arguments for this plan; None if it has."""
    if not isinstance(model, VisionTransformer):
        return f"{type(model).__name__} is not a VisionTransformer"
    if any(n < plan.shape.tokens for n in plan.tokens):
        return "the plan cuts tokens"
    left = [plan.blocks[i] for i in plan.present]
    if not left or any(not (b.attention and b.mlp) for b in left):
        return "a block lacks its attention or its MLP"
    if any(b.mlp_rank is not None for b in left):
        return "MLPs are factorised"
    if len({(b.heads, b.qk_dim, b.v_dim, b.mlp_hidden) for b in left}) > 1:
        return "blocks differ in their widths"
    block = left[0]
    if block.qk_dim != block.v_dim or block.heads * block.qk_dim != plan.embed_dim:
        return (
            f"{block.heads} heads of {block.qk_dim} (queries, keys) and {block.v_dim} (values) are not the embedding's "
            f"{plan.embed_dim} channels"
        )
    return None


def _fold_scales(model: nn.Module, twin: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """timm scales logits by its own head width; where the model keeps the old scale, its queries take the factor."""
    for i, (old, new) in enumerate(zip(model.blocks, twin.blocks, strict=True)):
        factor = old.attn.scale / new.attn.scale
        if abs(factor - 1) < 1e-12:
            continue
        if not isinstance(new.attn.q_norm, nn.Identity):
            raise PlanError(
                "format timm: queries are normalised and heads are narrower, which timm cannot express"
            )
        width = new.attn.num_heads * new.attn.head_dim
        for name in ("weight", "bias"):
            key = f"blocks.{i}.attn.qkv.{name}"
            if key in weights:
                weights[key][:width] *= factor

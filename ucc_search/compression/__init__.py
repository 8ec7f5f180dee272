"""Turn a dense timm model and a plan into a smaller model."""

from __future__ import annotations

import copy

from torch import nn

from ucc_search.builtin import default_components
from ucc_search.compression.blocks import CascadeBlocks, CompressedBlock, checked_scores, set_tokens
from ucc_search.compression.inspect import capabilities, refusals, shape_of
from ucc_search.errors import PlanError
from ucc_search.interfaces import Components
from ucc_search.plan import CompressionPlan

__all__ = ["capabilities", "checked_scores", "compress", "refusals", "set_tokens", "shape_of"]


def compress(model: nn.Module, plan: CompressionPlan, components: Components | None = None) -> nn.Module:
    """A new model realising `plan`; `model` is left untouched.

    Args:
        model: a timm `VisionTransformer`.
        plan: made for this model's shape.
        components: scorer, aggregator and cascade; the default is UCC's.

    Returns:
        A plain `nn.Module` of the model's own class, with timm's parameter names.

    Raises:
        ModelError: the model is of an unsupported kind.
        PlanError: the plan is for another model, or the components do not fit it.
    """
    shape = shape_of(model, plan.shape.name)
    if shape != plan.shape:
        raise PlanError(
            f"the plan was made for another model than this {plan.shape.name}; make it from shape_of(model)"
        )
    parts = components or default_components()
    _refuse_widths(plan)
    sites = {site.block: site for site in parts.sites(plan)}
    if sites and parts.aggregator.needs_scores and parts.scorer.needs_class_token and not shape.class_token:
        raise PlanError(
            f"{type(parts.scorer).__name__} scores by the class token's attention, and {shape.name} has no class "
            "token; use the scorer spatial, joint, spectral or random"
        )
    small = copy.deepcopy(model)
    if plan == CompressionPlan.identity(shape):
        return small
    blocks = []
    for i, block in enumerate(small.blocks):
        head_tokens = shape.head_tokens if plan.head_tokens_only and i == shape.depth - 1 else None
        changed = i in sites or head_tokens is not None or _must_weigh(parts, sites, i)
        if not changed:
            blocks.append(block)
            continue
        blocks.append(
            CompressedBlock(
                block,
                parts,
                sites.get(i),
                prefix=shape.prefix_tokens,
                class_token=shape.class_token,
                grid=shape.grid,
                head_tokens=head_tokens,
            )
        )
    restore = bool(sites) and parts.aggregator.merges and shape.pool in ("avg", "avgmax")
    small.blocks = CascadeBlocks(blocks, prefix=shape.prefix_tokens, restore=restore)
    # Scorers make buffers and parameters of their own, on the CPU.
    small.to(next(model.parameters()).device).train(model.training)
    return small


def _must_weigh(parts: Components, sites: dict[int, object], block: int) -> bool:
    """Blocks after a merge see token sizes where attention is proportional to them."""
    return parts.aggregator.proportional_attention and bool(sites) and block > min(sites)


def _refuse_widths(plan: CompressionPlan) -> None:
    identity = CompressionPlan.identity(plan.shape)
    if plan.replace(tokens_out=plan.shape.tokens, head_tokens_only=False) != identity:
        raise PlanError(
            "this version realises token plans only; leave widths, ranks and depth at the model's own"
        )

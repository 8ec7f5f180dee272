"""Turn a dense timm model and a plan into a smaller model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from ucc_search.builtin import default_components
from ucc_search.compression.blocks import CascadeBlocks, CompressedBlock, checked_scores, set_tokens
from ucc_search.compression.factorize import factorize, factorizes
from ucc_search.compression.inspect import capabilities, refusals, shape_of
from ucc_search.compression.narrow import narrow, rebuild_stages
from ucc_search.compression.selection import HeadsBy, Scores, Selection, narrows, select, unfactorized
from ucc_search.compression.weights import magnitude
from ucc_search.compression.whitening import ProxyInputs
from ucc_search.errors import PlanError
from ucc_search.interfaces import Components, Site
from ucc_search.plan import CompressionPlan

__all__ = [
    "ProxyInputs",
    "assemble",
    "capabilities",
    "checked_scores",
    "compress",
    "refusals",
    "set_tokens",
    "shape_of",
]


def compress(
    model: nn.Module,
    plan: CompressionPlan,
    components: Components | None = None,
    *,
    scores: Scores | None = None,
    heads: HeadsBy = "fuse",
    inputs: ProxyInputs | None = None,
) -> nn.Module:
    """A new model realising `plan`; `model` is left untouched.

    Units are selected first, then the products and matrices of what is left are factorised, then
    half-blocks leave, and at last the blocks that cut tokens are put in.

    Args:
        model: a timm `VisionTransformer` or PVTv2.
        plan: made for this model's shape.
        components: scorer, aggregator and cascade; the default is UCC's.
        scores: importance of every unit, larger is kept (`ucc_search.importance.unit_scores`); the
            default is the magnitude of its weights.
        heads: how fewer heads are made, see `ucc_search.compression.selection.select`.
        inputs: proxy images, to factorise for what the layers give on them; None factorises the weights.

    Returns:
        A plain `nn.Module` of the model's own class, with timm's parameter names. Blocks of which
        nothing is left are gone, and those after them move up.

    Raises:
        ModelError: the model is of an unsupported kind.
        PlanError: the plan is for another model, or the components or scores do not fit it.
    """
    if scores is None:
        # Only groups that are narrowed need scores; most plans narrow none.
        scores = {(kind, i): magnitude(model, kind, i) for kind, i in narrows(plan)}
    return assemble(
        model, plan, components or default_components(), select(plan, scores, heads=heads), inputs
    )


def assemble(
    model: nn.Module,
    plan: CompressionPlan,
    components: Components,
    selection: Selection,
    inputs: ProxyInputs | None = None,
) -> nn.Module:
    """`compress` with the units already chosen."""
    shape = shape_of(model, plan.shape.name, image_size=plan.shape.image_size)
    if shape != plan.shape:
        raise PlanError(
            f"the plan was made for another model than this {plan.shape.name}; make it from shape_of(model)"
        )
    sites = {site.block: site for site in components.sites(plan)}
    _check_scorer(components, plan, bool(sites))
    small = copy.deepcopy(model)
    if plan == CompressionPlan.identity(shape):
        return small
    if narrows(plan):
        narrow(small, unfactorized(plan), selection)
    moments = None
    if inputs is not None and factorizes(plan):
        moments = inputs.of(small, None if narrows(plan) else model)
    factorize(small, plan, moments)
    if shape.stages:
        rebuild_stages(small, plan)
    else:
        _replace_blocks(small, plan, components, sites)
    # Scorers make buffers and parameters of their own, on the CPU.
    return small.to(next(model.parameters()).device).train(model.training)


def _check_scorer(parts: Components, plan: CompressionPlan, cuts: bool) -> None:
    shape = plan.shape
    if cuts and parts.aggregator.needs_scores and parts.scorer.needs_class_token and not shape.class_token:
        raise PlanError(
            f"{type(parts.scorer).__name__} scores by the class token's attention, and {shape.name} has no class "
            "token; use the scorer spatial, joint, spectral or random"
        )


def _replace_blocks(
    model: nn.Module, plan: CompressionPlan, parts: Components, sites: Mapping[int, Site]
) -> None:
    """timm's own blocks stay where neither their structure nor their tokens change."""
    shape, carries = plan.shape, bool(sites) or plan.head_block is not None
    blocks = []
    for i in plan.present:
        block, wanted = model.blocks[i], plan.blocks[i]
        head_tokens = shape.head_tokens if i == plan.head_block else None
        whole = wanted.attention and wanted.mlp and wanted.qk_dim == wanted.v_dim
        if whole and i not in sites and head_tokens is None and not _must_weigh(parts, sites, i):
            blocks.append(block)
            continue
        blocks.append(
            CompressedBlock(
                block,
                i,
                wanted,
                parts,
                sites.get(i),
                prefix=shape.prefix_tokens,
                class_token=shape.class_token,
                grid=shape.grid,
                head_tokens=head_tokens,
                carries=carries,
            )
        )
    # timm names features by position, `blocks.0` first.
    del model.feature_info[len(blocks) :]
    if not carries:
        model.blocks = nn.Sequential(*blocks)
    else:
        restore = bool(sites) and parts.aggregator.merges and shape.pool in ("avg", "avgmax")
        model.blocks = CascadeBlocks(blocks, prefix=shape.prefix_tokens, restore=restore)


def _must_weigh(parts: Components, sites: Mapping[int, Site], block: int) -> bool:
    """Blocks after a merge see token sizes where attention is proportional to them."""
    return parts.aggregator.proportional_attention and bool(sites) and block > min(sites)

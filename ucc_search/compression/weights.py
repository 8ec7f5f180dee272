"""The weights that belong to each unit, and their magnitude."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ucc_search.compression.parts import blocks_of, classifiers, is_pyramid, last_convolution, parts_of


def magnitude(model: nn.Module, kind: str, index: int) -> Tensor:
    """L2 norm of all weights of each unit of a group; [units], double, on the CPU."""
    with torch.no_grad():
        squares = [w.double().square().sum(dim=1) for w in unit_weights(model, kind, index)]
        return torch.stack(squares).sum(dim=0).sqrt().cpu()


def unit_weights(model: nn.Module, kind: str, index: int) -> list[Tensor]:
    """Matrices [units, weights] whose rows leave with a unit, without biases and norms.

    Args:
        kind: `embed`, `attention` or `mlp`.
        index: of the stage, or of the block.
    """
    if kind == "embed":
        return _embedding(model, index)
    parts = parts_of(blocks_of(model)[index])
    if kind == "mlp":
        kernels = [parts.depthwise.weight.flatten(1)] if parts.depthwise is not None else []
        return [*(layer.weight for layer in parts.hidden_in), parts.hidden_out.weight.t(), *kernels]
    if kind != "attention":
        raise ValueError(f"kind is {kind!r}, expected embed, attention or mlp")
    rows = [part for layer, roles in parts.projections for part in layer.weight.chunk(len(roles))]
    return [*rows, parts.attention_out.weight.t()]


def _embedding(model: nn.Module, stage: int) -> list[Tensor]:
    """Everything that reads or writes an embedding channel of one stage."""
    if not is_pyramid(model):
        found = [last_convolution(model.patch_embed).weight.flatten(1)]
        blocks = list(model.blocks)
        readers = [head.weight.t() for head in classifiers(model)]
    else:
        before = model.patch_embed if stage == 0 else model.stages[stage].downsample
        found = [before.proj.weight.flatten(1)]
        blocks = list(model.stages[stage].blocks)
        after = model.stages[stage + 1 : stage + 2]
        readers = [s.downsample.proj.weight.transpose(0, 1).flatten(1) for s in after]
        readers = readers or [head.weight.t() for head in classifiers(model)]
    for block in blocks:
        parts = parts_of(block)
        inputs = [layer for layer, _ in parts.projections] + list(parts.hidden_in)
        found += [layer.weight.t() for layer in inputs]
        found += [parts.attention_out.weight, parts.hidden_out.weight]
        if parts.reduction is not None:
            found += _rows_and_columns(parts.reduction.weight.flatten(2))
    return found + readers


def _rows_and_columns(square: Tensor) -> list[Tensor]:
    """What leaves with each unit of a layer from units to the same units; its diagonal once."""
    others = 1 - torch.eye(len(square), dtype=square.dtype, device=square.device)
    return [square.flatten(1), (square.transpose(0, 1) * others[..., None]).flatten(1)]

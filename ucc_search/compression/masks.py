"""Delete units of a dense model without cutting it: multiplicative masks, one row per image.

A mask of 0 deletes a unit exactly as slicing would; between 0 and 1 it is the path along which the
second-order importance is a derivative. Rows differ per image, so one forward pass can delete
another unit for every image of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ucc_search.compression.parts import Parts, blocks_of, is_pyramid, parts_of, stage_norms
from ucc_search.errors import ModelError

Masks = Mapping[tuple[str, int], Tensor]
"""mask_BU for groups of units by kind (embed, attention, mlp, depth) and index."""


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Multiply units by their masks in every forward pass while the context is open.

    Raises:
        ModelError: the embedding is masked and a norm over it is no LayerNorm.
    """
    with contextlib.ExitStack() as stack:

        def hook(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
            handle = module.register_forward_hook(lambda _, inputs, output: change(inputs[0], output))
            stack.callback(handle.remove)

        for (kind, index), mask_BU in masks.items():
            if kind == "embed":
                for norm in _norms(model, index):
                    hook(norm, _over_kept(norm, mask_BU))
            elif kind == "depth":
                for module, scale_B in _half_blocks(model, mask_BU):
                    hook(module, lambda _, output, s=scale_B: output * s.view(-1, *[1] * (output.dim() - 1)))
            else:
                _mask_block(parts_of(blocks_of(model)[index]), kind, mask_BU, hook)
        yield


def _mask_block(parts: Parts, kind: str, mask_BU: Tensor, hook: Callable[..., None]) -> None:
    if kind == "attention":
        for layer, roles in parts.projections:
            tiled = torch.cat([mask_BU] * len(roles), dim=1)[:, None]
            hook(layer, lambda _, output, m=tiled: output * m)
        if isinstance(parts.attention_norm, nn.LayerNorm):
            hook(parts.attention_norm, _over_kept(parts.attention_norm, mask_BU))
        return
    if isinstance(parts.hidden_norm, nn.LayerNorm):
        hook(parts.hidden_norm, _over_kept(parts.hidden_norm, mask_BU))
    # The output is linear in the hidden units, so they are masked where it reads them.
    out = parts.hidden_out
    hook(out, lambda inputs, _: nn.functional.linear(inputs * mask_BU[:, None], out.weight, out.bias))


def _over_kept(norm: nn.Module, mask_BU: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A norm whose mean and variance are those of the kept channels, as after slicing."""
    if not isinstance(norm, nn.LayerNorm):
        raise ModelError(f"{type(norm).__name__} over the embedding: only LayerNorm can be masked")

    def change(x: Tensor, output: Tensor) -> Tensor:
        mask = mask_BU.view(len(mask_BU), *[1] * (x.dim() - 2), -1)
        count = mask.sum(dim=-1, keepdim=True)
        mean = (mask * x).sum(dim=-1, keepdim=True) / count
        variance = (mask * (x - mean) ** 2).sum(dim=-1, keepdim=True) / count
        normed = (x - mean) * torch.rsqrt(variance + norm.eps)
        weight, bias = norm.weight, norm.bias
        return mask * (normed * weight + bias if bias is not None else normed * weight)

    return change


def _norms(model: nn.Module, stage: int) -> list[nn.Module]:
    """Every norm that reads this stage's embedding; LayerScales only scale it."""
    blocks = list(model.stages[stage].blocks) if is_pyramid(model) else list(model.blocks)
    own = [m for b in blocks for m in parts_of(b).embed_norms]
    found = [*stage_norms(model)[stage], *own]
    return [m for m in found if not isinstance(m, nn.Identity) and not hasattr(m, "gamma")]


def _half_blocks(model: nn.Module, mask_BU: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """The two halves of every block, with the product of the depth masks that delete each.

    Unit 2 i is block i; unit 2 i + 1 is the MLP of block i with the attention of block i + 1 (UP-ViT,
    arXiv:2111.15127, section 3.3). In a pyramid unit i is block i.
    """
    blocks = blocks_of(model)
    whole = is_pyramid(model)
    for i, block in enumerate(blocks):
        if whole:
            yield block.attn, mask_BU[:, i]
            yield block.mlp, mask_BU[:, i]
            continue
        before = mask_BU[:, 2 * i - 1] if i else 1.0
        after = mask_BU[:, 2 * i + 1] if i < len(blocks) - 1 else 1.0
        yield block.attn, mask_BU[:, 2 * i] * before
        yield block.mlp, mask_BU[:, 2 * i] * after

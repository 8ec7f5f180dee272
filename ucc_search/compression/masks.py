"""Delete units of a dense model without cutting it: multiplicative masks, one row per image.

A mask of 0 deletes a unit exactly as slicing would; between 0 and 1 it is the path along which the
second-order importance is a derivative. So each mask stands once on the way of what it deletes:
twice would be its square, of double the slope. Rows differ per image, so one forward pass can
delete another unit for every image of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ucc_search.compression.parts import (
    Parts,
    blocks_of,
    classifiers,
    first_norms,
    is_pyramid,
    parts_of,
    stage_norms,
)
from ucc_search.errors import ModelError

Masks = Mapping[tuple[str, int], Tensor]
"""mask_BU for groups of units by kind (embed, attention, mlp, depth) and index."""


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Multiply units by their masks in every forward pass while the context is open.

    Raises:
        ModelError: a norm over what is masked is no LayerNorm.
    """
    with contextlib.ExitStack() as stack:

        def hook(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
            handle = module.register_forward_hook(lambda _, inputs, output: change(inputs[0], output))
            stack.callback(handle.remove)

        for (kind, index), mask_BU in masks.items():
            if kind == "embed":
                # What norms before the blocks write is masked where it is read.
                writers = {id(norm) for norm in first_norms(model)[index]}
                for norm in _norms(model, index):
                    hook(norm, _over_kept(norm, mask_BU, delete=id(norm) not in writers))
                for head in _bare_readers(model):
                    hook(head, _read_kept(head, mask_BU))
            elif kind == "depth":
                for module, scale_B in _half_blocks(model, mask_BU):
                    hook(module, lambda _, output, s=scale_B: output * s.view(-1, *[1] * (output.dim() - 1)))
            else:
                _mask_block(parts_of(blocks_of(model)[index]), kind, mask_BU, hook)
        yield


def _mask_block(parts: Parts, kind: str, mask_BU: Tensor, hook: Callable[..., None]) -> None:
    if kind == "attention":
        # A key without its query adds nothing to the logits, and a norm over what was mixed deletes values.
        masked_roles = "q" if _is_norm(parts.attention_norm) else "qv"
        for layer, roles in parts.projections:
            rows = [mask_BU if role in masked_roles else torch.ones_like(mask_BU) for role in roles]
            tiled = torch.cat(rows, dim=1)[:, None]
            hook(layer, lambda _, output, m=tiled: output * m)
        if parts.attention_norm is not None and _is_norm(parts.attention_norm):
            hook(parts.attention_norm, _over_kept(parts.attention_norm, mask_BU))
        return
    if parts.hidden_norm is not None and _is_norm(parts.hidden_norm):
        hook(parts.hidden_norm, _over_kept(parts.hidden_norm, mask_BU, delete=False))
    # The output is linear in the hidden units, so they are masked where it reads them.
    hook(parts.hidden_out, _read_kept(parts.hidden_out, mask_BU[:, None]))


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _read_kept(layer: nn.Linear, mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda inputs, _: nn.functional.linear(inputs * mask, layer.weight, layer.bias)


def _over_kept(
    norm: nn.Module, mask_BU: Tensor, *, delete: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """A norm whose mean and variance are those of the kept channels, as after slicing.

    Args:
        delete: mask what it puts out as well; False where that happens later.
    """
    if not isinstance(norm, nn.LayerNorm):
        raise ModelError(f"a {type(norm).__name__} reads what is deleted: only LayerNorm can be masked")

    def change(x: Tensor, output: Tensor) -> Tensor:
        mask = mask_BU.view(len(mask_BU), *[1] * (x.dim() - 2), -1)
        count = mask.sum(dim=-1, keepdim=True)
        mean = (mask * x).sum(dim=-1, keepdim=True) / count
        variance = (mask * (x - mean) ** 2).sum(dim=-1, keepdim=True) / count
        scaled = (x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight
        normed = scaled if norm.bias is None else scaled + norm.bias
        return mask * normed if delete else normed

    return change


def _norms(model: nn.Module, stage: int) -> list[nn.Module]:
    """Every norm that reads this stage's embedding; LayerScales only scale it."""
    blocks = list(model.stages[stage].blocks) if is_pyramid(model) else list(model.blocks)
    own = [m for b in blocks for m in parts_of(b).embed_norms]
    found = [*stage_norms(model)[stage], *own]
    return [m for m in found if not isinstance(m, nn.Identity) and not hasattr(m, "gamma")]


def _bare_readers(model: nn.Module) -> list[nn.Linear]:
    """Classifiers that read the embedding itself, for want of a last norm; elsewhere its mask reaches them."""
    bare = not is_pyramid(model) and all(isinstance(m, nn.Identity) for m in (model.norm, model.fc_norm))
    return classifiers(model) if bare else []


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

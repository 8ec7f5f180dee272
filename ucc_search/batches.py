"""Move through batches of tokens fast: a few images at a time where that helps the cache, and whole rows."""

from __future__ import annotations

import torch
from torch import Tensor

CACHE_BYTES = 2**20
"""Half of a small core's second-level cache: what is formed for one slice should fit beside its inputs."""


def image_slices(like_BX: Tensor, bytes_each: int) -> list[slice]:
    """Slices that together are the batch.

    More than one only on a CPU, without gradients (which would keep everything anyway) and outside of a
    trace, which must hold for any batch.

    Args:
        like_BX: what is sliced.
        bytes_each: what is formed for one image, and read again soon.
    """
    if like_BX.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [slice(None)]
    images = max(1, like_BX.shape[0])
    most = max(1, CACHE_BYTES // bytes_each)
    step = -(-images // -(-images // most))  # slices of one size
    return [slice(i, i + step) for i in range(0, images, step)]


def flat_rows(index_BR: Tensor, count: int, offset: int = 0) -> Tensor:
    """Row numbers, once the batch and its `count` rows an image are one axis, of row `offset + index` of each image."""
    batch = index_BR.shape[0]
    if torch.compiler.is_compiling():  # a trace must not fix the number of images
        first_B = torch.arange(batch, device=index_BR.device) * count + offset
    else:
        first_B = torch.arange(offset, offset + batch * count, count, device=index_BR.device)
    return (index_BR + first_B[:, None]).flatten()


def gather_rows(values_BTX: Tensor, index_BR: Tensor, offset: int = 0) -> Tensor:
    """values_BRX: the rows at `offset + index_BR` of each image, copied whole (`gather` goes number by number)."""
    batch, count, width = values_BTX.shape
    rows = values_BTX.reshape(batch * count, width).index_select(0, flat_rows(index_BR, count, offset))
    return rows.view(batch, index_BR.shape[1], width)

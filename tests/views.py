"""Token views made by hand, as a block of a model would hand them to scorers and aggregators."""

from __future__ import annotations

import torch
from torch import Tensor

from ucc_search.interfaces import Assignment, Site, TokenView

DIM, HEADS, QK_DIM = 8, 2, 4


def token_view(
    patches_BND: Tensor, *, prefix: int = 1, class_token: bool = True, grid: tuple[int, int] | None = None
) -> TokenView:
    """A view of these patch tokens, with random queries, keys, values and the attention they give."""
    batch, count, dim = patches_BND.shape
    generator = torch.Generator().manual_seed(7)
    q, k, v = torch.randn(3, batch, HEADS, prefix + count, QK_DIM, generator=generator)
    scale = QK_DIM**-0.5
    front = torch.randn(batch, prefix, dim, generator=generator)
    attn = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)
    return TokenView(
        x_BTD=torch.cat([front, patches_BND], dim=1),
        q_BHTK=q,
        k_BHTK=k,
        v_BHTK=v,
        attn_BHTT=attn,
        scale=scale,
        prefix=prefix,
        class_token=class_token,
        position_BN=torch.arange(count).expand(batch, count),
        size_BN=torch.ones(batch, count),
        grid=grid or (1, count),
        received_BHT=attn.mean(dim=2),
        class_row_BHT=attn[:, :, 0],
    )


def site(
    tokens_in: int, tokens_out: int, *, prefix: int = 1, class_token: bool = True, block: int = 1
) -> Site:
    """Where a view of `token_view` comes from."""
    return Site(
        block, tokens_in, tokens_out, prefix, class_token, DIM, HEADS, QK_DIM, QK_DIM, 4, (1, tokens_in)
    )


def check_assignment(found: Assignment, *, tokens: int, keep: int) -> None:
    """Every token is kept or pruned once, kept ones ascend, hosts exist, weights make an average."""
    keep_BR, prune_BP, host_BP, weight_BP, self_BR = found
    everything = torch.cat([keep_BR, prune_BP], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(tokens).expand_as(everything))
    assert keep_BR.shape[1] == keep
    assert bool((keep_BR.diff(dim=1) > 0).all())
    if host_BP is None:
        return
    assert weight_BP is not None
    assert self_BR is not None
    assert host_BP.shape == weight_BP.shape == prune_BP.shape
    assert host_BP.dtype == torch.int64
    assert int(host_BP.min()) >= 0
    assert int(host_BP.max()) < keep
    assert bool((weight_BP >= 0).all())
    assert bool((self_BR > 0).all())

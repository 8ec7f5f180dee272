"""Reduce tokens by an assignment: pure functions over tensors and the state that travels with them.

Shape suffixes: B batch, N patch tokens arriving, R kept, P pruned, T prefix plus patch tokens,
D embedding, O original patch tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ucc_search.batches import flat_rows, gather_rows
from ucc_search.interfaces import Assignment


class TokenState(NamedTuple):
    """What is known of the patch tokens on their way through the blocks."""

    position_BN: Tensor  # int64, original index on the grid
    size_BN: Tensor  # original patches each token stands for
    score_BN: Tensor | None = None  # cumulative score
    owner_BO: Tensor | None = None  # int64, for each original patch the token it is now part of
    compose_BNO: Tensor | None = None  # each token as a mix of the original patches; rows sum to 1


def initial_state(x_BND: Tensor, *, owners: bool, trace: bool) -> TokenState:
    """State before the first block; `owners` and `trace` also keep the optional maps."""
    batch, count = x_BND.shape[:2]
    position_BN = torch.arange(count, device=x_BND.device).expand(batch, count)
    size_BN = torch.ones(batch, count, device=x_BND.device, dtype=x_BND.dtype)
    compose = torch.eye(count, device=x_BND.device, dtype=x_BND.dtype).expand(batch, count, count)
    return TokenState(position_BN, size_BN, None, position_BN if owners else None, compose if trace else None)


def reduce_tokens(
    x_BTD: Tensor, state: TokenState, assignment: Assignment, *, prefix: int = 0, absorb_scores: bool
) -> tuple[Tensor, TokenState]:
    """Carry out an assignment on the tokens and on everything known of them.

    Args:
        x_BTD: `prefix` tokens that stay as they are, then the N patch tokens.

    Returns:
        The prefix and the R patch tokens that are left, and their state.
    """
    keep_BR, prune_BP, host_BP, weight_BP, self_BR = assignment
    position_BR = state.position_BN.gather(1, keep_BR)
    size_BR = state.size_BN.gather(1, keep_BR)
    score_BR = None if state.score_BN is None else state.score_BN.gather(1, keep_BR)
    owner_BO = state.owner_BO
    stay_BT = _after_prefix(keep_BR, prefix)
    if host_BP is None:
        compose = None if state.compose_BNO is None else gather_rows(state.compose_BNO, keep_BR)
        return gather_rows(x_BTD, stay_BT), TokenState(position_BR, size_BR, score_BR, owner_BO, compose)

    assert weight_BP is not None and self_BR is not None
    weight_BP, self_BR = weight_BP.to(x_BTD.dtype), self_BR.to(x_BTD.dtype)
    # Sum over count, not a mean reduction: exporters drop the mean of scatter_reduce.
    total_BR = self_BR.scatter_add(1, host_BP, weight_BP)
    share_BP = weight_BP / total_BR.gather(1, host_BP)
    own_BR = self_BR / total_BR

    def mix(values_BTX: Tensor, stay_BT: Tensor, before: int) -> Tensor:
        """One copy of what stays and one of what goes; the rest happens in place."""
        mixed_BTX = gather_rows(values_BTX, stay_BT)
        mixed_BTX[:, before:].mul_(own_BR[..., None].to(values_BTX.dtype))
        added_BPX = gather_rows(values_BTX, prune_BP, before).mul_(share_BP[..., None].to(values_BTX.dtype))
        hosts = flat_rows(host_BP, mixed_BTX.shape[1], before)
        mixed_BTX.flatten(0, 1).index_add_(0, hosts, added_BPX.flatten(0, 1))
        return mixed_BTX

    # A token of weight zero is dropped: its host does not stand for it.
    joins_BP = (weight_BP > 0).to(size_BR.dtype)
    size_BR = size_BR.scatter_add(1, host_BP, joins_BP * state.size_BN.gather(1, prune_BP))
    if score_BR is not None and absorb_scores:
        assert state.score_BN is not None
        absorbed_BP = share_BP.to(score_BR.dtype) * state.score_BN.gather(1, prune_BP)
        score_BR = score_BR.scatter_add(1, host_BP, absorbed_BP)
    if owner_BO is not None:
        owner_BO = _new_index(keep_BR, prune_BP, host_BP).gather(1, owner_BO)
    compose = None if state.compose_BNO is None else mix(state.compose_BNO, keep_BR, 0)
    return mix(x_BTD, stay_BT, prefix), TokenState(position_BR, size_BR, score_BR, owner_BO, compose)


def _after_prefix(keep_BR: Tensor, prefix: int) -> Tensor:
    """Indices among all tokens of the prefix and of these patch tokens."""
    if not prefix:
        return keep_BR
    first_T = torch.arange(prefix, device=keep_BR.device).expand(keep_BR.shape[0], prefix)
    return torch.cat([first_T, keep_BR + prefix], dim=1)


def _new_index(keep_BR: Tensor, prune_BP: Tensor, host_BP: Tensor) -> Tensor:
    """For each of the N tokens before, its index among the R after (its own, or its host's)."""
    rank_BR = torch.arange(keep_BR.shape[1], device=keep_BR.device).expand_as(keep_BR)
    index_BN = torch.zeros(
        keep_BR.shape[0], keep_BR.shape[1] + prune_BP.shape[1], dtype=torch.int64, device=keep_BR.device
    )
    return index_BN.scatter(1, keep_BR, rank_BR).scatter(1, prune_BP, host_BP)

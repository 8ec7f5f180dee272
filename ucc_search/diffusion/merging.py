"""Low-rank terms put into the weights of the attention beside them: exactly by width, or by the best ranks.

D, E, O as in `attention`; H heads of d channels and r ranks each, w = d + r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ucc_search.diffusion.attention import LowRankAttention
from ucc_search.errors import ModelError


class Lost(NamedTuple):
    """What a merge left out, over what the adapter had added: Frobenius norms of weight products.

    From 0 (nothing) to 1 (as much as the adapter had changed). Truncation is optimal, and the dense
    weights alone are among its options, so that it is never more.
    """

    scores: float
    """Of W^Q W^Kᵀ + U^Q S^Kᵀ, all heads."""
    outputs: float
    """Of W^V W^O + U^V S^O, all heads."""


def refuse_unmergeable(name: str, attn: Attention) -> None:
    """Raise ModelError unless every projection is a plain linear layer, and those of q, k and v have no bias."""
    layers = {"to_q": attn.to_q, "to_k": attn.to_k, "to_v": attn.to_v, "to_out": attn.to_out[0]}
    for part, layer in layers.items():
        kind = type(layer)
        if kind is not nn.Linear:
            raise ModelError(
                f"{name}.{part} is a {kind.__module__}.{kind.__name__}, which an adapter cannot be merged into; "
                "unload LoRA weights first (or fuse and unload them), and load the model without quantisation"
            )
        if part != "to_out" and layer.bias is not None:
            raise ModelError(f"{name}.{part} has a bias, with which merging is not supported")


def merge_term(attn: Attention, term: LowRankAttention, *, approximate: bool) -> Lost:
    """Replace the projections of `attn`, so that without `term` it computes what it did with it."""
    heads, strength = attn.heads, term.scale**2
    # Four stacks of [H, channels, w]: in each head, columns of the weights and then of the term.
    q_HDw = _columns(attn.to_q.weight, term.u_q.weight * strength, heads)
    k_HEw = _columns(attn.to_k.weight, term.s_k.weight, heads)
    v_HEw = _columns(attn.to_v.weight, term.u_v.weight * strength, heads)
    o_HOw = _columns(attn.to_out[0].weight.T, term.s_o.weight.T, heads)
    if not approximate:
        # Processors divide by the root of a head's width, which has grown.
        scale = q_HDw.shape[-1] ** -0.5
        q_HDw = q_HDw * (attn.scale / scale)
        attn.scale = scale
        _replace(attn, q_HDw, k_HEw, v_HEw, o_HOw)
        return Lost(0.0, 0.0)
    q_HDd, k_HEd, scores = _best_ranks(q_HDw, k_HEw, term.rank)
    v_HEd, o_HOd, outputs = _best_ranks(v_HEw, o_HOw, term.rank)
    _replace(attn, q_HDd, k_HEd, v_HEd, o_HOd)
    return Lost(scores, outputs)


def _columns(dense: Tensor, low: Tensor, heads: int) -> Tensor:
    """[H d, C] and [H r, C] as [H, C, d + r], in double precision where the device has it."""
    parts = [weight.detach().cpu().double().unflatten(0, (heads, -1)) for weight in (dense, low)]
    return torch.cat(parts, dim=1).transpose(1, 2)


def _best_ranks(left_HCw: Tensor, right_HCw: Tensor, drop: int) -> tuple[Tensor, Tensor, float]:
    """Factors of w - drop columns whose product is nearest to left @ rightᵀ, and the share of the term lost.

    No product is formed: its singular values are those of a w x w matrix, the norm of the term's
    that of two r x r ones.
    """
    kept = left_HCw.shape[-1] - drop
    left_q, left_r = torch.linalg.qr(left_HCw)
    right_q, right_r = torch.linalg.qr(right_HCw)
    u, values_Hs, vh = torch.linalg.svd(left_r @ right_r.mT, full_matrices=False)
    # Half the magnitude in each factor, so that neither strains half precision.
    root = values_Hs[:, :kept].sqrt()[:, None]
    left, right = left_q @ u[..., :kept] * root, right_q @ vh.mT[..., :kept] * root
    # With fewer channels than ranks there are fewer singular values than columns to fill.
    missing = kept - left.shape[-1]
    left, right = (nn.functional.pad(factor, (0, missing)) for factor in (left, right))
    grams = [low.mT @ low for low in (left_HCw[..., kept:], right_HCw[..., kept:])]
    change = float((grams[0] * grams[1]).sum().clamp(min=0).sqrt())
    return left, right, float(values_Hs[:, kept:].norm()) / change if change else 0.0


def _replace(attn: Attention, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """New projections of these columns per head [H, C, width]; the bias of the output stays."""
    attn.to_q, attn.to_k, attn.to_v = (
        _linear(c.transpose(1, 2).flatten(0, 1), old)
        for c, old in ((q, attn.to_q), (k, attn.to_k), (v, attn.to_v))
    )
    attn.to_out[0] = _linear(o.transpose(1, 2).flatten(0, 1).T, attn.to_out[0])
    attn.inner_dim = attn.inner_kv_dim = attn.to_q.out_features


def _linear(weight: Tensor, old: nn.Linear) -> nn.Linear:
    """A layer of this weight, with precision, device, bias and need of gradients of the old one."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(old.weight).contiguous(), requires_grad=old.weight.requires_grad)
    layer.bias = old.bias
    return layer.train(old.training)

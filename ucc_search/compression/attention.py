"""Attention with free widths that also shows its queries, keys and values to a scorer."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.pvt_v2 import Attention as PyramidDense
from torch import Tensor, nn

from ucc_search.batches import image_slices

Shown = Literal["nothing", "means", "map"]
"""What a scorer is shown of the attention map."""


class Attended(NamedTuple):
    """What one attention layer computed."""

    out_BQD: Tensor  # Q queries: all tokens, or the leading ones alone
    q_BHQK: Tensor
    k_BHTK: Tensor
    v_BHTV: Tensor
    map_BHQT: Tensor | None = None
    received_BHT: Tensor | None = None  # mean of the map over queries
    class_row_BHT: Tensor | None = None  # first row of the map


def fused_attention(
    q_BHQK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k.T + bias) v, [B, H, Q, V]; the default scale is that of the queries' own width.

    torch's fused kernel for CPUs takes values as wide as keys alone, and what it falls back to is three times
    slower. Zeros on the narrower side change nothing.
    """
    keys, values = q_BHQK.shape[-1], v_BHTV.shape[-1]
    scale = keys**-0.5 if scale is None else scale
    if q_BHQK.device.type == "cpu" and keys < values:
        q_BHQK, k_BHTK = (F.pad(t, (0, values - keys)) for t in (q_BHQK, k_BHTK))
    elif q_BHQK.device.type == "cpu" and values < keys:
        v_BHTV = F.pad(v_BHTV, (0, keys - values))
    mixed = F.scaled_dot_product_attention(
        q_BHQK, k_BHTK, v_BHTV, attn_mask=bias, dropout_p=dropout, scale=scale
    )
    return mixed[..., :values]


class CompressedAttention(nn.Module):
    """timm's `Attention` with separate query/key and value widths; parameter names are timm's.

    Args:
        attention: the layer, cut to these widths, whose parameters are taken over.
        queries: form queries for this many leading tokens only; None for all.
    """

    def __init__(
        self, attention: Attention, *, heads: int, qk_dim: int, v_dim: int, queries: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim = heads, qk_dim, v_dim
        self.scale = attention.scale
        self.queries = queries
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop

    def forward(
        self, x_BTD: Tensor, *, show: Shown = "nothing", key_bias_BT: Tensor | None = None
    ) -> Attended:
        q, k, v = self._project(x_BTD)
        bias = None if key_bias_BT is None else key_bias_BT[:, None, None, :].to(q.dtype)
        attn = received = class_row = None
        if show == "map":
            attn, mixed = self._attend(q, k, v, bias)
        elif show == "means":
            mixed, received, class_row = self._means(q, k, v, bias)
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            mixed = fused_attention(q, k, v, bias=bias, dropout=dropout, scale=self.scale)
        out = self.norm(mixed.transpose(1, 2).flatten(2))
        return Attended(self.proj_drop(self.proj(out)), q, k, v, attn, received, class_row)

    def _attend(
        self, q_BHQK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, bias_B11T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(map_BHQT, mixed_BHQV), not fused."""
        logits = (q_BHQK * self.scale) @ k_BHTK.transpose(-2, -1)
        attn = (logits if bias_B11T is None else logits + bias_B11T).softmax(dim=-1)
        return attn, self.attn_drop(attn) @ v_BHTV

    def _means(
        self, q_BHQK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, bias_B11T: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mixed_BHQV, received_BHT, class_row_BHT): each slice's map is in the cache when it is read again."""
        batch, heads, queries, _ = q_BHQK.shape
        keys, width = k_BHTK.shape[2], v_BHTV.shape[3]
        slices = image_slices(q_BHQK, heads * queries * keys * q_BHQK.element_size())
        if len(slices) == 1:
            attn, mixed = self._attend(q_BHQK, k_BHTK, v_BHTV, bias_B11T)
            return mixed, attn.mean(dim=2), attn[:, :, 0]
        mixed_BQHV = v_BHTV.new_empty(batch, queries, heads, width)  # as the projection reads it
        received, class_row = (v_BHTV.new_empty(batch, heads, keys) for _ in range(2))
        most = slices[0].stop * heads  # the last slice may have fewer images
        mean_X1Q = q_BHQK.new_full((most, 1, queries), 1 / queries)
        memory = q_BHQK.new_empty(most, queries, keys)
        for s in slices:
            q, k, v = (t[s].flatten(0, 1) for t in (q_BHQK, k_BHTK, v_BHTV))
            attn, mean = memory[: q.shape[0]], mean_X1Q[: q.shape[0]]
            if bias_B11T is None:
                torch.baddbmm(attn, q, k.transpose(1, 2), beta=0, alpha=self.scale, out=attn)
            else:
                bias = bias_B11T[s].expand(-1, heads, -1, -1).flatten(0, 1)
                torch.baddbmm(bias, q, k.transpose(1, 2), alpha=self.scale, out=attn)
            torch.softmax(attn, dim=-1, out=attn)
            torch.bmm(mean, attn, out=received[s].flatten(0, 1)[:, None])
            class_row[s] = attn[:, 0].unflatten(0, (-1, heads))
            mixed_BQHV[s] = (self.attn_drop(attn) @ v).unflatten(0, (-1, heads)).transpose(1, 2)
        return mixed_BQHV.transpose(1, 2), received, class_row

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.heads * self.qk_dim
        sizes = [width, width, self.heads * self.v_dim]
        if self.queries is None:
            q, k, v = self.qkv(x_BTD).split(sizes, dim=-1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
            q = F.linear(x_BTD[:, : self.queries], weight[:width], q_bias)
            k, v = F.linear(x_BTD, weight[width:], kv_bias).split(sizes[1:], dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.q_norm(q), self.k_norm(k), v


class PyramidAttention(nn.Module):
    """PVTv2's attention over a reduced grid, with free widths; parameter names are timm's.

    Args:
        attention: the layer, cut to these widths, whose parameters are taken over.

    Reference: Wang et al. 2022, PVT v2, arXiv:2106.13797, section 3.
    """

    def __init__(self, attention: PyramidDense, heads: int, qk_dim: int, v_dim: int) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim = heads, qk_dim, v_dim
        self.q, self.kv, self.proj = attention.q, attention.kv, attention.proj
        self.sr, self.norm = attention.sr, attention.norm
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop

    def forward(self, x_BTD: Tensor, feat_size: tuple[int, int]) -> Tensor:
        q = self.q(x_BTD)
        if self.sr is not None:
            grid = x_BTD.transpose(1, 2).unflatten(2, tuple(feat_size))
            x_BTD = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        k, v = self.kv(x_BTD).split([self.heads * self.qk_dim, self.heads * self.v_dim], dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = fused_attention(q, k, v, dropout=dropout)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

"""One attention with a low-rank term beside its own, as an attention processor of diffusers.

B images, N positions of queries and M of keys; D channels of queries, E of keys and values (the
text's, in cross-attention), O of outputs; H heads of d channels and r ranks each, w = d + r.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Init = Literal["zero", "random"]


class LowRankAttention(nn.Module):
    """Attention whose scores and outputs each gain a term of rank r per head.

    With the frozen W and the trained U and S, per head:

        A = softmax((X_Q W^Q (X_K W^K)ᵀ + X_Q U^Q (X_K S^K)ᵀ) / sqrt(d))
        out = A X_V W^V W^O + A X_V U^V S^O

    This is not LoRA on each projection: the term has queries and keys of its own, added before the
    softmax, and one A serves both outputs. With [q, q'], [k, k'] and [v, v'] side by side it is one
    fused attention, whose scale stays that of d channels.

    Args:
        attn: the attention it is for; only its sizes are read.
        rank: r, at least 1.
        init: `zero` makes both S zero, so that nothing changes before the first step; `random` draws
            all four as torch's linear layers do, as published.
        dtype: of the trained weights; activations are cast to it and back.

    Reference: Xiao et al. 2023, COMCAT, arXiv:2305.17235, the section on customisation.
    """

    def __init__(self, attn: Attention, rank: int, *, init: Init, dtype: torch.dtype) -> None:
        super().__init__()
        ranks, device = attn.heads * rank, next(attn.parameters()).device
        self.rank = rank
        self.scale = 1.0
        """a, on each of q', k', v' and the output: both terms come times a². Training is at 1."""
        self.u_q = nn.Linear(attn.query_dim, ranks, bias=False, device=device, dtype=dtype)
        self.s_k = nn.Linear(attn.cross_attention_dim, ranks, bias=False, device=device, dtype=dtype)
        self.u_v = nn.Linear(attn.cross_attention_dim, ranks, bias=False, device=device, dtype=dtype)
        self.s_o = nn.Linear(ranks, attn.out_dim, bias=False, device=device, dtype=dtype)
        if init == "zero":
            nn.init.zeros_(self.s_k.weight)
            nn.init.zeros_(self.s_o.weight)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Outputs [B, N, O]; called by `attn`, with the arguments of every processor of diffusers.

        Args:
            attn: the frozen attention.
            hidden_states: X_Q, [B, N, D].
            encoder_hidden_states: X_K = X_V, [B, M, E]; X_Q unless given.
            attention_mask: added to the scores, [B, 1, M] or [B H, N, M].
        """
        x_BND = hidden_states
        c_BME = x_BND if encoder_hidden_states is None else encoder_hidden_states
        strength = self.scale**2  # once per term: a on q' and on k' is a² on their product
        q_BHNw = _side_by_side(attn.to_q(x_BND), _apply(self.u_q, x_BND) * strength, attn.heads)
        k_BHMw = _side_by_side(attn.to_k(c_BME), _apply(self.s_k, c_BME), attn.heads)
        v_BHMw = _side_by_side(attn.to_v(c_BME), _apply(self.u_v, c_BME), attn.heads)
        if attention_mask is not None:
            batch, keys, _ = c_BME.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, keys)
        # The scale is given: by default torch would divide by the root of d + r.
        mixed_BHNw = scaled_dot_product_attention(
            q_BHNw, k_BHMw, v_BHMw, attn_mask=attention_mask, scale=attn.scale
        )
        dense_BNHd, low_BNHr = mixed_BHNw.transpose(1, 2).tensor_split([-self.rank], dim=-1)
        out_BNO = attn.to_out[0](dense_BNHd.flatten(2))
        out_BNO = out_BNO + (_apply(self.s_o, low_BNHr.flatten(2)) * strength).to(out_BNO.dtype)
        return attn.to_out[1](out_BNO)


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` in its own precision: float32 trains beside a U-Net in half precision."""
    return layer(x.to(layer.weight.dtype))


def _side_by_side(dense: Tensor, low: Tensor, heads: int) -> Tensor:
    """[B, T, H d] and [B, T, H r] as [B, H, T, d + r], in the precision of the former."""
    parts = [part.unflatten(-1, (heads, -1)) for part in (dense, low.to(dense.dtype))]
    return torch.cat(parts, dim=-1).transpose(1, 2)

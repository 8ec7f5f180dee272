"""Low ranks in a model, in place: head-level products of attention, and the matrices of MLPs (COMCAT).

Reference: Xiao et al. 2023, COMCAT, ICML, arXiv:2305.17235, section 3. Its released code drops the
biases of attention; here they are kept: exactly at full rank, and as part of what is approximated below.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ucc_search.compression.parts import Parts, blocks_of, parts_of
from ucc_search.plan import BlockPlan, CompressionPlan


def factorize(model: nn.Module, plan: CompressionPlan) -> None:
    """Bring products and matrices to the plan's ranks; the model has its other widths already."""
    for block, wanted in zip(blocks_of(model), plan.blocks, strict=True):
        if wanted.attention and plan.low_rank_attention:
            _factorize_attention(parts_of(block), wanted)
        if wanted.mlp and wanted.mlp_rank is not None:
            for name in ("fc1", "fc1_g", "fc1_x", "fc2"):
                layer = getattr(block.mlp, name, None)
                if isinstance(layer, nn.Linear):
                    setattr(block.mlp, name, low_rank_linear(layer, wanted.mlp_rank))


def low_rank_linear(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Two thin layers in place of one: the best approximation of its weight; the bias stays.

    Raises:
        ValueError: the rank is not between 1 and the smaller side.
    """
    if not 1 <= rank <= min(layer.in_features, layer.out_features):
        raise ValueError(f"rank is {rank}, expected 1 to {min(layer.in_features, layer.out_features)}")
    left, singular, right = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    reduce = _linear(singular[:rank, None] * right[:rank], None, like=layer)
    expand = _linear(left[:, :rank], layer.bias, like=layer)
    return nn.Sequential(OrderedDict(reduce=reduce, expand=expand))


def factor_product(left_Xd: Tensor, right_Yd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of left @ right.T of this rank: (U_Xr with orthonormal columns, V_Yr).

    The product itself, of X by Y numbers, is never formed.
    """
    q_left, r_left = torch.linalg.qr(left_Xd.double())
    q_right, r_right = torch.linalg.qr(right_Yd.double())
    u, singular, vh = torch.linalg.svd(r_left @ r_right.t())
    return q_left @ u[:, :rank], q_right @ (vh[:rank].t() * singular[:rank])


def _factorize_attention(parts: Parts, plan: BlockPlan) -> None:
    heads, dim = plan.heads, parts.attention.head_dim
    rows, biases = _rows(parts)
    q, k, v = (rows[role].detach().double().unflatten(0, (heads, dim)) for role in "qkv")
    out = parts.attention_out
    out_HdD = out.weight.detach().double().t().unflatten(0, (heads, dim))
    if "q" in biases:
        # The bias of queries adds a term to every key; as one more input that is always one, it is
        # part of the product. The bias of keys shifts all logits of a query alike: softmax drops it.
        q_bias = biases["q"].detach().double().unflatten(0, (heads, dim))[..., None]
        q = torch.cat([q, q_bias], dim=2)
        _absorb_value_bias(out, biases["v"])
    pairs = [factor_product(q[h].t(), k[h].t(), plan.qk_dim) for h in range(heads)]
    values = [factor_product(v[h].t(), out_HdD[h].t(), plan.v_dim) for h in range(heads)]
    # Attention of width r divides by sqrt(r), and must divide by the old root.
    q_new = torch.cat([u.t() for u, _ in pairs]) * math.sqrt(plan.qk_dim / dim)
    k_new = torch.cat([w.t() for _, w in pairs])
    v_new = torch.cat([u.t() for u, _ in values])
    width = rows["q"].shape[1]
    new = {"q": q_new[:, :width], "k": k_new, "v": v_new}
    new_bias = {
        "q": q_new[:, width:].flatten(),
        "k": k_new.new_zeros(len(k_new)),
        "v": v_new.new_zeros(len(v_new)),
    }
    for layer, roles in parts.projections:
        bias = None if layer.bias is None else torch.cat([new_bias[r] for r in roles])
        _replace(layer, torch.cat([new[r] for r in roles]), bias)
    _replace(out, torch.cat([w.t() for _, w in values]).t(), out.bias)
    attention = parts.attention
    attention.scale = attention.scale * math.sqrt(dim / plan.qk_dim)
    attention.head_dim, attention.attn_dim = plan.qk_dim, heads * plan.v_dim


def _rows(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and biases of queries, keys and values."""
    weights, biases = {}, {}
    for layer, roles in parts.projections:
        weights.update(zip(roles, layer.weight.chunk(len(roles)), strict=True))
        if layer.bias is not None:
            biases.update(zip(roles, layer.bias.chunk(len(roles)), strict=True))
    return weights, biases


def _absorb_value_bias(out: nn.Linear, bias: Tensor) -> None:
    """Rows of attention sum to one, so the bias of values is a constant of the output."""
    constant = out.weight.detach() @ bias.detach()
    assert out.bias is not None  # the plan refuses attention that has a bias in its values alone
    out.bias = nn.Parameter(out.bias.detach() + constant, requires_grad=out.bias.requires_grad)


def _replace(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    made = _linear(weight, bias, like=layer)
    layer.weight, layer.bias = made.weight, made.bias
    layer.out_features, layer.in_features = weight.shape


def _linear(weight: Tensor, bias: Tensor | None, *, like: nn.Linear) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    kind = {"dtype": like.weight.dtype, "device": like.weight.device}
    learned = like.weight.requires_grad
    made.weight = nn.Parameter(weight.detach().to(**kind).contiguous(), requires_grad=learned)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone().to(**kind), requires_grad=learned)
    return made

"""Low ranks in a model, in place: head-level products of attention, matrices of MLPs and classifiers (COMCAT).

Reference: Xiao et al. 2023, COMCAT, ICML, arXiv:2305.17235, section 3. Its released code drops the
biases of attention; here they are kept: exactly at full rank, and as part of what is approximated below.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ucc_search.batches import image_slices
from ucc_search.compression.parts import Parts, blocks_of, parts_of
from ucc_search.compression.whitening import Moments, root
from ucc_search.plan import BlockPlan, CompressionPlan

_LAST_LEVEL = 8  # how much more it holds than the second, at least


def factorize(model: nn.Module, plan: CompressionPlan, inputs: Mapping[str, Moments] | None = None) -> None:
    """Bring products and matrices to the plan's ranks; the model has its other widths already.

    Args:
        inputs: of every layer, by name: the factors then approximate what the layers give on them
            (`ucc_search.compression.whitening`); None: they approximate the weights (COMCAT).
    """
    name_of = {module: name for name, module in model.named_modules()}
    known = inputs or {}

    def seen(layer: nn.Module) -> Moments | None:
        return known.get(name_of[layer])

    for block, wanted in zip(blocks_of(model), plan.blocks, strict=True):
        if wanted.attention and plan.low_rank_attention:
            _factorize_attention(parts_of(block), wanted, seen)
        if wanted.mlp and wanted.mlp_rank is not None:
            for name in ("fc1", "fc1_g", "fc1_x", "fc2"):
                layer = getattr(block.mlp, name, None)
                if isinstance(layer, nn.Linear):
                    setattr(block.mlp, name, low_rank_linear(layer, wanted.mlp_rank, seen(layer)))
            if type(block.mlp) is Mlp:
                block.mlp = LowRankMlp(block.mlp)
    if plan.head_rank is not None:
        for name in ("head", "head_dist"):
            layer = getattr(model, name, None)
            if isinstance(layer, nn.Linear):
                setattr(model, name, low_rank_linear(layer, plan.head_rank, seen(layer)))


class LowRankMlp(Mlp):
    """timm's MLP with thin matrices, a few images at a time; parameter names are timm's.

    Thin products are done so soon that writing all hidden units to memory and reading them back is what takes
    the time: on a CPU at batch 32, slices bring back the speed that the MACs promise.
    """

    def __init__(self, mlp: Mlp) -> None:
        nn.Module.__init__(self)
        self.fc1, self.act, self.drop1 = mlp.fc1, mlp.act, mlp.drop1
        self.norm, self.fc2, self.drop2 = mlp.norm, mlp.fc2, mlp.drop2

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.fc1.expand.out_features * x_BTD.shape[1:-1].numel() * x_BTD.element_size()
        # Products want more rows than the second-level cache holds of hidden units: the last level does.
        slices = image_slices(x_BTD, max(1, hidden // _LAST_LEVEL))
        if len(slices) == 1:
            return cast(Tensor, super().forward(x_BTD))
        out_BTD = torch.empty_like(x_BTD)
        for s in slices:
            out_BTD[s] = super().forward(x_BTD[s])
        return out_BTD


def factorizes(plan: CompressionPlan) -> bool:
    """Whether the plan brings any rank down."""
    ranks = any(b.mlp and b.mlp_rank is not None for b in plan.blocks)
    return plan.low_rank_attention or plan.head_rank is not None or ranks


def low_rank_linear(layer: nn.Linear, rank: int, inputs: Moments | None = None) -> nn.Sequential:
    """Two thin layers in place of one: the best approximation of its weight, or of what it gives on `inputs`.

    The bias stays, and makes up for the mean error where inputs are known.

    Raises:
        ValueError: the rank is not between 1 and the smaller side.
    """
    if not 1 <= rank <= min(layer.in_features, layer.out_features):
        raise ValueError(f"rank is {rank}, expected 1 to {min(layer.in_features, layer.out_features)}")
    weight, bias = layer.weight.detach().double(), layer.bias
    if inputs is None:
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        right = right[:rank]
    else:
        # Without a bias the mean is part of what must be approximated.
        forward, back = root(inputs.covariance_II if bias is not None else inputs.plus_one()[:-1, :-1])
        left, singular, right = torch.linalg.svd(weight @ forward, full_matrices=False)
        right = right[:rank] @ back
    left, right = left[:, :rank], singular[:rank, None] * right
    if inputs is not None and bias is not None:
        error = (weight - left @ right) @ inputs.mean_I
        bias = bias.detach() + error.to(bias.dtype)
    return nn.Sequential(
        OrderedDict(reduce=_linear(right, None, like=layer), expand=_linear(left, bias, like=layer))
    )


def factor_product(
    left_Xd: Tensor,
    right_Yd: Tensor,
    rank: int,
    left_moments: Tensor | None = None,
    right_moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best approximation of P = left @ right.T of this rank: (U_Xr, V_Yr), U with orthonormal columns.

    With second moments of what P is multiplied with, on its left side, its right side or both, the best is
    that of x P y on average over independent x and y; U is orthonormal under the left ones.
    The product itself, of X by Y numbers, is never formed.
    """
    sides, back = [], []
    for factor, moments in ((left_Xd.double(), left_moments), (right_Yd.double(), right_moments)):
        forward, inverse = (None, None) if moments is None else root(moments)
        sides.append(torch.linalg.qr(factor if forward is None else forward @ factor))
        back.append(inverse)
    (q_left, r_left), (q_right, r_right) = sides
    u, singular, vh = torch.linalg.svd(r_left @ r_right.t())
    found = q_left @ u[:, :rank], q_right @ (vh[:rank].t() * singular[:rank])
    left, right = (f if b is None else b @ f for f, b in zip(found, back, strict=True))
    return left, right


def _factorize_attention(parts: Parts, plan: BlockPlan, seen: Callable[[nn.Module], Moments | None]) -> None:
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
        _add_to_bias(out, out.weight.detach() @ biases["v"].detach())  # rows of attention sum to one
    whiten = _attention_moments(parts, seen, biased="q" in biases)
    pairs = [factor_product(q[h].t(), k[h].t(), plan.qk_dim, whiten["q"], whiten["k"]) for h in range(heads)]
    values = [factor_product(v[h].t(), out_HdD[h].t(), plan.v_dim, whiten["v"]) for h in range(heads)]
    if whiten["mean"] is not None and out.bias is not None:
        errors = [(out_HdD[h].t() @ v[h] - w @ u.t()) @ whiten["mean"] for h, (u, w) in enumerate(values)]
        _add_to_bias(out, torch.stack(errors).sum(dim=0))
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


def _attention_moments(
    parts: Parts, seen: Callable[[nn.Module], Moments | None], *, biased: bool
) -> dict[str, Tensor | None]:
    """Second moments that queries, keys and values meet, and the mean of what values are formed from."""
    found: dict[str, Tensor | None] = dict.fromkeys(("q", "k", "v", "mean"))
    for layer, roles in parts.projections:
        moments = seen(layer)
        if moments is None:
            continue
        if "q" in roles:
            found["q"] = moments.plus_one() if biased else moments.plus_one()[:-1, :-1]
        if "k" in roles:
            found["k"], found["mean"] = moments.within_II, moments.mean_I
            biased_out = parts.attention_out.bias is not None
            found["v"] = moments.covariance_II if biased_out else moments.plus_one()[:-1, :-1]
    return found


def _rows(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and biases of queries, keys and values."""
    weights, biases = {}, {}
    for layer, roles in parts.projections:
        weights.update(zip(roles, layer.weight.chunk(len(roles)), strict=True))
        if layer.bias is not None:
            biases.update(zip(roles, layer.bias.chunk(len(roles)), strict=True))
    return weights, biases


def _add_to_bias(layer: nn.Linear, constant: Tensor) -> None:
    assert layer.bias is not None  # the plan refuses attention that has a bias in its values alone
    total = layer.bias.detach() + constant.to(layer.bias.dtype)
    layer.bias = nn.Parameter(total, requires_grad=layer.bias.requires_grad)


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

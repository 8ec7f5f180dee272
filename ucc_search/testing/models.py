"""The small models and hand-made views that components are checked on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ucc_search.compression import compress, shape_of
from ucc_search.interfaces import Components, Site, TokenView
from ucc_search.plan import CompressionPlan

DIM, HEADS, DEPTH, CLASSES = 16, 2, 3, 3
TOKENS_OUT = (10, 6, 6)  # of 16 patch tokens


@dataclass(frozen=True)
class Case:
    """Tokens as a block of some model would hand them over."""

    name: str
    batch: int = 2
    tokens: int = 16
    prefix: int = 1
    class_token: bool = True
    values: str = "random"  # random, zero, constant or large
    after_cut: bool = False  # only some of the grid's tokens are left, and they stand for several

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("16 patch tokens after a class token"),
    Case("a batch of 1", batch=1),
    Case("1 remaining token", tokens=1),
    Case("4 register tokens beside the class token", prefix=5),
    Case("no prefix token at all", prefix=0, class_token=False),
    Case("7 tokens that earlier blocks left", tokens=7, after_cut=True),
    Case("all-zero tokens", values="zero"),
    Case("equal tokens", values="constant"),
    Case("tokens a thousand times as large", values="large"),
)


def view_of(
    case: Case, *, attention: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TokenView:
    """The view of a case; equal for equal arguments where no other seed was set in between."""
    total, width = case.prefix + case.tokens, DIM // HEADS
    x_BTD = torch.randn(case.batch, total, DIM, device=device)
    if case.values == "zero":
        x_BTD = torch.zeros_like(x_BTD)
    elif case.values == "constant":
        x_BTD = torch.ones_like(x_BTD)
    elif case.values == "large":
        x_BTD = 1000 * x_BTD
    q, k, v = torch.randn(3, case.batch, HEADS, total, width, device=device)
    scale, side = width**-0.5, 4
    attn = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1) if attention else None
    grid = (side, side) if case.after_cut or case.tokens == side * side else (1, case.tokens)
    order_N = torch.arange(case.tokens, device=device) * (2 if case.after_cut else 1)
    size_BN = torch.ones(case.batch, case.tokens, device=device)
    if case.after_cut:
        size_BN[:, 0] = 3.0
    tensors = (t if t is None else t.to(dtype) for t in (x_BTD, q, k, v, attn))
    x_BTD, q, k, v, attn = tensors
    return TokenView(
        x_BTD,
        q,
        k,
        v,
        attn,
        scale,
        case.prefix,
        case.class_token,
        order_N.expand(case.batch, case.tokens),
        size_BN.to(dtype),
        grid,
    )


def site_of(case: Case, keep: int | None = None) -> Site:
    """Where the view of a case comes from."""
    width = DIM // HEADS
    grid = (4, 4) if case.after_cut or case.tokens == 16 else (1, case.tokens)
    keep = max(1, case.tokens // 2) if keep is None else keep
    return Site(1, case.tokens, keep, case.prefix, case.class_token, DIM, HEADS, width, width, DEPTH, grid)


def tiny_model(**changes: Any) -> VisionTransformer:
    """A ViT of 3 blocks, 16 patch tokens and a class token, always with the same weights."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 2,
        "embed_dim": DIM,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
    }
    return VisionTransformer(**{**arguments, **changes}).eval()


def tiny_models(class_token: bool = False) -> Iterator[tuple[str, VisionTransformer]]:
    """Models of the arrangements that timm knows, by what they have."""
    yield "a class token", tiny_model()
    yield "register tokens", tiny_model(reg_tokens=4)
    if not class_token:
        yield "average pooling and no class token", tiny_model(class_token=False, global_pool="avg")


def tiny_plan(model: nn.Module, tokens_out: Sequence[int] = TOKENS_OUT) -> CompressionPlan:
    """Cuts tokens in the first two blocks."""
    return CompressionPlan.identity(shape_of(model)).replace(tokens_out=list(tokens_out))


def tiny_compressed(
    parts: Components, model: nn.Module | None = None, tokens_out: Sequence[int] = TOKENS_OUT
) -> tuple[nn.Module, CompressionPlan]:
    """The compressed tiny model, its new modules drawn from seed 1."""
    model = tiny_model() if model is None else model
    plan = tiny_plan(model, tokens_out)
    torch.manual_seed(1)
    return compress(model, plan, parts), plan


def tiny_images(batch: int = 2) -> Tensor:
    """images_BCHW for the tiny models."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def counted_macs(model: nn.Module, images_BCHW: Tensor | None = None) -> tuple[float, float]:
    """(MACs of one image as torch counts them, those of FFTs by the convention of `fft_macs`), on the meta device."""
    seen = [0.0]

    def fft(
        values_shape: Any, dims: Sequence[int], *args: Any, out_shape: Any = None, **options: Any
    ) -> float:
        flops = sum(5 * math.prod(values_shape) * math.log2(values_shape[d]) for d in dims)
        seen[0] += flops
        return flops

    known = {getattr(torch.ops.aten, n): fft for n in ("_fft_r2c", "_fft_c2c", "_fft_c2r")}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        model.to("meta")((tiny_images(1) if images_BCHW is None else images_BCHW).to("meta"))
    return counter.get_total_flops() / 2, seen[0] / 2

"""Models of every supported family: small, in double precision, with weights under which any loss shows."""

from __future__ import annotations

import functools

import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import VisionTransformer

from ucc_search.compression import shape_of
from ucc_search.models import small_vit
from ucc_search.plan import CompressionPlan

_VIT = {"img_size": 48, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
_PATCH_14 = {**_VIT, "img_size": 42}
_OWN = {**_VIT, "patch_size": 16}

# Nine patches, three blocks of three heads; pyramids on a grid that is not square.
FAMILIES = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", **_VIT),
    "deit3": lambda: timm.create_model("deit3_small_patch16_224", **_VIT),  # LayerScale
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **_VIT),  # two heads
    "registers": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **_PATCH_14),
    "average": lambda: timm.create_model("vit_medium_patch16_gap_240", **_VIT),  # no class token
    "pre_norm": lambda: timm.create_model("vit_base_patch32_clip_224", **{**_VIT, "img_size": 96}),
    "swiglu": lambda: VisionTransformer(**_OWN, mlp_layer=SwiGLU, qkv_bias=False),
    "norms": lambda: VisionTransformer(**_OWN, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "no_last_norm": lambda: VisionTransformer(**_OWN, final_norm=False),
    "stem": lambda: small_vit(
        classes=5, channels=1, img_size=12, stem_channels=(6, 8), embed_dim=24, depth=3, num_heads=3
    ),
    "pvt_v2_b0": lambda: timm.create_model("pvt_v2_b0", embed_dims=(8, 16, 40, 64), num_classes=5),
    "pvt_v2_b2": lambda: timm.create_model("pvt_v2_b2", embed_dims=(8, 16, 40, 64), num_classes=5),
}
PYRAMIDS = ("pvt_v2_b0", "pvt_v2_b2")


@functools.cache
def family(name):
    """A model of this family with random weights, norms, biases, tokens and LayerScale included."""
    torch.manual_seed(0)
    model = FAMILIES[name]().double().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        # As they are initialised, norms are ones, biases zeros and LayerScales nearly zero.
        if parameter.ndim == 1 or "token" in key or "pos_embed" in key:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.mul_(3.0)
    return model


@functools.cache
def dense(name):
    """The plan of a family that changes nothing."""
    size = (64, 32) if name in PYRAMIDS else None
    return CompressionPlan.identity(shape_of(family(name), name, image_size=size))


def images(name, batch=2, seed=1):
    """Noise that a family can see."""
    shape = dense(name).shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, shape.channels, *shape.image_size, generator=generator, dtype=torch.float64)


def random_scores(shape, seed=2):
    """A score for every unit, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (g.kind, g.index): torch.rand(g.units, generator=generator, dtype=torch.float64)
        for g in shape.unit_groups()
    }

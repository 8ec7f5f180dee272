"""The contract of model families, line by line."""

from __future__ import annotations

import torch

from ucc_search.compression import compress, refusals, shape_of
from ucc_search.costs import cost
from ucc_search.interfaces import Family
from ucc_search.plan import CompressionPlan
from ucc_search.testing.core import Broken, Check
from ucc_search.testing.models import counted_macs


def models_are_readable(family: Family) -> None:
    model = family.build(classes=7, channels=3, pretrained=False)
    if reasons := refusals(model):
        raise Broken(
            f"the model cannot be compressed: {reasons[0]}",
            "build timm's VisionTransformer or PyramidVisionTransformerV2 with timm's own blocks",
            method="build",
        )
    shape = shape_of(model)
    if (shape.classes, shape.channels) != (7, 3):
        raise Broken(
            f"the model has {shape.classes} classes and {shape.channels} channels, 7 and 3 were asked for",
            "pass classes and channels on (num_classes=classes, in_chans=channels)",
            method="build",
        )


def models_take_no_memory_on_meta(family: Family) -> None:
    with torch.device("meta"):
        model = family.build(classes=7, channels=3, pretrained=False)
    real = [name for name, p in model.named_parameters() if p.device.type != "meta"]
    if real:
        raise Broken(
            f"{real[0]} is made on {dict(model.named_parameters())[real[0]].device} although the meta device is asked for",
            "name no device in build; load weights only if pretrained",
            method="build",
        )


def identity_plans_change_nothing(family: Family) -> None:
    torch.manual_seed(0)
    model = family.build(classes=7, channels=3, pretrained=False).eval()
    shape = shape_of(model)
    images = torch.randn(2, 3, *shape.image_size)
    with torch.no_grad():
        if not torch.equal(compress(model, CompressionPlan.identity(shape))(images), model(images)):
            raise Broken(
                "the model that keeps everything gives other outputs",
                "no random numbers in eval mode",
                method="build",
            )
        if not shape.stages:
            half = [max(1, shape.tokens // 2)] * shape.depth
            small = compress(model, CompressionPlan.identity(shape).replace(tokens_out=half))
            if tuple(small(images).shape) != (2, 7):
                raise Broken("a model of half the tokens has other outputs", "return logits [B, classes]")


def costs_are_what_is_counted(family: Family) -> None:
    model = family.build(classes=7, channels=3, pretrained=False).eval()
    price = cost(CompressionPlan.identity(shape_of(model)))
    params = sum(p.numel() for p in model.parameters())
    counted, _ = counted_macs(model, torch.zeros(1, 3, *shape_of(model).image_size))
    if price.params != params or price.macs != counted:
        raise Broken(
            f"read are {price.macs} MACs and {price.params} parameters, torch counts {counted:.0f} and {params}",
            "something in the model is not timm's own: a layer beside the stem, the blocks and the head",
            method="build",
        )


FAMILY_CHECKS = (
    Check(
        "readable",
        "the model is built of what can be compressed, for any classes and channels",
        models_are_readable,
    ),
    Check("meta", "the model can be built on the meta device", models_take_no_memory_on_meta),
    Check(
        "identity", "keeping everything changes nothing, and tokens can be cut", identity_plans_change_nothing
    ),
    Check("cost", "what is read of the model costs what torch counts", costs_are_what_is_counted),
)

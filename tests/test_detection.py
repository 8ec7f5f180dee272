"""Pruned models as backbones of detectors, on generated scenes: one coloured box on noise."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import timm
import torch

import ucc_search
from ucc_search.compression import compress, shape_of
from ucc_search.config import ModelConfig
from ucc_search.detection import Backbone, detector
from ucc_search.errors import ModelError
from ucc_search.interfaces import ComponentRef
from ucc_search.models import build_model
from ucc_search.plan import CompressionPlan
from ucc_search.saving import arch_of, load_model, save_model

SIZE = 64
CONFIGS = {
    "pvt": ModelConfig(name="pvt_v2_b0"),
    "vit": ModelConfig(
        name="vit_tiny_patch16_224", args={"img_size": SIZE, "depth": 4, "embed_dim": 48, "num_heads": 3}
    ),
    "stem": ModelConfig(name="small_vit", args={"img_size": SIZE, "depth": 2}),  # tokens of 4 pixels
}
CHANNELS = 16
FEW_PROPOSALS = {"rpn_post_nms_top_n_train": 30, "box_batch_size_per_image": 16}
COLOURS = torch.tensor([[1.0, 0.1, 0.1], [0.1, 1.0, 0.1]])


@functools.cache
def dense(family):
    torch.manual_seed(0)
    return build_model(CONFIGS[family], classes=5, channels=3).eval()


def pruned_plan(family, *, widths=True, depth=True):
    """Every width cut, each stage's embedding by another number; the second block gone, half of a ViT's last."""
    plan = CompressionPlan.identity(shape_of(dense(family), image_size=(SIZE, SIZE)))
    shape = plan.shape
    if widths:
        plan = plan.replace(
            embed_dims=tuple(dim * 3 // 4 - i for i, dim in enumerate(shape.embed_dims)),
            mlp_hidden=[b.mlp_hidden // 2 + i for i, b in enumerate(shape.blocks)],
            qk_dim=[b.qk_dim // 2 for b in shape.blocks],
            v_dim=[b.v_dim // 2 + 1 for b in shape.blocks],
        )
    kept = [not depth or i != 1 for i in range(shape.depth)]
    whole = [k and not (depth and family == "vit" and i == 3) for i, k in enumerate(kept)]
    return plan.replace(attention=kept, mlp=whole)


@functools.cache
def pruned(family):
    return compress(dense(family), pruned_plan(family))


def scenes(count, generator, size=SIZE):
    """Images [3, size, size] from 0 to 1 and torchvision's targets; the label is the colour."""
    images, targets = [], []
    for _ in range(count):
        image = 0.2 * torch.rand(3, size, size, generator=generator)
        width, height = torch.randint(size // 4, size // 2, (2,), generator=generator).tolist()
        left, top = (int(torch.randint(size - n, (1,), generator=generator)) for n in (width, height))
        colour = torch.randint(len(COLOURS), (1,), generator=generator)
        mask = torch.zeros(1, size, size, dtype=torch.uint8)
        mask[0, top : top + height, left : left + width] = 1
        images.append(torch.where(mask.bool(), COLOURS[colour].view(3, 1, 1), image))
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float)
        targets.append({"boxes": box, "labels": colour + 1, "masks": mask})
    return images, targets


# What timm says of the features


@pytest.mark.parametrize(("widths", "depth"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("family", ["pvt", "vit"])
def test_feature_info_describes_the_maps(family, widths, depth):
    plan = pruned_plan(family, widths=widths, depth=depth)
    model = compress(dense(family), plan)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.rand(1, 3, SIZE, SIZE), intermediates_only=True)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [SIZE // m.shape[2] for m in maps] == [info["reduction"] for info in model.feature_info]
    modules = dict(model.named_modules())
    assert all(info["module"] in modules for info in model.feature_info)
    assert model.num_features == plan.embed_dim == maps[-1].shape[1]


# Levels


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32)])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_level_lies_on_its_stride(family, strides):
    backbone = Backbone(pruned(family), image_size=(96, 64), channels=CHANNELS, strides=strides).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 96, 64))
    names = [str((4, 8, 16, 32).index(s)) for s in strides]  # torchvision pools regions by these names
    assert {k: tuple(m.shape) for k, m in maps.items()} == {
        name: (2, CHANNELS, 96 // s, 64 // s) for name, s in zip(names, strides, strict=True)
    }
    assert backbone.out_channels == CHANNELS


def test_the_pyramid_network_reads_the_kept_channels():
    backbone, plan = Backbone(pruned("pvt"), channels=CHANNELS), pruned_plan("pvt")
    assert tuple(block[0].in_channels for block in backbone.neck.inner_blocks) == plan.embed_dims


def test_the_map_of_a_vit_is_its_token_grid():
    """The neck must see the tokens of the last block in their places, without prefix tokens."""
    model = pruned("vit")
    backbone = Backbone(model, channels=CHANNELS).eval()
    seen, tokens = [], []
    backbone.neck.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0].values()))
    handle = model.blocks[-1].register_forward_hook(lambda module, inputs, out: tokens.append(out))
    images = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        model(images), backbone(images)
    handle.remove()
    assert torch.equal(seen[0].flatten(2).transpose(1, 2), tokens[0][:, model.num_prefix_tokens :])


@pytest.mark.parametrize("family", ["pvt", "vit"])
def test_the_model_is_left_untouched(family):
    model = pruned(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Backbone(model, image_size=(96, 96), channels=CHANNELS)
    assert not model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["pvt", "vit"])
def test_a_dense_model_serves_as_well(family):
    with torch.no_grad():
        maps = Backbone(dense(family), channels=CHANNELS).eval()(torch.rand(1, 3, SIZE, SIZE))
    assert [m.shape[-1] for m in maps.values()] == [16, 8, 4, 2]


# Detectors


@pytest.mark.parametrize("family", ["pvt", "vit"])
def test_a_detector_learns_on_a_pruned_backbone(family):
    torch.manual_seed(0)
    model = detector(pruned(family), len(COLOURS), image_size=(SIZE, SIZE), channels=32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(24):
        parts = model(*scenes(4, generator))
        loss = torch.stack(list(parts.values())).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert set(parts) == {"classification", "bbox_regression"}
    assert all(0 < loss < float("inf") for loss in losses)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "mask_rcnn"])
@pytest.mark.parametrize("family", ["pvt", "vit"])
def test_gradients_reach_every_weight_of_the_backbone(family, kind):
    """A weight without a gradient would be one that the detector does not use: the head's, say."""
    torch.manual_seed(0)
    few = FEW_PROPOSALS if kind != "retinanet" else {}
    model = detector(pruned(family), len(COLOURS), kind, channels=CHANNELS, image_size=(SIZE, SIZE), **few)
    images, targets = scenes(2, torch.Generator().manual_seed(1))
    losses = model(images, targets)
    assert ("loss_mask" in losses) == (kind == "mask_rcnn")
    sum(losses.values()).backward()
    body = dict(model.backbone.body.named_parameters())
    assert len(body) > 20
    assert not [k for k, p in model.backbone.named_parameters() if p.grad is None]
    assert not [k for k, p in body.items() if not bool(p.grad.any())]


@pytest.mark.parametrize("family", ["pvt", "vit"])
def test_images_of_any_size_are_stretched_to_the_one_given(family):
    model = detector(pruned(family), 2, image_size=(64, 96), channels=CHANNELS, score_thresh=0.0).eval()
    images = [torch.rand(3, 50, 40), torch.rand(3, 30, 200)]
    assert model.transform(images)[0].tensors.shape[-2:] == (64, 96)
    with torch.no_grad():
        found = model(images)
    for image, result in zip(images, found, strict=True):
        # Boxes come back in pixels of the image as it was given.
        assert len(result["boxes"])
        assert result["boxes"][:, 2].max() <= image.shape[2]
        assert result["boxes"][:, 3].max() <= image.shape[1]
        assert result["labels"].max() <= 2


def test_a_pyramid_keeps_proportions_unless_a_size_is_given():
    model = detector(pruned("pvt"), 2, channels=CHANNELS, min_size=64, max_size=128).eval()
    assert model.transform([torch.rand(3, 100, 150)])[0].tensors.shape[-2:] == (64, 96)


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_anchors_match_the_levels(kind):
    model = detector(pruned("pvt"), 2, kind, image_size=(256, 256), channels=CHANNELS).eval()
    generator = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    images, _ = model.transform([torch.rand(3, 256, 256)])
    with torch.no_grad():
        maps = list(model.backbone(images.tensors).values())
    (anchors,) = generator(images, maps)
    counts = [
        m.shape[2] * m.shape[3] * n for m, n in zip(maps, generator.num_anchors_per_location(), strict=True)
    ]
    first_stride, octaves, base = (8, 3, 4) if kind == "retinanet" else (4, 1, 8)
    for level, of_level in enumerate(anchors.split(counts)):
        stride = first_stride * 2**level
        assert maps[level].shape[-1] == 256 // stride
        areas = ((of_level[:, 2:] - of_level[:, :2]).prod(dim=1).sqrt() / (base * stride)).log2()
        assert areas.min() == pytest.approx(0, abs=0.05)
        assert areas.max() == pytest.approx((octaves - 1) / 3, abs=0.05)
        centres = (of_level[:, 0] + of_level[:, 2]) / 2
        assert torch.equal(centres.unique(), torch.arange(0.0, 256, stride))


def test_images_are_prepared_as_the_model_says():
    model = compress(dense("vit"), pruned_plan("vit"))
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    found = detector(model, 2, channels=CHANNELS).transform
    assert (found.image_mean, found.image_std) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    assert detector(model, 2, channels=CHANNELS, image_mean=[0.5] * 3).transform.image_mean == [0.5] * 3


@pytest.mark.parametrize("family", ["pvt", "vit"])
def test_a_saved_model_becomes_the_same_backbone(tmp_path, family):
    refs = {"scorer": "random", "aggregator": "drop", "cascade": "per_block"}
    components = {kind: ComponentRef(name) for kind, name in refs.items()}
    arch = arch_of(CONFIGS[family], components, {}, (), {"mean": (0.5,) * 3, "std": (0.25,) * 3})
    save_model(pruned(family), tmp_path, pruned_plan(family), arch)
    images, maps = torch.rand(1, 3, SIZE, SIZE), []
    for model in (pruned(family), load_model(tmp_path)):
        torch.manual_seed(0)  # the neck's weights
        with torch.no_grad():
            maps.append(Backbone(model, channels=CHANNELS).eval()(images))
    assert all(torch.equal(maps[0][name], maps[1][name]) for name in maps[0])
    assert detector(load_model(tmp_path), 2, channels=CHANNELS).transform.image_std == [0.25] * 3


# Refusals


def cut(**changes):
    plan = CompressionPlan.identity(shape_of(dense("vit")))
    return compress(dense("vit"), plan.replace(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens_out": [16, 16, 9, 9]}, r"cuts tokens in blocks \[2\]; compress by a plan that keeps them"),
        ({"tokens_out": [9, 9, 9, 9], "head_tokens_only": True}, r"cuts tokens in blocks \[0\]"),
        ({"head_tokens_only": True}, r"compress by a plan with head_tokens_only=False"),
    ],
)
def test_a_grid_with_holes_is_refused(changes, said):
    with pytest.raises(ModelError, match=said):
        detector(cut(**changes), 2)


def test_other_families_are_refused():
    with pytest.raises(ModelError, match="ResNet cannot be a backbone here"):
        Backbone(timm.create_model("resnet18"))


def test_sizes_that_make_no_whole_levels_are_refused():
    with pytest.raises(ModelError, match=r"image_size is 72 x 64, expected multiples of 32.*\(96, 64\)"):
        Backbone(dense("vit"), image_size=(72, 64))


@pytest.mark.parametrize("strides", [(16, 8), (2, 4)])
def test_strides_of_no_level_are_refused(strides):
    with pytest.raises(ModelError, match=r"expected some of \[4, 8, 16, 32\], ascending"):
        Backbone(dense("pvt"), strides=strides)


def test_tokens_of_14_pixels_are_refused_and_the_advice_helps():
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=56, depth=1, embed_dim=24, num_heads=3, num_classes=2
    )
    with pytest.raises(ModelError, match=r"14 x 14 pixels.*set_input_size\(patch_size=16\)"):
        Backbone(model, image_size=(64, 64))
    model.set_input_size(patch_size=16)
    with torch.no_grad():
        maps = Backbone(model, image_size=(64, 64), channels=CHANNELS)(torch.rand(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps.values()] == [16, 8, 4, 2]


def test_an_unknown_kind_is_refused():
    with pytest.raises(
        ModelError, match=r"kind is 'retina', expected one of retinanet.*did you mean 'retinanet'"
    ):
        detector(dense("vit"), 2, "retina")


def test_the_snippet_of_the_guide_runs():
    guide = Path(__file__).resolve().parent.parent / "docs" / "detection.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # the guide's own code
    assert set(names["found"][0]) == {"boxes", "labels", "scores"}
    assert ucc_search.detector is detector

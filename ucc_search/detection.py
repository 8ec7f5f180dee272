"""A compressed model as the backbone of torchvision's detectors: widths and depth may go, the grid stays.

B images, C channels of every level, D of a ViT's tokens, h x w cells. Strides are pixels per cell.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from ucc_search.compression.blocks import CascadeBlocks, CompressedBlock
from ucc_search.compression.parts import is_pyramid
from ucc_search.errors import ModelError, did_you_mean

STRIDES = (4, 8, 16, 32)
"""Of the levels "0" to "3", as torchvision calls them."""

Kind = Literal["retinanet", "faster_rcnn", "mask_rcnn"]
_KINDS = {"retinanet": RetinaNet, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
_RATIOS = (0.5, 1.0, 2.0)
_THIRDS = (1, 2 ** (1 / 3), 2 ** (2 / 3))  # of an octave


class Backbone(nn.Module):
    """Maps of several strides from a dense or compressed model, as torchvision's detectors want them.

    The stages of a PVTv2 go through a feature pyramid network. A ViT has one map, its last, from
    which `SimplePyramid` makes all levels; its position embeddings are resampled to `image_size`.

    Args:
        model: a timm `VisionTransformer` or PVTv2, dense or from `compress` or `load_model`. It is
            left untouched: the backbone owns a copy, in training mode and without the head.
        image_size: rows and columns in pixels. A ViT takes no other size than this, in multiples of
            32 (default: its own); a PVTv2 takes any.
        channels: C, of every map.
        strides: levels to make, of 4, 8, 16 and 32, ascending.
        extra: torchvision's block for coarser levels, or None.

    Raises:
        ModelError: another kind of model, one that cuts tokens, or sizes that make no whole levels.

    References: Lin et al. 2017, arXiv:1612.03144 (PVTv2); Li et al. 2022, ViTDet, arXiv:2203.16527,
    section 3 (ViT).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: tuple[int, int] | None = None,
        channels: int = 256,
        strides: Sequence[int] = STRIDES,
        extra: ExtraFPNBlock | None = None,
    ) -> None:
        super().__init__()
        _refuse_holes(model)
        if list(strides) != [s for s in STRIDES if s in strides]:
            raise ModelError(f"strides are {list(strides)}, expected some of {list(STRIDES)}, ascending")
        self.body = copy.deepcopy(model).train()
        self.image_size = image_size
        self.out_channels = channels
        """C; the name is torchvision's."""
        self.taken: dict[str, int]
        """What the neck reads: names of maps, and the stage or block they leave."""
        self.neck: nn.Module
        if is_pyramid(model):
            self.taken = {str(STRIDES.index(s)): STRIDES.index(s) for s in strides}
            widths = [model.feature_info[i]["num_chs"] for i in self.taken.values()]
            self.neck = FeaturePyramidNetwork(widths, channels, extra)
        else:
            self.taken = {"last": len(self.body.blocks) - 1}
            width, stride = model.feature_info[-1]["num_chs"], _token_stride(model)
            self.neck = SimplePyramid(width, stride, channels, strides, extra)
            self.image_size = _resize(self.body, image_size)
        self.body.prune_intermediate_layers(list(self.taken.values()), prune_norm=True)

    def forward(self, images_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        """Maps [B, C, h, w] by level, the finest first: "0" to "3", then those of `extra`."""
        indices = list(self.taken.values())
        maps = self.body.forward_intermediates(images_BCHW, indices=indices, intermediates_only=True)
        return self.neck(OrderedDict(zip(self.taken, maps, strict=True)))


class SimplePyramid(nn.Module):
    """Levels of several strides, each from the same map by (transposed) convolutions or pooling.

    No top-down path: the last map of a ViT holds both detail and meaning.

    Args:
        width: channels of the map.
        stride: of the map, a power of two.
        channels: C, of every level.
        strides: of the levels, powers of two.
        extra: torchvision's block for coarser levels, or None.

    Reference: Li et al. 2022, ViTDet, arXiv:2203.16527, section 3; layers as in its appendix.
    """

    def __init__(
        self, width: int, stride: int, channels: int, strides: Sequence[int], extra: ExtraFPNBlock | None
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(width, stride, channels, wanted) for wanted in strides)
        self.names = [str(STRIDES.index(s)) for s in strides]
        self.extra = extra

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        """All levels of the only map given."""
        (last_BDhw,) = maps.values()
        levels, names = [level(last_BDhw) for level in self.levels], list(self.names)
        if self.extra is not None:
            levels, names = self.extra(levels, [last_BDhw], names)
        return OrderedDict(zip(names, levels, strict=True))


def _level(width: int, stride: int, channels: int, wanted: int) -> nn.Sequential:
    """From `width` channels at `stride` to `channels` at the stride `wanted`."""
    layers: list[nn.Module] = []
    if stride < wanted:
        layers.append(nn.MaxPool2d(wanted // stride))
    while stride > wanted:
        if layers:
            layers += [LayerNorm2d(width), nn.GELU()]
        half = max(1, width // 2)
        layers.append(nn.ConvTranspose2d(width, half, kernel_size=2, stride=2))
        width, stride = half, stride // 2
    for before, kernel in ((width, 1), (channels, 3)):
        layers.append(
            Conv2dNormActivation(before, channels, kernel, norm_layer=LayerNorm2d, activation_layer=None)
        )
    return nn.Sequential(*layers)


def detector(
    model: nn.Module,
    classes: int,
    kind: Kind = "retinanet",
    *,
    image_size: tuple[int, int] | None = None,
    channels: int = 256,
    **options: Any,
) -> nn.Module:
    """torchvision's detector on a `Backbone`, in training mode, with new weights but for the backbone's body.

    RetinaNet reads strides 8 to 128, with anchors of 4 strides and two thirds of an octave above; the
    others read strides 4 to 64, with anchors of 8. Images are normalised as `model.pretrained_cfg` says.

    Args:
        model: as for `Backbone`.
        classes: kinds of objects; labels are 1 to `classes`, 0 is torchvision's background.
        kind: `retinanet`, `faster_rcnn` or `mask_rcnn`.
        image_size: rows and columns that every image is stretched to, in pixels. Default for a ViT:
            its own; for a PVTv2: torchvision's `min_size` and `max_size`, which keep proportions.
        channels: of every map and of the heads.
        options: torchvision's own, for example `score_thresh`; they win over what is set here.

    Raises:
        ModelError: as `Backbone`, or an unknown kind.

    References: Lin et al. 2017, arXiv:1708.02002; Ren et al. 2015, arXiv:1506.01497; He et al. 2017,
    arXiv:1703.06870.
    """
    if kind not in _KINDS:
        raise ModelError(f"kind is {kind!r}, expected one of {', '.join(_KINDS)}{did_you_mean(kind, _KINDS)}")
    strides: tuple[int, ...]
    extra: ExtraFPNBlock
    sizes: tuple[tuple[int, ...], ...]
    if kind == "retinanet":
        strides, extra, key = STRIDES[1:], LastLevelP6P7(channels, channels), "anchor_generator"
        sizes = tuple(tuple(int(4 * s * third) for third in _THIRDS) for s in (*strides, 64, 128))
    else:
        strides, extra, key = STRIDES, LastLevelMaxPool(), "rpn_anchor_generator"
        sizes = tuple((8 * s,) for s in (*strides, 64))
    backbone = Backbone(model, image_size=image_size, channels=channels, strides=strides, extra=extra)
    settings: dict[str, Any] = {key: AnchorGenerator(sizes, (_RATIOS,) * len(sizes))}
    known = getattr(model, "pretrained_cfg", None) or {}
    settings |= {f"image_{key}": list(known[key]) for key in ("mean", "std") if key in known}
    if backbone.image_size is not None:
        rows, columns = backbone.image_size
        settings["fixed_size"] = (columns, rows)
    return _KINDS[kind](backbone, num_classes=classes + 1, **{**settings, **options})


def _refuse_holes(model: nn.Module) -> None:
    if is_pyramid(model):
        return
    if not isinstance(model, VisionTransformer):
        raise ModelError(
            f"{type(model).__name__} cannot be a backbone here, expected timm's VisionTransformer or PVTv2"
        )
    if not isinstance(model.blocks, CascadeBlocks):
        return
    cut = [b.index for b in model.blocks if isinstance(b, CompressedBlock) and b.tokens_out is not None]
    if cut:
        raise ModelError(
            f"a detector needs a map without holes, and this model cuts tokens in blocks {cut}; "
            "compress by a plan that keeps them (tokens_out of every block = shape.tokens)"
        )
    raise ModelError(
        "a detector needs a map, and the last block of this model computes the tokens of its head alone; "
        "compress by a plan with head_tokens_only=False"
    )


def _token_stride(model: VisionTransformer) -> int:
    rows, columns = model.patch_embed.feat_ratio(as_scalar=False)
    if rows != columns or 32 % rows:
        raise ModelError(
            f"its tokens are {rows} x {columns} pixels, which make no levels of strides 4 to 32 (anchors stand at "
            "whole strides); call model.set_input_size(patch_size=16) first, which resamples the patch embedding"
        )
    return int(rows)


def _resize(model: VisionTransformer, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Make the model take images of this size; returns it."""
    rows, columns = image_size or model.patch_embed.img_size
    whole = tuple(-(-side // STRIDES[-1]) * STRIDES[-1] for side in (rows, columns))
    if (rows, columns) != whole:
        raise ModelError(
            f"image_size is {rows} x {columns}, expected multiples of {STRIDES[-1]}, the stride of the coarsest "
            f"level; give for example image_size={whole}"
        )
    model.set_input_size(img_size=(rows, columns))
    return rows, columns

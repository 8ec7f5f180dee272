"""Build the model to compress: any timm Vision Transformer, or the small reference one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ucc_search.config import ModelConfig
from ucc_search.errors import ModelError

SMALL_VIT = "small_vit"


def build_model(config: ModelConfig, *, classes: int, channels: int) -> nn.Module:
    """The uncompressed model, with random or timm's pretrained weights.

    Raises:
        ModelError: unknown name or arguments, or weights that cannot be fetched.
    """
    import timm

    arguments = dict(config.args)
    if config.bound is not None:
        return _of_plugin(config, classes, channels)
    if config.name.startswith("plugin:"):
        raise ModelError(f"model.name is {config.name!r}: the plugin that brings it is not loaded here")
    try:
        if config.name == SMALL_VIT:
            return small_vit(classes=classes, channels=channels, **arguments)
        return timm.create_model(
            config.name, pretrained=config.pretrained, num_classes=classes, in_chans=channels, **arguments
        )
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise ModelError(f"model {config.name!r} cannot be built: {error}") from None
        near = difflib.get_close_matches(config.name, [*timm.list_models(), SMALL_VIT], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"timm knows no model {config.name!r}{hint}") from None
    except (TypeError, AssertionError, ValueError) as error:
        raise ModelError(f"model {config.name!r} does not take these model.args: {error}") from None
    except OSError as error:
        raise ModelError(
            f"the pretrained weights of {config.name!r} cannot be fetched ({type(error).__name__}); "
            "go online once, or set model.pretrained: false and model.checkpoint to a local file"
        ) from None


def _of_plugin(config: ModelConfig, classes: int, channels: int) -> nn.Module:
    """The model of a plugin's family; whether it can be compressed is for `shape_of` to say."""
    assert config.bound is not None
    try:
        model = config.bound.component.build(classes=classes, channels=channels, pretrained=config.pretrained)
    except Exception as error:  # whatever a plugin raises
        raise ModelError(f"{config.name}: cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{config.name}: build() gave a {type(model).__name__}, expected an nn.Module")
    return model


def small_vit(
    *,
    classes: int,
    channels: int,
    img_size: int = 28,
    stem_channels: tuple[int, ...] = (32, 64),
    stem_strides: tuple[int, ...] = (2, 2),
    embed_dim: int = 64,
    depth: int = 6,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
    **arguments: Any,
) -> nn.Module:
    """A timm `VisionTransformer` for small images, with a convolution stem instead of patches.

    Early convolutions let a small ViT learn from little data (Xiao et al. 2021, arXiv:2106.14881).

    Args:
        stem_channels: widths of the 3 x 3 convolutions; a 1 x 1 convolution to `embed_dim` follows.
        stem_strides: stride of each; their product is the side of a token in pixels.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=img_size,
        in_chans=channels,
        num_classes=classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        embed_layer=partial(_conv_stem, stem_channels=tuple(stem_channels), stem_strides=tuple(stem_strides)),
        **arguments,
    )


def _conv_stem(
    *,
    img_size: int,
    in_chans: int,
    embed_dim: int,
    stem_channels: tuple[int, ...],
    stem_strides: tuple[int, ...],
    patch_size: int = 1,  # timm passes one; the strides decide here
    **arguments: Any,
) -> nn.Module:
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer_hybrid import ConvStem

    if len(stem_channels) != len(stem_strides):
        raise ValueError(
            f"stem_channels has {len(stem_channels)} entries and stem_strides {len(stem_strides)}, expected as many"
        )
    stem = ConvStem(
        in_chans,
        depth=len(stem_channels) + 1,
        channels=(*stem_channels, embed_dim),
        kernel_size=(3,) * len(stem_channels) + (1,),
        stride=(*stem_strides, 1),
    )
    return HybridEmbed(
        stem, img_size=img_size, patch_size=1, in_chans=in_chans, embed_dim=embed_dim, proj=False, **arguments
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a .safetensors, .pth or .pt file, or of a folder holding `model.safetensors`.

    Nothing is unpickled but tensors. Common wrappers (`state_dict`, `model`, `module.`) are opened.

    Raises:
        ModelError: missing, unreadable or corrupt file.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"{path}: no such checkpoint; give a .safetensors or .pth file, or a teacher's folder"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises its own kinds for a corrupt file
        # torch.load answers with a page of advice, some of it unsafe.
        what = f"safetensors: {error}" if path.suffix == ".safetensors" else type(error).__name__
        raise ModelError(
            f"{path}: not a readable checkpoint ({' '.join(what.split())[:120]}); "
            "expected safetensors, or a .pth of plain tensors (weights_only)"
        ) from None
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ModelError(f"{path}: holds no state dict of tensors")
    return {str(k).removeprefix("module."): v for k, v in data.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into `model`; every key and shape must match.

    Raises:
        ModelError: naming the first key that does not fit, and the class counts if these differ.
    """
    weights = read_weights(path)
    wanted = model.state_dict()
    for key in ("head.weight", "head.bias"):
        if key in weights and key in wanted and len(weights[key]) != len(wanted[key]):
            raise ModelError(
                f"{path}: the checkpoint has {len(weights[key])} classes, the data has {len(wanted[key])}; "
                "train a teacher on this data (ucc-search train-teacher) or choose the matching data"
            )
    missing = sorted(set(wanted) - set(weights))
    extra = sorted(set(weights) - set(wanted))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has an unknown {extra[0]!r}"
        raise ModelError(f"{path}: the checkpoint {what}; check model.name and model.args")
    for key, value in weights.items():
        if value.shape != wanted[key].shape:
            raise ModelError(
                f"{path}: {key} has shape {tuple(value.shape)}, the model needs {tuple(wanted[key].shape)}; "
                "check model.args"
            )
    model.load_state_dict(weights)

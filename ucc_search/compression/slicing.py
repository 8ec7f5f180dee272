"""Keep some rows and columns of a layer, in place. A group of channels is cut wherever it appears."""

from __future__ import annotations

from torch import Tensor, nn


def keep_linear(layer: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep these outputs (rows) and inputs (columns)."""
    if columns is not None:
        _set(layer, "weight", layer.weight[:, columns])
        layer.in_features = len(columns)
    if rows is not None:
        _set(layer, "weight", layer.weight[rows])
        if layer.bias is not None:
            _set(layer, "bias", layer.bias[rows])
        layer.out_features = len(rows)


def keep_conv(layer: nn.Conv2d, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Keep these channels; of a depth-wise convolution `outputs` are its inputs as well."""
    depthwise = layer.groups > 1
    if inputs is not None and not depthwise:
        _set(layer, "weight", layer.weight[:, inputs])
        layer.in_channels = len(inputs)
    if outputs is not None:
        _set(layer, "weight", layer.weight[outputs])
        if layer.bias is not None:
            _set(layer, "bias", layer.bias[outputs])
        layer.out_channels = len(outputs)
        if depthwise:
            layer.in_channels = layer.groups = len(outputs)


def keep_vectors(module: nn.Module | None, channels: Tensor) -> None:
    """Keep these channels of every vector in a norm, a LayerScale or nothing at all."""
    for part in module.modules() if module is not None else ():
        for name, vector in list(part.named_parameters(recurse=False)):
            _set(part, name, vector[channels])
        if hasattr(part, "normalized_shape"):
            part.normalized_shape = (len(channels),)


def keep_token(model: nn.Module, name: str, channels: Tensor) -> None:
    """Keep these channels of a special token or position embedding, if the model has it."""
    token = getattr(model, name, None)
    if token is not None:
        _set(model, name, token[..., channels])


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))

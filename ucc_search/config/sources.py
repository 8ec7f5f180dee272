"""`model:` and `data:`, where the teacher and the images come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import Field, PrivateAttr
from typing_extensions import Self

from ucc_search.config.base import Frozen


class Bound(NamedTuple):
    """A plugin's component that a section names, built; and what tells its content from another's."""

    component: Any
    sha256: str | None


class _FromPlugin(Frozen):
    """A section whose `name` may be `plugin:NAME`; see `binding`."""

    _bound: Bound | None = PrivateAttr(None)

    @property
    def bound(self) -> Bound | None:
        return self._bound

    def with_bound(self, bound: Bound) -> Self:
        copy = self.model_copy()
        copy._bound = bound
        return copy


class ModelConfig(_FromPlugin):
    """The model to compress; it is also the teacher."""

    name: str
    """A timm name, the reference model `small_vit`, or plugin:NAME."""
    args: Mapping[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor, for example img_size, patch_size, embed_dim, depth."""
    pretrained: bool = False
    """timm's weights, from the hub."""
    checkpoint: str | None = None
    """A .safetensors file, a .pth/.pt file (read with weights_only) or a folder of `train-teacher`;
    `auto` trains a teacher on first use by `teacher:` and caches it."""


class DataConfig(_FromPlugin):
    """Where images come from and how they are split."""

    name: str
    """digits, fashion-mnist, folder:PATH, torchvision:NAME, hf:NAME or plugin:NAME."""
    args: Mapping[str, Any] = Field(default_factory=dict)
    """Parameters of a plugin's data set."""
    root: str | None = None
    """Where the data set lies, for those that are not found by name."""
    select: float = Field(0.1, gt=0.0, lt=1.0)
    """Share of the training split that is held out for selection, never trained on."""
    calibration: int = Field(1000, ge=1)
    """Images of the selection split used by zero-shot evaluation and calibrated schedules."""
    proxy: int = Field(1000, ge=1)
    """Images of the training split, equally many of each class, on which importance is measured."""
    image_size: int | None = Field(None, ge=1)
    limit_train: int | None = Field(None, ge=1)
    loader_workers: int = Field(0, ge=0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Per channel, of pixels from 0 to 1; likewise `mean`. Those of the data or of ImageNet by default."""

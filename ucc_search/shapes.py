"""A model's shape without waiting for torch: cached on disk by the model's and the data's settings."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ucc_search.config import RunConfig
from ucc_search.plan import ModelShape

FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts it."""


def cache_folder() -> Path:
    """Where teachers and shapes are kept between runs; UCC_SEARCH_CACHE moves it."""
    return Path(os.environ.get("UCC_SEARCH_CACHE", Path.home() / ".cache" / "ucc-search"))


def model_shape(config: RunConfig) -> ModelShape:
    """The shape of the configured model; building it (on the meta device) only if it is not cached.

    Raises:
        ModelError, DataError: the model or data cannot be used.
    """
    return ModelShape.from_dict(_facts(config)["shape"])


def train_images(config: RunConfig) -> int:
    """Images of the training split, without loading them again."""
    return int(_facts(config)["train_images"])


def _facts(config: RunConfig) -> dict[str, Any]:
    path = cache_folder() / "shapes" / f"{_key(config)}.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ModelShape.from_dict(facts["shape"])
        return facts
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or of another version
    from ucc_search.data import load_data

    splits = load_data(config.data)
    shape = _dense_shape(config, splits.classes, splits.channels, splits.image_size)
    facts = {"shape": shape.to_dict(), "train_images": len(splits.train)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    temporary.replace(path)
    return facts


def _dense_shape(config: RunConfig, classes: int, channels: int, size: int) -> ModelShape:
    """Read from the model built on the meta device, where weights take no memory and no time."""
    import torch

    from ucc_search.compression import shape_of
    from ucc_search.models import build_model

    unweighted = config.model.model_copy(update={"pretrained": False})
    with torch.device("meta"):
        model = build_model(unweighted, classes=classes, channels=channels)
    return shape_of(model, config.model.name, image_size=(size, size))


def _key(config: RunConfig) -> str:
    parts = [config.model.model_dump(mode="json"), config.data.model_dump(mode="json")]
    text = json.dumps([parts, folder_stamp(config), version("timm"), version("ucc-search")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def folder_stamp(config: RunConfig) -> list[tuple[str, int]]:
    """What changes when images or classes do: folders, two levels deep, with their times; plugins, by content."""
    kind, _, argument = config.data.name.partition(":")
    top = Path(argument).expanduser().resolve()
    if kind != "folder" or not top.is_dir():
        bound = [section.bound for section in (config.data, config.model) if section.bound is not None]
        return [(str(b.sha256), 0) for b in bound]
    folders = [top, *sorted(p for pattern in ("*/", "*/*/") for p in top.glob(pattern))]
    return [(str(p), p.stat().st_mtime_ns) for p in folders]

"""The smallest whole run: digits, a model of a few thousand parameters, everything in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ucc_search.config import RunConfig, parse_config

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "name": "small_vit",
        "args": {
            "img_size": 8,
            "stem_channels": [8],
            "stem_strides": [2],
            "embed_dim": 16,
            "depth": 4,
            "num_heads": 2,
            "mlp_ratio": 2.0,
        },
        "checkpoint": "auto",
    },
    "data": {"name": "digits", "select": 0.2, "calibration": 60, "limit_train": 300},
    "budget": {"macs": ["70%", "50%"]},
    "space": {
        "keep_ratio": {"low": 0.2, "high": 1.0},
        "scorer": "class_attention",
        "aggregator": "fuse",
        "distiller": {"name": "logits"},
    },
    "search": {"trials": 4, "promote": 1, "executor": "local"},
    "train": {"engine": "torch", "steps": 2, "batch_size": 32},
    "teacher": {"engine": "torch", "steps": 60, "batch_size": 32, "optimizer": {"lr": 0.01}},
}


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny space file as a mapping; a section given as a mapping is merged, anything else replaces."""
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    for key, value in changes.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
    return {k: v for k, v in merged.items() if v is not None}


def tiny_config(**changes: Any) -> RunConfig:
    """`tiny` as the reader would return it."""
    return parse_config(tiny(**changes))


def write_space(folder: Path, **changes: Any) -> Path:
    """`tiny` as a file in `folder`."""
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(tiny(**changes), sort_keys=False), encoding="utf-8")
    return path

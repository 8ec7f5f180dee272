"""Where the uncompressed model's weights lie, and whether they and the data were loaded before. No torch."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ucc_search.config import RunConfig
from ucc_search.errors import ConfigError, ModelError
from ucc_search.shapes import FASHION_MNIST_DEBIAN, cache_folder, folder_stamp

SHIPPED = "shipped:"
ASSETS = Path(__file__).parent / "assets" / "teachers"


def checkpoint_path(config: RunConfig) -> Path | None:
    """Where the configured weights lie; None where timm supplies them."""
    name = config.model.checkpoint
    if name is None:
        return None
    if name == "auto":
        if config.teacher is None:
            raise ConfigError("model.checkpoint is 'auto', which needs a `teacher:` section to train by")
        # What training does not see is left out, and so are defaults: a key added later changes nothing.
        unseen = {"calibration", "proxy", "loader_workers"}
        sections = (
            config.model.model_dump(exclude_defaults=True),
            config.data.model_dump(exclude_defaults=True, exclude=unseen),
            config.teacher.model_dump(exclude_defaults=True),
        )
        recipe = json.dumps([*sections, folder_stamp(config)], default=str)
        digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
        folder = cache_folder() / "teachers"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{config.model.name}-{digest}"
    if name.startswith(SHIPPED):
        path = ASSETS / name.removeprefix(SHIPPED)
        if not path.is_dir():
            shipped = ", ".join(SHIPPED + p.name for p in sorted(ASSETS.glob("*/"))) or "none"
            raise ModelError(f"model.checkpoint is {name!r}, shipped are: {shipped}")
        return path
    return Path(name).expanduser()


def was_loaded(config: RunConfig) -> bool:
    """Whether these data and weights were loaded on this machine before, and no file of theirs changed since."""
    return _mark(config).is_file()


def remember_loaded(config: RunConfig) -> None:
    path = _mark(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _mark(config: RunConfig) -> Path:
    weights = checkpoint_path(config)
    files = _stamps(weights) if weights is not None else []
    root = config.data.root or (FASHION_MNIST_DEBIAN if config.data.name == "fashion-mnist" else None)
    if root is not None:
        files += _stamps(Path(root))
    seen: list[Any] = [config.model.model_dump(mode="json"), config.data.model_dump(mode="json"), files]
    seen += [folder_stamp(config), version("ucc-search"), version("timm")]
    digest = hashlib.sha256(json.dumps(seen, default=str).encode()).hexdigest()[:24]
    return cache_folder() / "loaded" / digest


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of a file, or of the files of a folder."""
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]

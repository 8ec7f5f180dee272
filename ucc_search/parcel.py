"""What a worker on any node needs of a run, sent once per process: settings, plugins' sources, the teacher. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucc_search.config import RunConfig, dump_config
from ucc_search.plugins import Plugins
from ucc_search.shapes import cache_folder


@dataclass(frozen=True)
class Parcel:
    """All that the jobs of a run have in common."""

    config: str
    """The resolved space file."""
    plugins: Mapping[str, Any]
    """Local ones by content (`Plugins.bundle`)."""
    cached: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the cache that every worker reads (teacher, importance scores), by path below the cache folder."""

    @classmethod
    def of(cls, config: RunConfig, plugins: Plugins, folders: Iterable[Path] = ()) -> Parcel:
        """
        Args:
            folders: whose files go along, if they are in this machine's cache.
        """
        return cls(
            dump_config(config),
            plugins.bundle(),
            _cached_files(folders),
        )

    def open(self) -> dict[str, Any]:
        """The common part of every task (see `worker.measure`); writes what this machine's cache lacks."""
        for name, content in self.cached.items():
            _write_once(cache_folder() / name, content)
        return {"config": self.config, "plugins": self.plugins}


def _cached_files(folders: Iterable[Path]) -> dict[str, bytes]:
    home = cache_folder().resolve()
    files: dict[str, bytes] = {}
    for folder in folders:
        if folder.resolve().is_relative_to(home):
            for path in sorted(p for p in folder.resolve().rglob("*") if p.is_file() and p.suffix != ".lock"):
                files[path.relative_to(home).as_posix()] = path.read_bytes()
    # The weights last: a folder with weights is a finished teacher.
    return dict(sorted(files.items(), key=lambda item: item[0].endswith("model.safetensors")))


def _write_once(path: Path, content: bytes) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def folders_of_teacher(config: RunConfig) -> Sequence[Path]:
    """Where a teacher that was trained on this machine lies; nothing if the weights come from elsewhere."""
    if config.model.checkpoint != "auto":
        return ()
    from ucc_search.checkpoints import checkpoint_path

    path = checkpoint_path(config)
    return () if path is None else (path,)

"""What a worker on any node needs of a run, sent once per process: settings, plugins' sources, the teacher. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucc_search.config import RunConfig, dump_config
from ucc_search.plugins import Plugins
from ucc_search.shapes import cache_folder


@dataclass(frozen=True)
class PluginSource:
    """One source of plugins as the user named it, and, if it is a file or a folder, the text of its files."""

    name: str
    """An absolute path, or the name of a module, which must be installed on every node."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Content by path relative to the source's own folder."""

    @classmethod
    def read(cls, name: str) -> PluginSource:
        path = Path(name)
        if not path.is_absolute():
            return cls(name)
        found = sorted(path.glob("*.py")) if path.is_dir() else [path]
        return cls(name, {file.name: file.read_bytes() for file in found})

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()[:24]

    def unpacked(self) -> str:
        """Where this process can load it from: the same place if the same files are there, else a cache."""
        if not self.files or self._is_here():
            return self.name
        path = Path(self.name)
        home = cache_folder() / "plugins" / self.digest
        is_file = path.suffix == ".py"
        for name, content in self.files.items():
            _write_once((home if is_file else home / path.name) / name, content)
        return str(home / path.name)

    def _is_here(self) -> bool:
        try:
            return PluginSource.read(self.name).digest == self.digest
        except OSError:
            return False


@dataclass(frozen=True)
class Parcel:
    """All that the jobs of a run have in common."""

    config: str
    """The resolved space file."""
    plugins: tuple[PluginSource, ...] = ()
    disabled: tuple[str, ...] = ()
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
            tuple(map(PluginSource.read, plugins.sources)),
            plugins.disabled,
            _cached_files(folders),
        )

    def open(self) -> dict[str, Any]:
        """The common part of every task (see `worker.measure`); writes what this machine's cache lacks."""
        for name, content in self.cached.items():
            _write_once(cache_folder() / name, content)
        return {
            "config": self.config,
            "plugins": [source.unpacked() for source in self.plugins],
            "sources": [source.name for source in self.plugins],
            "disabled": list(self.disabled),
        }


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

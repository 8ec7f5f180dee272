"""Where plugins come from: files, folders, packages, modules and installed entry points. Imports no torch.

Nothing is searched that nobody named: installed packages announce themselves by an entry point, the
rest is named by the user. The folder one happens to stand in is neither.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ucc_search.errors import PluginError
from ucc_search.hookspecs import PROJECT

_LARGEST = 20_000_000  # bytes of one plugin that travels to workers


class NoSuchSourceError(PluginError):
    """The user named something that is not there: their mistake, not a broken plugin's."""


@dataclass(frozen=True)
class Source:
    """One plugin before it is imported."""

    name: str
    origin: str
    load: Callable[[], Any]
    version: str | None = None
    installed: bool = False


def absolute(source: str) -> str:
    """Paths become absolute; names of modules stay.

    Raises:
        PluginError: neither a .py file or folder, nor the name of a module.
    """
    path = Path(source).expanduser()
    if path.suffix != ".py" and os.sep not in source and _is_module(source):
        return source
    if not source.strip() or not path.exists():
        raise PluginError(
            f"plugin {source!r}: no such .py file or folder, and no module of this name can be imported"
        )
    if path.is_dir() and not _files(path):
        raise PluginError(f"plugin {source!r}: the folder holds no .py file whose name starts without '_'")
    if path.is_file() and path.suffix != ".py":
        raise PluginError(f"plugin {source!r}: expected a .py file, a folder or the name of a module")
    return str(path.resolve())


def _is_module(source: str) -> bool:
    """Whether a module may be meant; decided without importing anything, as it may be disabled."""
    try:
        spec = importlib.util.find_spec(source.partition(".")[0])
    except (ImportError, ValueError):
        return False
    # Any folder on the path, even the current one's, passes for a namespace package without origin.
    return spec is not None and (spec.origin is not None or "." in source)


def _is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def _files(path: Path) -> list[Path]:
    """What is a plugin of its own: a package or file itself, or the files of a folder."""
    if path.is_file() or _is_package(path):
        return [path]
    return sorted(p for p in path.glob("*.py") if not p.name.startswith("_"))


def expand(source: str, *, held: Path | None = None) -> Iterator[Source]:
    """The plugins of one named source: an absolute path, or a module.

    Args:
        held: where a copy of it is; the plugins are loaded from there, and keep their origin.
    """
    path = Path(source)
    if not path.is_absolute():
        yield Source(source, f"module {source}", functools.partial(_import_module, source, held))
        return
    for file in _files(held or path):
        origin = path if file == (held or path) else path / file.name
        yield Source(file.stem, str(origin), functools.partial(_import_file, file))


def _import_module(name: str, held: Path | None = None) -> ModuleType:
    if held is not None and str(held.parent) not in sys.path:
        sys.path.append(str(held.parent))  # last: it takes the place of nothing that is installed
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise NoSuchSourceError(f"plugin {name!r}: there is no module {error.name!r}") from None
        raise


def _import_file(path: Path) -> ModuleType:
    """A file, or a folder that is a package."""
    # A name of its own, so that files of the same stem do not replace one another in sys.modules.
    name = f"ucc_search_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    inside = [str(path)] if path.is_dir() else None
    file = path / "__init__.py" if inside else path
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for left in [m for m in set(sys.modules) - before if m == name or m.startswith(f"{name}.")]:
            del sys.modules[left]
        raise
    return module


def installed_plugins() -> list[Source]:
    """Installed plugins, by package and name. Not those of the current folder, which Python may have on its path."""
    path = [p for p in sys.path if p and not _is_current(p)]
    found: dict[tuple[str, str], Source] = {}
    for distribution in importlib.metadata.distributions(path=path):
        for point in distribution.entry_points.select(group=PROJECT):
            package = distribution.metadata["Name"] or point.value
            origin, version = f"package {package}", distribution.metadata["Version"]
            # The first on the path is the one that is imported.
            source = Source(point.name, origin, point.load, version, installed=True)
            found.setdefault((package, point.name), source)
    return [found[key] for key in sorted(found)]


def _is_current(folder: str) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:  # one of the two is gone
        return False


def digest(module: Any) -> str | None:
    """SHA-256 of the source: of the file, or of all files of the package that a module belongs to."""
    root = source_root(module)
    return None if root is None else hash_files(read_files(root))


def source_root(module: Any) -> Path | None:
    """The file of a module, or the folder of the outermost package around it."""
    file = getattr(module, "__file__", None)
    if not file:
        return None
    path = Path(file)
    root = path.parent if path.name == "__init__.py" else path
    name = str(getattr(module, "__name__", ""))
    while name := name.rpartition(".")[0]:
        above = getattr(sys.modules.get(name), "__file__", None)
        if not above or name == PROJECT:
            break
        root = Path(above).parent
    return root


def read_files(root: Path) -> dict[str, bytes]:
    """Contents by path below `root` (its own name for a file), without caches and hidden files."""
    if root.is_file():
        return {root.name: root.read_bytes()}
    paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in paths.items()
        if not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
        and path.suffix != ".pyc"
    }


def hash_files(files: Mapping[str, bytes]) -> str:
    """SHA-256 of one file as any tool computes it; of several, of their names and contents in order."""
    if len(files) == 1:
        (content,) = files.values()
        return hashlib.sha256(content).hexdigest()
    found = hashlib.sha256()
    for name, content in sorted(files.items()):
        found.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return found.hexdigest()


def content_of(source: str) -> tuple[str, dict[str, bytes]] | None:
    """Name and files of a named source, for it to travel; None for a module of an installed package.

    Raises:
        PluginError: too large to travel.
    """
    root = Path(source)
    if not root.is_absolute():
        found = _local_root(source)
        if found is None:
            return None
        root = found
    files = read_files(root) if root.is_file() or _is_package(root) else _flat_files(root)
    size = sum(map(len, files.values()))
    if size > _LARGEST:
        raise PluginError(
            f"plugin {source!r}: {size / 1e6:.0f} MB cannot travel to workers (at most {_LARGEST / 1e6:.0f} MB); "
            "install it as a package on every node, or move its data elsewhere"
        )
    return root.name, files


def _flat_files(folder: Path) -> dict[str, bytes]:
    """A folder of plugins is its .py files alone; it may be a whole working directory."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.py"))}


def _local_root(module: str) -> Path | None:
    """The file or folder of a module that no installed package brought."""
    top = module.partition(".")[0]
    if top in importlib.metadata.packages_distributions() or top in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    return path.parent if path.name == "__init__.py" else path


def held_copy(source: str, name: str, files: Mapping[str, bytes]) -> Path | None:
    """Where the files of a source are, if not here in its own place: written to the cache when needed."""
    own = Path(source) if Path(source).is_absolute() else _local_root(source)
    try:
        if own is not None and own.exists() and content_of(source) == (name, dict(files)):
            return None
    except OSError:
        pass  # not readable here
    from ucc_search.shapes import cache_folder

    folder = cache_folder() / "plugins" / hash_files({**files, "": name.encode()})[:24]
    root = folder / name
    if not root.exists() or read_files(root) != files:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        for relative, content in files.items():
            target = temporary / name if relative == name and len(files) == 1 else temporary / name / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        try:
            temporary.rename(folder)
        except OSError:  # another worker was faster, or what is there was changed
            if not root.exists() or read_files(root) != files:
                return temporary / name
            shutil.rmtree(temporary, ignore_errors=True)
    return root


def version_of(distribution: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

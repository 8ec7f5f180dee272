"""Find plugins, load each in its own try, and build the components they offer. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from ucc_search import builtin, hookspecs
from ucc_search.errors import PluginError, UserError, did_you_mean
from ucc_search.hookspecs import HOOKSPEC_VERSION, PROJECT
from ucc_search.interfaces import Component, ComponentRef, Components

HOOKS = {
    "scorer": "ucc_scorers",
    "aggregator": "ucc_aggregators",
    "cascade": "ucc_cascades",
    "distiller": "ucc_distillers",
}
ENVIRONMENT = "UCC_SEARCH_PLUGINS"
STRICT = "UCC_SEARCH_STRICT"
BUILTIN = "builtin"


@dataclass
class PluginRecord:
    """What became of one plugin."""

    name: str
    origin: str
    status: str = "ok"  # ok, failed, disabled or shadowed
    version: str | None = None
    sha256: str | None = None
    provides: dict[str, list[str]] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class _Source:
    name: str
    origin: str
    load: Callable[[], Any]
    version: str | None = None


class Plugins:
    """The plugins of one process: an instance that is passed on, never a global.

    Attributes:
        records: one per plugin found, in the order of loading.
        sources: files, folders and modules named by the user, absolute; with `disabled` they are
            enough to build an equal instance in another process.
    """

    def __init__(self, sources: Sequence[str], disabled: Collection[str]) -> None:
        self.sources, self.disabled = tuple(sources), tuple(sorted(disabled))
        self.records: list[PluginRecord] = []
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in HOOKS}

    @classmethod
    def load(
        cls,
        sources: Sequence[str] = (),
        *,
        disabled: Collection[str] = (),
        entry_points: bool = True,
        strict: bool = False,
    ) -> Plugins:
        """Load built-ins, installed entry points, then `sources` and those of UCC_SEARCH_PLUGINS.

        Args:
            sources: paths of .py files or folders, or names of modules.
            strict: raise on the first plugin that fails, instead of recording it.

        Raises:
            PluginError: a named source does not exist, or, if strict, a plugin failed.
        """
        named = [*sources, *filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep))]
        absolute = list(dict.fromkeys(_absolute(s) for s in named))
        plugins = cls(absolute, disabled)
        plugins._add(_Source(BUILTIN, "ucc_search", lambda: builtin, _version("ucc-search")))
        found = list(_entry_points()) if entry_points else []
        for source in [*found, *(s for text in absolute for s in _expand(text))]:
            plugins._add(source)
        plugins._manager.check_pending()
        failed = [r for r in plugins.records if r.status == "failed"]
        if failed and (strict or os.environ.get(STRICT, "") not in ("", "0")):
            raise PluginError(_failure(failed[0]))
        return plugins

    def _add(self, source: _Source) -> None:
        record = PluginRecord(source.name, source.origin, version=source.version)
        self.records.append(record)
        if source.name in self.disabled:
            record.status = "disabled"
            return
        if any(r.name == source.name and r.status == "ok" for r in self.records[:-1]):
            record.status = "shadowed"
            record.error = f"another plugin is already called {source.name!r}"
            return
        try:
            module = source.load()
            record.sha256 = _digest(module)
            record.version = record.version or getattr(module, "__version__", None)
            provided = self._register(module, source.name)
        except BaseException as error:  # a plugin may raise anything, even SystemExit
            if isinstance(error, KeyboardInterrupt):
                raise
            record.status, record.error = "failed", _one_sentence(error)
            return
        for kind, factories in provided.items():
            record.provides[HOOKS[kind]] = sorted(factories)
            for name, factory in factories.items():
                self._found[kind].setdefault(name, {})[source.name] = factory

    def _register(self, module: Any, name: str) -> dict[str, dict[str, Any]]:
        """Ask the module's hooks; nothing stays registered if one of them fails."""
        _check_version(module)
        _check_hook_names(module)
        self._manager.register(module, name)
        try:
            provided = {}
            for kind, hook in HOOKS.items():
                for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                    if implementation.plugin_name == name:
                        provided[kind] = _checked_mapping(implementation.function(), hook)
        except BaseException:
            self._manager.unregister(name=name)
            raise
        return provided

    def names(self, kind: str) -> list[str]:
        """Component names of a kind (`scorer`, `aggregator`, `cascade`, `distiller`)."""
        return sorted(self._found[kind])

    def get(self, kind: str, name: str) -> Callable[..., Any]:
        """The factory of a component, by its name or by `plugin/name`.

        Raises:
            PluginError: unknown, or claimed by two plugins.
        """
        return self._owned(kind, name)[1]

    def _owned(self, kind: str, name: str) -> tuple[str, Callable[..., Any]]:
        owner, _, bare = name.rpartition("/")
        offers = self._found[kind].get(bare, {})
        if owner:
            offers = {k: v for k, v in offers.items() if k == owner}
        if not offers:
            raise PluginError(self._unknown(kind, name))
        if len(offers) > 1:
            raise PluginError(self._collision(kind, name, list(offers)))
        return next(iter(offers.items()))

    def _unknown(self, kind: str, name: str) -> str:
        names = self.names(kind)
        failed = "; ".join(_failure(r) for r in self.records if r.status == "failed")
        return (
            f"unknown {kind} {name!r}{did_you_mean(name, names)} (available: {', '.join(names)})"
            + (f"; note that {failed}" if failed else "")
        )

    def _collision(self, kind: str, name: str, owners: Sequence[str]) -> str:
        records = {r.name: r for r in self.records}
        who = " and ".join(
            f"{o!r} ({records[o].origin}, version {records[o].version or 'unknown'})" for o in owners
        )
        return (
            f"{kind} {name!r} comes from both {who}; leave one out with --disable-plugin {owners[-1]}, "
            f"or write {owners[0]}/{name}"
        )

    def check(self, kind: str, ref: ComponentRef) -> None:
        """Check a component's name and its parameters' names; values may still be ranges.

        Raises:
            PluginError: naming what is allowed.
        """
        allowed = _parameters(self.get(kind, ref.name))
        for key in ref.params:
            if allowed is not None and key not in allowed:
                names = ", ".join(allowed) or "none"
                raise PluginError(
                    f"{kind} {ref.name!r} has no parameter {key!r}{did_you_mean(key, allowed)} (it has: {names})"
                )
        if not any(isinstance(v, Mapping) for v in ref.params.values()):
            self.build(kind, ref)

    def build(self, kind: str, ref: ComponentRef) -> Any:
        """Construct a component.

        Raises:
            PluginError: unknown name or parameter, or a value its constructor refuses.
        """
        factory = self.get(kind, ref.name)
        searched = [k for k, v in ref.params.items() if isinstance(v, Mapping)]
        if searched:
            raise PluginError(f"{kind} {ref.name!r}: {searched[0]} is a range, expected a value")
        try:
            component = factory(**ref.params)
        except (ValueError, TypeError) as error:
            raise PluginError(f"{kind} {ref.name!r}: {error}") from None
        if not isinstance(component, Component):
            raise PluginError(
                f"{kind} {ref.name!r} builds a {type(component).__name__}, which does not derive from "
                f"ucc_search.interfaces.{kind.title()}"
            )
        return component

    def components(self, scorer: ComponentRef, aggregator: ComponentRef, cascade: ComponentRef) -> Components:
        """The components a compressed model needs, built."""
        refs = {"scorer": scorer, "aggregator": aggregator, "cascade": cascade}
        return Components(**{kind: self.build(kind, ref) for kind, ref in refs.items()})

    def describe(self, kind: str, name: str) -> dict[str, Any]:
        """Summary, parameters with defaults, search ranges and owner of a component."""
        owner, factory = self._owned(kind, name)
        return {
            "kind": kind,
            "name": name,
            "summary": (inspect.getdoc(factory) or "").partition("\n")[0],
            "params": _parameters(factory) or {},
            "ranges": {k: dict(v) for k, v in getattr(factory, "ranges", {}).items()},
            "plugin": owner,
        }

    def identity(self, kind: str, name: str) -> dict[str, str | None]:
        """What a trial records of a component, to find the same one again."""
        owner, _ = self._owned(kind, name)
        record = next(r for r in self.records if r.name == owner and r.status == "ok")
        return {"component": name, "plugin": owner, "version": record.version, "sha256": record.sha256}


def _absolute(source: str) -> str:
    """Paths become absolute; names of modules stay."""
    path = Path(source).expanduser()
    if path.suffix == ".py" or os.sep in source or path.is_dir():
        if not path.exists():
            raise PluginError(f"plugin {source!r}: no such file or folder")
        return str(path.resolve())
    if importlib.util.find_spec(source.partition(".")[0]) is None:
        raise PluginError(f"plugin {source!r}: neither a .py file or folder, nor a module that can be imported")
    return source


def _expand(source: str) -> Iterator[_Source]:
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.glob("*.py") if not p.name.startswith("_"))
        for file in files:
            yield from _expand(str(file))
    elif path.suffix == ".py":
        yield _Source(path.stem, str(path), lambda: _import_file(path))
    else:
        yield _Source(source, f"module {source}", lambda: importlib.import_module(source))


def _import_file(path: Path) -> ModuleType:
    # A name of its own, so that files of the same stem do not replace one another in sys.modules.
    name = f"ucc_search_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _entry_points() -> Iterator[_Source]:
    for point in importlib.metadata.entry_points(group=PROJECT):
        package = point.dist.name if point.dist else point.value
        version = point.dist.version if point.dist else None
        yield _Source(point.name, f"package {package}", point.load, version)


def _check_version(module: Any) -> None:
    wanted = getattr(module, "ucc_search_api", None)
    if wanted is None:
        return
    from packaging.specifiers import SpecifierSet

    if str(HOOKSPEC_VERSION) not in SpecifierSet(str(wanted)):
        raise PluginError(
            f"it needs hook version {wanted}, this ucc-search has {HOOKSPEC_VERSION}; upgrade the older of the two"
        )


def _check_hook_names(module: Any) -> None:
    """A misspelt hook would register and never be called."""
    marker = f"{PROJECT}_impl"
    for name, value in vars(module).items():
        if callable(value) and hasattr(value, marker) and not hasattr(hookspecs, name):
            raise PluginError(f"there is no hook {name!r}{did_you_mean(name, HOOKS.values())}")


def _checked_mapping(offered: Any, hook: str) -> dict[str, Any]:
    if not isinstance(offered, Mapping):
        raise PluginError(f"{hook} returned {type(offered).__name__}, expected a mapping of names to factories")
    for name, factory in offered.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", name) or not callable(factory):
            raise PluginError(f"{hook} offers {name!r}: {factory!r}, expected a plain name and a class or function")
    return dict(offered)


def _parameters(factory: Callable[..., Any]) -> dict[str, Any] | None:
    """Parameter names and defaults; None where any are taken."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: None if p.default is p.empty else p.default for p in parameters if p.name != "self"}


def _digest(module: Any) -> str | None:
    """SHA-256 of the source: of the file, or of every .py file of the package it belongs to."""
    file = getattr(module, "__file__", None)
    if not file:
        return None
    path = Path(file)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = hashlib.sha256()
    for source in files:
        digest.update(source.relative_to(path.parent).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_sentence(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"syntax error at line {error.lineno}: {error.msg}"
    if isinstance(error, ModuleNotFoundError):
        return f"it needs the module {error.name!r}, which is not installed; install it with pip"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _failure(record: PluginRecord) -> str:
    return f"plugin {record.name!r} ({record.origin}) failed: {record.error}"

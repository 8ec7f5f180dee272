"""Find plugins, load each in its own try, and build the components they offer. Imports no torch."""

from __future__ import annotations

import functools
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
from ucc_search.interfaces import (
    Aggregator,
    Cascade,
    ComponentRef,
    Components,
    Distiller,
    Importance,
    Metric,
    Observer,
    Sampler,
    Scorer,
)

HOOKS = {
    "scorer": "ucc_scorers",
    "aggregator": "ucc_aggregators",
    "cascade": "ucc_cascades",
    "distiller": "ucc_distillers",
    "importance": "ucc_importances",
    "sampler": "ucc_samplers",
    "metric": "ucc_metrics",
    "observer": "ucc_observers",
}
BASES = {
    "scorer": Scorer,
    "aggregator": Aggregator,
    "cascade": Cascade,
    "distiller": Distiller,
    "importance": Importance,
    "sampler": Sampler,
    "metric": Metric,
    "observer": Observer,
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


class _NoSuchSourceError(PluginError):
    """The user named something that is not there: their mistake, not a broken plugin's."""


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
        environment: bool = True,
        strict: bool = False,
    ) -> Plugins:
        """Load built-ins, installed entry points, then `sources` and those of UCC_SEARCH_PLUGINS.

        Args:
            sources: paths of .py files or folders, or names of modules.
            disabled: names of plugins that are neither imported nor run.
            entry_points: load installed plugins.
            environment: read UCC_SEARCH_PLUGINS. A worker that was given another instance's `sources`
                passes False: they hold these already, and relative ones mean nothing in its folder.
            strict: raise on a plugin that failed or a name claimed twice, instead of recording it;
                UCC_SEARCH_STRICT=1 does the same.

        Raises:
            PluginError: a named source does not exist, or, if strict, a plugin failed or a name is
                claimed twice.
        """
        inherited = os.environ.get(ENVIRONMENT, "") if environment else ""
        named = [*sources, *filter(None, inherited.split(os.pathsep))]
        absolute = list(dict.fromkeys(_absolute(s) for s in named))
        plugins = cls(absolute, disabled)
        plugins._add(_Source(BUILTIN, "ucc_search", lambda: builtin, _version("ucc-search")))
        found = list(_entry_points()) if entry_points else []
        for source in [*found, *(s for text in absolute for s in _expand(text))]:
            plugins._add(source)
        plugins._manager.check_pending()
        if strict or os.environ.get(STRICT, "") not in ("", "0"):
            plugins._refuse_trouble()
        return plugins

    def _refuse_trouble(self) -> None:
        for record in self.records:
            if record.status == "failed":
                raise PluginError(_trouble(record))
        for kind, names in self.collisions.items():
            for name, owners in names.items():
                raise PluginError(self._collision(kind, name, owners))

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
            if self._manager.is_registered(module):
                record.status = "shadowed"
                record.error = f"the same module is already loaded as {self._manager.get_name(module)!r}"
                return
            record.sha256 = _digest(module)
            record.version = record.version or getattr(module, "__version__", None)
            provided = self._register(module, source.name)
        except (KeyboardInterrupt, _NoSuchSourceError):
            raise
        except BaseException as error:  # a plugin may raise anything, even SystemExit
            record.status, record.error = "failed", _one_sentence(error)
            return
        for kind, factories in provided.items():
            record.provides[HOOKS[kind]] = sorted(factories)
            for name, factory in factories.items():
                self._found[kind].setdefault(name, {})[source.name] = factory

    def _register(self, module: Any, name: str) -> dict[str, dict[str, Any]]:
        """Ask the module's hooks; nothing stays registered if one of them fails."""
        _check_version(module)
        self._check_hook_names(module)
        try:
            self._manager.register(module, name)
            provided = {}
            for kind, hook in HOOKS.items():
                for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                    if implementation.plugin_name == name:
                        provided[kind] = _checked_mapping(implementation.function(), hook)
        except BaseException:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            raise
        return provided

    def _check_hook_names(self, module: Any) -> None:
        """A misspelt hook, or one without its decorator, would never be called."""
        for name in dir(module):
            options = self._manager.parse_hookimpl_opts(module, name)
            if options is None:
                if name in HOOKS.values() and not hasattr(getattr(module, name), f"{PROJECT}_spec"):
                    raise PluginError(f"{name} is not decorated, put @hookimpl above it")
                continue
            hook = options.get("specname") or name
            if hook not in HOOKS.values() and not options.get("optionalhook"):
                raise PluginError(f"there is no hook {hook!r}{did_you_mean(hook, HOOKS.values())}")

    @property
    def collisions(self) -> dict[str, dict[str, list[str]]]:
        """Component names that several plugins claim, by kind, each with these plugins' names."""
        claimed = {
            kind: {name: list(offers) for name, offers in sorted(found.items()) if len(offers) > 1}
            for kind, found in self._found.items()
        }
        return {kind: names for kind, names in claimed.items() if names}

    def names(self, kind: str) -> list[str]:
        """Component names of a kind (`scorer`, `aggregator`, `cascade`, `distiller`, `importance`)."""
        return sorted(self._of(kind))

    def _of(self, kind: str) -> dict[str, dict[str, Any]]:
        if kind not in self._found:
            raise PluginError(f"unknown kind {kind!r}{did_you_mean(kind, HOOKS)} (kinds: {', '.join(HOOKS)})")
        return self._found[kind]

    def get(self, kind: str, name: str) -> Callable[..., Any]:
        """The factory of a component, by its name or by `plugin/name`.

        Raises:
            PluginError: unknown, or claimed by two plugins.
        """
        return self._owned(kind, name)[1]

    def _owned(self, kind: str, name: str) -> tuple[str, Callable[..., Any]]:
        owner, _, bare = name.rpartition("/")
        offers = self._of(kind).get(bare, {})
        if owner:
            offers = {k: v for k, v in offers.items() if k == owner}
        if not offers:
            raise PluginError(self._unknown(kind, name))
        if len(offers) > 1:
            raise PluginError(self._collision(kind, name, list(offers)))
        return next(iter(offers.items()))

    def _unknown(self, kind: str, name: str) -> str:
        names = self.names(kind)
        qualified = [f"{owner}/{n}" for n in names for owner in self._found[kind][n]]
        near = did_you_mean(name, qualified if "/" in name else names)
        absent = "; ".join(_trouble(r) for r in self.records if r.status != "ok")
        note = f"; note that {absent}" if absent else ""
        return f"unknown {kind} {name!r}{near} (available: {', '.join(names)}){note}"

    def _collision(self, kind: str, name: str, owners: Sequence[str]) -> str:
        records = {r.name: r for r in self.records if r.status == "ok"}
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
        self._check_parameters(kind, ref)
        if not any(isinstance(v, Mapping) for v in ref.params.values()):
            self.build(kind, ref)

    def _check_parameters(self, kind: str, ref: ComponentRef) -> None:
        allowed = _parameters(self.get(kind, ref.name))
        for key in ref.params:
            if allowed is not None and key not in allowed:
                raise PluginError(
                    f"{kind} {ref.name!r} has no parameter {key!r}{did_you_mean(key, allowed)} "
                    f"(it has: {', '.join(allowed) or 'none'})"
                )

    def build(self, kind: str, ref: ComponentRef) -> Any:
        """Construct a component.

        Raises:
            PluginError: unknown name or parameter, or a value its constructor refuses.
        """
        self._check_parameters(kind, ref)
        searched = [k for k, v in ref.params.items() if isinstance(v, Mapping)]
        if searched:
            raise PluginError(f"{kind} {ref.name!r}: {searched[0]} is a range, expected a value")
        try:
            component = self.get(kind, ref.name)(**ref.params)
        except (ValueError, TypeError, UserError) as error:
            raise PluginError(f"{kind} {ref.name!r}: {error}") from None
        except Exception as error:  # a bug of the plugin; the cause keeps its traceback
            raise PluginError(f"{kind} {ref.name!r} cannot be built: {_one_sentence(error)}") from error
        if not isinstance(component, BASES[kind]):
            raise PluginError(
                f"{kind} {ref.name!r} builds a {type(component).__name__}, which does not derive from "
                f"ucc_search.interfaces.{BASES[kind].__name__}"
            )
        return component

    def components(self, scorer: ComponentRef, aggregator: ComponentRef, cascade: ComponentRef) -> Components:
        """The components a compressed model needs, built."""
        refs = {"scorer": scorer, "aggregator": aggregator, "cascade": cascade}
        return Components(**{kind: self.build(kind, ref) for kind, ref in refs.items()})

    def describe(self, kind: str, name: str) -> dict[str, Any]:
        """Summary, parameters with defaults (and which have none), search ranges and owner."""
        owner, factory = self._owned(kind, name)
        parameters = _parameters(factory) or {}
        required = [k for k, default in parameters.items() if default is inspect.Parameter.empty]
        return {
            "kind": kind,
            "name": name,
            "summary": (inspect.getdoc(factory) or "").partition("\n")[0],
            "params": {k: None if k in required else v for k, v in parameters.items()},
            "required": required,
            "ranges": {k: dict(v) for k, v in getattr(factory, "ranges", {}).items()},
            "plugin": owner,
        }

    def identity(self, kind: str, name: str) -> dict[str, str | None]:
        """What a trial records of a component, to find the same one again."""
        owner, _ = self._owned(kind, name)
        record = next(r for r in self.records if r.name == owner and r.status == "ok")
        bare = name.rpartition("/")[2]  # equal however the space file spells it
        return {"component": bare, "plugin": owner, "version": record.version, "sha256": record.sha256}


def _absolute(source: str) -> str:
    """Paths become absolute; names of modules stay."""
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


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))


def _expand(source: str) -> Iterator[_Source]:
    path = Path(source)
    if not path.is_absolute():
        yield _Source(source, f"module {source}", lambda: _import_module(source))
        return
    for file in _files(path) if path.is_dir() else [path]:
        yield _Source(file.stem, str(file), functools.partial(_import_file, file))


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise _NoSuchSourceError(f"plugin {name!r}: there is no module {error.name!r}") from None
        raise


def _import_file(path: Path) -> ModuleType:
    # A name of its own, so that files of the same stem do not replace one another in sys.modules.
    name = f"ucc_search_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
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
            f"it needs hook version {wanted}, this ucc-search has {HOOKSPEC_VERSION}; "
            "upgrade the older of the two"
        )


def _checked_mapping(offered: Any, hook: str) -> dict[str, Any]:
    if not isinstance(offered, Mapping):
        kind = type(offered).__name__
        raise PluginError(f"{hook} returned {kind}, expected a mapping of names to factories")
    for name, factory in offered.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", name) or not callable(factory):
            raise PluginError(
                f"{hook} offers {name!r}: {factory!r}, expected a plain name and a class or function"
            )
    return dict(offered)


def _parameters(factory: Callable[..., Any]) -> dict[str, Any] | None:
    """Parameter names and defaults, `inspect.Parameter.empty` if required; None where any are taken."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _digest(module: Any) -> str | None:
    """SHA-256 of the source: of the file, or of every .py file of the package it belongs to."""
    file = getattr(module, "__file__", None)
    if not file:
        return None
    path = Path(file)
    if path.name != "__init__.py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for source in sorted(path.parent.rglob("*.py")):
        digest.update(source.relative_to(path.parent).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UserError) and text:
        return text
    if isinstance(error, SyntaxError):
        return f"syntax error at line {error.lineno}: {error.msg}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name.partition(".")[0] == PROJECT:
            return f"it needs {error.name!r}, which this version of ucc-search does not have"
        return f"it needs the module {error.name!r}, which is not installed; install it with pip"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _trouble(record: PluginRecord) -> str:
    reason = f": {record.error}" if record.error else ""
    what = "failed" if record.status == "failed" else f"is {record.status}"
    return f"plugin {record.name!r} ({record.origin}) {what}{reason}"

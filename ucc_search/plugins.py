"""Find plugins, load each in its own try, and build the components they offer. Imports no torch."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pluggy

from ucc_search import builtin, hookspecs
from ucc_search.errors import PluginError, UserError, did_you_mean
from ucc_search.hookspecs import PROJECT
from ucc_search.interfaces import (
    Aggregator,
    Cascade,
    ComponentRef,
    Components,
    Dataset,
    Distiller,
    Family,
    Importance,
    Metric,
    Observer,
    Sampler,
    Scorer,
)
from ucc_search.plugin_checks import check_version, checked_mapping, one_sentence, parameters_of
from ucc_search.plugin_sources import (
    NoSuchSourceError,
    Source,
    absolute,
    content_of,
    digest,
    expand,
    held_copy,
    installed_plugins,
    version_of,
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
    "dataset": "ucc_datasets",
    "family": "ucc_families",
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
    "dataset": Dataset,
    "family": Family,
}
ENVIRONMENT = "UCC_SEARCH_PLUGINS"
STRICT = "UCC_SEARCH_STRICT"
BUILTIN = "builtin"
SEARCH = "search"
"""In a space file: the value of a parameter that is searched over the range its plugin declares."""


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
    installed: bool = False  # announced by an entry point of a package


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
        plugins = cls(list(dict.fromkeys(absolute(s) for s in named)), disabled)
        installed = installed_plugins() if entry_points else []
        plugins._add_all([*installed, *(s for text in plugins.sources for s in expand(text))])
        for name in plugins.disabled:
            if name not in (known := [r.name for r in plugins.records]):
                raise PluginError(
                    f"there is no plugin {name!r} to disable{did_you_mean(name, known)} "
                    f"(found: {', '.join(known)})"
                )
        if strict or os.environ.get(STRICT, "") not in ("", "0"):
            plugins._refuse_trouble()
        return plugins

    def bundle(self) -> dict[str, Any]:
        """All that another process, on any machine, needs to load the same plugins; plain values, to be pickled.

        Files, folders and modules that no installed package brought travel by content; installed plugins
        by name and hash.

        Raises:
            PluginError: a plugin is too large to travel.
        """
        local = []
        for source in self.sources:
            name, files = content_of(source) or (None, {})
            local.append({"source": source, "name": name, "files": files})
        return {
            "local": local,
            "installed": [r.name for r in self.records if r.installed],
            "disabled": list(self.disabled),
            "sha256": {r.name: r.sha256 for r in self.records if r.status == "ok"},
        }

    @classmethod
    def from_bundle(cls, bundle: Mapping[str, Any]) -> Plugins:
        """The plugins of another process. One that differs from what was bundled is `failed`."""
        local = bundle["local"]
        plugins = cls([item["source"] for item in local], bundle["disabled"])
        found = [s for s in installed_plugins() if s.name in bundle["installed"]]
        for item in local:
            held = held_copy(**item) if item["files"] else None
            found += expand(item["source"], held=held)
        plugins._add_all(found, bundle["sha256"])
        return plugins

    def _add_all(self, sources: Iterable[Source], expected: Mapping[str, str] | None = None) -> None:
        self._add(Source(BUILTIN, PROJECT, lambda: builtin, version_of("ucc-search")), expected)
        for source in sources:
            self._add(source, expected)
        self._manager.check_pending()

    def _refuse_trouble(self) -> None:
        for record in self.records:
            clash = record.status == "shadowed" and any(
                r.name == record.name and r.status == "ok" for r in self.records
            )
            if record.status == "failed" or clash:
                raise PluginError(_trouble(record))
        for kind, names in self.collisions.items():
            for name, owners in names.items():
                raise PluginError(self.collision(kind, name, owners))

    def _add(self, source: Source, expected: Mapping[str, str] | None) -> None:
        record = PluginRecord(source.name, source.origin, version=source.version, installed=source.installed)
        self.records.append(record)
        if source.name in self.disabled:
            record.status = "disabled"
            return
        first = next((r for r in self.records[:-1] if r.name == source.name and r.status == "ok"), None)
        if first is not None:
            record.status = "shadowed"
            record.error = (
                f"another plugin is already called {source.name!r}, that of {_who(first)}; "
                "rename or uninstall one of the two"
            )
            return
        try:
            module = source.load()
            known = self._already(module)
            if known is not None:
                record.status = "shadowed"
                record.error = f"the same module is already loaded as {known!r}"
                return
            record.sha256 = digest(module)
            record.version = record.version or getattr(module, "__version__", None)
            if expected is not None and expected.get(source.name, record.sha256) != record.sha256:
                raise PluginError(
                    f"its files (version {record.version or 'unknown'}) are not those of the process that "
                    "started the run; install the same version on every node"
                )
            provided = self._register(module, source.name)
        except (KeyboardInterrupt, NoSuchSourceError):
            raise
        except BaseException as error:  # a plugin may raise anything, even SystemExit
            record.status, record.error = "failed", one_sentence(error)
            return
        for kind, factories in provided.items():
            record.provides[HOOKS[kind]] = sorted(factories)
            for name, factory in factories.items():
                self._found[kind].setdefault(name, {})[source.name] = factory

    def _already(self, module: Any) -> str | None:
        """The name under which the same file was loaded: it may be installed and named as well."""
        file = getattr(module, "__file__", None)
        for name, other in self._manager.list_name_plugin():
            same_file = file and os.path.realpath(file) == os.path.realpath(getattr(other, "__file__", ""))
            if other is module or same_file:
                return name
        return None

    def _register(self, module: Any, name: str) -> dict[str, dict[str, Any]]:
        """Ask the module's hooks; nothing stays registered if one of them fails."""
        check_version(module)
        self._check_hook_names(module)
        try:
            self._manager.register(module, name)
            provided = {}
            for kind, hook in HOOKS.items():
                for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                    if implementation.plugin_name == name:
                        provided[kind] = checked_mapping(implementation.function(), hook)
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

    def unused(self, record: PluginRecord) -> list[tuple[str, str]]:
        """(kind, class) of the components that a plugin's module defines; of use where its hooks offer none."""
        module: Any = self._manager.get_plugin(record.name)
        defined = [v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__]
        return [(kind, c.__name__) for kind, base in BASES.items() for c in defined if issubclass(c, base)]

    @property
    def collisions(self) -> dict[str, dict[str, list[str]]]:
        """Component names that several plugins claim, by kind, each with these plugins' names."""
        claimed = {
            kind: {name: list(offers) for name, offers in sorted(found.items()) if len(offers) > 1}
            for kind, found in self._found.items()
        }
        return {kind: names for kind, names in claimed.items() if names}

    def offers(self, kind: str) -> dict[str, list[str]]:
        """Component names of a kind, each with the plugins that claim it."""
        return {name: list(owners) for name, owners in sorted(self._of(kind).items())}

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
            raise PluginError(self.collision(kind, name, list(offers)))
        return next(iter(offers.items()))

    def _unknown(self, kind: str, name: str) -> str:
        names = self.names(kind)
        qualified = [f"{owner}/{n}" for n in names for owner in self._found[kind][n]]
        near = did_you_mean(name, qualified if "/" in name else names)
        absent = "; ".join(_trouble(r) for r in self.records if r.status != "ok")
        note = f"; note that {absent}" if absent else ""
        if not near:
            note += (
                "; more ship in the repository's plugins/ folder and are to be installed (pip install "
                "./plugins/NAME) or passed with --plugin"
            )
        return f"unknown {kind} {name!r}{near} (available: {', '.join(names)}){note}"

    def collision(self, kind: str, name: str, owners: Sequence[str]) -> str:
        """One sentence: who claims the name, and what to do."""
        records = {r.name: r for r in self.records if r.status == "ok"}
        who = " and ".join(f"{o!r} ({_who(records[o])})" for o in owners)
        return (
            f"{kind} {name!r} comes from both {who}; leave one out with --disable-plugin {owners[-1]}, "
            f"or write {owners[0]}/{name}"
        )

    def with_ranges(self, kind: str, ref: ComponentRef) -> ComponentRef:
        """The same component with the range that its plugin declares where a parameter says `search`.

        Raises:
            PluginError: an unknown component, or a parameter without a declared range.
        """
        asked = [key for key, value in ref.params.items() if value == SEARCH]
        if not asked:
            return ref
        self._check_parameters(kind, ref)
        ranges = self.describe(kind, ref.name)["ranges"]
        for key in asked:
            if key not in ranges:
                raise PluginError(
                    f"{kind} {ref.name!r} declares no range for {key} (it declares: {', '.join(ranges) or 'none'}); "
                    f"give one: {key}: {{low: ..., high: ...}}"
                )
        return ComponentRef(ref.name, {k: ranges[k] if k in asked else v for k, v in ref.params.items()})

    def check(self, kind: str, ref: ComponentRef) -> None:
        """Check a component's name and its parameters' names; values may still be ranges.

        Raises:
            PluginError: naming what is allowed.
        """
        self._check_parameters(kind, ref)
        if not any(isinstance(v, Mapping) for v in ref.params.values()):
            self.build(kind, ref)

    def _check_parameters(self, kind: str, ref: ComponentRef) -> None:
        allowed = parameters_of(self.get(kind, ref.name))
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
            raise PluginError(f"{kind} {ref.name!r} cannot be built: {one_sentence(error)}") from error
        if not isinstance(component, BASES[kind]):
            raise PluginError(
                f"{kind} {ref.name!r} builds a {type(component).__name__}, which does not derive from "
                f"ucc_search.interfaces.{BASES[kind].__name__}"
            )
        return component

    def components(self, scorer: ComponentRef, aggregator: ComponentRef, cascade: ComponentRef) -> Components:
        """The components a compressed model needs, built."""
        refs = {"scorer": scorer, "aggregator": aggregator, "cascade": cascade}
        return Components(**{k: self.build(k, ref) for k, ref in refs.items()}, refs=(scorer, aggregator))

    def describe(self, kind: str, name: str) -> dict[str, Any]:
        """Summary, parameters with defaults (and which have none), search ranges and owner."""
        owner, factory = self._owned(kind, name)
        parameters = parameters_of(factory) or {}
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


def _who(record: PluginRecord) -> str:
    return f"{record.origin}, version {record.version or 'unknown'}"


def _trouble(record: PluginRecord) -> str:
    reason = f": {record.error}" if record.error else ""
    what = "failed" if record.status == "failed" else f"is {record.status}"
    return f"plugin {record.name!r} ({record.origin}) {what}{reason}"

"""What `plugins list`, `info` and `validate` show. Text and JSON; torch only where components are validated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ucc_search import hookspecs
from ucc_search.errors import PluginError, did_you_mean
from ucc_search.interfaces import ComponentRef
from ucc_search.plugins import BASES, BUILTIN, HOOKS, PluginRecord, Plugins

ORDER = (
    "ucc-search's own, installed packages, those of the space file, --plugin, and those of UCC_SEARCH_PLUGINS"
)


def plugins_json(plugins: Plugins) -> dict[str, Any]:
    """`plugins list`: records in the order of loading, every component described, and names claimed twice."""
    components = [
        plugins.describe(kind, f"{record.name}/{name}")
        for kind, hook in HOOKS.items()
        for record in plugins.records
        if record.status == "ok"
        for name in record.provides.get(hook, ())
    ]
    return {
        "plugins": [vars(r) for r in plugins.records],
        "components": components,
        "collisions": [
            {"kind": kind, "name": name, "plugins": owners, "message": plugins.collision(kind, name, owners)}
            for kind, names in plugins.collisions.items()
            for name, owners in names.items()
        ],
    }


def plugins_text(found: Mapping[str, Any]) -> str:
    """`plugins_json` for people."""
    lines = []
    for record in found["plugins"]:
        version = f" {record['version']}" if record["version"] else ""
        lines.append(f"{record['name']}{version}  {record['status']}  ({record['origin']})")
        if record["error"]:
            lines.append(f"  {record['error']}")
        for component in found["components"]:
            if component["plugin"] == record["name"] and record["status"] == "ok":
                name = component["name"].rpartition("/")[2]
                lines.append(f"  {component['kind']:<11} {name:<16} {component['summary']}")
    lines += [f"collision: {collision['message']}" for collision in found["collisions"]]
    lines.append(f"loaded in this order: {ORDER}")
    return "\n".join(lines)


def hook_table() -> str:
    """All hooks as a table in Markdown, made from the hookspecs."""
    rows = ["| hook | returns | what it adds |", "|---|---|---|"]
    for hook, base in ((HOOKS[kind], BASES[kind]) for kind in HOOKS):
        text = (inspect.getdoc(getattr(hookspecs, hook)) or "").partition("\n")[0].rstrip(".")
        what = text.partition(": ")[2] or text
        rows.append(f"| `{hook}` | name -> `{base.__name__}` | {what} |")
    return "\n".join(rows)


def components_named(plugins: Plugins, name: str) -> list[tuple[str, str]]:
    """(kind, name) of all components that a name may mean: `joint`, `scorer:joint`, `builtin/joint` or a plugin's.

    Raises:
        PluginError: nothing is called so.
    """
    kind, colon, bare = name.rpartition(":")
    if colon and kind not in HOOKS:
        raise PluginError(f"unknown kind {kind!r}{did_you_mean(kind, HOOKS)} (kinds: {', '.join(HOOKS)})")
    kinds = [kind] if colon else list(HOOKS)
    found = []
    for each in kinds:
        for offered, owners in plugins.offers(each).items():
            if bare == offered:
                found += [(each, f"{owner}/{offered}") for owner in owners]
            found += [
                (each, f"{owner}/{offered}") for owner in owners if bare in (owner, f"{owner}/{offered}")
            ]
    if found:
        return list(dict.fromkeys(found))
    broken = next((r for r in plugins.records if r.name == bare and r.status != "ok"), None)
    if broken is not None:
        raise PluginError(
            f"plugin {broken.name!r} ({broken.origin}) is {broken.status}: {broken.error or 'by option'}"
        )
    if Path(name).exists() or name.endswith(".py"):
        raise PluginError(f"{name!r} is a file, not a component's name; name it with --plugin {name}")
    known = [r.name for r in plugins.records] + [n for each in kinds for n in plugins.offers(each)]
    raise PluginError(
        f"nothing is called {name!r}{did_you_mean(bare, known)} (see ucc-search plugins list){_named(plugins)}"
    )


def _named(plugins: Plugins) -> str:
    """What the plugins that were named offer, for a user who looks for something else in them."""
    named = [r for r in plugins.records if r.status == "ok" and r.name != BUILTIN and not r.installed]
    return "".join(f"; {_offered(plugins, record)}" for record in named)


def _offered(plugins: Plugins, record: PluginRecord) -> str:
    kinds = {hook: kind for kind, hook in HOOKS.items()}
    offers = [f"{kinds[hook]} {name!r}" for hook, names in record.provides.items() for name in names]
    if offers:
        return f"{record.origin} offers {', '.join(offers)}"
    unused = plugins.unused(record)
    if not unused:
        return (
            f"{record.origin} holds no component and no hook; ucc-search plugins new NAME --kind KIND writes a file "
            f"with both (kinds: {', '.join(HOOKS)})"
        )
    kind, cls = unused[0]
    found = ", ".join(f"the {kind} {cls}" for kind, cls in unused)
    return (
        f"{record.origin} holds {found}, but no hook that offers it; expected a function "
        f"`@hookimpl def {HOOKS[kind]}(): return {{{cls.lower()!r}: {cls}}}` beside it"
    )


def info_json(plugins: Plugins, name: str) -> list[dict[str, Any]]:
    """`plugins info`: all that is known of the components that a name may mean."""
    found = []
    for kind, qualified in components_named(plugins, name):
        owner, _, bare = qualified.partition("/")
        factory = plugins.get(kind, qualified)
        record = next(r for r in plugins.records if r.name == owner and r.status == "ok")
        flags = {
            key: value
            for key, value in inspect.getmembers(factory, lambda v: isinstance(v, bool))
            if not key.startswith("_")
        }
        found.append(
            {
                **plugins.describe(kind, qualified),
                "name": bare,
                "description": inspect.getdoc(factory) or "",
                "flags": flags,
                "origin": record.origin,
                "version": record.version,
                "sha256": record.sha256,
            }
        )
    return found


def info_text(found: Sequence[Mapping[str, Any]]) -> str:
    """`info_json` for people."""
    return "\n\n".join(map(_component_text, found))


def _component_text(component: Mapping[str, Any]) -> str:
    version = f" {component['version']}" if component["version"] else ""
    lines = [
        f"{component['kind']} {component['name']}",
        f"  plugin      {component['plugin']}{version} ({component['origin']})",
        f"  sha256      {component['sha256'] or 'unknown'}",
    ]
    for name, default in component["params"].items():
        value = "required" if name in component["required"] else f"default {default!r}"
        searched = component["ranges"].get(name)
        shown = f"; with {name}: search it is searched over {_range(searched)}" if searched else ""
        lines.append(f"  parameter   {name}: {value}{shown}")
    lines += [f"  declares    {key}: {value}" for key, value in component["flags"].items() if value]
    lines += ["", *(f"  {line}".rstrip() for line in component["description"].splitlines())]
    return "\n".join(lines)


def _range(bounds: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(bounds), default_flow_style=True, sort_keys=False)).strip()


def validate(plugins: Plugins, names: Sequence[str], params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`plugins validate`: the conformance suite on components, and whether plugins load at all.

    Args:
        names: as for `components_named`; all components that are not built in, if empty.
        params: values of parameters, for components that have required ones.

    Returns:
        component, kind, plugin and results (check, contract, passed, problem, fix, where).

    Raises:
        PluginError: an unknown name, or nothing to validate.
    """
    wanted = [found for name in names for found in components_named(plugins, name)]
    broken = [] if names else [r for r in plugins.records if r.status in ("failed", "shadowed")]
    if not names:
        wanted = [
            (kind, f"{owner}/{name}")
            for kind in HOOKS
            for name, owners in plugins.offers(kind).items()
            for owner in owners
            if owner != BUILTIN
        ]
    if not wanted and not broken:
        raise PluginError(
            "there is nothing to validate"
            + (_named(plugins) or "; name a component (ucc-search plugins list) or a file (--plugin FILE)")
        )
    return [*map(_unloaded, broken), *(_validated(plugins, kind, name, params) for kind, name in wanted)]


def _unloaded(record: PluginRecord) -> dict[str, Any]:
    problem = record.error or ""
    result = {
        "check": "load",
        "contract": "the plugin loads, and its hooks answer",
        "passed": False,
        "problem": problem,
        "fix": "mend the file; ucc-search plugins list shows whether it loads",
        "where": record.origin,
    }
    return {"component": record.name, "kind": "plugin", "plugin": record.name, "results": [result]}


def _validated(plugins: Plugins, kind: str, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    from ucc_search.testing import conformance

    known = plugins.describe(kind, name)["params"]
    given = {key: value for key, value in params.items() if key in known}
    component = plugins.build(kind, ComponentRef(name, given))
    owner, _, bare = name.partition("/")
    results = [vars(result) for result in conformance(component)]
    return {"component": bare, "kind": kind, "plugin": owner, "results": results}


def validate_text(found: Sequence[Mapping[str, Any]]) -> str:
    """`validate` for people."""
    from ucc_search.testing import Result

    lines = []
    for component in found:
        lines.append(f"{component['kind']} {component['component']} ({component['plugin']})")
        for result in component["results"]:
            lines += [f"  {line}" for line in str(Result(**result)).splitlines()]
    checks = [r["passed"] for c in found for r in c["results"]]
    lines.append(f"{sum(checks)} of {len(checks)} checks passed")
    return "\n".join(lines)

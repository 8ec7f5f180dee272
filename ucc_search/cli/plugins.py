"""Commands of plugins: list, info, validate, hooks, new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ucc_search.cli.app import plugins_app
from ucc_search.cli.options import Disable, Json, NoPlugins, PluginOption, Strict, load_plugins


@plugins_app.command("list")
def list_plugins(
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    strict_plugins: Strict = False,
    as_json: Json = False,
) -> None:
    """All plugins in the order of loading, and the components they provide."""
    from ucc_search.plugin_pages import plugins_json, plugins_text

    plugins = load_plugins(None, plugin, disable_plugin, no_plugins, strict_plugins)
    found = plugins_json(plugins)
    typer.echo(json.dumps(found, indent=1, default=str) if as_json else plugins_text(found))


@plugins_app.command("info")
def plugin_info(
    name: Annotated[str, typer.Argument(help="joint, scorer:joint, plugin/name, or a plugin's name.")],
    plugin: PluginOption = None,
    no_plugins: NoPlugins = False,
    as_json: Json = False,
) -> None:
    """What a component does, its parameters and ranges, and where it comes from."""
    from ucc_search.plugin_pages import info_json, info_text

    found = info_json(load_plugins(None, plugin, None, no_plugins), name)
    typer.echo(json.dumps(found, indent=1, default=str) if as_json else info_text(found))


@plugins_app.command("validate")
def validate_plugins(
    names: Annotated[list[str] | None, typer.Argument(help="Components; all that are not built in.")] = None,
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    param: Annotated[
        list[str] | None, typer.Option("--param", help="Value of a parameter: weight=2. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check components against their contract, line by line. Exit code 1 if a line does not hold."""
    from ucc_search.config import parse_pairs
    from ucc_search.plugin_pages import validate, validate_text

    # Files that are named are meant alone; what is installed is checked when nothing is named.
    plugins = load_plugins(None, plugin, disable_plugin, no_plugins or bool(plugin and not names))
    found = validate(plugins, names or (), parse_pairs(param or (), "--param"))
    typer.echo(json.dumps(found, indent=1) if as_json else validate_text(found))
    raise typer.Exit(0 if all(r["passed"] for c in found for r in c["results"]) else 1)


@plugins_app.command("hooks")
def hooks() -> None:
    """All hooks, as a table in Markdown."""
    from ucc_search.plugin_pages import hook_table

    typer.echo(hook_table())


@plugins_app.command("new", context_settings={"allow_extra_args": True})
def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The component's name: my_score.", show_default=False)],
    kind: Annotated[str, typer.Option(help="scorer, aggregator, cascade, distiller, ...")] = "scorer",
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("."),
    package: Annotated[
        bool, typer.Option("--package", help="An installable package with a test and a README.")
    ] = False,
) -> None:
    """Write a plugin that works, to be changed: one file, or a package."""
    from ucc_search.scaffold import new_plugin, one_name

    one_name(name, context.args)
    files = new_plugin(kind, name, out, package=package)
    for path in files:
        typer.echo(f"wrote {path}")
    typer.echo(f"next: ucc-search plugins validate --plugin {files[0]}")

"""Commands that look at a model outside of a run: what it costs, what its units matter, one trial again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ucc_search.cli.app import app, models
from ucc_search.cli.options import (
    Budgets,
    Disable,
    Json,
    NoPlugins,
    PluginOption,
    RunFolder,
    Sets,
    Space,
    load_plugins,
    load_space,
    note,
)


@app.command()
def latency(
    space: Space,
    out: Annotated[
        Path | None, typer.Option(help="Write the table, for latency.table on another machine.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even if this machine has a table.")] = False,
    budget: Budgets = None,
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Time the parts of a space file's model on this machine, for limits on latency; kept for searches."""
    config = load_space(space, sets, budgets=budget)
    plugins = load_plugins(config, plugin, disable_plugin, no_plugins)
    from ucc_search.preview import latency_found, latency_text

    found = latency_found(config, plugins, out=out, again=again, log=note)
    typer.echo(json.dumps(found, indent=1) if as_json else latency_text(found))


@app.command("train-teacher")
def train_teacher(
    space: Space,
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and recipe.json.")],
    sets: Sets = None,
) -> None:
    """Train the uncompressed model by the space file's `teacher:` recipe."""
    config = load_space(space, sets)
    from ucc_search.binding import bind
    from ucc_search.teachers import teacher_for_command

    teacher_for_command(bind(config, load_plugins(config, None, None)), out, log=typer.echo)


@app.command()
def importance(
    space: Space,
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Score the units that the space file allows to be pruned. Kept on disk; an interrupted run goes on."""
    config = load_space(space, sets)
    plugins = load_plugins(config, plugin, disable_plugin, no_plugins)
    from ucc_search.scoring import score_units, scores_text

    try:
        found = score_units(config, plugins, log=note)
    except KeyboardInterrupt:
        typer.echo("interrupted; what was scored is kept, run it again to go on", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps(found, indent=1) if as_json else scores_text(found))


@app.command()
def sensitivity(
    space: Space,
    keep: Annotated[float, typer.Option(help="Share of the patch tokens that stay from a block on.")] = 0.5,
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """What each block can spare: cut one at a time, measured without training. Writes nothing."""
    config = load_space(space, sets)
    plugins = load_plugins(config, plugin, disable_plugin, no_plugins)
    from rich.console import Console

    from ucc_search.sensitivity import probe_blocks, probe_json
    from ucc_search.tables import print_probes

    found = probe_blocks(config, plugins, keep=keep, log=note)
    if as_json:
        typer.echo(json.dumps(probe_json(found), indent=1))
    else:
        print_probes(found, Console())


@models.command()
def inspect(
    name: Annotated[str, typer.Argument(help="A timm model name, or plugin:NAME.", show_default=False)],
    args: Annotated[
        list[str] | None, typer.Option("--arg", help="Constructor argument: img_size=112.")
    ] = None,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """What can be compressed in a model, what not, and why."""
    from ucc_search.preview import inspect_model, inspect_text

    found = inspect_model(name, args or (), load_plugins(None, plugin, None))
    typer.echo(json.dumps(found, indent=1) if as_json else inspect_text(found))


@app.command()
def reproduce(
    run: RunFolder,
    trial: Annotated[int, typer.Option(help="The trial's id.", show_default=False)],
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Measure although a component has changed since.")
    ] = False,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Measure a trial again with its seed, and compare the numbers. Exit code 1 if they differ."""
    from ucc_search.reproduce import reproduce as measure_again
    from ucc_search.reproduce import reproduce_text

    found = measure_again(
        run,
        trial,
        sources=plugin or (),
        allow_changes=allow_changes,
        log=note,
    )
    typer.echo(json.dumps(found, indent=1) if as_json else reproduce_text(found))
    raise typer.Exit(0 if found["equal"] else 1)

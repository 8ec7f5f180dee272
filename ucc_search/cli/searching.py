"""Commands that carry out a run, or say what it would be: search, compare, plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ucc_search.cli.app import app
from ucc_search.cli.options import (
    Budgets,
    Disable,
    Json,
    NoPlugins,
    PluginOption,
    Sets,
    Space,
    Strict,
    load_plugins,
    load_space,
)


def _run(config: Any, plugins: Any, out: Path | None, resume: bool) -> None:
    """A whole run, its table on the terminal and in the run folder, and the exit code."""
    from rich.console import Console

    from ucc_search.live import LiveView
    from ucc_search.runner import Interrupted, exit_code, lost_text
    from ucc_search.runner import search as run_search
    from ucc_search.stopping import stoppable
    from ucc_search.tables import print_analysis

    view = LiveView(Console())
    with stoppable() as stop:
        try:
            run = run_search(config, out=out, resume=resume, plugins=plugins, log=view.log, view=view)
        except Interrupted as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(stop.status) from None
        except KeyboardInterrupt:
            typer.echo("interrupted before the first trial; nothing was written, run it again", err=True)
            raise typer.Exit(stop.status) from None
        finally:
            view.close()
    print_analysis(run, Console())
    with open(run.path / "analysis.txt", "w", encoding="utf-8") as file:
        print_analysis(run, Console(file=file, width=160))
    _report_of(run)
    if (lost := lost_text(run)) is not None:
        typer.echo(f"error: {lost}", err=True)
    raise typer.Exit(exit_code(run))


def _report_of(run: Any) -> None:
    """The report at the end of a search; what it lacks must not spoil a run that is done."""
    from ucc_search.report import write_plots, write_report

    try:
        path = write_report(run)
        write_plots(run)
    except Exception as error:
        typer.echo(f"no report: {error}; try ucc-search report {run.path}", err=True)
    else:
        typer.echo(f"Report: {path}")


@app.command()
def search(
    space: Space,
    out: Annotated[Path | None, typer.Option(help="Run folder; results/NAME by default.")] = None,
    trials: Annotated[int | None, typer.Option(help="Proposals to measure.")] = None,
    budget: Budgets = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    strict_plugins: Strict = False,
    ray_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray cluster's head node, or auto; this machine alone by default."),
    ] = None,
    sets: Sets = None,
) -> None:
    """Search, train the best candidates, and print the Pareto table."""
    where = (
        []
        if ray_address is None
        else ["search.executor=ray", f"search.ray_address={json.dumps(ray_address)}"]
    )
    config = load_space(space, [*(sets or ()), *where], budgets=budget, trials=trials, seed=seed)
    plugins = load_plugins(config, plugin, disable_plugin, no_plugins, strict_plugins)
    _run(config, plugins, out, resume)


@app.command()
def compare(
    space: Space,
    scorer: Annotated[
        str | None, typer.Option(help="Your scorer: a name, or {name: x, parameter: 1}.")
    ] = None,
    aggregator: Annotated[str | None, typer.Option(help="Your aggregator.")] = None,
    cascade: Annotated[str | None, typer.Option(help="Your cascade.")] = None,
    distiller: Annotated[str | None, typer.Option(help="Your distiller.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; results/NAME-YOURS by default.")] = None,
    budget: Budgets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    strict_plugins: Strict = False,
    sets: Sets = None,
) -> None:
    """Your components beside the space file's baselines: equal budgets, equal training, no search.

    Kinds you leave out are those of the file's `space:` section.
    """
    from ucc_search.contender import with_contender

    named = {"scorer": scorer, "aggregator": aggregator, "cascade": cascade, "distiller": distiller}
    chosen = {kind: text for kind, text in named.items() if text is not None}
    config = with_contender(load_space(space, sets, budgets=budget), chosen)
    _run(config, load_plugins(config, plugin, disable_plugin, no_plugins, strict_plugins), out, resume)


@app.command()
def plan(
    space: Space,
    budget: Budgets = None,
    trials: Annotated[int | None, typer.Option(help="Proposals to measure.")] = None,
    plugin: PluginOption = None,
    disable_plugin: Disable = None,
    no_plugins: NoPlugins = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """What a search would do: baseline cost, reachable budgets, trials and time. Trains nothing."""
    config = load_space(space, sets, budgets=budget, trials=trials)
    plugins = load_plugins(config, plugin, disable_plugin, no_plugins)
    from ucc_search.preview import preview, preview_text

    found = preview(config, plugins)
    typer.echo(json.dumps(found, indent=1) if as_json else preview_text(found))

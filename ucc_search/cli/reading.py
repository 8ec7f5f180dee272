"""Commands that read a run: analyze, status, pick, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ucc_search.cli.app import app
from ucc_search.cli.options import Json, RunFolder


@app.command()
def analyze(
    run: RunFolder,
    other: Annotated[
        Path | None, typer.Argument(help="Another run to compare it with.", show_default=False)
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare even where data, model or teacher differ.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The Pareto front of a run, its baselines, what mattered, failures; or two runs side by side."""
    from rich.console import Console

    from ucc_search.runs import load_run

    opened = load_run(run)
    if other is not None:
        from ucc_search.comparison import compare_runs
        from ucc_search.tables import comparison_json, print_comparison

        found = compare_runs(opened, load_run(other), anyway=anyway)
        if as_json:
            typer.echo(json.dumps(comparison_json(found), indent=1))
        else:
            print_comparison(found, Console())
        return
    from ucc_search.tables import analysis_json, print_analysis

    if as_json:
        typer.echo(json.dumps(analysis_json(opened), indent=1))
    else:
        print_analysis(opened, Console())


@app.command()
def status(run: RunFolder, as_json: Json = False) -> None:
    """How far a run is, also while another process carries it out: trials, best so far, failures, time left."""
    from ucc_search.status import run_status

    found = run_status(run)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    from rich.console import Console

    from ucc_search.live import status_table, status_text

    console = Console()
    console.print(status_table(found)) if console.is_terminal else typer.echo(status_text(found))


@app.command()
def pick(
    run: RunFolder,
    max_gmacs: Annotated[float | None, typer.Option(help="Upper limit in GMACs per image.")] = None,
    max_macs: Annotated[str | None, typer.Option(help="Upper limit in MACs: 2.1G, 600M.")] = None,
    max_params: Annotated[str | None, typer.Option(help="Upper limit in parameters: 5M.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Upper limit in milliseconds, where the run measured them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The best trial under limits, and how to use it."""
    from ucc_search.runs import load_run
    from ucc_search.tables import pick_message
    from ucc_search.units import parse_amount

    limits = [parse_amount(max_macs, key="--max-macs")] if max_macs is not None else []
    if max_gmacs is not None:
        limits.append(parse_amount(max_gmacs * 1e9, key="--max-gmacs (in MACs)"))
    opened = load_run(run)
    params = parse_amount(max_params, key="--max-params") if max_params is not None else None
    row = opened.pick(
        max_macs=min(limits) if limits else None, max_params=params, max_latency_ms=max_latency_ms
    )
    typer.echo(json.dumps(row.to_dict(), indent=1) if as_json else pick_message(opened, row))


@app.command()
def report(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; report.html in the run folder by default.")
    ] = None,
) -> None:
    """One offline HTML file about a run; with matplotlib also plots, in `plots/` of the run folder."""
    from ucc_search.report import write_plots, write_report
    from ucc_search.runs import load_run

    opened = load_run(run)
    path = write_report(opened, out)
    plots = write_plots(opened) if out is None else []
    beside = f", and {len(plots)} plots in {plots[0].parent}" if plots else ""
    typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB){beside}")

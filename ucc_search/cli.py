"""The command line: parse, call one function, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ucc_search.errors import BudgetError, UserError

# Typer reads annotations at run time, on Python 3.10 too.
Space = Annotated[Path, typer.Argument(help="The space file (YAML).", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: search.trials=20. Repeatable.")
]
PluginOption = Annotated[
    list[str] | None, typer.Option("--plugin", help="A plugin: .py file, folder or module. Repeatable.")
]
Disable = Annotated[
    list[str] | None, typer.Option("--disable-plugin", help="Leave a plugin out. Repeatable.")
]
NoPlugins = Annotated[bool, typer.Option("--no-plugins", help="Load no installed plugins.")]
Strict = Annotated[bool, typer.Option("--strict-plugins", help="Stop if any plugin fails to load.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="macs=50%, macs=2.1G, params=5M, latency_ms=50%. Repeat a metric for several targets.",
    ),
]
Source = Annotated[
    Path, typer.Argument(help="A run folder (with --trial), or a saved model's folder.", show_default=False)
]
Trial = Annotated[int | None, typer.Option(help="Which trial of the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    name="ucc-search",
    help="Find the compressed Vision Transformer that loses least within a budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
models = typer.Typer(help="What can be compressed in a model.", no_args_is_help=True)
plugins_app = typer.Typer(
    help="Components and who provides them; check them, and write new ones.", no_args_is_help=True
)
app.add_typer(models, name="models")
app.add_typer(plugins_app, name="plugins")


def main() -> None:
    """Entry point.

    Exit codes: 0 done, 1 no usable trial or the whole search failed, 2 the input is wrong, 130 interrupted
    (Ctrl-C), 143 terminated (SIGTERM).
    """
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of a pipe went away; so does the rest of the output.
        sys.stderr.close()


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"ucc-search {version('ucc-search')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of the program itself."""


def _config(
    space: Path,
    sets: list[str] | None,
    *,
    budgets: list[str] | None = None,
    trials: int | None = None,
    seed: int | None = None,
) -> Any:
    from ucc_search.config import load_config

    overrides = list(sets or ())
    if trials is not None:
        overrides.append(f"search.trials={trials}")
    if seed is not None:
        overrides.append(f"search.seed={seed}")
    if budgets:
        overrides.append(f"budget={_budget_section(budgets)}")
    return load_config(space, overrides)


def _budget_section(budgets: list[str]) -> str:
    targets: dict[str, list[str]] = {}
    for text in budgets:
        metric, equals, value = text.partition("=")
        if not equals or not value:
            raise BudgetError(f"--budget {text!r}: expected METRIC=VALUE, for example macs=50% or params=5M")
        targets.setdefault(metric.strip(), []).append(value.strip())
    return json.dumps({k: v if len(v) > 1 else v[0] for k, v in targets.items()})


def _plugins(
    config: Any, extra: list[str] | None, disabled: list[str] | None, none: bool = False, strict: bool = False
) -> Any:
    from ucc_search.plugins import Plugins

    named = [*(config.plugins if config is not None else ()), *(extra or ())]
    plugins = Plugins.load(named, disabled=disabled or (), entry_points=not none, strict=strict)
    for record in plugins.records if config is not None else ():
        if record.status == "failed":
            typer.echo(f"warning: plugin {record.name!r} ({record.origin}) failed: {record.error}", err=True)
    return plugins


def _echo(line: str) -> None:
    typer.echo(line)


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
    config = _config(space, [*(sets or ()), *where], budgets=budget, trials=trials, seed=seed)
    plugins = _plugins(config, plugin, disable_plugin, no_plugins, strict_plugins)
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
    config = with_contender(_config(space, sets, budgets=budget), chosen)
    _run(config, _plugins(config, plugin, disable_plugin, no_plugins, strict_plugins), out, resume)


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
    config = _config(space, sets, budgets=budget, trials=trials)
    plugins = _plugins(config, plugin, disable_plugin, no_plugins)
    from ucc_search.preview import preview, preview_text

    found = preview(config, plugins)
    typer.echo(json.dumps(found, indent=1) if as_json else preview_text(found))


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
    config = _config(space, sets, budgets=budget)
    plugins = _plugins(config, plugin, disable_plugin, no_plugins)
    from ucc_search.preview import latency_found, latency_text

    def log(line: str) -> None:
        typer.echo(line, err=True)

    found = latency_found(config, plugins, out=out, again=again, log=log)
    typer.echo(json.dumps(found, indent=1) if as_json else latency_text(found))


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


@app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Option(help="A new folder: the model and its card are written there.")],
    trial: Trial = None,
    format: Annotated[
        str, typer.Option(help="safetensors, onnx, torch-export or timm (widths only).")
    ] = "safetensors",
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Write a trained model for others to run, checked against the trial's model, with a model card."""
    from ucc_search.artifacts import find_artifact

    artifact = find_artifact(source, trial)
    from ucc_search.export import export_model

    plugins = _plugins(None, plugin, None) if plugin else None
    done = export_model(artifact, format, out, plugins=plugins)
    opset = f", opset {done.opset}" if done.opset else ""
    text = (
        f"{done.folder}: {', '.join(done.files)}\n"
        f"{done.format}{opset}: logits differ by at most {done.difference:.1e} ({done.images} images in batches of 1, 2 and 5)"
    )
    typer.echo(json.dumps(done.to_dict(), indent=1) if as_json else text)


@app.command()
def push(
    source: Source,
    repo_id: Annotated[str, typer.Option(help="user/name on the Hugging Face Hub.")],
    trial: Trial = None,
    private: Annotated[bool, typer.Option("--private", help="Only you can see it.")] = False,
    plugin: PluginOption = None,
) -> None:
    """Upload a trained model, with its card, to the Hugging Face Hub."""
    from ucc_search.artifacts import find_artifact

    artifact = find_artifact(source, trial)
    from ucc_search.hub import push as push_model

    plugins = _plugins(None, plugin, None) if plugin else None
    address = push_model(artifact, repo_id, private=private, plugins=plugins)
    typer.echo(f"{address}\nload it with ucc_search.load_model({repo_id!r})")


@app.command()
def bench(
    source: Source,
    trial: Trial = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at a time; repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch and onnxruntime.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Also with torch.compile.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also in onnxruntime.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="At most, per batch size and runtime.")] = 30,
    seconds: Annotated[float, typer.Option(min=0.0, help="At most, per batch size and runtime.")] = 20.0,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Latency and throughput beside the uncompressed model, and where the time went."""
    from ucc_search.artifacts import find_artifact

    artifact = find_artifact(source, trial)
    from ucc_search.bench import bench as run_bench
    from ucc_search.bench import bench_text

    found = run_bench(
        artifact,
        batches=batch or (1, 32),
        threads=threads,
        device=device,
        compiled=compiled,
        onnx=onnx,
        rounds=rounds,
        seconds=seconds,
        plugins=_plugins(None, plugin, None) if plugin else None,
    )
    typer.echo(json.dumps(found, indent=1) if as_json else bench_text(found))


@app.command("train-teacher")
def train_teacher(
    space: Space,
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and recipe.json.")],
    sets: Sets = None,
) -> None:
    """Train the uncompressed model by the space file's `teacher:` recipe."""
    config = _config(space, sets)
    from ucc_search.binding import bind
    from ucc_search.teachers import teacher_for_command

    teacher_for_command(bind(config, _plugins(config, None, None)), out, log=_echo)


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
    config = _config(space, sets)
    plugins = _plugins(config, plugin, disable_plugin, no_plugins)
    from ucc_search.scoring import score_units, scores_text

    try:
        found = score_units(config, plugins, log=lambda line: typer.echo(line, err=True))
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
    config = _config(space, sets)
    plugins = _plugins(config, plugin, disable_plugin, no_plugins)
    from rich.console import Console

    from ucc_search.sensitivity import probe_blocks, probe_json
    from ucc_search.tables import print_probes

    found = probe_blocks(config, plugins, keep=keep, log=lambda line: typer.echo(line, err=True))
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

    found = inspect_model(name, args or (), _plugins(None, plugin, None))
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
        log=lambda line: typer.echo(line, err=True),
    )
    typer.echo(json.dumps(found, indent=1) if as_json else reproduce_text(found))
    raise typer.Exit(0 if found["equal"] else 1)


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

    plugins = _plugins(None, plugin, disable_plugin, no_plugins, strict_plugins)
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

    found = info_json(_plugins(None, plugin, None, no_plugins), name)
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
    plugins = _plugins(None, plugin, disable_plugin, no_plugins or bool(plugin and not names))
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


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: packages, devices, data, and what DeepSpeed and Ray can do here."""
    from ucc_search.doctor import check_machine, doctor_text

    checks = check_machine()
    typer.echo(json.dumps(checks, indent=1) if as_json else doctor_text(checks))
    raise typer.Exit(0 if all(c["status"] != "failed" for c in checks) else 1)

"""Options that several commands take, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ucc_search.errors import BudgetError

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


def note(line: str) -> None:
    """A line that is no result: on stderr, so that what is piped on stays clean."""
    typer.echo(line, err=True)


def load_space(
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


def load_plugins(
    config: Any, extra: list[str] | None, disabled: list[str] | None, none: bool = False, strict: bool = False
) -> Any:
    from ucc_search.plugins import Plugins

    named = [*(config.plugins if config is not None else ()), *(extra or ())]
    plugins = Plugins.load(named, disabled=disabled or (), entry_points=not none, strict=strict)
    for record in plugins.records if config is not None else ():
        if record.status == "failed":
            typer.echo(f"warning: plugin {record.name!r} ({record.origin}) failed: {record.error}", err=True)
    return plugins

"""The program and its groups of commands, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ucc_search.errors import UserError

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

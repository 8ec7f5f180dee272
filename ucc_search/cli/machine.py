"""The command that checks the machine: doctor."""

from __future__ import annotations

import json

import typer

from ucc_search.cli.app import app
from ucc_search.cli.options import Json


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: packages, devices, data, and what DeepSpeed and Ray can do here."""
    from ucc_search.doctor import check_machine, doctor_text

    checks = check_machine()
    typer.echo(json.dumps(checks, indent=1) if as_json else doctor_text(checks))
    raise typer.Exit(0 if all(c["status"] != "failed" for c in checks) else 1)

"""What a run depends on besides its space file: versions, commit, hardware, seeds and plugins."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ucc_search.config import RunConfig

PACKAGES = ("ucc-search", "torch", "torchvision", "timm", "optuna", "ray", "deepspeed", "pandas")


def environment(config: RunConfig, plugins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `environment.json`; asks for versions without importing the packages.

    Args:
        plugins: JSON-able records of the loaded plugins.
    """
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "versions": {p: _version(p) for p in PACKAGES},
        "commit": _commit(),
        "seed": config.search.seed,
        "seeds": list(config.search.rungs[-1].seeds),
        "plugins": list(plugins),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, ending in -dirty where files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    # Installed in a virtual environment inside somebody else's checkout, this folder is not tracked.
    tracked = [*git, "ls-files", "--error-unmatch", "."]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (tracked, describe):
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

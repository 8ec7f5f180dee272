"""Find a model to deliver: a trial of a run, or the folder of a saved model, with all that is known of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucc_search.errors import ModelError, RunError
from ucc_search.plan import CompressionPlan
from ucc_search.runs import Run
from ucc_search.store import CONFIG, TrialRow

ARCH = "arch.json"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A saved model, and the trial that made it where that is known."""

    folder: Path
    arch: dict[str, Any]
    run: Run | None = None
    row: TrialRow | None = None

    @property
    def plan(self) -> CompressionPlan:
        return CompressionPlan.from_dict(self.arch["plan"])

    @property
    def name(self) -> str:
        """For headings: the run and trial, or the folder."""
        if self.run is None or self.row is None:
            return self.folder.name
        return f"{self.run.config.name}, trial {self.row.id}"


def find_artifact(source: str | Path, trial: int | None = None) -> Artifact:
    """The saved model at `source`: a run folder with a trial's number, or a model's own folder.

    Raises:
        RunError: a run without a trial's number, or an unknown trial.
        ModelError: no saved model there.
    """
    source = Path(source)
    if (source / CONFIG).is_file():
        return _of_trial(source, trial)
    if trial is not None:
        raise RunError(f"{source}: no {CONFIG}, so no run folder; leave --trial out or give a run folder")
    arch = _read_arch(
        source, f"{source}: no {ARCH}; give a run folder with --trial, or a saved model's folder"
    )
    run_folder = source.resolve().parent.parent
    if source.resolve().parent.name == "trials" and (run_folder / CONFIG).is_file():
        run = Run(run_folder)
        return Artifact(source, arch, run, next((r for r in run.rows if str(r.id) == source.name), None))
    return Artifact(source, arch)


def _of_trial(folder: Path, trial: int | None) -> Artifact:
    run = Run(folder)
    saved = sorted(r.id for r in run.rows if (folder / "trials" / str(r.id) / ARCH).is_file())
    some = f"trials with saved models: {', '.join(map(str, saved[:20])) or 'none'}"
    if trial is None:
        raise RunError(f"{folder} is a run folder: choose one of its models with --trial ID; {some}")
    row = next((r for r in run.rows if r.id == trial), None)
    if row is None:
        raise RunError(f"{folder}: no trial {trial}; {some}")
    where = folder / "trials" / str(trial)
    message = f"{folder}: trial {trial} has no saved model (only trained trials do, and search.keep_weights may drop them); {some}"
    return Artifact(where, _read_arch(where, message), run, row)


def _read_arch(folder: Path, message: str) -> dict[str, Any]:
    path = folder / ARCH
    if not path.is_file():
        raise ModelError(message)
    try:
        arch: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        CompressionPlan.from_dict(arch["plan"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: not readable ({type(error).__name__}: {error})") from None
    return arch

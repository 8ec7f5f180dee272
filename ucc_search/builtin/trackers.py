"""Observers that hand a run on to experiment trackers. Each imports its package when a run starts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ucc_search.errors import PluginError
from ucc_search.interfaces import Observer

_MEASURED = ("kl", "accuracy", "test_accuracy", "loss", "macs", "params", "macs_ratio", "seconds")


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise PluginError(
            f"it needs the package {package}; install it with pip install 'ucc-search[{extra}]'"
        )


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that a tracker can draw."""
    return {k: float(row[k]) for k in _MEASURED if row.get(k) is not None}


def _curve(run_path: Path, row: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """Optimiser step and losses of a trained trial; nothing for others."""
    path = run_path / "trials" / str(row["id"]) / "metrics.jsonl"
    if row["state"] == "ok" and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            point = json.loads(line)
            yield int(point.pop("step")), {k: float(v) for k, v in point.items() if v is not None}


def _text(row: Mapping[str, Any]) -> dict[str, str]:
    """What a trial was, as parameters of a tracker."""
    names = ("method", "origin", "rung", "target", "seed", "scorer", "aggregator", "cascade", "distiller")
    found = {k: row.get(k) for k in names} | {
        "importance": row.get("importance"),
        "parent": row.get("parent"),
    }
    found |= {f"searched.{k}": v for k, v in (row.get("params_searched") or {}).items()}
    return {k: str(v) for k, v in found.items() if v not in (None, "")}


class TensorBoard(Observer):
    """Event files in the run folder: every trial by rung and budget, and the loss curves of trained ones."""

    def __init__(self) -> None:
        _require("tensorboardX", "tensorboard")
        self._writer: Any = None
        self._path = Path()

    def run_started(self, run_path: Path, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._path = run_path
        # No text here: it would have to import a tensor library first.
        self._writer = SummaryWriter(logdir=str(run_path / "tensorboard"), flush_secs=10)

    def trial_finished(self, row: Mapping[str, Any]) -> None:
        group = f"{row['rung']}/{row['method']} {row['target']}".replace("=", " ").replace("%", " percent")
        for name, value in _measured(row).items():
            self._writer.add_scalar(f"{group}/{name}", value, row["id"])
        self._writer.add_scalar("run/failed", float(row["state"] != "ok"), row["id"])
        for step, losses in _curve(self._path, row):
            for name, value in losses.items():
                self._writer.add_scalar(f"training of trial {row['id']}/{name}", value, step)
        self._writer.flush()

    def run_finished(self, run_path: Path) -> None:
        self._writer.close()


class MLflow(Observer):
    """An MLflow run for the search, and one within it for every trial, with its loss curve.

    Args:
        experiment: the MLflow experiment; the name in the space file by default.
        tracking_uri: where to; MLflow's own setting (MLFLOW_TRACKING_URI) by default.
    """

    def __init__(self, experiment: str | None = None, tracking_uri: str | None = None) -> None:
        _require("mlflow", "mlflow")
        self._experiment, self._uri = experiment, tracking_uri
        self._client: Any = None
        self._home, self._parent, self._path = "", "", Path()

    def run_started(self, run_path: Path, config: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client, self._path = MlflowClient(tracking_uri=self._uri), run_path
        name = self._experiment or str(config["name"])
        known = self._client.get_experiment_by_name(name)
        self._home = known.experiment_id if known else self._client.create_experiment(name)
        tag = str(run_path.resolve())
        before = self._client.search_runs([self._home], f"tags.`ucc_search.run` = '{tag}'", max_results=1)
        if before:  # resumed
            self._parent = before[0].info.run_id
            self._client.update_run(self._parent, status="RUNNING")
            return
        run = self._client.create_run(self._home, run_name=run_path.name, tags={"ucc_search.run": tag})
        self._parent = run.info.run_id
        for section in ("model", "data", "budget"):
            self._client.log_param(self._parent, section, json.dumps(config.get(section), default=str)[:500])

    def trial_finished(self, row: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        tags = {
            "mlflow.parentRunId": self._parent,
            "state": row["state"],
            "failure": row.get("failure") or "",
        }
        run = self._client.create_run(self._home, run_name=f"trial {row['id']}")
        metrics = [Metric(k, v, 0, 0) for k, v in _measured(row).items()]
        for step, losses in _curve(self._path, row):
            metrics += [Metric(f"training_{k}", v, 0, step) for k, v in losses.items()]
        params = [Param(k, v[:500]) for k, v in _text(row).items()]
        run_id, parts = run.info.run_id, (metrics[i : i + 500] for i in range(0, len(metrics), 500))
        self._client.log_batch(run_id, params=params[:100], tags=[RunTag(k, v) for k, v in tags.items()])
        for part in parts:
            self._client.log_batch(run_id, metrics=part)
        self._client.set_terminated(run_id, "FINISHED" if row["state"] == "ok" else "FAILED")

    def run_finished(self, run_path: Path) -> None:
        self._client.set_terminated(self._parent)


class WandB(Observer):
    """A Weights & Biases run for the search: a step for every trial, and the table of trials at the end.

    Args:
        project: the W&B project.
        entity: team or user; W&B's own setting by default.
        mode: `online`, `offline` or `disabled`; W&B's own setting (WANDB_MODE) by default.
    """

    def __init__(
        self, project: str = "ucc-search", entity: str | None = None, mode: str | None = None
    ) -> None:
        _require("wandb", "wandb")
        if mode not in (None, "online", "offline", "disabled"):
            raise ValueError(f"mode is {mode!r}, expected online, offline or disabled")
        self._project, self._entity, self._mode = project, entity, mode
        self._run: Any = None

    def run_started(self, run_path: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=self._project,
            entity=self._entity,
            mode=self._mode,  # type: ignore[arg-type]  # checked above
            dir=str(run_path),
            name=run_path.name,
            # A resumed search goes on in the same run.
            id=hashlib.sha256(str(run_path.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def trial_finished(self, row: Mapping[str, Any]) -> None:
        group = f"{row['rung']}/{row['target']}"
        values = {f"{group}/{k}": v for k, v in _measured(row).items()}
        self._run.log({**values, "trial": row["id"], "failed": int(row["state"] != "ok")})

    def run_finished(self, run_path: Path) -> None:
        import pandas as pd
        import wandb

        trials = pd.read_csv(run_path / "trials.csv")
        if len(trials):
            self._run.log({"trials": wandb.Table(dataframe=trials.astype(str))})
        self._run.finish(exit_code=0)
